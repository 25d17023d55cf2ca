"""Losses on the margin of one pair: slot 0 chosen, slot 1 rejected.

Further slots go unread. In all of them d = logps - ref, r = beta * d and
h = d_0 - d_1. Rows without a valid pair have loss 0 and no gradient.
"""

import math
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

  loss_b = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

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
  losses = pairs.logistic(margins, label_smoothing=label_smoothing)
  return pairs.result(losses, rewards, features, batch, state)


def robust_dpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Robust DPO: unbiased if a share e of the labels is flipped.

  loss_b = (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e).
  May be negative. e = 0: DPO.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    label_smoothing: e, the share of flipped labels, in [0, 0.5).

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  margins = pairs.margins(rewards, batch)
  losses = label_smoothing * jax.nn.log_sigmoid(-margins)
  losses = losses - (1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)
  losses = losses / (1.0 - 2.0 * label_smoothing)
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

  d is summed over tokens as in the paper, or divided by the number of tokens,
  which its authors have confirmed to be meant.

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
    ratios = pairs.per_token(ratios, batch)
  losses = (pairs.margins(ratios, batch) - 1.0 / (2.0 * beta)) ** 2
  return pairs.result(losses, beta * ratios, features, batch, state)


def hinge_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Hinge loss on the implicit rewards: loss_b = max(0, 1 - beta h).

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: one over the margin in h that is asked for, > 0.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  losses = jax.nn.relu(1.0 - pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def rso_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    form: str,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """RSO: the logistic loss of DPO, or the hinge loss, on accepted samples.

  What makes it RSO is its data: pairs of completions that rejection sampling
  from the SFT model has accepted. The loss takes the pairs as they come.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: scale of h (gamma of the paper), > 0.
    form: `sigmoid` or `hinge`.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Liu et al. 2023, https://arxiv.org/abs/2309.06657
  """
  loss_fn = {"sigmoid": dpo_loss, "hinge": hinge_loss}[form]
  return loss_fn(features, batch, state, beta=beta)


def exo_pair_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """EXO on a pair: reverse KL to the labels, smoothed by e.

  loss_b = KL(q || p) of two coins, q = sigmoid(beta h) and p = 1 - e.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    label_smoothing: e, in (0, 0.5); at 0 the divergence is infinite.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Ji et al. 2024, Eq. 16, https://arxiv.org/abs/2402.00856
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  log_odds = math.log1p(-label_smoothing) - math.log(label_smoothing)
  losses = _coin_kl(pairs.margins(rewards, batch), log_odds)
  return pairs.result(losses, rewards, features, batch, state)


def reward_rpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    reward_scale: float,
    form: str,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Reward-aware RPO: beta h shall follow the gap of the external scores.

  With a = sigmoid(s (R_0 - R_1)) and b = sigmoid(beta h), both chances of a
  coin, loss_b is KL(a || b), KL(b || a), or (beta h - s (R_0 - R_1))^2. A pair
  with a score that is unknown or infinite counts as no pair.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref"; `scores`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    reward_scale: s, > 0.
    form: `backward` for KL(a || b), `forward` for KL(b || a), `squared`.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Adler et al. 2024 (Nemotron-4), Section 3.3.2,
      https://arxiv.org/abs/2406.11704
  """
  features, batch = pairs.take_pair(features, batch)
  known = jnp.all(jnp.isfinite(batch.scores), axis=1, keepdims=True)
  batch = batch._replace(role=jnp.where(known, batch.role, 0))
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  margins = pairs.margins(rewards, batch)
  scores = jax.lax.stop_gradient(jnp.asarray(batch.scores, rewards.dtype))
  gaps = pairs.margins(reward_scale * scores, batch)
  losses = {
      "backward": lambda: _coin_kl(gaps, margins),
      "forward": lambda: _coin_kl(margins, gaps),
      "squared": lambda: (margins - gaps) ** 2,
  }[form]()
  return pairs.result(losses, rewards, features, batch, state)


def r_dpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    length_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """R-DPO: DPO on a reward with a term in the length.

  loss_b = -log sigmoid(r_0 - r_1), r = beta * d + length_weight * length. A
  long chosen one is so explained by its length, and pushed up less.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref"; `lengths`.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    length_weight: per token; > 0 works against length, < 0 for it.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Park et al. 2024, https://arxiv.org/abs/2403.19159
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  rewards = rewards + length_weight * batch.lengths
  losses = pairs.logistic(pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def sigmoid_norm_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Length-normalised DPO: loss_b = -log sigmoid(r_0 - r_1), r per token.

  r = beta * d / length.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref"; `lengths`.
    state: passed through.
    beta: inverse temperature of the implicit reward per token, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Lambert et al. 2024 (Tulu 3), https://arxiv.org/abs/2411.15124
  """
  features, batch = pairs.take_pair(features, batch)
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  rewards = pairs.per_token(rewards, batch)
  losses = pairs.logistic(pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def f_dpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    divergence: str,
    alpha: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """f-DPO: DPO whose regulariser is another divergence from the reference.

  loss_b = -log sigmoid(r_0 - r_1), r = beta * f'(u) with u = exp(d):
  reverse KL d, so DPO; forward KL -1 / u; Jensen-Shannon log(2 u / (1 + u));
  alpha -u^-alpha / alpha, which is forward KL at 1 and tends to reverse KL
  at 0, up to a constant. Exponents are clipped at `pairs.MAX_EXPONENT`.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    divergence: `reverse_kl`, `forward_kl`, `js` or `alpha`.
    alpha: in (0, 1); read by `alpha` only.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are r.
    state: as given.

  References:
    Wang et al. 2023, Table 1, https://arxiv.org/abs/2309.16240
  """
  features, batch = pairs.take_pair(features, batch)
  ratios = implicit.implicit_rewards(features, batch, beta=1.0)
  slopes = {
      "reverse_kl": lambda: ratios,
      "forward_kl": lambda: -pairs.exp(-ratios),
      "js": lambda: math.log(2.0) + jax.nn.log_sigmoid(ratios),
      "alpha": lambda: -pairs.exp(-alpha * ratios) / alpha,
  }[divergence]()
  losses = pairs.logistic(pairs.margins(beta * slopes, batch))
  return pairs.result(losses, beta * slopes, features, batch, state)


def mirror_po_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    potential: str,
    q: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Mirror PO: DPO whose regulariser is another mirror map.

  loss_b = -log sigmoid(r_0 - r_1), r = beta (g(pi) - g(ref)) for the inverse
  potential g of a sequence's probability: log, so DPO; or Tsallis
  g(x) = q x^(q - 1) / (q - 1), which tends to log as q to 1. There x is held in
  [1e-8, 1 - 1e-8], as log x before the power: most sequences are less likely,
  and move nothing.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "ref".
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    potential: `log` or `tsallis`.
    q: in (0, 1); read by `tsallis` only.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are r.
    state: as given.

  References:
    Alfano et al. 2024, https://arxiv.org/abs/2411.06568
  """
  features, batch = pairs.take_pair(features, batch)

  def tsallis(logps):
    logps = jnp.clip(logps, math.log(1e-8), math.log1p(-1e-8))
    return q / (q - 1.0) * jnp.exp((q - 1.0) * logps)

  inverse = {"log": lambda logps: logps, "tsallis": tsallis}[potential]
  reference = implicit.masked(jnp.asarray(batch.anchors["ref"]), batch)
  reference = jax.lax.stop_gradient(inverse(reference))
  policy = inverse(implicit.masked(features.logps, batch))
  rewards = beta * (policy - reference)
  losses = pairs.logistic(pairs.margins(rewards, batch))
  return pairs.result(losses, rewards, features, batch, state)


def _coin_kl(first, second):
  """[B] KL of two coins, given their log-odds."""
  log = jax.nn.log_sigmoid
  heads = jax.nn.sigmoid(first) * (log(first) - log(second))
  return heads + jax.nn.sigmoid(-first) * (log(-first) - log(-second))
