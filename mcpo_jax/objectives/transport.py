"""Alignment via optimal transport: losses on the sorted batch.

Both compare two samples of numbers, one number a pair, by their order
statistics over the valid pairs of the whole batch. The difference at rank i is
given to the row whose own first number has rank i; what counts is the mean over
the batch. Equal numbers rank in the order of the rows. One pair: DPO. Rows
without a valid pair have loss 0, no gradient, and take no part in the ranks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.objectives import implicit, pairs
from mcpo_jax.types import Features, SetBatch


def aot_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Paired AOT: the policy's margins shall dominate the reference's.

  loss_b = -(1 - e) log sigmoid(beta t) - e log sigmoid(-beta t), with
  t = a_(i) - b_(i), a = logps_0 - logps_1 and b = ref_0 - ref_1, sorted apart.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    label_smoothing: share of pairs taken as labelled the wrong way round, in
      [0, 0.5).

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  policy = pairs.margins(implicit.masked(features.logps, batch), batch)
  reference = implicit.masked(jnp.asarray(batch.anchors["ref"]), batch)
  reference = jax.lax.stop_gradient(pairs.margins(reference, batch))
  gaps = beta * _rank_gaps(policy, reference, pairs.valid(batch))
  losses = pairs.logistic(gaps, label_smoothing=label_smoothing)
  return pairs.result(losses, rewards, features, batch, state)


def aot_unpaired_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Unpaired AOT: the rewards of the chosen shall dominate the rejected's.

  loss_b = -(1 - e) log sigmoid(t) - e log sigmoid(-t), with
  t = r_0(i) - r_1(i), sorted apart, r = beta * (logps - ref). The rejected one
  compared with need not be the row's own; the gradient reaches both.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    label_smoothing: share of pairs taken as labelled the wrong way round, in
      [0, 0.5).

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  gaps = _rank_gaps(*pairs.split(rewards, batch), pairs.valid(batch))
  losses = pairs.logistic(gaps, label_smoothing=label_smoothing)
  return pairs.result(losses, rewards, features, batch, state)


def _rank_gaps(first, second, valid):
  """[B] first less the second of the same rank, both among valid rows."""
  # Rows out of the game rank last in both, so the others' ranks agree.
  last = lambda x: jnp.where(valid, x, jnp.inf)
  ranks = jnp.argsort(jnp.argsort(last(first)))
  return jnp.where(valid, first - jnp.sort(last(second))[ranks], 0.0)
