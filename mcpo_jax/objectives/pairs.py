"""What losses on one pair share: slot 0 chosen, slot 1 rejected."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mcpo_jax.kernels import weights
from mcpo_jax.objectives import implicit
from mcpo_jax.types import Array, Features, SetBatch

# Exponents of exponential losses are clipped at plus and minus this: past it
# the exponential is constant, without gradient, and float32 holds it.
MAX_EXPONENT = 60.0
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


def split(values: Array, batch: SetBatch) -> tuple[jax.Array, jax.Array]:
  """[B] slot 0 and [B] slot 1, both 0 without gradient without a pair."""
  values = jnp.where(valid(batch)[:, None], values, 0.0)
  return values[:, 0], values[:, 1]


def margins(values: Array, batch: SetBatch) -> jax.Array:
  """[B] slot 0 less slot 1, 0 without gradient without a pair."""
  chosen, rejected = split(values, batch)
  return chosen - rejected


def per_token(values: Array, batch: SetBatch) -> jax.Array:
  """[B, J] values divided by the completions' numbers of tokens."""
  return values / jnp.maximum(batch.lengths, 1)


def logistic(margins: Array, *, label_smoothing: float = 0.0) -> jax.Array:
  """-(1 - e) log sigmoid(margins) - e log sigmoid(-margins)."""
  losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)
  return losses - label_smoothing * jax.nn.log_sigmoid(-margins)


def exp(exponents: Array) -> jax.Array:
  """e to the `exponents`, clipped at `MAX_EXPONENT`."""
  return jnp.exp(jnp.clip(exponents, -MAX_EXPONENT, MAX_EXPONENT))


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
