"""Losses on one pair: slot 0 chosen, slot 1 rejected; further slots unread.

Rows without a valid pair have loss 0 and no gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.objectives import implicit, pairs
from mcpo_jax.types import Features, SetBatch


def dpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DPO; with label smoothing e, cDPO.

  loss_b = -(1 - e) log sigmoid(r_0 - r_1) - e log sigmoid(r_1 - r_0), with
  r = beta * (logps - ref).

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
    Rafailov et al. 2023, Eq. 7, https://arxiv.org/abs/2305.18290
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  margins = pairs.margins(rewards, batch)
  losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)
  losses = losses - label_smoothing * jax.nn.log_sigmoid(-margins)
  return pairs.result(losses, rewards, features, batch, state)


def ipo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    length_average: bool,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """IPO: loss_b = (h - 1 / (2 beta))^2.

  h = d_0 - d_1 with d = logps - ref, summed over tokens as in the paper, or
  divided by the number of tokens, which its authors have confirmed to be meant.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref"; `lengths` where averaged.
    state: passed through.
    beta: strength of the regularisation (tau of the paper), > 0.
    length_average: divides d by the completion's number of tokens.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are beta * d.
    state: as given.

  References:
    Azar et al. 2023, Eq. 17, https://arxiv.org/abs/2310.12036
  """
  features, batch = pairs.take_pair(features, batch)
  ratios = implicit.implicit_rewards(features, batch, beta=1.0)
  if length_average:
    ratios = ratios / jnp.maximum(batch.lengths, 1)
  losses = (pairs.margins(ratios, batch) - 1.0 / (2.0 * beta)) ** 2
  return pairs.result(losses, beta * ratios, features, batch, state)


def simpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    gamma_beta_ratio: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SimPO: length-normalised, without a reference.

  loss_b = -log sigmoid(r_0 - r_1 - beta * gamma_beta_ratio), with
  r = beta * logps / length.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; `lengths`.
    state: passed through.
    beta: scale of the reward per token, > 0.
    gamma_beta_ratio: target margin in units of beta, >= 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Meng et al. 2024, Eq. 6, https://arxiv.org/abs/2405.14734
  """
  features, batch = pairs.take_pair(features, batch)
  logps = implicit.masked(features.logps, batch)
  rewards = beta * logps / jnp.maximum(batch.lengths, 1)
  margins = pairs.margins(rewards, batch) - beta * gamma_beta_ratio
  losses = -jax.nn.log_sigmoid(margins)
  return pairs.result(losses, rewards, features, batch, state)
