"""The decoder: the forward pass on streams, prefill and decoding.

Pure functions of a nested dict of parameters (parameters.py), whose arrays are
stacked over the layers: one `lax.scan` runs over them, and what differs from
layer to layer (window, RoPE base) is scanned beside them.

Letters beside those of types.py: H query heads, N key-value heads, E head
width, R rows of a cache, L layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import sharding
from mcpo_jax.models import attention, parameters, rope
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Params, Streams

PARAM_RULES = parameters.PARAM_RULES
init_params = parameters.init_params
param_shapes = parameters.param_shapes

REMAT = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(
        body,
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),
}


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
  return probed_states(
      params, config, streams, _unseen, None,
      compute_dtype=compute_dtype, remat=remat,
  )[0]


def probed_states(
    params: Params,
    config: ModelConfig,
    streams: Streams,
    probe: Callable,
    probe_weights: Any,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
  """`hidden_states`, and what a probe reads after each layer.

  The probe runs inside the scan over the layers, so that the hidden states of
  all layers never exist at once in the forward pass.

  Args:
    params, config, streams: as of hidden_states.
    probe: (x [S, T, D], the layer's slice of probe_weights) -> arrays; x is
      the residual stream after the layer.
    probe_weights: tree of arrays [L, ...].
    compute_dtype, remat: as of hidden_states.

  Returns:
    [S, T, D] as hidden_states, and what the probe gave, stacked over layers.
  """
  slots = attention.Slots(
      streams.positions, streams.prompt_slot, streams.candidate_slot
  )
  x = _embed(params, config, streams.tokens, compute_dtype)
  attend = _stream_attention(config, slots, keep=False)
  x, _, _, probed = _run_layers(
      params, config, x, streams.positions, attend, (), remat,
      probe, probe_weights,
  )
  return x, probed


def head_logits(
    params: Params, config: ModelConfig, hidden: jax.Array
) -> jax.Array:
  """Logits [..., V] of hidden states [..., D], in float32 at least."""
  wide = jnp.promote_types(hidden.dtype, jnp.float32)
  if config.tied_head:
    kernel = params["embed"]["embedding"].T
  else:
    kernel = params["lm_head"]["kernel"]
  logits = _matmul(hidden, kernel, wide)
  if config.final_softcap is not None:
    logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
  return logits


def _embed(params, config, tokens, dtype):
  x = params["embed"]["embedding"][tokens].astype(dtype)
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


def _unseen(x, weights):
  """The probe that reads nothing."""


def _run_layers(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    attend: Callable,
    state: Any,
    remat: str,
    probe: Callable = _unseen,
    probe_weights: Any = None,
) -> tuple[jax.Array, Any, Any, Any]:
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
    probe, probe_weights: see probed_states.

  Returns:
    hidden states [..., D], the last state, and what attend and the probe gave,
    stacked.
  """
  tables = rope.tables(
      config, positions, jnp.promote_types(x.dtype, "float32")
  )
  windows = np.array(config.windows, np.int32)
  base_of_layer = np.zeros_like(windows)
  if len(rope.bases(config)) > 1:
    base_of_layer[:] = config.local_layers
  scanned = (
      params["layers"], np.arange(len(windows)), windows, base_of_layer,
      probe_weights,
  )

  def body(carry, layer):
    x, state = carry
    weights, index, window, base, of_probe = layer
    x = _pin(x)
    cos, sin = (
        jax.lax.dynamic_index_in_dim(table, base, keepdims=False)
        for table in tables
    )
    h = _pin(_norm(x, weights["attention_norm"], config))
    q, k, v = _project_heads(weights["attention"], config, h, cos, sin)
    h, state, kept = attend(q, k, v, window, index, state)
    h = h.reshape(*h.shape[:-2], -1)
    h = _pin(_linear(h, weights["attention"]["o_proj"]))
    if config.post_norms:
      h = _norm(h, weights["post_attention_norm"], config)
    x = x + h
    h = _pin(_norm(x, weights["mlp_norm"], config))
    h = _pin(_mlp(h, weights["mlp"], config))
    if config.post_norms:
      h = _norm(h, weights["post_mlp_norm"], config)
    x = x + h
    return (x, state), (kept, probe(x, of_probe))

  (x, state), (kept, probed) = jax.lax.scan(
      REMAT[remat](body), (x, state), scanned
  )
  return _pin(_norm(x, params["final_norm"], config)), state, kept, probed


def _pin(x):
  """Splits x [..., D], and its gradient, over the batch axes alone.

  It stands on the D side of every projection. Left to itself, XLA may split D
  over "tensor" too; a product of fewer rows than columns, whose weights are
  split over "tensor" and "fsdp", then has its rows in the wrong order on a
  mesh where all three axes are larger than 1 (jax 0.10.2).
  """
  return sharding.constrain(x, *sharding.BATCH_SPEC)


def _project_heads(weights, config, h, cos, sin):
  """Rotated queries [..., H, E] and keys [..., N, E], and values."""
  q, k, v = (
      _linear(h, weights[name]).reshape(*h.shape[:-1], -1, config.head_dim)
      for name in ("q_proj", "k_proj", "v_proj")
  )
  if config.qk_norm:
    q = _norm(q, weights["q_norm"], config)
    k = _norm(k, weights["k_norm"], config)
  return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v


def _mlp(h, weights, config):
  gate = _linear(h, weights["gate_proj"])
  gate = (
      jax.nn.silu(gate)
      if config.activation == "silu"
      else jax.nn.gelu(gate, approximate=True)
  )
  return _linear(gate * _linear(h, weights["up_proj"]), weights["down_proj"])


def _linear(x, weights):
  # Two axes: XLA:CPU is slow at a product that sums over two axes at once,
  # which the gradient of the weights would be.
  y = x.reshape(-1, x.shape[-1]) @ weights["kernel"].astype(x.dtype)
  y = y.reshape(*x.shape[:-1], -1)
  if "bias" in weights:
    y = y + _along_last(weights["bias"].astype(x.dtype), y)
  return y


def _matmul(x, kernel, dtype):
  """x [..., in] times kernel [in, out], in the dtype of x, to dtype.

  As one product of two matrices: XLA:CPU runs the backward pass of the product
  with more axes at two thirds of its speed.
  """
  y = jnp.matmul(
      x.reshape(-1, x.shape[-1]),
      kernel.astype(x.dtype),
      preferred_element_type=dtype,
  )
  return y.reshape(*x.shape[:-1], -1)


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


# --- generation ---------------------------------------------------------------


class Cache(NamedTuple):
  """Keys and values of the tokens so far; slot i holds position i."""

  keys: jax.Array  # [L, R, N, length, E]
  values: jax.Array  # [L, R, N, length, E]
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
      config.num_layers, rows, config.num_kv_heads, length, config.head_dim
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
  x, _, (keys, values), _ = _run_layers(
      params, config, x, positions, attend, (), "none"
  )
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
  cache = Cache(
      keys=cache.keys.at[..., :width, :].set(jnp.swapaxes(keys, 2, 3)),
      values=cache.values.at[..., :width, :].set(jnp.swapaxes(values, 2, 3)),
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
        whole.at[index, rows, :, positions].set(new)
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
  x, (keys, values), _, _ = _run_layers(
      params, config, x, positions, attend, (cache.keys, cache.values), "none"
  )
  cache = Cache(keys, values, (positions + 1).astype(jnp.int32))
  return head_logits(params, config, x), cache
