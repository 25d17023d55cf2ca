"""What losses on one pair share: slot 0 chosen, slot 1 rejected."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import Array, Features, SetBatch

_PER_SET = ("example_id", "visit", "row")  # fields of SetBatch without slots


def take_pair(
    features: Features, batch: SetBatch
) -> tuple[Features, SetBatch]:
  """Cuts [B, J], J >= 2, to slots 0 and 1; further slots go unread.

  Raises:
    AssertionError: at trace time, on other shapes.
  """
  chex.assert_rank(features.logps, 2)
  chex.assert_equal_shape([features.logps, batch.role])
  chex.assert_axis_dimension_gteq(features.logps, 1, 2)
  cut = lambda x: x[:, :2]
  batch = SetBatch(**{
      name: x if name in _PER_SET else jax.tree.map(cut, x)
      for name, x in batch._asdict().items()
  })
  return jax.tree.map(cut, features), batch


def valid(batch: SetBatch) -> jax.Array:
  """[B] bool, True where slot 1 is a valid negative of a valid slot 0."""
  return weights.negatives(batch)[:, 1]


def margins(values: Array, batch: SetBatch) -> jax.Array:
  """[B] slot 0 less slot 1 of [B, 2], 0 without gradient without a pair."""
  return jnp.where(valid(batch), values[:, 0] - values[:, 1], 0.0)


def result(
    losses: Array,
    rewards: Array,
    features: Features,
    batch: SetBatch,
    state: Any,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """The return value of a loss on pairs: losses [B], 0 where there is none.

  `losses` must be finite there, or the gradient is not.
  """
  losses = jnp.where(valid(batch), losses, 0.0)
  return losses, implicit.preference_aux(rewards, features.logps, batch), state
