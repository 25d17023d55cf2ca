"""The Monte Carlo kernel: draws the negatives of a set from its pool.

One step from the preferred completion y0: candidates {y0?} and y_1 .. y_L,
weights w = softmax(scores / temperature), z ~ Categorical(w). Every kernel has
the form `(key, state, ...) -> (state, info)`; this one has no memory.
"""

import jax
import jax.numpy as jnp

from mcpo_jax.kernels import address, weights
from mcpo_jax.types import Array, KernelInfo, KernelState, SetBatch

STRATEGIES = ("mc", "max", "min", "random", "fixed_worst", "all", "pool")
SCORES = (
    "reward",
    "policy_logp",
    "reward_per_token",
    "policy_logp_per_token",
)


def kernel_scores(
    logps: Array,
    ref_logps: Array | None,
    lengths: Array,
    *,
    score: str,
    beta: float,
) -> jax.Array:
  """What the kernel weighs candidates by.

  Args:
    logps: [B, K] nats, log-probabilities of the current policy.
    ref_logps: [B, K] nats, of the reference; None for the policy scores.
    lengths: [B, K] int32, scored completion tokens, 0 where masked.
    score: `reward` beta * (logps - ref_logps), `policy_logp` logps, or either
      with `_per_token`: divided by the length.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    [B, K], without gradient.

  Raises:
    ValueError: at trace time, on an unknown score.
  """
  if score not in SCORES:
    raise ValueError(f"unknown kernel score {score!r}, one of {SCORES}")
  scores = beta * (logps - ref_logps) if "reward" in score else logps
  if score.endswith("_per_token"):
    scores = scores / jnp.maximum(lengths, 1)
  return jax.lax.stop_gradient(jnp.asarray(scores))


def draw(
    key: Array,
    state: KernelState | None,
    scores: Array,
    sets: SetBatch,
    *,
    strategy: str,
    temperature: float | Array,
    num_negatives: int,
    include_preferred: bool,
    replace: bool,
    corrected: bool = False,
) -> tuple[KernelState, KernelInfo]:
  """Draws M negatives per set.

  The draw of a set depends on its address (`address.gumbel`) and its scores,
  not on row, slot order, padding or batch.

  Args:
    key: typed key of the run's seed, the same at every step.
    state: the chains' last state; not read, a categorical step forgets it.
    scores: [B, K] float, e.g. of `kernel_scores`. No gradient flows.
      NaN makes the row's info NaN; the caller stops on it.
    sets: [B, K] the pool, the preferred completion in slot 0.
    strategy: `mc` in proportion to the weights; `random` in proportion to the
      multiplicity; `max` and `min` by score; ties by noise, as in the limit of
      the temperature. `fixed_worst` by lowest external score, unknown scores
      last, ties by lowest candidate id. `all` every negative in slot order,
      M = K - 1, whatever the settings below say. `pool` likewise every
      candidate, ties with the preferred one and the mismatched included.
    temperature: > 0, may be traced.
    num_negatives: M >= 1.
    include_preferred: slot 0 is a candidate too. Drawn, it is masked.
    replace: False: distinct negatives (Gumbel top-M), of which
      min(M, negatives) are valid. True: M independent chains.
    corrected: see `weights.proposal_correction`.

  Returns:
    state: KernelState, [B, M]. Slot 0 where `selected_mask` is False: the
      chain drew the preferred completion or had nothing to draw.
    info: KernelInfo; log-weights are those of `mc`, of `random` under
      `random`. `negative_rank` counts ties as half and is 0 where nothing was
      drawn. Rows without candidates have zeros.

  Raises:
    ValueError: at trace time, on an unknown strategy.

  References:
    Chen et al. 2025, https://arxiv.org/abs/2502.04567
    Kool et al. 2019 (Gumbel top-k), https://arxiv.org/abs/1903.06059
  """
  del state
  if strategy not in STRATEGIES:
    raise ValueError(f"unknown strategy {strategy!r}, one of {STRATEGIES}")
  if strategy in ("all", "pool"):
    num_negatives = sets.role.shape[1] - 1
    include_preferred, replace = False, False
  scores = jax.lax.stop_gradient(jnp.asarray(scores))
  log_weights = weights.log_weights(
      jnp.zeros_like(scores) if strategy == "random" else scores,
      sets,
      temperature=temperature,
      include_preferred=include_preferred,
      corrected=corrected,
  )
  candidate = weights.candidates(sets, include_preferred=include_preferred)
  negative = weights.negatives(sets)

  chains = jnp.arange(num_negatives if replace else 1)
  noise = jax.vmap(
      lambda chain: address.gumbel(
          key, sets, purpose=address.DRAW_NEGATIVES, chain=chain
      )
  )(chains)  # [chains, B, K]
  rank, tie = _sort_keys(strategy, scores, log_weights, noise, sets)
  keys = (tie, rank, ~candidate)  # the last one counts most
  order = jnp.lexsort(
      [jnp.broadcast_to(key, noise.shape) for key in keys], axis=-1
  )
  count = jnp.sum(negative, axis=1, keepdims=True)  # [B, 1]
  if replace:
    selected = order[..., 0].T
    num_drawn = jnp.where(count > 0, num_negatives, 0)
  else:
    selected = jnp.take(
        order[0], jnp.arange(num_negatives), axis=1, mode="clip"
    )
    num_drawn = jnp.minimum(num_negatives, count)
  drawn = jnp.arange(num_negatives)[None, :] < num_drawn
  is_negative = jnp.take_along_axis(negative, selected, axis=1)
  selected_mask = jnp.logical_and(drawn, is_negative)
  selected = jnp.where(selected_mask, selected, 0).astype(jnp.int32)

  num_stayed = jnp.sum(jnp.logical_and(drawn, ~is_negative), axis=1)
  info = kernel_info(
      log_weights,
      candidate,
      scores,
      sets,
      KernelState(selected, selected_mask),
      stayed=num_stayed / jnp.maximum(num_drawn[:, 0], 1),
  )
  if strategy == "pool":
    selected = jnp.broadcast_to(
        jnp.arange(1, sets.role.shape[1], dtype=jnp.int32), selected.shape
    )
    valid = jnp.asarray(sets.candidate_mask)
    selected_mask = jnp.logical_and(valid[:, 1:], valid[:, :1])
  return KernelState(selected, selected_mask), info


