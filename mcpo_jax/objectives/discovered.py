"""Losses found by search: DiscoPOP's list, constants as published.

Slot 0 chosen, slot 1 rejected; further slots go unread. In all of them
x = beta * (d_0 - d_1), d = logps - ref, and

  logistic = -log sigmoid(x)    hinge = max(0, 1 - x)    exponential = exp(-x).

The searched code divides by beta = 0.05 inside some weights whatever beta is;
y = x / 0.05 here. Gradients flow through all weights, statistics of the batch
included, as there. Those statistics are over the valid pairs, with the
unbiased variance, which is 0 for one pair alone. Exponents are clipped at
`pairs.MAX_EXPONENT`. Rows without a valid pair have loss 0 and no gradient.

  Lu et al. 2024, https://arxiv.org/abs/2406.08414
"""

from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.objectives import implicit, pairs
from mcpo_jax.types import Features, SetBatch

_SCALE = 0.05


def discopop_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    tau: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DiscoPOP (log-ratio modulated): logistic and exponential, blended.

  loss_b = (1 - m) logistic + m exponential, m = sigmoid(x / tau).

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    tau: width of the blend in x, > 0.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  # m exp(-x) in one exponent: m may underflow where exp(-x) is huge.
  exponential = pairs.exp(jax.nn.log_sigmoid(x / tau) - x)
  losses = jax.nn.sigmoid(-x / tau) * pairs.logistic(x) + exponential
  return pairs.result(losses, rewards, features, batch, state)


def dbaql_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DBAQL: logistic and exponential, blended by the batch's variance.

  loss_b = c logistic(x / 0.9) + (1 - c) exponential(0.9 x), c = sigmoid(Var y).

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
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  blend = jax.nn.sigmoid(_batch_variance(x / _SCALE, pairs.valid(batch)))
  losses = blend * pairs.logistic(x / 0.9)
  losses = losses + (1.0 - blend) * pairs.exp(-0.9 * x)
  return pairs.result(losses, rewards, features, batch, state)


def aql_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """AQL: logistic and hinge, blended by the distance to a quantile.

  loss_b = w logistic + (1 - w) hinge, w = sigmoid(k - y), with
  k = 0.5 + 0.01 (sigmoid(mean y) - 0.5).

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
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  y = x / _SCALE
  mean = _batch_mean(y, pairs.valid(batch))
  quantile = 0.5 + 0.01 * (jax.nn.sigmoid(mean) - 0.5)
  losses = _blend(jax.nn.sigmoid(quantile - y), x)
  return pairs.result(losses, rewards, features, batch, state)


def aqfl_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """AQFL: as AQL, with a quantile from the batch's spread.

  loss_b = w logistic + (1 - w) hinge, w = sigmoid(0.1 |y - k|), with
  k = 0.95 std(y) mean(sigmoid(-y)) + 0.05 sigmoid(mean y).

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
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  y, valid = x / _SCALE, pairs.valid(batch)
  variance = _batch_variance(y, valid)
  # The root has no slope at 0, where all pairs are alike or there is but one.
  some = variance > 0.0
  deviation = jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1.0)), 0.0)
  quantile = 0.95 * deviation * _batch_mean(jax.nn.sigmoid(-y), valid)
  quantile = quantile + 0.05 * jax.nn.sigmoid(_batch_mean(y, valid))
  losses = _blend(jax.nn.sigmoid(0.1 * jnp.abs(y - quantile)), x)
  return pairs.result(losses, rewards, features, batch, state)


def padll_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """PADLL: loss_b = 0.9 logistic, and 0.45 logistic where x < 0.

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
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  losses = jnp.where(x < 0.0, 0.45, 0.9) * pairs.logistic(x)
  return pairs.result(losses, rewards, features, batch, state)


def cell_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """CELL: loss_b = (exponential + logistic) / 2.

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
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  losses = 0.5 * pairs.exp(-x) + 0.5 * pairs.logistic(x)
  return pairs.result(losses, rewards, features, batch, state)


def pfl_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """PFL: loss_b = logistic / 2 where the policy ranks the pair right.

  That is logps_0 > logps_1, whatever the reference says; elsewhere 2 hinge.

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
    Lu et al. 2024, https://arxiv.org/abs/2406.08414
  """
  features, batch, rewards, x = _take(features, batch, beta)
  right = pairs.margins(implicit.masked(features.logps, batch), batch) > 0.0
  hinge = jax.nn.relu(1.0 - x)
  losses = jnp.where(right, 0.5 * pairs.logistic(x), 2.0 * hinge)
  return pairs.result(losses, rewards, features, batch, state)


def _take(features, batch, beta):
  """Both cut to the pair, the rewards [B, 2] and x [B]."""
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  return features, batch, rewards, pairs.margins(rewards, batch)


def _blend(weight, x):
  """[B] weight * logistic + (1 - weight) * hinge."""
  return weight * pairs.logistic(x) + (1.0 - weight) * jax.nn.relu(1.0 - x)


def _batch_mean(values, valid):
  """Mean of [B] over the valid rows."""
  total = jnp.sum(jnp.where(valid, values, 0.0))
  return total / jnp.maximum(jnp.sum(valid), 1)


def _batch_variance(values, valid):
  """Unbiased variance of [B] over the valid rows, 0 for less than two."""
  away = jnp.where(valid, values - _batch_mean(values, valid), 0.0)
  return jnp.sum(away**2) / jnp.maximum(jnp.sum(valid) - 1, 1)
