"""Several losses at once: weighted, or one turning into another.

All members see the same features and slots; each has a state of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.types import Array, Features, SetBatch

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]]


def mixture_loss(
    features: Features,
    batch: SetBatch,
    state: tuple[Any, ...],
    *,
    members: Sequence[tuple[float | Array, Loss]],
) -> tuple[jax.Array, dict[str, jax.Array], tuple[Any, ...]]:
  """loss_b = sum_i w_i loss_i,b.

  Args:
    features: as the members need.
    batch: [B, J], likewise.
    state: one for each member.
    members: weight > 0 and loss(features, batch, state), settings bound.

  Returns:
    losses: [B], not reduced. A row is 0 where it is 0 for every member.
    aux: of all members. Of statistics that several of them tell, those of the
      first that compares candidates.
    state: one for each member.
  """
  total, parts, states = 0.0, [], []
  for (weight, loss), own in zip(members, state, strict=True):
    losses, aux, own = loss(features, batch, own)
    total = total + weight * losses
    parts.append(aux)
    states.append(own)
  parts.sort(key=lambda aux: "candidates/negatives" not in aux)
  merged = {k: v for aux in reversed(parts) for k, v in aux.items()}
  return total, merged, tuple(states)


def blended_loss(
    features: Features,
    batch: SetBatch,
    state: tuple[Any, Any],
    *,
    members: Sequence[tuple[float, Loss]],
    progress: float | Array,
) -> tuple[jax.Array, dict[str, jax.Array], tuple[Any, Any]]:
  """loss_b = (1 - t) w_1 loss_1,b + t w_2 loss_2,b, t the share of training.

  From imitation to preference (sft->dpo): the first member is then the
  negative log-likelihood per token, see `per_token`. A stand-in for the
  temporally aware Mirror PO, whose learned weights were not published.

  Args:
    features: as the members need.
    batch: [B, J], likewise.
    state: one for each member.
    members: two of them, see `mixture_loss`.
    progress: t, updates done / num_steps, in [0, 1]; may be traced.

  Returns:
    See `mixture_loss`. Both members count in aux and state throughout.

  References:
    Alfano et al. 2024, https://arxiv.org/abs/2411.06568
  """
  (first, imitation), (second, preference) = members
  weighted = (
      ((1.0 - progress) * first, imitation), (progress * second, preference)
  )
  return mixture_loss(features, batch, state, members=weighted)


def per_token(loss: Loss) -> Loss:
  """A loss divided by the number of tokens of the chosen completion.

  For losses summed over tokens whose step divides by the number of all tokens;
  beside losses that it divides by the number of sets they would count as much
  as their completions are long.
  """
  def run(features, batch, state):
    losses, aux, state = loss(features, batch, state)
    return losses / jnp.maximum(batch.lengths[:, 0], 1), aux, state

  return run
