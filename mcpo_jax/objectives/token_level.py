"""Losses that need more than sequence log-probs: terms of the token laws.

The terms are sums over a completion's scored tokens, in `Features.terms`; see
`scoring.sequence_features` for what each of them is. Those of one pair read
slot 0 as chosen and slot 1 as rejected.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit, pairs
from mcpo_jax.types import MISMATCHED_ID, Features, SetBatch


def wpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """WPO: DPO with pairs weighted by how likely the policy is to write them.

  loss_b = -w log sigmoid(r_0 - r_1), r = beta * (logps - ref), with the
  constant w = min(1, W_0 W_1) and log W = (logps - collision) / length. W is
  the geometric mean over tokens of pi(token) / sum_v pi(v)^2: how likely the
  token is, next to one that the policy draws itself.

  Args:
    features: logps [B, J], J >= 2; term "collision".
    batch: [B, J]; anchor "ref", `lengths`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Zhou et al. 2024, https://arxiv.org/abs/2406.11827
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  margins = pairs.margins(rewards, batch)
  logps = implicit.masked(features.logps, batch)
  log_w = logps - _term("collision", features, batch)
  log_w = jnp.sum(log_w / jnp.maximum(batch.lengths, 1), axis=1)
  w = jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_w, 0.0)))
  losses = -w * jax.nn.log_sigmoid(margins)
  return pairs.result(losses, rewards, features, batch, state)


