"""Losses on the whole pool: every candidate of a set with its score.

A list holds the candidates level with the chosen one too. Masked slots,
another prompt's completion (`types.MISMATCHED_ID`) and candidates of unknown
score stay out of it. A set has contrast if two scores of its list differ;
without it the loss is 0 and has no gradient.

A merged duplicate stands for `multiplicity` samples, in slot 0 as in all
others, and counts as often in every sum over candidates or pairs.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import MISMATCHED_ID, Array, Features, SetBatch

# Scores stand in an exponent in `lipo_loss`; beyond +-60 nats they are cut.
MAX_EXPONENT = 60.0


def exo_reward_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    reward_temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """EXO with rewards: the reverse KL from policy to rewards on the list.

  loss_b = KL(softmax(s) || softmax(R / reward_temperature)), with
  s = beta * (logps - ref) and R the scores.

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    reward_temperature: of the scores, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Ji et al. 2024, Towards Efficient Exact Optimization of Language Model
    Alignment, https://arxiv.org/abs/2402.00856
  """
  rewards, listed, scores = _list(features, batch, beta=beta)
  log_q = _log_weights(rewards, batch, listed)
  log_p = _log_weights(scores / reward_temperature, batch, listed)
  log_ratio = jnp.where(listed, log_q - log_p, 0.0)
  losses = jnp.sum(jnp.exp(log_q) * log_ratio, axis=1)
  return _result(losses, rewards, features, batch, state)


def infonca_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    reward_temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """InfoNCA: cross-entropy from the scores' softmax to that of the rewards.

  loss_b = -sum_i p_i log softmax(s)_i, with p = softmax(R / reward_temperature)
  and s = beta * (logps - ref). As the temperature goes to 0 and slot 0 is best:
  `softmax.rnce_loss`.

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    reward_temperature: of the scores, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Chen et al. 2024, https://arxiv.org/abs/2402.05369
  """
  rewards, listed, scores = _list(features, batch, beta=beta)
  log_q = _log_weights(rewards, batch, listed)
  # Of one sample: softmax(s)_i without the count of its copies.
  log_q = jnp.where(listed, log_q - jnp.log(_counts(batch)), 0.0)
  p = jnp.exp(_log_weights(scores / reward_temperature, batch, listed))
  losses = -jnp.sum(p * log_q, axis=1)
  return _result(losses, rewards, features, batch, state)


def nca_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    reward_temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """NCA: the rewards' own height counts, not only their differences.

  loss_b = -sum_i p_i log sigmoid(s_i) - mean_i log sigmoid(-s_i), with
  p = softmax(R / reward_temperature) and s = beta * (logps - ref).

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    reward_temperature: of the scores, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Chen et al. 2024, https://arxiv.org/abs/2402.05369
  """
  rewards, listed, scores = _list(features, batch, beta=beta)
  p = jnp.exp(_log_weights(scores / reward_temperature, batch, listed))
  count = jnp.where(listed, _counts(batch), 0.0)
  share = count / jnp.maximum(jnp.sum(count, axis=1, keepdims=True), 1.0)
  losses = -jnp.sum(
      p * jax.nn.log_sigmoid(rewards) + share * jax.nn.log_sigmoid(-rewards),
      axis=1,
  )
  return _result(losses, rewards, features, batch, state)


def plackett_luce_loss(
    features: Features, batch: SetBatch, state: Any, *, beta: float
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Plackett-Luce (list MLE): each candidate against all that rank below it.

  loss_b = sum_i log(1 + sum_{j: R_j < R_i} exp(s_j - s_i)), with
  s = beta * (logps - ref). Distinct scores: the negative log-likelihood of the
  ranking. Candidates of equal score do not compete with each other, so that
  their order has no say: one best and all others level is `softmax.rnce_loss`,
  as it is under the likelihood of "any order among the tied".

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Liu et al. 2024 (LiPO), Eq. 7, https://arxiv.org/abs/2402.01878
  """
  rewards, _, _ = _list(features, batch, beta=beta)
  count = _counts(batch)
  excess = rewards[:, None, :] - rewards[:, :, None]
  excess = jnp.where(
      _above(batch), excess + jnp.log(count)[:, None, :], -jnp.inf
  )
  # The candidate's own term is exp(0): the largest is finite in every row.
  terms = jnp.pad(excess, ((0, 0), (0, 0), (0, 1)))
  losses = jnp.sum(count * jax.nn.logsumexp(terms, axis=2), axis=1)
  return _result(losses, rewards, features, batch, state)


