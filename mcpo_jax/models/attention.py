"""Attention over streams and over a key-value cache.

Letters beside those of types.py: H query heads, N key-value heads, E head
width; of the cache G groups of W slots, C own tokens of each, and in each of F
parts Q pages of T tokens of prompts.
No mask of stream by stream is ever stored. What a token sees is two intervals
of places (spans.py), and so is what a tile of queries meets: the prompt of its
first token's set, and all from the first key of that token's own run to the
tile's end. It takes them tile by tile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mcpo_jax import sharding
from mcpo_jax.models import spans
from mcpo_jax.models.spans import Interval

MASKED = -1e30  # finite: a query that sees nothing stays finite
TILE = 64  # tokens; XLA:CPU keeps the scores of a tile in cache


class Slots(NamedTuple):
  """Where each token of a stream belongs; the fields of types.Streams."""

  positions: jax.Array  # [S, T] int32
  prompt: jax.Array  # [S, T] int32, -1 on padding
  candidate: jax.Array  # [S, T] int32, -1 on prompt and padding


class Met(NamedTuple):
  """The keys that each of B tiles of queries meets, as places."""

  own: jax.Array  # [S, B] int32, first; the last is the tile's own
  prompt: jax.Array  # [S, B] int32, first
  prompt_length: jax.Array  # [S, B] int32, 0 where there is none before `own`


def stream_attention(
    slots: Slots, *, scale: float, softcap: float | None
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
  """Attention of streams to themselves, by the visibility rule of Streams.

  Under a mesh each device works on its own streams and heads.

  Args:
    slots: [S, T] each. A set's prompt stands before its candidates, each
      candidate's tokens side by side, padding at the end.
    scale: factor on q·k.
    softcap: cap·tanh(x / cap) on the scaled scores, or None.

  Returns:
    (q [S, T, H, E], k [S, T, N, E], v [S, T, N, E], window [] int32) ->
    [S, T, H, E] in the dtype of v; finite, of no meaning, on padding. A key at
    distance window or more is not seen.
  """
  length = slots.positions.shape[1]
  tile = min(TILE, length)
  fill = -length % tile
  pad = lambda x, value=0: jnp.pad(
      x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2), constant_values=value
  )
  runs = spans.runs(
      Slots(pad(slots.positions), *(pad(x, -1) for x in slots[1:]))
  )
  tiled = functools.partial(_tiled, scale=scale, softcap=softcap, tile=tile)

  def attend(q, k, v, window):
    seen = spans.intervals(runs, window)
    axes = _axes(q.shape[0], k.shape[2])
    run = tiled
    if axes is not None:
      batch, heads = axes
      states = P(batch, None, heads)
      run = jax.shard_map(
          tiled,
          in_specs=(states, states, states, P(batch), P(batch)),
          out_specs=states,
          check_vma=False,
      )
    out = run(pad(q), pad(k), pad(v), seen, _met(*seen, tile))
    return out[:, :length]

  return attend


def _axes(num_streams, kv_heads):
  """Mesh axes of streams and heads, None where no mesh splits anything."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return None
  batch = sharding.BATCH_SPEC[0]
  if num_streams % (mesh.shape["data"] * mesh.shape["fsdp"]):
    batch = None
  return batch, "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None


def _met(own: Interval, prompt: Interval, tile: int) -> Met:
  """Of intervals [S, T], T a multiple of the tile."""
  tiles = lambda x: x.reshape(len(x), -1, tile)
  last = tiles(prompt.last)
  # Another candidate of the same set may reach further back into the prompt.
  same = last == last[..., :1]
  first = jnp.min(tiles(prompt.first), axis=-1, where=same, initial=2**30)
  length = jnp.maximum(last[..., 0] + 1 - first, 0)
  return Met(tiles(own.first)[..., 0], first, length)