def take_drawn(
    values: Array, sets: SetBatch, state: KernelState, *, spent: bool = True
) -> tuple[jax.Array, SetBatch]:
  """Slot 0 and the drawn slots: [B, K] becomes [B, J], J = 1 + M.

  Args:
    values: [B, K], e.g. logps, or a tree of such arrays.
    sets: [B, K].
    state: [B, M], a draw from `sets`; M may be 0.
    spent: the multiplicity has had its say in the draw and becomes 1; False
      where everything was taken (`all`, `pool`).

  Returns:
    values: [B, J].
    sets: [B, J]. Not drawn: role 0, `candidate_mask` False, length 0.
  """
  slots = jnp.pad(state.selected, ((0, 0), (1, 0)))
  mask = jnp.pad(state.selected_mask, ((0, 0), (1, 0)), constant_values=True)
  take = lambda x: jnp.take_along_axis(jnp.asarray(x), slots, axis=1)
  return jax.tree.map(take, values), sets._replace(
      role=jnp.where(mask, take(sets.role), 0),
      candidate_mask=jnp.logical_and(mask, take(sets.candidate_mask)),
      candidate_id=take(sets.candidate_id),
      multiplicity=jnp.ones_like(slots) if spent else take(sets.multiplicity),
      scores=take(sets.scores),
      lengths=jnp.where(mask, take(sets.lengths), 0),
      anchors={name: take(x) for name, x in sets.anchors.items()},
  )


def _sort_keys(strategy, scores, log_weights, noise, sets):
  """What to sort by and what breaks its ties: the smallest is drawn first."""
  if strategy in ("mc", "random"):
    return -(log_weights[None] + noise), -noise
  if strategy in ("max", "min"):
    return (-scores if strategy == "max" else scores), -noise
  if strategy == "fixed_worst":
    external = jnp.asarray(sets.scores)
    unknown = jnp.finfo(external.dtype).max
    external = jnp.where(jnp.isnan(external), unknown, external)
    return external, jnp.asarray(sets.candidate_id)
  return jnp.zeros_like(scores), jnp.arange(sets.role.shape[1])


def kernel_info(
    log_weights: Array,
    candidate: Array,
    scores: Array,
    sets: SetBatch,
    state: KernelState,
    *,
    stayed: Array,
) -> KernelInfo:
  """What a kernel call saw, from its normalised log-weights and its draw.

  Args:
    log_weights: [B, K] nats, -inf outside the candidate set.
    candidate: [B, K] bool, the candidate set.
    scores: [B, K] what the kernel weighs by.
    sets: [B, K]; its `scores` give the rank by external score.
    state: the draw.
    stayed: [B].

  Returns:
    KernelInfo; zeros where there is nothing to tell.
  """
  probs = jnp.exp(log_weights)
  finite = jnp.where(candidate, log_weights, 0.0)
  square = jnp.sum(probs**2, axis=1)
  some = jnp.any(candidate, axis=1)
  negative = weights.negatives(sets)
  external = jnp.asarray(sets.scores)
  lowest = -jnp.finfo(external.dtype).max
  external = jnp.where(jnp.isnan(external), lowest, external)
  heaviest = jnp.max(
      jnp.where(negative, log_weights, -jnp.inf), axis=1, keepdims=True
  )
  top = jnp.where(log_weights >= heaviest, 1.0, 0.0)
  return KernelInfo(
      log_weights=log_weights,
      ess=jnp.where(some, 1.0 / jnp.where(some, square, 1.0), 0.0),
      entropy=-jnp.sum(probs * finite, axis=1),
      max_weight=jnp.max(probs, axis=1),
      negative_rank=_mean_of_drawn(_ranks(scores, negative), state),
      negative_score_rank=_mean_of_drawn(_ranks(external, negative), state),
      argmax_share=_mean_of_drawn(top, state),
      stayed=stayed,
  )


def _ranks(scores, negative):
  """[B, K] rank among the negatives, 0 = highest score, ties count half."""
  other, own = scores[:, None, :], scores[:, :, None]
  above = jnp.where(other > own, 1.0, jnp.where(other == own, 0.5, 0.0))
  return jnp.sum(jnp.where(negative[:, None, :], above, 0.0), axis=2) - 0.5


def _mean_of_drawn(values, state):
  """[B] mean of values [B, K] over what was drawn, 0 if nothing was."""
  values = jnp.take_along_axis(values, state.selected, axis=1)
  total = jnp.sum(jnp.where(state.selected_mask, values, 0.0), axis=1)
  return total / jnp.maximum(jnp.sum(state.selected_mask, axis=1), 1)
