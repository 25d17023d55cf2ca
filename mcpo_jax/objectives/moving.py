"""Losses with an estimate of log Z per prompt that moves with every visit.

One visit's negatives give a noisy Z, and log of a noisy Z is biased. So each
prompt keeps u, a moving average of its estimates of Z, and the gradient of
log Z is sum_j w_j exp(e_j - log u) grad e_j over the negatives, e their
log-terms and w = m_j / sum of m, the multiplicity: compositional optimisation,
whose bias vanishes as u settles.

`batch.row` says where a prompt's u stands. Its first visit takes the fresh
estimate: any fixed start would weigh on it for visits, and is far off wherever
the negatives do not come from the reference. Row -1 (a held-out prompt) has no
u: it takes the fresh estimate and leaves none.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import Array, Features, SetBatch

# Exponents e - log u are cut at +-60 nats. Above 0 they stay small by
# themselves, as u holds a share `moving_rate` of the fresh estimate.
MAX_EXPONENT = 60.0

State = dict[str, Any]  # arrays, see `log_z_state`


def log_z_state(num_examples: int) -> State:
  """The first state of all losses here.

  Args:
    num_examples: N, prompts that are trained on.

  Returns:
    log_z: [N] float32 nats, log u. Without meaning where not seen.
    seen: [N] bool, True after a prompt's first visit.
  """
  return {
      "log_z": jnp.zeros(num_examples, jnp.float32),
      "seen": jnp.zeros(num_examples, bool),
  }


def compositional_loss(
    features: Features,
    batch: SetBatch,
    state: State,
    *,
    beta: float,
    moving_rate: float,
) -> tuple[jax.Array, dict[str, jax.Array], State]:
  """The NLL -r_0 + log Z, with Z averaged over a prompt's visits.

  loss_b = -r_0 + log u, u <- (1 - moving_rate) u + moving_rate * mean_j
  exp(r_j) over the negatives, r = beta * (logps - ref). The gradient is that of
  -r_0 + sum_j w_j sg[exp(r_j - log u)] r_j, with u after the update.

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0; anchor "ref", `row`.
    state: see `log_z_state`.
    beta: inverse temperature of the implicit reward, > 0.
    moving_rate: weight of this visit in u, in [0, 1]; 1: no memory.

  Returns:
    losses: [B] nats, not reduced; may be negative. 0 without gradient on rows
      without a valid negative.
    aux: see `implicit.preference_aux`; and `log_z`, log u.
    state: u of the batch's prompts moved on.

  References:
    Yuan et al. 2022 (SogCLR), https://arxiv.org/abs/2202.12387
  """
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  return _moving_loss(
      rewards,
      rewards,
      features,
      batch,
      state,
      tau=1.0,
      moving_rate=moving_rate,
  )


def dft_loss(
    features: Features,
    batch: SetBatch,
    state: State,
    *,
    tau: float,
    moving_rate: float,
) -> tuple[jax.Array, dict[str, jax.Array], State]:
  """DFT: the chosen against all completions that the policy finds likely.

  loss_b = -logps_0 + tau * log u, u <- (1 - moving_rate) u + moving_rate *
  mean_j exp(logps_j / tau - ref_j) over the negatives; "ref" is the law that
  they were sampled from. The gradient is that of
  -logps_0 + sum_j w_j sg[exp(logps_j / tau - ref_j - log u)] logps_j.

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0; anchor "ref", `row`.
    state: see `log_z_state`.
    tau: temperature of the discriminative likelihood, > 0.
    moving_rate: weight of this visit in u, in [0, 1]; 1: no memory.

  Returns:
    losses: [B] nats, not reduced. 0 without gradient on rows without a valid
      negative.
    aux: see `implicit.preference_aux`, rewards are the logps; and `log_z`,
      log u.
    state: u of the batch's prompts moved on.

  References:
    Guo et al. 2025, https://arxiv.org/abs/2502.18679
  """
  logps = implicit.masked(features.logps, batch)
  reference = implicit.masked(jnp.asarray(batch.anchors["ref"]), batch)
  return _moving_loss(
      logps,
      logps / tau - reference,
      features,
      batch,
      state,
      tau=tau,
      moving_rate=moving_rate,
  )


def dft2_loss(
    features: Features,
    batch: SetBatch,
    state: State,
    *,
    tau: float,
    moving_rate: float,
) -> tuple[jax.Array, dict[str, jax.Array], State]:
  """DFT2: DFT on means over tokens, without the law of the negatives.

  As `dft_loss` with a = logps / length in place of logps and without "ref":
  loss_b = -a_0 + tau * log u, u the moving average of mean_j exp(a_j / tau).

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0; `lengths`, `row`.
    state: see `log_z_state`.
    tau: temperature of the discriminative likelihood, > 0.
    moving_rate: weight of this visit in u, in [0, 1]; 1: no memory.

  Returns:
    losses: [B] nats per token, not reduced. 0 without gradient on rows without
      a valid negative.
    aux: see `implicit.preference_aux`, rewards are a; and `log_z`, log u.
    state: u of the batch's prompts moved on.

  References:
    Guo et al. 2025, https://arxiv.org/abs/2502.18679
  """
  logps = implicit.masked(features.logps, batch)
  means = logps / jnp.maximum(batch.lengths, 1)
  return _moving_loss(
      means,
      means / tau,
      features,
      batch,
      state,
      tau=tau,
      moving_rate=moving_rate,
  )


def _moving_loss(
    values: Array,
    log_terms: Array,
    features: Features,
    batch: SetBatch,
    state: State,
    *,
    tau: float,
    moving_rate: float,
) -> tuple[jax.Array, dict[str, jax.Array], State]:
  """-values_0 + tau * log u, u the moving average of mean_j exp(log_terms_j).

  Args:
    values: [B, J] whose gradient is tau times that of the log-terms.
    log_terms: [B, J] nats, finite; no gradient flows through them.
    features, batch, state, moving_rate: as of the losses.
    tau: > 0.
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  log_terms = jax.lax.stop_gradient(log_terms)
  negative = weights.negatives(batch)
  some = jnp.any(negative, axis=1)
  log_share = weights.log_counts(batch, corrected=False)
  log_share = jnp.where(
      negative, log_share, jnp.where(some[:, None], -jnp.inf, 0.0)
  )
  log_share = jax.nn.log_softmax(log_share, axis=1)
  fresh = jax.nn.logsumexp(log_terms + log_share, axis=1)
  log_z, state = _move(state, fresh, batch.row, some, moving_rate=moving_rate)
  exponent = jnp.clip(
      log_terms - log_z[:, None], -MAX_EXPONENT, MAX_EXPONENT
  )
  pull = jnp.where(negative, jnp.exp(log_share + exponent), 0.0)
  surrogate = -values[:, 0] + jnp.sum(pull * values, axis=1)
  # The value is the estimated loss, the gradient that of the surrogate.
  value = jax.lax.stop_gradient(-values[:, 0] + tau * log_z)
  losses = value + (surrogate - jax.lax.stop_gradient(surrogate))
  aux = implicit.preference_aux(values, features.logps, batch)
  aux |= {"log_z": jnp.where(some, log_z, 0.0)}
  return jnp.where(some, losses, 0.0), aux, state


