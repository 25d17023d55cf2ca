"""Log-weights of candidates: score, temperature, multiplicity, proposal.

At temperature 1 and by reward scores, `log_weights` with the preferred
completion in is the exact model p_theta on the pool: all that a sampled
negative estimates, for a real model too.

The preferred completion counts once, whatever its multiplicity: a second copy
of it is tied with it, and a tie is no negative.
"""

import jax
import jax.numpy as jnp

from mcpo_jax.types import Array, SetBatch

SCHEDULES = ("constant", "linear", "geometric")


def negatives(sets: SetBatch) -> jax.Array:
  """[B, K] bool, True on candidates that may be rejected.

  A row whose slot 0 is no valid preferred completion has no negatives.
  """
  negative = jnp.logical_and(sets.role == -1, sets.candidate_mask)
  return jnp.logical_and(negative, _preferred(sets)[:, :1])


def candidates(sets: SetBatch, *, include_preferred: bool) -> jax.Array:
  """[B, K] bool, True on what a kernel may draw."""
  if not include_preferred:
    return negatives(sets)
  return jnp.logical_or(negatives(sets), _preferred(sets))


def proposal_correction(sets: SetBatch) -> jax.Array:
  """[B, K] log mu - log q: weight of a candidate drawn from q instead of mu.

  Reads the anchors "proposal_mu" and "proposal_q". It belongs to EVERY
  candidate, slot 0 included; left out there, the estimate is biased.
  """
  correction = sets.anchors["proposal_mu"] - sets.anchors["proposal_q"]
  correction = jnp.where(sets.candidate_mask, correction, 0.0)
  return jax.lax.stop_gradient(correction)


def log_counts(sets: SetBatch, *, corrected: bool) -> jax.Array:
  """[B, K] what is added to rewards in weights and in log Z.

  Args:
    sets: multiplicity m adds log m on slots 1.. ; slot 0 counts once.
    corrected: adds `proposal_correction`.
  """
  first = jnp.arange(sets.role.shape[1])[None, :] == 0
  count = jnp.where(first, 1, jnp.maximum(sets.multiplicity, 1))
  log_count = jnp.log(count.astype(jnp.result_type(float)))
  if corrected:
    log_count = log_count + proposal_correction(sets)
  return log_count


def log_weights(
    scores: Array,
    sets: SetBatch,
    *,
    temperature: float | Array,
    include_preferred: bool,
    corrected: bool = False,
) -> jax.Array:
  """Normalised log-weights of one kernel step.

  w_i = m_i exp(s_i / temperature) / sum over the candidate set.

  Args:
    scores: [B, K] float, higher is heavier; infinities are safe, NaN stays.
    sets: [B, K] roles, masks, multiplicity.
    temperature: > 0, may be traced; checked on the host.
    include_preferred: slot 0 is a candidate too.
    corrected: candidates come from q, see `proposal_correction`.

  Returns:
    [B, K] nats, -inf outside the candidate set; finite inside. Without
    gradient. Rows without candidates are -inf all over.
  """
  candidate = candidates(sets, include_preferred=include_preferred)
  scores = jax.lax.stop_gradient(jnp.asarray(scores))
  big = jnp.finfo(scores.dtype).max
  scores = jnp.clip(scores, -big, big)
  # The largest score goes first: scores / temperature may overflow.
  top = jnp.max(
      jnp.where(candidate, scores, -big), axis=1, keepdims=True
  )
  tempered = jnp.maximum((scores - top) / temperature, -big)
  logits = tempered + log_counts(sets, corrected=corrected)
  some = jnp.any(candidate, axis=1, keepdims=True)
  logits = jnp.where(candidate, logits, jnp.where(some, -jnp.inf, 0.0))
  normalised = jnp.maximum(jax.nn.log_softmax(logits, axis=1), -big)
  # Said outright: whether min and max pass NaN on depends on the backend.
  broken = jnp.any(
      jnp.logical_and(candidate, jnp.isnan(scores)), axis=1, keepdims=True
  )
  normalised = jnp.where(broken, jnp.nan, normalised)
  return jnp.where(candidate, normalised, -jnp.inf)


def temperature_at(
    step: int | Array,
    *,
    start: float,
    end: float | None,
    num_steps: int,
    schedule: str,
) -> float | jax.Array:
  """The kernel's temperature at a step of the run.

  Args:
    step: updates done; may be traced.
    start: > 0, at step 0.
    end: > 0, from step `num_steps` on; `constant` does not read it.
    num_steps: >= 1, updates of the run.
    schedule: `constant`; `linear`; `geometric`: the logarithm is linear.

  Raises:
    ValueError: at trace time, on an unknown schedule.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"unknown schedule {schedule!r}, one of {SCHEDULES}")
  if schedule == "constant":
    return start
  done = jnp.clip(jnp.asarray(step) / num_steps, 0.0, 1.0)
  if schedule == "linear":
    return start + (end - start) * done
  return start * (end / start) ** done


def preferred_weight(
    scores: Array,
    sets: SetBatch,
    *,
    temperature: float | Array,
    corrected: bool = False,
) -> jax.Array:
  """[B] p_0, the weight of slot 0 among all candidates of the pool.

  `cd_loss` needs it where the kernel leaves the preferred completion out. 0
  on rows that are no set.
  """
  weights = log_weights(
      scores,
      sets,
      temperature=temperature,
      include_preferred=True,
      corrected=corrected,
  )
  return jnp.exp(weights[:, 0])


def _preferred(sets: SetBatch) -> jax.Array:
  """[B, K] bool, True on slot 0 of every valid set."""
  first = jnp.arange(sets.role.shape[1])[None, :] == 0
  valid = jnp.logical_and(sets.role == 1, sets.candidate_mask)
  return jnp.logical_and(first, valid)
