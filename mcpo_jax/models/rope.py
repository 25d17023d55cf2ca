"""Rotary position embeddings: each family's frequencies, the rotation."""

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax.models.config import ModelConfig


def bases(config: ModelConfig) -> np.ndarray:
  """Inverse frequencies [bases, E / 2] float64: of full, of local layers."""
  half = np.arange(0, config.head_dim, 2) / config.head_dim
  scaling = dict(config.rope_scaling)
  inverse = config.rope_theta**-half
  if scaling.get("rope_type") == "linear":
    inverse = inverse / scaling["factor"]
  elif scaling.get("rope_type") == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * np.pi)
    # Few turns within the old context: stretched; many: kept; between: mixed.
    mix = np.clip((turns - low) / (high - low), 0.0, 1.0)
    inverse = inverse * (mix + (1 - mix) / scaling["factor"])
  if config.local_rope_theta is None:
    return inverse[None]
  return np.stack([inverse, config.local_rope_theta**-half])


def tables(
    config: ModelConfig, positions: jax.Array, dtype
) -> tuple[jax.Array, jax.Array]:
  """cos and sin [bases, ..., E / 2] of positions [...] int32, in dtype."""
  inverse = bases(config).astype(dtype)
  inverse = inverse.reshape(len(inverse), *(1,) * positions.ndim, -1)
  angles = positions[None, ..., None].astype(dtype) * inverse
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """x [..., heads, E] turned by cos, sin [..., E / 2]: half against half."""
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
