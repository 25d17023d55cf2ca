"""Attention in tiles of queries and of keys: what every backend can run.

No mask of stream by stream is ever stored. What a token sees is two intervals
of places (spans.py), and so is what a tile of queries meets: the prompt of its
first token's set, and all from the first key of that token's own run to the
tile's end. It takes them tile by tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mcpo_jax import sharding
from mcpo_jax.models.spans import OUTPUT, Interval

MASKED = -1e30  # finite: a query that sees nothing stays finite
TILE = 64  # tokens; XLA:CPU keeps the scores of a tile in cache


class Met(NamedTuple):
  """The keys that each of B tiles of queries meets, as places."""

  own: jax.Array  # [S, B] int32, first; the last is the tile's own
  prompt: jax.Array  # [S, B] int32, first
  prompt_length: jax.Array  # [S, B] int32, 0 where there is none before `own`


def met(own: Interval, prompt: Interval, tile: int) -> Met:
  """Of intervals [S, T] from spans.intervals, T a multiple of the tile."""
  tiles = lambda x: x.reshape(len(x), -1, tile)
  last = tiles(prompt.last)
  # Another candidate of the same set may reach further back into the prompt.
  same = last == last[..., :1]
  first = jnp.min(tiles(prompt.first), axis=-1, where=same, initial=2**30)
  length = jnp.maximum(last[..., 0] + 1 - first, 0)
  return Met(tiles(own.first)[..., 0], first, length)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: tuple[Interval, Interval],
    met: Met,
    *,
    scale: float,
    softcap: float | None,
    tile: int,
) -> jax.Array:
  """Attention of queries to the keys of their streams.

  On a CPU one stream comes after the other.

  Args:
    q: [S, Q, H, E]; Q a multiple of the tile.
    k: [S, T, N, E].
    v: [S, T, N, E].
    seen: the intervals [S, Q] of keys that each query sees.
    met: [S, Q / tile].
    scale: factor on q·k.
    softcap: cap·tanh(x / cap) on the scaled scores, or None.
    tile: tokens of a tile.

  Returns:
    [S, Q, H, E] in the dtype of v.
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
      return jax.vmap(head.forward, (0, 1, 1))(*qkv)

    out, log_sum = checkpoint_name(each(stream, inputs), OUTPUT)
    return out, (inputs, out, log_sum)

  def backward(saved, d_out):
    def stream(x):
      (*qkv, seen, met), *of_out = x
      head = _Head(*seen, met, scale, softcap, tile)
      return jax.vmap(head.backward, (0, 1, 1, 0, 0, 0), (0, 1, 1))(
          *qkv, *of_out)

    return *each(stream, (*saved, d_out)), None, None

  run.defvjp(forward, backward)
  q = q.reshape(streams, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
  # Keys and values stay as they are, and their tiles are turned as they are
  # cut: XLA:CPU takes ten times as long to turn a stream of rotated keys.
  out = run(q, k, v, seen, met)  # [S, N, H / N, Q, E]
  return out.transpose(0, 3, 1, 2, 4).reshape(streams, length, heads, width)


class _Head(NamedTuple):
  """One key-value head of one stream, and its R = H / N query heads."""

  own: Interval  # [Q]
  prompt: Interval  # [Q]
  met: Met  # [Q / tile]
  scale: float
  softcap: float | None
  tile: int

  def forward(self, q, k, v):
    """q [R, Q, E], k and v [T, E] -> [R, Q, E], log-sum-exp [R, Q]."""

    def over_queries(block):
      seen, take = self._queries(block)
      q_tile = take(q)
      rows = len(q_tile)
      count, place = self._keys(block, len(k))

      def over_keys(i, carry):
        top, total, out = carry
        k_tile, v_tile, scores, _ = self._scores(
            q_tile, k, v, seen, place(i)
        )
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, old = jnp.exp(scores - new), jnp.exp(top - new)
        total = old * total + weights.sum(-1, keepdims=True)
        values = _matmul(weights.astype(v.dtype), v_tile)
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

  def backward(self, q, k, v, out, log_sum, d_out):
    """Gradients of q, k, v in their shapes."""
    wide = _wide(q.dtype)
    # Of a softmax: d scores = weights * (d weights - their weighted mean).
    mean = jnp.sum(out.astype(wide) * d_out, axis=-1, keepdims=True)

    def over_queries(carry, block):
      seen, take = self._queries(block)
      q_tile, d_tile = take(q), take(d_out)
      log_sum_tile, mean_tile = take(log_sum[..., None]), take(mean)
      count, place = self._keys(block, len(k))

      def over_keys(i, carry):
        d_q, d_k, d_v = carry
        start, *_ = span = place(i)
        k_tile, v_tile, scores, slope = self._scores(
            q_tile, k, v, seen, span
        )
        weights = jnp.exp(scores - log_sum_tile)
        d_scores = weights * (_matmul(d_tile, v_tile.T) - mean_tile) * slope
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)

        def add(whole, x):
          old = lax.dynamic_slice_in_dim(whole, start, self.tile)
          return lax.dynamic_update_slice_in_dim(whole, old + x, start, 0)

        return (
            d_q + _matmul(d_scores, k_tile),
            add(d_k, _matmul(d_scores.T, q_tile)),
            add(d_v, _matmul(weights.T, d_tile)),
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
    """Intervals [tile] of a block of queries, and what cuts it out: [R, Q, ...]
    to [R * tile, ...]."""
    start = block * self.tile
    cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, self.tile, axis)
    take = lambda x: cut(x, 1).reshape(-1, x.shape[-1])
    seen = jax.tree.map(lambda x: cut(x, 0), (self.own, self.prompt))
    return seen, take

  def _keys(self, block, length):
    """How many tiles of keys a block meets, and the place of the i-th one:
    where it begins, and from where to where its keys count."""
    own, prompt, prompt_length = (x[block] for x in self.met)
    # The tile's last query is its own run's last key.
    stop = self.own.last[(block + 1) * self.tile - 1] + 1
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
    """Tiles [tile, E] of keys and values, and of one row of q [R * tile, E]
    the masked scores [R * tile, tile] and their slope by q·k."""
    start, first, end = span
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, self.tile)
    k, v = cut(k), cut(v)
    index = (start + jnp.arange(self.tile))[None]
    inside = lambda x: (index >= x.first[:, None]) & (index <= x.last[:, None])
    own, prompt = map(inside, seen)
    visible = (own | prompt) & (index >= first) & (index < end)
    scores = _matmul(q, k.T) * self.scale
    slope = self.scale
    if self.softcap is not None:
      bent = jnp.tanh(scores / self.softcap)
      scores, slope = self.softcap * bent, slope * (1 - bent * bent)
    visible = jnp.tile(visible, (len(q) // self.tile, 1))
    return k, v, jnp.where(visible, scores, MASKED), slope

  def _join(self, blocks):
    """[B, R, tile, ...] to [R, Q, ...]."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(len(blocks), -1, *blocks.shape[3:])


def _matmul(a, b):
  return jnp.matmul(a, b, preferred_element_type=_wide(a.dtype))


def _wide(dtype):
  """At least float32; float64 stays."""
  return jnp.promote_types(dtype, jnp.float32)
