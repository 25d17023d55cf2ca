"""Losses of several rounds on one pair: slot 0 chosen, slot 1 rejected.

The anchor "prev" is the policy of the round before, which wrote the
completions; in the first round that is the reference. Rows without a valid
pair have loss 0 and no gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.objectives import implicit, pairs, pairwise
from mcpo_jax.types import Array, Features, SetBatch

SPPO_FORMS = ("hard", "win_rate")


def sppo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    form: str,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SPPO: every log-ratio is drawn to its completion's win rate.

  With d = logps - prev and P the rate at which a completion wins against
  samples of the policy of the round before:

    hard      loss_b = (d_0 - 1 / (2 beta))^2 + (d_1 + 1 / (2 beta))^2, which
              takes P as 1 and 0
    win_rate  loss_b = 1/2 sum over both of (d - (P - 1/2) / beta)^2

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "prev"; for `win_rate` P in `scores`, in [0, 1]. A
      pair with a score that is unknown or infinite counts as no pair.
    state: passed through.
    beta: 1 / eta of the paper, > 0.
    form: `hard` or `win_rate`.

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are beta * d.
    state: as given.

  Raises:
    ValueError: at trace time, on an unknown form.

  References:
    Wu et al. 2024, https://arxiv.org/abs/2405.00675
  """
  if form not in SPPO_FORMS:
    raise ValueError(f"unknown form {form!r}, one of {SPPO_FORMS}")
  features, batch = pairs.take_pair(features, batch)
  batch = _against(batch, batch.anchors["prev"])
  ratios = implicit.implicit_rewards(features, batch, beta=1.0)
  if form == "hard":
    rates = jnp.array([[1.0, 0.0]], ratios.dtype)
    factor = 1.0
  else:
    batch = _with_scores_only(batch)
    scores = _scores(features, batch)
    rates = jnp.where(pairs.valid(batch)[:, None], scores, 0.5)
    factor = 0.5
  squares = (ratios - (rates - 0.5) / beta) ** 2
  losses = factor * jnp.sum(squares, axis=1)
  return pairs.result(losses, beta * ratios, features, batch, state)


def inpo_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    ratio: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """INPO: IPO against a geometric mixture of the reference and "prev".

  loss_b = (h - 1 / (2 beta))^2, h = d_0 - d_1, with
  d = logps - ratio * ref - (1 - ratio) * prev, summed over tokens.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchors "ref" and "prev".
    state: passed through.
    beta: eta of the paper, > 0.
    ratio: tau / eta of the paper, the reference's share, in [0, 1].

  Returns:
    losses: [B], not reduced.
    aux: see `implicit.preference_aux`, of slot 1; rewards are beta * d.
    state: as given.

  References:
    Zhang et al. 2024, Algorithm 1, https://arxiv.org/abs/2407.00617
  """
  ref, prev = batch.anchors["ref"], batch.anchors["prev"]
  batch = _against(batch, ratio * ref + (1.0 - ratio) * prev)
  return pairwise.ipo_loss(
      features, batch, state, beta=beta, length_average=False
  )


def dno_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """DNO: DPO against "prev" with soft labels from the scores.

  loss_b = -s log sigmoid(r_0 - r_1) - (1 - s) log sigmoid(r_1 - r_0), with
  r = beta * (logps - prev) and s = sigmoid of the gap in scores.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "prev"; `scores`: the reward of the round, in the
      paper the rate of wins against "prev". A pair with a score that is
      unknown or infinite counts as no pair.
    state: passed through.
    beta: eta of the paper, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Rosset et al. 2024, Algorithm 1, https://arxiv.org/abs/2404.03715
  """
  features, batch = pairs.take_pair(features, batch)
  batch = _with_scores_only(_against(batch, batch.anchors["prev"]))
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  margins = pairs.margins(rewards, batch)
  gaps = pairs.margins(_scores(features, batch), batch)
  losses = jax.nn.sigmoid(gaps) * pairs.logistic(margins)
  losses = losses + jax.nn.sigmoid(-gaps) * pairs.logistic(-margins)
  return pairs.result(losses, rewards, features, batch, state)


def spin_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """SPIN with the logistic loss: DPO against "prev".

  The chosen is the target of supervised fine-tuning, the rejected a sample of
  the policy of the round before.

  Args:
    features: logps [B, J], J >= 2.
    batch: [B, J]; anchor "prev".
    state: passed through.
    beta: lambda of the paper, > 0.

  Returns:
    losses: [B] nats, not reduced.
    aux: see `implicit.preference_aux`, of slot 1.
    state: as given.

  References:
    Chen et al. 2024, Eq. 4.7, https://arxiv.org/abs/2401.01335
  """
  batch = _against(batch, batch.anchors["prev"])
  return pairwise.dpo_loss(features, batch, state, beta=beta)


def _against(batch: SetBatch, anchor: Array) -> SetBatch:
  """The batch with `anchor` [B, J] in the place of the reference."""
  return batch._replace(anchors=batch.anchors | {"ref": anchor})


def _with_scores_only(batch):
  """[B, 2], no pair where a score is unknown or infinite."""
  known = jnp.all(jnp.isfinite(batch.scores), axis=1, keepdims=True)
  return batch._replace(role=jnp.where(known, batch.role, 0))


def _scores(features, batch):
  """[B, J] external scores, constants, as precise as the log-probabilities."""
  scores = jnp.asarray(batch.scores, features.logps.dtype)
  return jax.lax.stop_gradient(scores)
