"""Implicit rewards of a gathered batch and their statistics.

Slot 0 is the chosen completion, negatives are the slots of role -1; J slots.
"""

import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.types import Array, Features, SetBatch


def implicit_rewards(
    features: Features, batch: SetBatch, *, beta: float
) -> jax.Array:
  """[B, J] r = beta * (logps - ref), 0 on masked slots, whatever stands there.

  The reference is a constant: no gradient flows to it.
  """
  reference = jax.lax.stop_gradient(jnp.asarray(batch.anchors["ref"]))
  return beta * (
      masked(features.logps, batch) - masked(reference, batch)
  )


def masked(values: Array, batch: SetBatch) -> jax.Array:
  """[B, J] `values`, 0 and without gradient on masked slots."""
  return jnp.where(batch.candidate_mask, values, 0.0)


def preference_aux(
    rewards: Array, logps: Array, batch: SetBatch
) -> dict[str, jax.Array]:
  """Per-example statistics for logs. No gradient flows through them.

  Args:
    rewards: [B, J] what the loss compares.
    logps: [B, J] nats, summed over tokens.
    batch: [B, J].

  Returns:
    name -> [B]. What concerns the rejected is the mean over the negatives,
    all of them 0 where `candidates/negatives`, their number, is 0.
  """
  negative = weights.negatives(batch)
  count = jnp.sum(negative, axis=1)

  def mean(values):
    total = jnp.sum(jnp.where(negative, values, 0.0), axis=1)
    return total / jnp.maximum(count, 1)

  margins = rewards[:, :1] - rewards
  aux = {
      "rewards/chosen": jnp.where(count > 0, rewards[:, 0], 0.0),
      "rewards/rejected": mean(rewards),
      "rewards/margins": mean(margins),
      "rewards/accuracies": mean(jnp.where(margins > 0, 1.0, 0.0)),
      "logps/chosen": jnp.where(count > 0, masked(logps, batch)[:, 0], 0.0),
      "logps/rejected": mean(logps),
      "candidates/negatives": count.astype(rewards.dtype),
  }
  return jax.lax.stop_gradient(aux)
