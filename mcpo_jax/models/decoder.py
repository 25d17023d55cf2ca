"""The decoder: parameters, the forward pass on streams, prefill and decoding.

The parameters are built by Flax NNX modules whose arrays are stacked over the
layers, and are taken out of them once, as a plain nested dict. All functions
here are pure functions of that dict; one `lax.scan` runs over the layers, and
what differs from layer to layer (window, RoPE base) is scanned beside them.

Letters beside those of types.py: H query heads, N key-value heads, E head
width, R rows of a cache, L layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from mcpo_jax import sharding
from mcpo_jax.models import attention
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Params, Streams

PARAM_RULES = [
    (r"embed/embedding$", P("fsdp", "tensor")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"layers/.*(q|k|v|gate|up)_proj/kernel$", P(None, "fsdp", "tensor")),
    (r"layers/.*(o|down)_proj/kernel$", P(None, "tensor", "fsdp")),
    (r"layers/.*(q|k|v|gate|up)_proj/bias$", P(None, "tensor")),
    (r"layers/.*(o|down)_proj/bias$", P()),
    (r"norm/scale$", P()),
]
REMAT = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(
        body,
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),
}


# --- parameters ---------------------------------------------------------------


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
    if not config.tied_head:
      self.lm_head = Projection(rngs, (width, vocab), dtype, std=std)


def _normal(rngs, shape, dtype, std):
  return std * jax.random.normal(rngs.params(), shape, dtype)


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


# --- the forward pass ---------------------------------------------------------


def hidden_states(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
  """The last hidden state of every token, after the final norm.

  Args:
    params: from init_params or hf.load_params.
    config: static.
    streams: [S, T] each.
    compute_dtype: of products and activations; norms and softmax are computed
      in float32 at least.
    remat: "none", "dots" (keep products) or "full" (keep each layer's input).

  Returns:
    [S, T, D] in compute_dtype; finite, of no meaning, on padding.
  """
  slots = attention.Slots(
      streams.positions, streams.prompt_slot, streams.candidate_slot
  )
  x = _embed(params, config, streams.tokens, compute_dtype)
  attend = _stream_attention(config, slots, keep=False)
  x, _, _ = _run_layers(
      params, config, x, streams.positions, attend, (), remat
  )
  return x


def head_logits(
    params: Params, config: ModelConfig, hidden: jax.Array
) -> jax.Array:
  """Logits [..., V] of hidden states [..., D], in float32 at least."""
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  if config.tied_head:
    kernel = params["embed"]["embedding"].T
  else:
    kernel = params["lm_head"]["kernel"]
  logits = jnp.matmul(
      hidden, kernel.astype(hidden.dtype), preferred_element_type=wide
  )
  if config.final_softcap is not None:
    logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
  return logits


def _embed(params, config, tokens, dtype):
  x = params["embed"]["embedding"].astype(dtype)[tokens]
  if config.embedding_scale:
    x = x * jnp.asarray(config.hidden_size**0.5, dtype)
  return x


def _stream_attention(config, slots, *, keep):
  """Attention within streams; keep hands the keys and values back."""

  def attend(q, k, v, window, index, state):
    out = attention.attend(
        q, k, v, slots, window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )
    return out, state, (k, v) if keep else None

  return attend


def _run_layers(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    attend: Callable,
    state: Any,
    remat: str,
) -> tuple[jax.Array, Any, Any]:
  """All layers and the final norm.

  Args:
    params: all parameters.
    config: static.
    x: [..., D] embedded tokens.
    positions: [...] int32.
    attend: (q [..., H, E], k [..., N, E], v, window, layer index, state) ->
      (out [..., H, E], state, what to stack over the layers).
    state: what attend carries from layer to layer.
    remat: a key of REMAT.

  Returns:
    hidden states [..., D], the last state, what attend gave, stacked.
  """
  rope = _rope_tables(config, positions, jnp.promote_types(x.dtype, "float32"))
  windows = np.array(config.windows, np.int32)
  base_of_layer = np.zeros_like(windows)
  if len(_rope_bases(config)) > 1:
    base_of_layer[:] = config.local_layers
  scanned = (params["layers"], np.arange(len(windows)), windows, base_of_layer)

  def body(carry, layer):
    x, state = carry
    weights, index, window, base = layer
    x = sharding.constrain(x, *sharding.BATCH_SPEC)
    cos, sin = (
        jax.lax.dynamic_index_in_dim(table, base, keepdims=False)
        for table in rope
    )
    h = _norm(x, weights["attention_norm"], config)
    q, k, v = _project_heads(weights["attention"], config, h, cos, sin)
    h, state, kept = attend(q, k, v, window, index, state)
    h = _linear(
        h.reshape(*h.shape[:-2], -1), weights["attention"]["o_proj"]
    )
    if config.post_norms:
      h = _norm(h, weights["post_attention_norm"], config)
    x = x + h
    h = _mlp(_norm(x, weights["mlp_norm"], config), weights["mlp"], config)
    if config.post_norms:
      h = _norm(h, weights["post_mlp_norm"], config)
    return (x + h, state), kept

  (x, state), kept = jax.lax.scan(REMAT[remat](body), (x, state), scanned)
  return _norm(x, params["final_norm"], config), state, kept


def _project_heads(weights, config, h, cos, sin):
  """Rotated queries [..., H, E] and keys [..., N, E], and values."""
  q, k, v = (
      _linear(h, weights[name]).reshape(*h.shape[:-1], -1, config.head_dim)
      for name in ("q_proj", "k_proj", "v_proj")
  )
  if config.qk_norm:
    q = _norm(q, weights["q_norm"], config)
    k = _norm(k, weights["k_norm"], config)
  return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _mlp(h, weights, config):
  gate = _linear(h, weights["gate_proj"])
  gate = (
      jax.nn.silu(gate)
      if config.activation == "silu"
      else jax.nn.gelu(gate, approximate=True)
  )
  return _linear(gate * _linear(h, weights["up_proj"]), weights["down_proj"])


def _linear(x, weights):
  y = x @ weights["kernel"].astype(x.dtype)
  if "bias" in weights:
    y = y + _along_last(weights["bias"].astype(x.dtype), y)
  return y


def _norm(x, weights, config):
  """RMSNorm over the last axis, in float32 at least."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  scale = weights["scale"].astype(wide.dtype)
  if config.norm_offset:
    scale = 1.0 + scale
  mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  wide = wide * jax.lax.rsqrt(mean_square + config.rms_norm_eps)
  return (wide * _along_last(scale, x)).astype(x.dtype)


def _along_last(vector, x):
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _rope_bases(config: ModelConfig) -> np.ndarray:
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
  bases = [inverse]
  if config.local_rope_theta is not None:
    bases.append(config.local_rope_theta**-half)
  return np.stack(bases)


def _rope_tables(config, positions, dtype):
  """cos and sin [bases, ..., E / 2] of positions [...]."""
  bases = _rope_bases(config).astype(dtype)
  bases = bases.reshape(len(bases), *(1,) * positions.ndim, -1)
  angles = positions[None, ..., None].astype(dtype) * bases
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, cos, sin):
  """RoPE on x [..., heads, E], halves against halves."""
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


