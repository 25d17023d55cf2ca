"""Losses on one pair that see where each reward stands, not the margin alone.

Slot 0 chosen, slot 1 rejected; further slots go unread. In all of them
d = logps - ref, r = beta * d and h = d_0 - d_1. Rows without a valid pair have
loss 0 and no gradient.
"""

from typing import Any

import jax

from mcpo_jax.objectives import implicit, pairs
from mcpo_jax.types import Features, SetBatch


def nca_pair_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """NCA on a pair: keeps the chosen one likely, unlike DPO.

  loss_b = -log sigmoid(r_0) - log sigmoid(-r_0) / 2 - log sigmoid(-r_1) / 2.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Chen et al. 2024, https://arxiv.org/abs/2402.05369
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  chosen, rejected = pairs.split(rewards, batch)
  log = jax.nn.log_sigmoid
  losses = -log(chosen) - 0.5 * log(-chosen) - 0.5 * log(-rejected)
  return pairs.result(losses, rewards, features, batch, state)


def apo_zero_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """APO-zero: the chosen one up, the rejected one down.

  loss_b = 1 - sigmoid(r_0) + sigmoid(r_1). For chosen ones better than the
  model.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  chosen, rejected = pairs.split(rewards, batch)
  losses = 1.0 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)
  return pairs.result(losses, rewards, features, batch, state)


def apo_down_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """APO-down: both down, the rejected one further.

  loss_b = sigmoid(r_0) + 1 - sigmoid(r_0 - r_1). For chosen ones worse than
  the model.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  chosen, rejected = pairs.split(rewards, batch)
  contrast = 1.0 - jax.nn.sigmoid(chosen - rejected)
  losses = jax.nn.sigmoid(chosen) + contrast
  return pairs.result(losses, rewards, features, batch, state)


def rpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    sft_weight: float,
    length_average: bool,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SFT-regularised DPO: RPO, and with the length average iterative RPO.

  loss_b = -log sigmoid(beta h) - sft_weight * logps_0, the latter divided by
  the length if asked. Not `reward_rpo_loss`, which shares the name only.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref"; `lengths` where averaged.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    sft_weight: weight of the chosen one's negative log-likelihood, >= 0.
    length_average: divides that by its number of tokens.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Liu et al. 2024, https://arxiv.org/abs/2405.16436
    Pang et al. 2024 (iterative RPO), https://arxiv.org/abs/2404.19733
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  logps = implicit.masked(features.logps, batch)
  if length_average:
    logps = pairs.per_token(logps, batch)
  chosen, _ = pairs.split(logps, batch)
  losses = pairs.logistic(pairs.margins(rewards, batch)) - sft_weight * chosen
  return pairs.result(losses, rewards, features, batch, state)


def dpop_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    penalty: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DPOP (Smaug): DPO that minds a chosen one less likely than the reference.

  loss_b = -log sigmoid(beta (h - penalty * max(0, -d_0))).

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    penalty: lambda of the paper, >= 0. 0: DPO.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Pal et al. 2024, https://arxiv.org/abs/2402.13228
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  chosen, rejected = pairs.split(rewards, batch)
  margins = chosen - rejected - penalty * jax.nn.relu(-chosen)
  losses = pairs.logistic(margins)
  return pairs.result(losses, rewards, features, batch, state)


def cal_dpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Cal-DPO: DPO at beta 1 with d_0 and d_1 drawn to their targets.

  loss_b = -log sigmoid(h) + (d_0 - 1 / (2 beta))^2 + (d_1 + 1 / (2 beta))^2.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: one over the gap of the targets, > 0.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are beta * d.
    state: as given.

  References:
    Xiao et al. 2024, https://arxiv.org/abs/2412.14516
  """
  features, batch = pairs.take_pair(features, batch)
  ratios = implicit.implicit_rewards(features, batch, beta=1.0)
  chosen, rejected = pairs.split(ratios, batch)
  target = 1.0 / (2.0 * beta)
  losses = (chosen - target) ** 2 + (rejected + target) ** 2
  losses = losses + pairs.logistic(chosen - rejected)
  return pairs.result(losses, beta * ratios, features, batch, state)
