"""Losses on completions judged one by one, good or bad: KTO, BCO.

Desirable is slot 0, undesirable are the negatives. A set of a single
completion, beside another prompt's (`types.MISMATCHED_ID`), is undesirable if
its score is known and not above 0: so records of one judged completion say it.

The loss of a set is the mean over its judged completions. Where all sets have
equally many, one each or a pair each, the mean over sets is the mean over
completions, TRL's. The multiplicity is not read.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import MISMATCHED_ID, Array, Features, SetBatch


def kto_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """KTO: each completion against the policy's divergence from the reference.

  Desirable: desirable_weight * (1 - sigmoid(beta * (d - z))). Undesirable:
  undesirable_weight * (1 - sigmoid(beta * (z - d))). d = logps - ref, and
  z = max(0, mean of d over the batch's mismatched completions), a constant; 0
  without any: then a pair has half the loss of APO-zero.

  Args:
    features: logps [B, J].
    batch: [B, J], the WHOLE batch, chosen in slot 0; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    desirable_weight: of desirable completions, >= 0.
    undesirable_weight: of undesirable completions, >= 0.

  Returns:
    losses: [B], not reduced. 0 where nothing is judged.
    aux: see `implicit.preference_aux`; and `rewards/baseline`, beta * z.
    state: as given.

  References:
    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  mask = jnp.asarray(batch.candidate_mask)
  mismatched = mask & mask[:, :1] & _mismatched(batch)
  baseline = jnp.maximum(_mean(rewards, mismatched, axis=None), 0.0)
  baseline = jax.lax.stop_gradient(baseline)
  desirable, undesirable = _judged(batch)
  terms = jnp.where(
      desirable,
      desirable_weight * jax.nn.sigmoid(baseline - rewards),
      undesirable_weight * jax.nn.sigmoid(rewards - baseline),
  )
  losses = _mean(terms, desirable | undesirable, axis=1)
  return losses, _aux(rewards, baseline, features, batch), state


def bco_state(num_examples: int) -> dict[str, jax.Array]:
  """The first state of `bco_loss`: `delta` 0, the mean at the reference."""
  del num_examples
  return {"delta": jnp.zeros((), jnp.float32)}


def bco_loss(
    features: Features,
    batch: SetBatch,
    state: dict[str, jax.Array],
    *,
    beta: float,
    moving_rate: float,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
  """BCO: a binary classifier of good and bad, shifted by the mean reward.

  Desirable: -log sigmoid(r - delta). Undesirable: -log sigmoid(delta - r), with
  r = beta * (logps - ref). delta <- (1 - moving_rate) * delta + moving_rate *
  mean of r over the batch's judged completions; the loss reads it AFTER this
  update, as a constant.

  Args:
    features: logps [B, J].
    batch: [B, J], the WHOLE batch, chosen in slot 0; anchor "ref".
    state: see `bco_state`.
    beta: inverse temperature of the implicit reward, > 0.
    moving_rate: weight of this batch in delta, in [0, 1].

  Returns:
    losses: [B] nats, not reduced; on a pair half of the sum over both. 0 where
      nothing is judged.
    aux: see `implicit.preference_aux`; and `rewards/baseline`, delta.
    state: delta after the update; as given if the batch judges nothing.

  References:
    Jung et al. 2024, https://arxiv.org/abs/2404.04656
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  desirable, undesirable = _judged(batch)
  judged = desirable | undesirable
  old = state["delta"].astype(rewards.dtype)
  fresh = jax.lax.stop_gradient(_mean(rewards, judged, axis=None))
  delta = (1.0 - moving_rate) * old + moving_rate * fresh
  delta = jnp.where(jnp.any(judged), delta, old)
  signed = jnp.where(desirable, rewards - delta, delta - rewards)
  losses = _mean(-jax.nn.log_sigmoid(signed), judged, axis=1)
  new = {"delta": delta.astype(state["delta"].dtype)}
  return losses, _aux(rewards, delta, features, batch), new


def _judged(batch: SetBatch) -> tuple[jax.Array, jax.Array]:
  """[B, J] bool twice: the desirable and the undesirable completions."""
  own = jnp.logical_and(batch.candidate_mask, ~_mismatched(batch))
  alone = jnp.sum(own, axis=1, keepdims=True) == 1
  bad = jnp.logical_and(alone, batch.scores <= 0.0)  # unknown is not bad
  judged = weights.candidates(batch, include_preferred=True)
  undesirable = judged & (weights.negatives(batch) | bad)
  return judged & ~undesirable, undesirable


def _mismatched(batch: SetBatch) -> jax.Array:
  """[B, J] bool, True on another prompt's completion, masked or not."""
  return batch.candidate_id == MISMATCHED_ID


def _mean(values: Array, where: Array, *, axis: int | None) -> jax.Array:
  """Mean of [B, J] over an axis or both, 0 where there is nothing."""
  total = jnp.sum(jnp.where(where, values, 0.0), axis=axis)
  return total / jnp.maximum(jnp.sum(where, axis=axis), 1)


def _aux(rewards, baseline, features, batch):
  """Statistics of preferences, and the baseline on every set."""
  judged = jnp.any(weights.candidates(batch, include_preferred=True), axis=1)
  aux = implicit.preference_aux(rewards, features.logps, batch)
  baseline = jax.lax.stop_gradient(baseline)
  return aux | {"rewards/baseline": jnp.where(judged, baseline, 0.0)}