def _tiled(q, k, v, seen, met, *, scale, softcap, tile):
  """Flash attention over the tiles that see each other.

  q [S, T, H, E], k and v [S, T, N, E], `seen` two intervals [S, T], `met`
  [S, T / tile] -> [S, T, H, E]. On a CPU one stream and head after the other.
  """
  streams, length, heads, width = q.shape
  kv_heads = k.shape[2]
  each = lambda f, xs: jax.vmap(f)(xs)
  if sharding.traced_devices()[0] == "cpu":
    each = lax.map

  @jax.custom_vjp
  def run(*inputs):
    return forward(*inputs)[0]

  def forward(*inputs):
    def stream(x):
      *qkv, seen, met = x
      head = _Head(*seen, met, scale, softcap, tile)
      return each(head.forward, qkv)

    out, log_sum = each(stream, inputs)
    return out, (inputs, out, log_sum)

  def backward(saved, d_out):
    def stream(x):
      (*qkv, seen, met), *of_out = x
      head = _Head(*seen, met, scale, softcap, tile)
      return each(head.backward, (*qkv, *of_out))

    return *each(stream, (*saved, d_out)), None, None

  run.defvjp(forward, backward)
  q = q.reshape(streams, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
  # With keys and values as [E, T] all products have a form that XLA:CPU runs
  # fast.
  k, v = (x.transpose(0, 2, 3, 1) for x in (k, v))
  out = run(q, k, v, seen, met)  # [S, N, H / N, T, E]
  return out.transpose(0, 3, 1, 2, 4).reshape(streams, length, heads, width)


class _Head(NamedTuple):
  """One key-value head of one stream, and its R = H / N query heads."""

  own: Interval  # [T]
  prompt: Interval  # [T]
  met: Met  # [T / tile]
  scale: float
  softcap: float | None
  tile: int

  def forward(self, qkv):
    """q [R, T, E], k and v [E, T] -> [R, T, E], log-sum-exp [R, T]."""
    q, k, v = qkv

    def over_queries(block):
      seen, take = self._queries(block)
      q_tile = take(q)
      rows = len(q_tile)
      count, place = self._keys(block)

      def over_keys(i, carry):
        top, total, out = carry
        k_tile, v_tile, scores, _ = self._scores(
            q_tile, k, v, seen, place(i)
        )
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, old = jnp.exp(scores - new), jnp.exp(top - new)
        total = old * total + weights.sum(-1, keepdims=True)
        values = _matmul(weights.astype(v.dtype), v_tile.T)
        return new, total, old * out + values

      wide = _wide(q.dtype)
      zeros = lambda width: jnp.zeros((rows, width), wide)
      top, total, out = lax.fori_loop(
          0, count, over_keys,
          (zeros(1) + MASKED, zeros(1), zeros(q.shape[2])),
      )
      total = jnp.maximum(total, jnp.finfo(wide).tiny)
      back = lambda x: x.reshape(len(q), self.tile, -1)
      return back(out / total).astype(v.dtype), back(top + jnp.log(total))

    out, log_sum = lax.map(over_queries, jnp.arange(len(self.met.own)))
    return self._join(out), self._join(log_sum)[..., 0]

  def backward(self, saved):
    """Gradients of q, k, v in their shapes."""
    q, k, v, out, log_sum, d_out = saved
    wide = _wide(q.dtype)
    # Of a softmax: d scores = weights * (d weights - their weighted mean).
    mean = jnp.sum(out.astype(wide) * d_out, axis=-1, keepdims=True)

    def over_queries(carry, block):
      seen, take = self._queries(block)
      q_tile, d_tile = take(q), take(d_out)
      log_sum_tile, mean_tile = take(log_sum[..., None]), take(mean)
      count, place = self._keys(block)

      def over_keys(i, carry):
        d_q, d_k, d_v = carry
        start, *_ = span = place(i)
        k_tile, v_tile, scores, slope = self._scores(
            q_tile, k, v, seen, span
        )
        weights = jnp.exp(scores - log_sum_tile)
        d_scores = weights * (_matmul(d_tile, v_tile) - mean_tile) * slope
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)

        def add(whole, x):
          old = lax.dynamic_slice_in_dim(whole, start, self.tile, axis=1)
          return lax.dynamic_update_slice_in_dim(whole, old + x, start, axis=1)

        return (
            d_q + _matmul(d_scores, k_tile.T),
            add(d_k, _matmul(q_tile.T, d_scores)),
            add(d_v, _matmul(d_tile.T, weights)),
        )

      d_q, *carry = lax.fori_loop(
          0, count, over_keys, (jnp.zeros(q_tile.shape, wide), *carry)
      )
      d_q = d_q.reshape(len(q), self.tile, -1).astype(q.dtype)
      return tuple(carry), d_q

    zeros = jnp.zeros(k.shape, wide)
    (d_k, d_v), d_q = lax.scan(
        over_queries, (zeros, zeros), jnp.arange(len(self.met.own))
    )
    return self._join(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype)

  def _queries(self, block):
    """Intervals [tile] of a block of queries, and what cuts it out: [R, T, ...]
    to [R * tile, ...]."""
    start = block * self.tile
    cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, self.tile, axis)
    take = lambda x: cut(x, 1).reshape(-1, x.shape[-1])
    seen = jax.tree.map(lambda x: cut(x, 0), (self.own, self.prompt))
    return seen, take

  def _keys(self, block):
    """How many tiles of keys a block meets, and the place of the i-th one:
    where it begins, and from where to where its keys count."""
    own, prompt, prompt_length = (x[block] for x in self.met)
    length, stop = len(self.own.first), (block + 1) * self.tile
    of_prompt = -(-prompt_length // self.tile)
    of_own = -(-(stop - own) // self.tile)

    def place(i):
      early = i < of_prompt
      first = jnp.where(early, prompt, own)
      first += jnp.where(early, i, i - of_prompt) * self.tile
      end = jnp.where(early, prompt + prompt_length, stop)
      # The last tile of the stream is not cut: it begins earlier.
      return jnp.minimum(first, length - self.tile), first, end

    return of_prompt + of_own, place

  def _scores(self, q, k, v, seen, span):
    """Tiles [E, tile] of keys and values, and of one row of q [R * tile, E]
    the masked scores [R * tile, tile] and their slope by q·k."""
    start, first, end = span
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, self.tile, x.ndim - 1)
    k, v = cut(k), cut(v)
    index = (start + jnp.arange(self.tile))[None]
    inside = lambda x: (index >= x.first[:, None]) & (index <= x.last[:, None])
    own, prompt = map(inside, seen)
    visible = (own | prompt) & (index >= first) & (index < end)
    scores = _matmul(q, k) * self.scale
    slope = self.scale
    if self.softcap is not None:
      bent = jnp.tanh(scores / self.softcap)
      scores, slope = self.softcap * bent, slope * (1 - bent * bent)
    visible = jnp.tile(visible, (len(q) // self.tile, 1))
    return k, v, jnp.where(visible, scores, MASKED), slope

  def _join(self, blocks):
    """[B, R, tile, ...] to [R, T, ...]."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(len(blocks), -1, *blocks.shape[3:])


def _matmul(a, b):
  return jnp.matmul(a, b, preferred_element_type=_wide(a.dtype))


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


def _masked(scores, visible, scale, softcap):
  scores = scores * scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(visible, scores, MASKED)


def _wide(dtype):
  """At least float32; float64 stays."""
  return jnp.promote_types(dtype, jnp.float32)
