"""The decoder: the forward pass on streams, prefill and decoding.

Pure functions of a nested dict of parameters (parameters.py), whose arrays are
stacked over the layers: one `lax.scan` runs over them, and what differs from
layer to layer (window, RoPE base) is scanned beside them. Generation runs over
unstacked layers instead: a scan would copy each layer's cache at every token.

Letters beside those of types.py: H query heads, N key-value heads, E head
width, L layers; of a cache G groups of W slots, C own tokens of each, and in
each of F parts Q pages of PAGE tokens of prompts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import sharding
from mcpo_jax.models import attention, parameters, rope, spans
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Params, Streams

PARAM_RULES = parameters.PARAM_RULES
init_params = parameters.init_params
param_shapes = parameters.param_shapes

_policies = jax.checkpoint_policies
REMAT = {
    "none": lambda body: body,
    "dots": lambda body: jax.checkpoint(
        body,
        prevent_cse=False,
        policy=_policies.save_from_both_policies(
            _policies.dots_with_no_batch_dims_saveable,
            _policies.save_only_these_names(spans.OUTPUT),
        ),
    ),
    "offload": lambda body: jax.checkpoint(
        body,
        prevent_cse=False,
        policy=_policies.offload_dot_with_no_batch_dims(
            "device", sharding.HOST_MEMORY
        ),
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
    remat: "none", "dots" (keep products and attention), "offload" (keep
      products in the hosts' memory) or "full" (keep each layer's input).

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
  slots = spans.Slots(
      streams.positions, streams.prompt_slot, streams.candidate_slot
  )
  x = _embed(params, config, streams.tokens, compute_dtype)
  attend = _stream_attention(config, slots, keep=False)
  x, _, _, probed = _run_layers(
      params, config, x, streams.positions, attend, (), remat,
      probe, probe_weights, spec=sharding.STREAM_SPEC,
  )
  return x, probed


def split_head(params: Params, config: ModelConfig, dtype: Any) -> Params:
  """The head alone, as `head_logits` takes it, for many products.

  On a mesh its vocabulary is split over all devices that it can be split over:
  a device then has some of the logits of all tokens. So nothing of the size of
  the head moves but once, and no gradient of it is summed over devices.

  Args:
    params: the parameters.
    config: static.
    dtype: of the products.
  """
  axes = sharding.axes_that_split(config.vocab_size)
  # First over the axes that weights are split over: in one step XLA would
  # gather the head to get there (jax 0.10.2).
  split = lambda x, *before: sharding.constrain(
      sharding.constrain(x.astype(dtype), *before, axes[:3]), *before, axes
  )
  if config.tied_head:
    return {"embed": {"embedding": split(params["embed"]["embedding"])}}
  return {"lm_head": {"kernel": split(params["lm_head"]["kernel"], None)}}


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
  within = attention.stream_attention(
      slots,
      scale=config.attention_scale,
      softcap=config.attention_softcap,
      windows=config.windows,
  )

  def attend(q, k, v, window, index, state):
    return within(q, k, v, window), state, (k, v) if keep else None

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
    spec: jax.sharding.PartitionSpec = sharding.BATCH_SPEC,
) -> tuple[jax.Array, Any, Any, Any]:
  """All layers and the final norm.

  Args:
    params: all parameters; from unstack_layers they have no probe.
    config: static.
    x: [..., D] embedded tokens.
    positions: [...] int32.
    attend: (q [..., H, E], k [..., N, E], v, window, layer index, state) ->
      (out [..., H, E], state, what to stack over the layers).
    state: what attend carries from layer to layer.
    remat: a key of REMAT.
    probe, probe_weights: see probed_states.
    spec: over which mesh axes the tokens of x are split.

  Returns:
    hidden states [..., D], the last state, and what attend and the probe gave,
    stacked, or listed where the layers are unstacked.
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

  pin = functools.partial(_pin, spec=spec)

  def body(carry, layer):
    x, state = carry
    weights, index, window, base, of_probe = layer
    x = pin(x)
    cos, sin = (
        jax.lax.dynamic_index_in_dim(table, base, keepdims=False)
        for table in tables
    )
    h = pin(_norm(x, weights["attention_norm"], config))
    q, k, v = _project_heads(weights["attention"], config, h, cos, sin)
    h, state, kept = attend(q, k, v, window, index, state)
    h = h.reshape(*h.shape[:-2], -1)
    h = pin(_linear(h, weights["attention"]["o_proj"]))
    if config.post_norms:
      h = _norm(h, weights["post_attention_norm"], config)
    x = x + h
    h = pin(_norm(x, weights["mlp_norm"], config))
    h = pin(_mlp(h, weights["mlp"], config))
    if config.post_norms:
      h = _norm(h, weights["post_mlp_norm"], config)
    x = x + h
    return (x, state), (kept, probe(x, of_probe))

  if isinstance(params["layers"], tuple):
    kept = []
    for layer in zip(params["layers"], *scanned[1:4], strict=True):
      (x, state), (of_layer, _) = body((x, state), (*layer, None))
      kept.append(of_layer)
    probed = None
  else:
    (x, state), (kept, probed) = jax.lax.scan(
        REMAT[remat](body), (x, state), scanned
    )
  return pin(_norm(x, params["final_norm"], config)), state, kept, probed


