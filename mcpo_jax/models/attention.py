"""Attention over streams and over a key-value cache.

Letters beside those of types.py: H query heads, N key-value heads (G = H / N
queries share one), E head width, R rows of the cache, L its length.
No mask of stream by stream is ever stored: each block of queries makes its own
from slots and positions and meets only the keys that can stand before it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a query that sees nothing stays finite
QUERY_BLOCK = 128
MAX_BLOCKS = 16


class Slots(NamedTuple):
  """Where each token of a stream belongs; the fields of types.Streams."""

  positions: jax.Array  # [S, T] int32
  prompt: jax.Array  # [S, T] int32, -1 on padding
  candidate: jax.Array  # [S, T] int32, -1 on prompt and padding


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: Slots,
    window: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    one_by_one: bool | None = None,
) -> jax.Array:
  """Attention of streams to themselves, by the visibility rule of Streams.

  Args:
    q: [S, T, H, E].
    k: [S, T, N, E].
    v: [S, T, N, E].
    slots: [S, T] each.
    window: [] int32; a key at distance window or more is not seen.
    scale: factor on q·k.
    softcap: cap·tanh(x / cap) on the scaled scores, or None.
    one_by_one: one stream at a time instead of all at once. The default takes
      the faster: on one CPU device the scores of a stream stay in cache.

  Returns:
    [S, T, H, E] in the dtype of v; finite, of no meaning, on padding.
  """
  if one_by_one is None:
    one_by_one = jax.default_backend() == "cpu" and jax.device_count() == 1
  # over(f, xs, shared) is f(x, *shared) for every x of axis 0 of xs.
  if one_by_one:
    over = lambda f, xs, *shared: jax.lax.map(lambda x: f(x, *shared), xs)
  else:
    over = lambda f, xs, *shared: jax.vmap(lambda x: f(x, *shared))(xs)
  head = functools.partial(
      _attend_head, window=window, scale=scale, softcap=softcap
  )
  stream = functools.partial(_attend_stream, jax.checkpoint(head), over)
  return over(stream, (q, k, v, slots))


def _attend_stream(head, over, stream):
  """One stream: q [T, H, E], k and v [T, N, E], slots [T] -> [T, H, E]."""
  q, k, v, slots = stream
  length, heads, width = q.shape
  kv_heads = k.shape[1]
  q = q.reshape(length, kv_heads, heads // kv_heads, width)
  q = q.transpose(1, 2, 0, 3)  # [N, G, T, E]
  # With keys and values as [N, E, T] every product of the backward pass has a
  # form that XLA:CPU runs fast (1.7 times as fast in all as [N, T, E]).
  k, v = (x.transpose(1, 2, 0) for x in (k, v))
  block = max(QUERY_BLOCK, -(-length // MAX_BLOCKS))
  out = []
  for start in range(0, length, block):
    stop = min(start + block, length)
    queries = Slots(*(x[start:stop] for x in slots))
    keys = Slots(*(x[:stop] for x in slots))
    block_of_heads = (q[:, :, start:stop], k[..., :stop], v[..., :stop])
    out.append(over(head, block_of_heads, queries, keys))
  out = jnp.concatenate(out, axis=2)  # [N, G, T, E]
  return out.transpose(2, 0, 1, 3).reshape(length, heads, width)


def _attend_head(qkv, queries, keys, *, window, scale, softcap):
  """A block of queries [G, Q, E] of one key-value head, keys up to its end."""
  q, k, v = qkv
  groups, num_queries, width = q.shape
  scores = jnp.matmul(
      q.reshape(-1, width), k, preferred_element_type=_wide(q.dtype)
  )
  scores = scores.reshape(groups, num_queries, -1)
  visible = visibility(queries, keys, window)  # [Q, T]
  weights = _softmax(scores, visible[None], scale, softcap)
  out = weights.astype(v.dtype).reshape(groups * num_queries, -1) @ v.T
  return out.reshape(groups, num_queries, width)


def visibility(queries: Slots, keys: Slots, window: jax.Array) -> jax.Array:
  """[Q, T] bool, True where query i sees key j. The fields are [Q] and [T]."""
  prompt, candidate = queries.prompt[:, None], queries.candidate[:, None]
  distance = queries.positions[:, None] - keys.positions[None]
  return (
      (keys.prompt[None] == prompt)
      & (prompt >= 0)
      & ((keys.candidate[None] < 0) | (keys.candidate[None] == candidate))
      & (distance >= 0)
      & (distance < window)
  )


def attend_cache(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    window: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
  """One new token of each row against its cache.

  Args:
    q: [R, H, E].
    keys: [R, N, L, E], slot i holds the key of position i.
    values: [R, N, L, E].
    positions: [R] int32, of the new token, whose key is in the cache already.
    window: [] int32.
    scale: factor on q·k.
    softcap: as in attend.

  Returns:
    [R, H, E] in the dtype of values.
  """
  rows, heads, width = q.shape
  kv_heads, length = keys.shape[1:3]
  q = q.reshape(rows, kv_heads, heads // kv_heads, width)
  distance = positions[:, None] - jnp.arange(length)[None]
  visible = (distance >= 0) & (distance < window)  # [R, L]
  scores = jnp.einsum(
      "rnge,rnle->rngl", q, keys, preferred_element_type=_wide(q.dtype)
  )
  weights = _softmax(scores, visible[:, None, None], scale, softcap)
  out = jnp.einsum("rngl,rnle->rnge", weights.astype(values.dtype), values)
  return out.reshape(rows, heads, width)


def _softmax(scores, visible, scale, softcap):
  scores = scores * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)


def _wide(dtype):
  """At least float32; float64 stays."""
  return jnp.promote_types(dtype, jnp.float32)