def ld_dpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    tail_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """LD-DPO: what the longer one has beyond the shorter's length counts less.

  DPO on prefix + tail_weight * (logps - prefix), and so for the reference. The
  prefix is as many tokens as both have, so the shorter one is all prefix.

  Args:
    features: logps [B, J], J >= 2; terms "prefix", "ref_prefix" for the
      lengths of this pair.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    tail_weight: in [0, 1]; 1: DPO.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Liu et al. 2024, https://arxiv.org/abs/2409.06411
  """
  features, batch = pairs.take_pair(features, batch)
  whole = implicit.implicit_rewards(features, batch, beta=beta)
  ref_prefix = jax.lax.stop_gradient(_term("ref_prefix", features, batch))
  prefix = beta * (_term("prefix", features, batch) - ref_prefix)
  rewards = prefix + tail_weight * (whole - prefix)
  losses = -jax.nn.log_sigmoid(pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def tdpo1_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """TDPO1: loss_b = -log sigmoid(r_0 - r_1), r = beta (logps - ref + kl).

  kl is the KL from reference to policy, summed over the completion's tokens;
  its gradient is taken too.

  Args:
    features: logps [B, J], J >= 2; term "kl".
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Zeng et al. 2024, https://arxiv.org/abs/2404.11999
  """
  return _tdpo1(features, batch, state, term="kl", beta=beta)


def tdpo2_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    alpha: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """TDPO2: TDPO1 with alpha * kl, which is a constant on the chosen one.

  Args:
    features: logps [B, J], J >= 2; term "kl".
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    alpha: weight of the divergence, >= 0; 0: DPO.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Zeng et al. 2024, https://arxiv.org/abs/2404.11999
  """
  return _tdpo2(features, batch, state, term="kl", beta=beta, alpha=alpha)


def ra_dpo1_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    confidence: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Ra-DPO1: TDPO1 with the term "risk" in place of "kl".

  Args:
    features: logps [B, J], J >= 2; term "risk".
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    confidence: what "risk" was computed with; not read again.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Zhang et al. 2025, https://arxiv.org/abs/2505.20359
  """
  del confidence
  return _tdpo1(features, batch, state, term="risk", beta=beta)


def ra_dpo2_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    alpha: float,
    confidence: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Ra-DPO2: TDPO2 with the term "risk" in place of "kl".

  Args:
    features: logps [B, J], J >= 2; term "risk".
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    alpha: weight of the risk, >= 0; 0: DPO.
    confidence: what "risk" was computed with; not read again.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Zhang et al. 2025, https://arxiv.org/abs/2505.20359
  """
  del confidence
  return _tdpo2(features, batch, state, term="risk", beta=beta, alpha=alpha)


def _tdpo1(features, batch, state, *, term, beta):
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  rewards = rewards + beta * _term(term, features, batch)
  losses = -jax.nn.log_sigmoid(pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def _tdpo2(features, batch, state, *, term, beta, alpha):
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  values = _term(term, features, batch)
  chosen = jax.lax.stop_gradient(values[:, :1])
  values = jnp.concatenate([chosen, values[:, 1:]], axis=1)
  rewards = rewards + beta * alpha * values
  losses = -jax.nn.log_sigmoid(pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def sparse_po_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    mask_penalty: float,
    shared_mask: bool,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SparsePO: TDPO1 whose tokens are weighted by learned masks.

  loss_b = -log sigmoid(r_0 - r_1) + mask_penalty * (size_0 + size_1), with
  r = beta * (masked_ratio + masked_kl). Masks of 1: TDPO1, plus a constant.

  Args:
    features: logps [B, J], J >= 2; terms "masked_ratio", "masked_kl" and
      "mask_size".
    batch: [B, J].
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    mask_penalty: weight of the masks' L1 norm, >= 0, the same for both masks.
    shared_mask: of `sparse_po_parameters`; not read again.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Christopoulou et al. 2024, https://arxiv.org/abs/2410.05102
  """
  del shared_mask
  features, batch = pairs.take_pair(features, batch)
  rewards = beta * (
      _term("masked_ratio", features, batch)
      + _term("masked_kl", features, batch)
  )
  sizes = jnp.sum(_term("mask_size", features, batch), axis=1)
  losses = -jax.nn.log_sigmoid(pairs.margins(rewards, batch))
  losses = losses + mask_penalty * sizes
  return pairs.result(losses, rewards, features, batch, state)


def sparse_po_parameters(
    key: jax.Array, config: Any, *, shared_mask: bool
) -> dict[str, jax.Array]:
  """The first parameters of the masks: every mask is 1, the loss is TDPO1.

  A mask that starts at 0 would stay there: its ReLU passes no gradient. Norms
  of hidden states have no scale and offset of their own, which the kernel and
  bias after them have.

  Args:
    key: nothing is drawn from it.
    config: the reference's, with `num_layers` L and `hidden_size` D.
    shared_mask: one mask on log ratios and KL, or one for each.

  Returns:
    kernel [L, M, D], bias [L, M] and mixer [L, M], M masks.
  """
  del key
  shape = (config.num_layers, 1 if shared_mask else 2)
  return {
      "kernel": jnp.zeros((*shape, config.hidden_size)),
      "bias": jnp.ones(shape),
      "mixer": jnp.full(shape, 1.0 / config.num_layers, jnp.float32),
  }


def pmpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    alpha: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """PMPO: likelihood up on the better half, down on the worse, near the ref.

  loss_b = -alpha mean_{D+} logps + (1 - alpha) mean_{D-} logps + beta mean kl,
  with D+ the better half by score and D- the worse, n // 2 places each; of an
  odd number n the middle one is in neither. Candidates of the same score share
  their places evenly, one of multiplicity m is m candidates. Without a known
  score a candidate is left out.

  Args:
    features: logps [B, J]; term "kl".
    batch: [B, J] the whole pool; `scores`.
    state: passed through.
    beta: weight of the divergence, > 0.
    alpha: weight of the better half, in [0, 1].

  Returns:
    losses: [B], not reduced; unbounded below but for the divergence.
    aux: see `implicit.preference_aux`; its rewards are the logps.
    state: as given.

  References:
    Abdolmaleki et al. 2024, https://arxiv.org/abs/2410.04166
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  known = jnp.logical_not(jnp.isnan(batch.scores))
  own = batch.candidate_id != MISMATCHED_ID
  batch = batch._replace(
      candidate_mask=batch.candidate_mask & known & own
  )
  logps = implicit.masked(features.logps, batch)
  better, worse, each = _halves(batch)
  losses = jnp.sum(
      ((1.0 - alpha) * worse - alpha * better) * logps
      + beta * each * _term("kl", features, batch),
      axis=1,
  )
  some = jnp.any(weights.negatives(batch), axis=1)
  losses = jnp.where(some, losses, 0.0)
  return losses, implicit.preference_aux(logps, logps, batch), state


def _halves(batch):
  """Weights [B, J] of means over the better half, the worse, and all."""
  count = jnp.where(batch.candidate_mask, jnp.maximum(batch.multiplicity, 1), 0)
  scores = jnp.where(batch.candidate_mask, batch.scores, 0.0)
  own, other = scores[:, :, None], scores[:, None, :]
  count_if = lambda true: jnp.sum(jnp.where(true, count[:, None, :], 0), axis=2)
  above, level, below = (
      count_if(other > own), count_if(other == own), count_if(other < own)
  )
  total = jnp.sum(count, axis=1, keepdims=True)
  half = total // 2
  share = count / jnp.maximum(level, 1)
  places = lambda first: share * jnp.clip(half - first, 0, level)
  halved = jnp.maximum(half, 1)
  return (
      places(above) / halved, places(below) / halved,
      count / jnp.maximum(total, 1),
  )


def _term(name, features, batch):
  """[B, J] a term, 0 and without gradient on masked slots."""
  return implicit.masked(features.terms[name], batch)
