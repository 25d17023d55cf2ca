"""Attention over streams and over a key-value cache.

Letters beside those of types.py: H query heads, N key-value heads, E head
width; of the cache G groups of W slots, C own tokens of each, and in each of F
parts Q pages of T tokens of prompts.
No mask of stream by stream is ever stored: each block of queries makes its own
from slots and positions and meets only the keys that can stand before it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mcpo_jax import sharding

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
    one_by_one = sharding.traced_devices() == ("cpu", 1)
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
    page_keys: jax.Array,
    page_values: jax.Array,
    page_groups: jax.Array,
    see_page: jax.Array,
    own_keys: jax.Array,
    own_values: jax.Array,
    see_own: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
  """One new token of each slot against its group's prompt and its own tokens.

  The queries of a group's W slots meet a page of their prompt in one product;
  one softmax runs over all pages and the own tokens. Keys have their tokens
  last and values their width last: so XLA:CPU runs both products fast.

  Args:
    q: [G, W, H, E]; the G groups are F equal parts.
    page_keys: [F, Q, N, E, T].
    page_values: [F, Q, N, T, E].
    page_groups: [F, Q] int32, the group within the part that each page belongs
      to, -1 for none.
    see_page: [F, Q, W, T] bool, the keys that are seen; none of such pages.
    own_keys: [G, W, N, E, C], the new token's key among them.
    own_values: [G, W, N, C, E].
    see_own: [G, W, C] bool, at least one of them in every slot.
    scale: factor on q·k.
    softcap: as in attend.

  Returns:
    [G, W, H, E] in the dtype of the values.
  """
  parts, heads = page_groups.shape[0], own_keys.shape[2]
  groups, slots, width = q.shape[0] // parts, q.shape[1], q.shape[3]
  wide, dtype = _wide(q.dtype), own_values.dtype
  q = q.reshape(parts * groups, slots, heads, -1, width)
  shared = q.shape[3]

  def turn(x):
    """[G, W, N, H / N, ...] to [F, G / F, N, W * H / N, ...]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(parts, groups, heads, slots * shared, *x.shape[4:])

  def of_pages(x):
    """What each page's group has, [F, Q, ...] of [F, G / F, ...]."""
    index = jnp.maximum(page_groups, 0)
    return jnp.take_along_axis(x, index.reshape(*index.shape, 1, 1, 1), axis=1)

  prompt = jnp.einsum(
      "fqnae,fqnet->fqnat", of_pages(turn(q)), page_keys,
      preferred_element_type=wide,
  )
  see_page = jnp.repeat(see_page, shared, axis=2)[:, :, None]
  prompt = _masked(prompt, see_page, scale, softcap)
  own = jnp.einsum(
      "gwnhe,gwnec->gwnhc", q, own_keys, preferred_element_type=wide
  )
  own = _masked(own, see_own[:, :, None, None], scale, softcap)

  member = page_groups[:, None] == jnp.arange(groups)[None, :, None]
  best = prompt.max(-1)[:, None]
  best = jnp.where(member[..., None, None], best, MASKED).max(2)
  top = jnp.maximum(best, turn(own.max(-1)))[..., None]
  prompt = jnp.exp(prompt - of_pages(top))
  back = top.reshape(parts * groups, heads, slots, shared, 1)
  own = jnp.exp(own - jnp.swapaxes(back, 1, 2))

  # Sums over the pages of a group, as a product with zeros and ones.
  gather = lambda x: jnp.einsum("fgq,fqnae->fgnae", member.astype(wide), x)
  of_prompt = jnp.einsum(
      "fqnat,fqnte->fqnae", prompt.astype(dtype), page_values,
      preferred_element_type=wide,
  )
  of_own = jnp.einsum(
      "gwnhc,gwnce->gwnhe", own.astype(dtype), own_values,
      preferred_element_type=wide,
  )
  total = gather(prompt.sum(-1, keepdims=True))
  total = total + turn(own.sum(-1, keepdims=True))
  out = (gather(of_prompt) + turn(of_own)) / total
  out = out.astype(dtype).reshape(
      parts * groups, heads, slots, shared, width
  )
  return jnp.swapaxes(out, 1, 2).reshape(parts * groups, slots, -1, width)


def _softmax(scores, visible, scale, softcap):
  return jax.nn.softmax(_masked(scores, visible, scale, softcap), axis=-1)


def _masked(scores, visible, scale, softcap):
  scores = scores * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(visible, scores, MASKED)


def _wide(dtype):
  """At least float32; float64 stays."""
  return jnp.promote_types(dtype, jnp.float32)