def _pin(x, spec):
  """Splits x [..., D], and its gradient, as spec says and not over D.

  It stands on the D side of every projection. Left to itself, XLA may split D
  over "tensor" too; a product of fewer rows than columns, whose weights are
  split over "tensor" and "fsdp", then has its rows in the wrong order on a
  mesh where all three axes are larger than 1 (jax 0.10.2).
  """
  return sharding.constrain(x, *spec)


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
  flat = _rows(x)
  y = flat @ weights["kernel"].astype(x.dtype)
  if "lora_a" in weights:
    a, b, scale = (
        weights[f"lora_{name}"].astype(x.dtype) for name in ("a", "b", "scale")
    )
    y = y + (scale * (flat @ a)) @ b
  y = y.reshape(*x.shape[:-1], -1)
  if "bias" in weights:
    y = y + _spread(weights["bias"].astype(x.dtype), y.shape)
  return y


def _rows(x):
  """x [..., D] as [rows, D], for products.

  XLA:CPU is slow at a product that sums over two axes at once, which the
  gradient of the weights would be. But where both axes of streams are split
  over devices one axis of them could not be: then x as it is.
  """
  if sharding.axis_size("context") > 1:
    return x
  return x.reshape(-1, x.shape[-1])


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
  return (wide * _spread(scale, x.shape)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(vector, shape):
  """vector [D] along the last axis of a shape [..., D].

  Its gradient is a sum over all other axes: as a product, which XLA:CPU runs
  five times as fast as the sum.
  """
  return jax.lax.broadcast_in_dim(vector, shape, (len(shape) - 1,))


def _spread_forward(vector, shape):
  return _spread(vector, shape), None


def _spread_backward(shape, _, gradient):
  gradient = _rows(gradient)
  ones = jnp.ones((1, gradient.shape[-2]), gradient.dtype)
  return ((ones @ gradient).reshape(-1, shape[-1]).sum(0),)


_spread.defvjp(_spread_forward, _spread_backward)


# --- generation ---------------------------------------------------------------


PAGE = 64  # tokens


class Cache(NamedTuple):
  """Keys and values of prompts and of the own tokens of G groups of W slots.

  L arrays of each kind. A prompt is stored once for its group, in pages, so
  that a long one takes no place beside short ones. A slot's own tokens stand
  in a ring: all slots write the same column at a time, so that none has a
  place of its own to be scattered to. The groups are F equal parts, each with
  its own Q pages.
  """

  page_keys: tuple[jax.Array, ...]  # [F, Q, N, E, PAGE]
  page_values: tuple[jax.Array, ...]  # [F, Q, N, PAGE, E]
  own_keys: tuple[jax.Array, ...]  # [G, W, N, E, C]
  own_values: tuple[jax.Array, ...]  # [G, W, N, C, E]


class Pages(NamedTuple):
  """Whose the pages are."""

  groups: jax.Array  # [F, Q] int32, group within the part, -1: nobody's
  starts: jax.Array  # [F, Q] int32, position of the page's first token


def unstack_layers(params: Params, dtype: Any) -> Params:
  """The parameters as `prefill` and `decode_step` take them, copied.

  Args:
    params: from init_params or hf.load_params.
    dtype: of products. Scales of norms stay as they are: norms are computed in
      float32 at least.

  Returns:
    The tree, with a tuple of the L layers' trees under "layers".
  """

  def cast(path, x):
    return x if path[-1].key == "scale" else x.astype(dtype)

  params = jax.tree_util.tree_map_with_path(cast, params)
  layers = params["layers"]
  number = len(jax.tree.leaves(layers)[0])
  one = lambda i: jax.tree.map(lambda x: x[i], layers)
  return params | {"layers": tuple(one(i) for i in range(number))}


def init_cache(
    config: ModelConfig,
    *,
    groups: int,
    slots: int,
    own_length: int,
    parts: int,
    pages: int,
    dtype: Any = jnp.float32,
) -> Cache:
  """An empty cache. Its dtype is the dtype that prefill and decode compute in.

  Args:
    config: the decoder.
    groups: G.
    slots: W of each group.
    own_length: C.
    parts: F.
    pages: Q of each part.
    dtype: of keys and values.
  """
  heads, width = config.num_kv_heads, config.head_dim
  layers = lambda *shape: tuple(
      jnp.zeros(shape, dtype) for _ in range(config.num_layers)
  )
  return Cache(
      page_keys=layers(parts, pages, heads, width, PAGE),
      page_values=layers(parts, pages, heads, PAGE, width),
      own_keys=layers(groups, slots, heads, width, own_length),
      own_values=layers(groups, slots, heads, own_length, width),
  )


def prefill(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens: jax.Array,
    lengths: jax.Array,
    pages: jax.Array,
) -> Cache:
  """Runs prompts and stores their keys and values.

  Args:
    params: from unstack_layers.
    config: static.
    cache: from init_cache.
    tokens: [F, P] int32, padded on the right; P a multiple of PAGE. Prompt f
      is stored in part f.
    lengths: [F] int32, tokens of each prompt; 0 for none.
    pages: [F, P / PAGE] int32, where each piece is stored; Q stores nothing.

  Returns:
    The cache.
  """
  parts = len(tokens)
  _, kept = _run_prompts(
      params, config, tokens, lengths, cache.own_keys[0].dtype, keep=True)

  def store(whole, new, *axes):
    new = new.reshape(parts, -1, PAGE, *new.shape[2:]).transpose(0, 1, *axes)
    return whole.at[np.arange(parts)[:, None], pages].set(new, mode="drop")

  keys, values = zip(*kept)
  return cache._replace(
      page_keys=tuple(
          store(*of_layer, 3, 4, 2) for of_layer in zip(cache.page_keys, keys)
      ),
      page_values=tuple(
          store(*of_layer, 3, 2, 4)
          for of_layer in zip(cache.page_values, values)
      ),
  )


def prompt_logps(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    compute_dtype: Any = jnp.float32,
    head_chunk: int = 256,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the model says of the tokens of prompts, each after those before it.

  Args:
    params: from unstack_layers.
    config: static.
    tokens: [F, P] int32, padded on the right.
    lengths: [F] int32, tokens of each prompt; 0 for none.
    compute_dtype: of products and activations.
    head_chunk: tokens of a prompt whose logits exist at once.

  Returns:
    [F, P] nats of each token, [F, P] nats of the likeliest in its place, and
    [F, P] int32 which that is; of no meaning at the first token and on padding.
  """
  hidden, _ = _run_prompts(
      params, config, tokens, lengths, compute_dtype, keep=False)
  parts, width = tokens.shape
  chunk = min(head_chunk, width)
  pad = -width % chunk

  def cut(x):  # [F, P, ...] -> [chunks, F, chunk, ...]
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(
        x.reshape(parts, -1, chunk, *x.shape[2:]), 1, 0)

  def look(part):
    states, following = part
    logits = head_logits(params, config, states)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return picked - log_z, jnp.max(logits, axis=-1) - log_z, best

  out = jax.lax.map(look, (cut(hidden), cut(jnp.roll(tokens, -1, axis=1))))
  # The law after a token is of the next one.
  return tuple(
      jnp.roll(jnp.moveaxis(x, 0, 1).reshape(parts, -1)[:, :width], 1, axis=1)
      for x in out)


def _run_prompts(params, config, tokens, lengths, dtype, *, keep):
  """Hidden states [F, P, D] of prompts, and with keep the keys and values of
  every layer."""
  positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[1])[None], tokens.shape)
  slots = spans.Slots(
      positions=positions,
      prompt=jnp.where(positions < lengths[:, None], 0, -1),
      candidate=jnp.full(tokens.shape, -1),
  )
  x = _embed(params, config, tokens, dtype)
  attend = _stream_attention(config, slots, keep=keep)
  x, _, kept, _ = _run_layers(params, config, x, positions, attend, (), "none")
  return x, kept


def decode_step(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    pages: Pages,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    ages: jax.Array,
    column: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Runs one more token of every slot.

  Args:
    params: from unstack_layers.
    config: static.
    cache: of the tokens before.
    pages: whose they are.
    tokens: [G, W] int32.
    prompt_lengths: [G] int32, tokens of the prompt in the cache.
    ages: [G, W] int32 below C, own tokens in the cache, in the columns before
      `column`.
    column: [] int32 below C, where the new tokens are stored.

  Returns:
    logits [G, W, V] float32 of the next token, and the cache.
  """
  positions = prompt_lengths[:, None] + ages
  parts, slots = pages.groups.shape[0], tokens.shape[1]
  index = jnp.maximum(pages.groups, 0)
  lengths = prompt_lengths.reshape(parts, -1)
  lengths = jnp.take_along_axis(lengths, index, axis=1)[..., None]
  place = pages.starts[..., None] + jnp.arange(PAGE)[None, None]
  stored = (pages.groups >= 0)[..., None] & (place < lengths)  # [F, Q, PAGE]
  queries = jnp.take_along_axis(
      positions.reshape(parts, -1, slots), index[..., None], axis=1
  )
  distance = queries[..., None] - place[:, :, None]  # [F, Q, W, PAGE]
  length = cache.own_values[0].shape[3]
  age = jnp.mod(column - jnp.arange(length), length)[None, None]  # [1, 1, C]

  def attend(q, k, v, window, index, state):
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(whole, new, column, axis)
        for whole, new, axis in (
            (cache.own_keys[index], k[..., None], 4),
            (cache.own_values[index], v[..., None, :], 3),
        )
    )
    out = attention.attend_cache(
        q,
        cache.page_keys[index],
        cache.page_values[index],
        pages.groups,
        stored[:, :, None] & (distance < window),
        keys,
        values,
        (age <= ages[..., None]) & (age < window),
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )
    return out, state, (keys, values)

  x = _embed(params, config, tokens, cache.own_keys[0].dtype)
  x, _, kept, _ = _run_layers(
      params, config, x, positions, attend, (), "none"
  )
  keys, values = zip(*kept)
  cache = cache._replace(own_keys=keys, own_values=values)
  return head_logits(params, config, x), cache
