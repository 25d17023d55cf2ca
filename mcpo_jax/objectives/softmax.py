"""Losses over a set of negatives: ranking NCE (and MC-PO on it), CD."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import Features, SetBatch


def rnce_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    corrected: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Ranking NCE, which is Softmax-DPO; on a drawn set it is MC-PO.

  loss_b = log(1 + sum_i m_i exp(r_i - r_0)) over the negatives i, with
  r = beta * (logps - ref) and m the multiplicity. One negative of
  multiplicity 1: DPO.

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0; anchor "ref". On a drawn set the
      multiplicity is 1: the draw has used it.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    corrected: negatives come from q, see `weights.proposal_correction`; the
      difference log mu - log q is added to every r, slot 0 included.

  Returns:
    losses: [B] nats, not reduced. 0 without gradient on rows without a valid
      negative.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Chen et al. 2025, https://arxiv.org/abs/2502.04567
    Chen et al. 2024 (Softmax-DPO), https://arxiv.org/abs/2406.09215
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  logits = rewards + weights.log_counts(batch, corrected=corrected)
  excess = logits[:, 1:] - logits[:, :1]
  excess = jnp.where(weights.negatives(batch)[:, 1:], excess, -jnp.inf)
  # The chosen one's own term is exp(0): the largest is finite in every row.
  terms = jnp.pad(excess, ((0, 0), (1, 0)))
  losses = jax.nn.logsumexp(terms, axis=1)
  return losses, implicit.preference_aux(rewards, features.logps, batch), state


def cd_loss(
    features: Features,
    batch: SetBatch,
    state: Any,
    *,
    beta: float,
    include_preferred: bool,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """Contrastive divergence: -r_0 + mean over the chains of r_{y'}.

  Its gradient is an unbiased estimate of that of `rnce_loss` on the whole pool
  if the M = J - 1 chains were drawn WITH replacement by reward scores at
  temperature 1; at another temperature t, of t times that at beta / t.

  Preferred in the kernel: a chain that drew it is a masked slot and adds
  r_0 - r_0 = 0; the mean is over all M slots. Preferred left out: the term
  would be unbounded below, so it is multiplied by the constant 1 - p_0, with
  p_0 the weight of the preferred in the POOL, same scores and temperature.

  Args:
    features: logps [B, J].
    batch: [B, J], chosen in slot 0, slot 1 + m what chain m drew; anchor
      "ref", and where `include_preferred` is False the anchor
      "preferred_weight" [B, J]: p_0 of `weights.preferred_weight` on the score
      pass, the same number in every slot of a row.
    state: passed through.
    beta: inverse temperature of the implicit reward, > 0.
    include_preferred: as the kernel had it.

  Returns:
    losses: [B] nats, not reduced; a surrogate: may be negative, only its
      gradient has a meaning. 0 on rows without a valid negative.
    aux: see `implicit.preference_aux`.
    state: as given.

  References:
    Hinton 2002, Training products of experts by minimizing contrastive
    divergence; Chen et al. 2025, https://arxiv.org/abs/2502.04567
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  rewards = implicit.implicit_rewards(features, batch, beta=beta)
  moved = weights.negatives(batch)[:, 1:]
  excess = jnp.where(moved, rewards[:, 1:] - rewards[:, :1], 0.0)
  losses = jnp.mean(excess, axis=1)
  if not include_preferred:
    p_0 = jnp.asarray(batch.anchors["preferred_weight"])[:, 0]
    losses = losses * jax.lax.stop_gradient(1.0 - p_0)
  return losses, implicit.preference_aux(rewards, features.logps, batch), state