# --- generation ---------------------------------------------------------------


class Cache(NamedTuple):
  """Keys and values of the tokens so far; slot i holds position i."""

  keys: jax.Array  # [L, R, length, N, E]
  values: jax.Array  # [L, R, length, N, E]
  lengths: jax.Array  # [R] int32, tokens of each row in the cache


def init_cache(
    config: ModelConfig, rows: int, length: int, dtype: Any = jnp.float32
) -> Cache:
  """An empty cache. Its dtype is the dtype that prefill and decode compute in.

  Args:
    config: the decoder.
    rows: sequences.
    length: tokens of a sequence, prompt and completion together.
    dtype: of keys and values.
  """
  shape = (
      config.num_layers, rows, length, config.num_kv_heads, config.head_dim
  )
  return Cache(
      keys=jnp.zeros(shape, dtype),
      values=jnp.zeros(shape, dtype),
      lengths=jnp.zeros((rows,), jnp.int32),
  )


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
  """Runs the prompts.

  Args:
    params: the parameters.
    config: static.
    tokens: [R, P] int32, padded on the right; P at most the cache's length.
    lengths: [R] int32, tokens of each prompt, at least 1.
    cache: from init_cache.

  Returns:
    logits [R, V] float32 after the last token of each prompt, and the cache.
  """
  rows, width = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(width)[None], (rows, width))
  slots = attention.Slots(
      positions=positions,
      prompt=jnp.where(positions < lengths[:, None], 0, -1),
      candidate=jnp.full((rows, width), -1),
  )
  x = _embed(params, config, tokens, cache.keys.dtype)
  attend = _stream_attention(config, slots, keep=True)
  x, _, (keys, values) = _run_layers(
      params, config, x, positions, attend, (), "none"
  )
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
  cache = Cache(
      keys=cache.keys.at[:, :, :width].set(keys),
      values=cache.values.at[:, :, :width].set(values),
      lengths=lengths.astype(jnp.int32),
  )
  return head_logits(params, config, last), cache


def decode_step(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs one more token of every row.

  Args:
    params: the parameters.
    config: static.
    cache: holds positions 0 .. positions - 1 of each row.
    tokens: [R] int32.
    positions: [R] int32, of these tokens, below the cache's length.

  Returns:
    logits [R, V] float32 of the next token, and the cache.
  """
  rows = np.arange(len(tokens))

  def attend(q, k, v, window, index, state):
    keys, values = (
        whole.at[index, rows, positions].set(new)
        for whole, new in zip(state, (k, v))
    )
    out = attention.attend_cache(
        q,
        jax.lax.dynamic_index_in_dim(keys, index, keepdims=False),
        jax.lax.dynamic_index_in_dim(values, index, keepdims=False),
        positions,
        window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )
    return out, (keys, values), None

  x = _embed(params, config, tokens, cache.keys.dtype)
  x, (keys, values), _ = _run_layers(
      params, config, x, positions, attend, (cache.keys, cache.values), "none"
  )
  cache = Cache(keys, values, (positions + 1).astype(jnp.int32))
  return head_logits(params, config, x), cache
