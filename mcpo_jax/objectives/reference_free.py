"""Losses on one pair without a reference: slot 0 chosen, slot 1 rejected.

a is the mean log-probability of a completion's tokens, lp their sum. Rows
without a valid pair have loss 0 and no gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.objectives import implicit, pairs
from mcpo_jax.types import Features, SetBatch


def simpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    gamma_beta_ratio: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SimPO: length-normalised.

  loss_b = -log sigmoid(r_0 - r_1 - beta * gamma_beta_ratio), with r = beta * a.

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
  rewards = beta * _mean_logps(features, batch)
  margins = pairs.margins(rewards, batch) - beta * gamma_beta_ratio
  losses = pairs.logistic(margins)
  return pairs.result(losses, rewards, features, batch, state)


def alphapo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    alpha: float,
    gamma_beta_ratio: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """AlphaPO: SimPO with another shape of the reward.

  loss_b = -log sigmoid(r_0 - r_1 - beta * gamma_beta_ratio), with
  r = beta * (1 - p^-alpha) / alpha and p = exp(a). alpha -> 0: SimPO.

  The exponent -alpha * a is clipped at +-`pairs.MAX_EXPONENT`; past it a
  completion has no gradient.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; `lengths`.
    state: passed through.
    beta: scale of the reward, > 0.
    alpha: shape of the reward. Above 0 it falls faster than a where p is
      small, below 0 slower; 0 is SimPO itself.
    gamma_beta_ratio: target margin in units of beta, >= 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Gupta et al. 2025, https://arxiv.org/abs/2501.03884
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = _mean_logps(features, batch)
  if alpha != 0.0:
    limit = pairs.MAX_EXPONENT
    exponents = jnp.clip(-alpha * rewards, -limit, limit)
    rewards = -jnp.expm1(exponents) / alpha
  rewards = beta * rewards
  margins = pairs.margins(rewards, batch) - beta * gamma_beta_ratio
  losses = pairs.logistic(margins)
  return pairs.result(losses, rewards, features, batch, state)


def slic_hf_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    margin: float,
    sft_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SLiC-HF: a hinge on the log-probabilities, and the chosen as the target.

  loss_b = max(0, margin - (lp_0 - lp_1)) - sft_weight * lp_0.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; no anchor needed.
    state: passed through.
    margin: nats by which the chosen should lead, >= 0.
    sft_weight: weight of the negative log-likelihood of slot 0, >= 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are lp.
    state: as given.

  References:
    Zhao et al. 2023, https://arxiv.org/abs/2305.10425
  """
  features, batch = pairs.take_pair(features, batch)
  logps = implicit.masked(features.logps, batch)
  losses = jax.nn.relu(margin - pairs.margins(logps, batch))
  losses = losses - sft_weight * logps[:, 0]
  return pairs.result(losses, logps, features, batch, state)


def cpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    sft_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """CPO: DPO against a uniform reference, and the chosen as the target.

  loss_b = -log sigmoid(beta * (lp_0 - lp_1)) - sft_weight * lp_0. The second
  term is summed over tokens as in the paper; its authors' code takes the mean
  over the tokens of the batch.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; no anchor needed.
    state: passed through.
    beta: inverse temperature, > 0.
    sft_weight: weight of the negative log-likelihood of slot 0, >= 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are beta * lp.
    state: as given.

  References:
    Xu et al. 2024, https://arxiv.org/abs/2401.08417
  """
  features, batch = pairs.take_pair(features, batch)
  logps = implicit.masked(features.logps, batch)
  rewards = beta * logps
  losses = pairs.logistic(pairs.margins(rewards, batch))
  losses = losses - sft_weight * logps[:, 0]
  return pairs.result(losses, rewards, features, batch, state)


def orpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    odds_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """ORPO: the chosen as the target, and a ratio of odds.

  loss_b = -a_0 - odds_weight * log sigmoid(o_0 - o_1), with the log-odds
  o = a - log(1 - exp(a)), capped as in `_log_odds`.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; `lengths`.
    state: passed through.
    odds_weight: weight of the preference term (lambda of the paper), >= 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are o.
    state: as given.

  References:
    Hong et al. 2024, Eq. 6 and 7, https://arxiv.org/abs/2403.07691
  """
  features, batch = pairs.take_pair(features, batch)
  means = _mean_logps(features, batch)
  odds = _log_odds(means)
  ratios = pairs.logistic(pairs.margins(odds, batch))
  losses = odds_weight * ratios - means[:, 0]
  return pairs.result(losses, odds, features, batch, state)


def asft_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    odds_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """ASFT: ORPO with the odds of each completion judged on their own.

  loss_b = -a_0 - odds_weight * [log sigmoid(beta * o_0)
  + log sigmoid(-beta * o_1)], with o as in `orpo_loss`.

  At beta = 1, the original: sigmoid(o) = p = exp(a), so the loss is
  -(1 + odds_weight) * a_0 - odds_weight * log(1 - p_1), at no point below
  that of ORPO. Another beta tempers the odds, not the first term.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; `lengths`.
    state: passed through.
    beta: inverse temperature of the odds, > 0.
    odds_weight: weight of the preference terms, >= 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are beta * o.
    state: as given.

  References:
    Wang et al. 2024, https://arxiv.org/abs/2409.10571
    Gorbatovski et al. 2025 (beta), https://arxiv.org/abs/2502.01237
  """
  features, batch = pairs.take_pair(features, batch)
  means = _mean_logps(features, batch)
  rewards = beta * _log_odds(means)
  terms = pairs.logistic(rewards[:, 0]) + pairs.logistic(-rewards[:, 1])
  losses = odds_weight * terms - means[:, 0]
  return pairs.result(losses, rewards, features, batch, state)


def _mean_logps(features, batch):
  """[B, J] a, 0 on masked slots."""
  return pairs.per_token(implicit.masked(features.logps, batch), batch)


def _log_odds(means):
  """[B, J] log p - log(1 - p) of log p = means, finite at p = 1.

  A log-softmax does not tell p from 1 above 1 - eps of its dtype: the odds
  stay there, without gradient.
  """
  means = jnp.minimum(means, -jnp.finfo(means.dtype).eps)
  return means - jnp.log(-jnp.expm1(means))
