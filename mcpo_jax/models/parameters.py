"""The parameters of a decoder: Flax NNX modules, stacked over the layers.

They are taken out of the modules once, as a plain nested dict.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Params

# Devices that share a stream's tokens all need the weights: each keeps a part.
_SPLIT = ("fsdp", "context")
PARAM_RULES = [
    (r"embed/embedding$", P(_SPLIT, "tensor")),
    (r"lm_head/kernel$", P(_SPLIT, "tensor")),
    (r"score/kernel$", P()),
    (r"layers/.*(q|k|v|gate|up)_proj/kernel$", P(None, _SPLIT, "tensor")),
    (r"layers/.*(o|down)_proj/kernel$", P(None, "tensor", _SPLIT)),
    (r"layers/.*(q|k|v|gate|up)_proj/lora_a$", P(None, _SPLIT)),
    (r"layers/.*(q|k|v|gate|up)_proj/lora_b$", P(None, None, "tensor")),
    (r"layers/.*(o|down)_proj/lora_a$", P(None, "tensor")),
    (r"layers/.*(o|down)_proj/lora_b$", P(None, None, _SPLIT)),
    (r"lora_scale$", P()),
    (r"layers/.*(q|k|v|gate|up)_proj/bias$", P(None, "tensor")),
    (r"layers/.*(o|down)_proj/bias$", P()),
    (r"norm/scale$", P()),
]


def init_params(
    key: jax.Array, config: ModelConfig, *, dtype: Any = jnp.float32
) -> Params:
  """Random parameters: a nested dict, layers stacked on axis 0. Jittable."""
  state = nnx.state(Decoder(nnx.Rngs(params=key), config, dtype), nnx.Param)
  return nnx.to_pure_dict(state)


def param_shapes(config: ModelConfig, *, dtype: Any = jnp.float32) -> Params:
  """The tree of init_params as ShapeDtypeStructs; nothing is allocated."""
  return jax.eval_shape(
      lambda key: init_params(key, config, dtype=dtype), jax.random.key(0)
  )


class Projection(nnx.Module):
  """kernel [L, in, out] and, if asked for, bias [L, out]."""

  def __init__(self, rngs, shape, dtype, *, std, bias=False):
    self.kernel = nnx.Param(_normal(rngs, shape, dtype, std))
    if bias:
      self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]), dtype))


class Norm(nnx.Module):
  """scale [L, width]; it starts at one, or at zero where 1 + w multiplies."""

  def __init__(self, shape, dtype, config: ModelConfig):
    self.scale = nnx.Param(
        jnp.full(shape, 0.0 if config.norm_offset else 1.0, dtype)
    )


class Embedding(nnx.Module):
  """embedding [V, D]."""

  def __init__(self, rngs, shape, dtype, *, std):
    self.embedding = nnx.Param(_normal(rngs, shape, dtype, std))


class Attention(nnx.Module):
  """Projections of attention, of all layers."""

  def __init__(self, rngs, dtype, config: ModelConfig, *, std, out_std):
    layers, width = config.num_layers, config.hidden_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    bias = config.qkv_bias
    project = lambda *shape, **kw: Projection(
        rngs, (layers, *shape), dtype, **kw
    )
    self.q_proj = project(width, queries, std=std, bias=bias)
    self.k_proj = project(width, keys, std=std, bias=bias)
    self.v_proj = project(width, keys, std=std, bias=bias)
    self.o_proj = project(queries, width, std=out_std, bias=config.out_bias)
    if config.qk_norm:
      self.q_norm = Norm((layers, config.head_dim), dtype, config)
      self.k_norm = Norm((layers, config.head_dim), dtype, config)


class MLP(nnx.Module):
  """Projections of the gated MLP, of all layers."""

  def __init__(self, rngs, dtype, config: ModelConfig, *, std, out_std):
    layers, bias = config.num_layers, config.mlp_bias
    width, hidden = config.hidden_size, config.intermediate_size
    inner, outer = (layers, width, hidden), (layers, hidden, width)
    self.gate_proj = Projection(rngs, inner, dtype, std=std, bias=bias)
    self.up_proj = Projection(rngs, inner, dtype, std=std, bias=bias)
    self.down_proj = Projection(rngs, outer, dtype, std=out_std, bias=bias)


class Layers(nnx.Module):
  """The layers, stacked on axis 0."""

  def __init__(self, rngs, dtype, config: ModelConfig):
    std = config.initializer_range
    stds = dict(std=std, out_std=std / (2 * config.num_layers) ** 0.5)
    shape = (config.num_layers, config.hidden_size)
    self.attention = Attention(rngs, dtype, config, **stds)
    self.mlp = MLP(rngs, dtype, config, **stds)
    self.attention_norm = Norm(shape, dtype, config)
    self.mlp_norm = Norm(shape, dtype, config)
    if config.post_norms:
      self.post_attention_norm = Norm(shape, dtype, config)
      self.post_mlp_norm = Norm(shape, dtype, config)


class Decoder(nnx.Module):
  """Everything that is learned."""

  def __init__(self, rngs: nnx.Rngs, config: ModelConfig, dtype):
    std = config.initializer_range
    vocab, width = config.vocab_size, config.hidden_size
    self.embed = Embedding(rngs, (vocab, width), dtype, std=std)
    self.layers = Layers(rngs, dtype, config)
    self.final_norm = Norm((width,), dtype, config)
    if config.reward_head:
      self.score = Projection(rngs, (width, 1), dtype, std=std)
    elif not config.tied_head:
      self.lm_head = Projection(rngs, (width, vocab), dtype, std=std)


def _normal(rngs, shape, dtype, std):
  # A kernel and one of the opposite direction are drawn in the same shape: XLA
  # takes about a second to compile the draw of each new shape.
  turned = shape[-2] > shape[-1]
  drawn = (*shape[:-2], *sorted(shape[-2:]))
  x = std * jax.random.normal(rngs.params(), drawn, dtype)
  return jnp.swapaxes(x, -2, -1) if turned else x