def lipo_loss(
    features: Features, batch: SetBatch, state: Any, *, beta: float
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """LiPO-lambda: pairs weighted by what their exchange does to the DCG.

  loss_b = -sum_{R_i > R_j} |G_i - G_j| |1 / D_i - 1 / D_j|
  log sigmoid(s_i - s_j), with s = beta * (logps - ref), gains G = 2^R - 1 and
  discounts D = log(1 + rank). The rank, from 1, is by s, ties by lowest
  candidate id, and a constant. Copies share a rank: the multiplicity is
  not read here.

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`: meant to lie in [0, 1].
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Liu et al. 2024, https://arxiv.org/abs/2402.01878
  """
  rewards, listed, scores = _list(features, batch, beta=beta)
  gains = jnp.exp(
      jnp.clip(jnp.log(2.0) * scores, -MAX_EXPONENT, MAX_EXPONENT)
  )
  # At the reference all rewards are level; without an order among them every
  # weight would be 0 and training could not begin.
  ids = jnp.asarray(batch.candidate_id)
  level = rewards[:, None, :] == rewards[:, :, None]
  first = jnp.where(
      level,
      ids[:, None, :] < ids[:, :, None],
      rewards[:, None, :] > rewards[:, :, None],
  )
  first = jnp.logical_and(first, listed[:, None, :])
  discount = 1.0 / jnp.log1p(1.0 + jnp.sum(first, axis=2))
  lambdas = jnp.abs(_differences(gains)) * jnp.abs(_differences(discount))
  lambdas = jnp.where(_above(batch), jax.lax.stop_gradient(lambdas), 0.0)
  terms = lambdas * jax.nn.log_sigmoid(_differences(rewards))
  losses = -jnp.sum(terms, axis=(1, 2))
  return _result(losses, rewards, features, batch, state)


def all_pairs_loss(
    features: Features, batch: SetBatch, state: Any, *, beta: float
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DPO on every pair of the list whose scores differ.

  loss_b = -mean over R_i > R_j of log sigmoid(s_i - s_j), with
  s = beta * (logps - ref).

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Zhao et al. 2024, https://arxiv.org/abs/2410.04346
  """
  rewards, _, _ = _list(features, batch, beta=beta)
  count = _pair_counts(batch)
  terms = count * jax.nn.log_sigmoid(_differences(rewards))
  total = jnp.sum(count, axis=(1, 2))
  losses = -jnp.sum(terms, axis=(1, 2)) / jnp.maximum(total, 1.0)
  return _result(losses, rewards, features, batch, state)


def best_vs_rest_loss(
    features: Features, batch: SetBatch, state: Any, *, beta: float
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DPO on every pair of the chosen and a negative; no scores needed.

  loss_b = -mean over the negatives j of log sigmoid(s_0 - s_j), with
  s = beta * (logps - ref).

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.

  Returns:
    losses: [B] nats, not reduced. 0 without gradient on rows without a valid
      negative.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Zhao et al. 2024, https://arxiv.org/abs/2410.04346
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  count = jnp.where(weights.negatives(batch), _counts(batch), 0.0)
  terms = count * jax.nn.log_sigmoid(rewards[:, :1] - rewards)
  losses = -jnp.sum(terms, axis=1) / jnp.maximum(jnp.sum(count, axis=1), 1.0)
  return losses, implicit.preference_aux(rewards, features.logps, batch), state


def pointwise_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    form: str,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Regression of the implicit rewards on the scores, without comparison.

  mse: loss_b = sum_i (R_i - s_i)^2. sigmoid:
  loss_b = -sum_i [R_i log sigmoid(s_i) + (1 - R_i) log sigmoid(-s_i)], with
  s = beta * (logps - ref). Needs no contrast.

  Args:
    features: logps [B, J].
    batch: [B, J]; anchor "ref", `scores`: probabilities under `sigmoid`, which
      cuts them to [0, 1], as it is unbounded below for others.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    form: "mse" or "sigmoid".

  Returns:
    losses: [B], not reduced. 0 where no candidate has a known score.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Liu et al. 2024 (LiPO), Eq. 9 and 10, https://arxiv.org/abs/2402.01878
  """
  rewards, listed, scores = _list(features, batch, beta=beta)
  if form == "mse":
    terms = (scores - rewards) ** 2
  else:
    target = jnp.clip(scores, 0.0, 1.0)
    terms = -target * jax.nn.log_sigmoid(rewards)
    terms = terms - (1.0 - target) * jax.nn.log_sigmoid(-rewards)
  losses = jnp.sum(jnp.where(listed, _counts(batch) * terms, 0.0), axis=1)
  return losses, implicit.preference_aux(rewards, features.logps, batch), state


def rrhf_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    sft_weight: float,
    length_power: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """RRHF: a hinge on every wrongly ranked pair, and likelihood of the chosen.

  loss_b = sum over R_i > R_j of max(0, p_j - p_i) - sft_weight * logps_0 / n_0,
  with p = logps / n^length_power and n the number of tokens.

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0; `scores`, `lengths`.
    state: passed through.
    sft_weight: of the chosen completion's negative log-likelihood per token,
      which the paper sums and the authors' code averages, >= 0.
    length_power: 1 ranks by the mean over tokens, 0 by the sum.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`; rewards are p.
    state: as given.

  References:
    Yuan et al. 2023, https://arxiv.org/abs/2304.05302
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  logps = implicit.masked(features.logps, batch)
  lengths = jnp.maximum(batch.lengths, 1)
  rewards = logps / lengths**length_power
  hinges = _pair_counts(batch) * jax.nn.relu(-_differences(rewards))
  losses = jnp.sum(hinges, axis=(1, 2))
  losses = losses - sft_weight * logps[:, 0] / lengths[:, 0]
  return _result(losses, rewards, features, batch, state)


def _list(features, batch, *, beta):
  """Rewards, the mask of the list and its scores, 0 outside; all [B, J]."""
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  listed = _listed(batch)
  scores = jnp.where(listed, batch.scores, 0.0).astype(rewards.dtype)
  return rewards, listed, scores


def _listed(batch: SetBatch) -> jax.Array:
  """[B, J] bool, True on candidates in the list."""
  mask = jnp.asarray(batch.candidate_mask)
  own = batch.candidate_id != MISMATCHED_ID
  known = ~jnp.isnan(batch.scores)
  return mask & mask[:, :1] & own & known


def _above(batch: SetBatch) -> jax.Array:
  """[B, J, J] bool, True where both are listed and i scores above j."""
  listed, scores = _listed(batch), jnp.asarray(batch.scores)
  both = listed[:, :, None] & listed[:, None, :]
  return both & (scores[:, :, None] > scores[:, None, :])


def _counts(batch: SetBatch) -> jax.Array:
  """[B, J] samples that a candidate stands for, as floats."""
  count = jnp.maximum(batch.multiplicity, 1)
  return count.astype(jnp.result_type(float))


def _pair_counts(batch: SetBatch) -> jax.Array:
  """[B, J, J] pairs of samples of which i scores above j, 0 elsewhere."""
  count = _counts(batch)
  return jnp.where(
      _above(batch), count[:, :, None] * count[:, None, :], 0.0
  )


def _differences(values: Array) -> jax.Array:
  """[B, J, J] values_i - values_j."""
  return values[:, :, None] - values[:, None, :]


def _log_weights(values: Array, batch: SetBatch, listed: Array) -> jax.Array:
  """[B, J] log softmax of values + log m over the list, -inf outside it."""
  logits = values + jnp.log(_counts(batch))
  some = jnp.any(listed, axis=1, keepdims=True)
  logits = jnp.where(listed, logits, jnp.where(some, -jnp.inf, 0.0))
  return jax.nn.log_softmax(logits, axis=1)


def _result(losses, rewards, features, batch, state):
  """The return value of a loss on lists, 0 where there is no contrast."""
  contrast = jnp.any(_above(batch), axis=(1, 2))
  aux = implicit.preference_aux(rewards, features.logps, batch)
  aux = {name: jnp.where(contrast, x, 0.0) for name, x in aux.items()}
  return jnp.where(contrast, losses, 0.0), aux, state