def _move(
    state: State, fresh: Array, row: Array, some: Array, *, moving_rate: float
) -> tuple[jax.Array, State]:
  """One visit of the batch's prompts: log u after it, and the state.

  A batch across the end of an epoch may hold a prompt twice. Both then move
  what the state holds, and the later one is kept.

  Args:
    state: see `log_z_state`.
    fresh: [B] nats, estimates of this batch.
    row: [B] int32, -1 where a prompt has no u.
    some: [B] bool, False: there is no estimate.
    moving_rate: in [0, 1].

  Returns:
    log_z: [B] nats.
    state: with the rows written.
  """
  stored, seen = (jnp.asarray(state[name]) for name in ("log_z", "seen"))
  # A negative index would count from the end: past the end it is dropped.
  row = jnp.where(row < 0, len(stored), row)
  old = stored.at[row].get(mode="fill", fill_value=0.0).astype(fresh.dtype)
  moved = jnp.logaddexp(
      jnp.log1p(-moving_rate) + old, jnp.log(moving_rate) + fresh
  )
  known = seen.at[row].get(mode="fill", fill_value=False)
  log_z = jnp.where(known, moved, fresh)
  # A scatter to equal indices promises no order: only the last one writes.
  same = jnp.logical_and(row[:, None] == row[None, :], some[None, :])
  later = jnp.any(jnp.triu(same, 1), axis=1)
  row = jnp.where(jnp.logical_and(some, ~later), row, len(stored))
  return log_z, {
      "log_z": stored.at[row].set(log_z.astype(stored.dtype), mode="drop"),
      "seen": seen.at[row].set(True, mode="drop"),
  }
