"""Fused attention on TPU: the splash kernel, blocks that nobody sees skipped.

The kernel knows one interval of keys for each query, and what a token sees is
two (spans.py). So it runs twice, over a token's own run and over the prompt
before it, and the two are merged by their log-sum-exps. This is exact for any
window, skips every block of keys that none of its queries sees, and reads each
key of a prompt once for all candidates; no mask is ever stored: a query's
interval is one number, which the kernel compares with the places of its keys.

Differentiated as it stands, the merge would need the gradient of the kernel's
log-sum-exp, which it does not give. None is needed: with the merged output and
log-sum-exp, each part's backward pass is that of one softmax over both.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)

from mcpo_jax.models.spans import OUTPUT, Interval

LANES = 128  # what the kernel needs lengths to be a multiple of
MAX_BLOCK = 512  # tokens
MAX_LENGTH = 2**15  # an interval of places is kept in one int32
NAME = "splash_mha"  # part of the kernel's name in a compiled program


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: tuple[Interval, Interval],
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
  """Attention of queries to the keys of their streams.

  Args:
    q: [S, Q, H, E] float32 or bfloat16; Q a multiple of LANES.
    k: [S, T, N, E]; T a multiple of Q, at most MAX_LENGTH.
    v: [S, T, N, E].
    seen: two intervals [S, Q] of keys that each query sees, disjoint, the first
      never empty.
    scale: factor on q·k.
    softcap: cap·tanh(x / cap) on the scaled scores, or None.
    interpret: runs the kernel without a TPU, for tests.

  Returns:
    [S, Q, H, E] in the dtype of q.
  """
  wide = q.astype(jnp.float32) * scale
  turn = lambda x: jnp.swapaxes(x, 1, 2)  # [S, heads, tokens, E]
  arrays = (turn(wide.astype(q.dtype)), turn(k), turn(v))
  bounds = tuple(map(_bound, seen))
  stream = lambda x: _attend_stream(*x, softcap, interpret)
  return turn(jax.lax.map(stream, (*arrays, bounds)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_stream(q, k, v, bounds, softcap, interpret):
  """One stream: q [H, Q, E], k and v [N, T, E], two bounds [Q]."""
  return _forward(q, k, v, bounds, softcap, interpret)[0]


def _forward(q, k, v, bounds, softcap, interpret):
  parts = []
  for bound in bounds:
    run = kernel.SplashAttentionKernel(
        _blocks_of_queries(q, k, bound), None, None,
        save_residuals=True, **_settings(q, softcap, interpret),
    )
    out, (lse,) = run(q, k, v)
    parts.append((out.astype(jnp.float32), lse))
  (own, own_lse), (prompt, prompt_lse) = parts
  lse = jnp.logaddexp(own_lse, prompt_lse)
  weigh = lambda x: jnp.exp(x - lse)[..., None]
  # Where a query has no prompt nothing was computed, and not even zeros.
  seen = (prompt_lse > 0.5 * kernel.DEFAULT_MASK_VALUE)[..., None]
  out = own * weigh(own_lse) + jnp.where(seen, prompt * weigh(prompt_lse), 0.0)
  out, lse = checkpoint_name((out.astype(q.dtype), lse), OUTPUT)
  return out, (q, k, v, bounds, out, lse)


def _backward(softcap, interpret, saved, cotangent):
  q, k, v, bounds, out, lse = saved
  gradients = []
  for bound in bounds:
    of_queries = _blocks_of_queries(q, k, bound)
    of_keys = _blocks_of_queries(q, k, bound, by_key=True)
    gradients.append(
        kernel._splash_attention_bwd(  # no public function takes lse
            save_residuals=False,
            res=(q, k, v, None, None, out, lse, of_queries, of_keys),
            do=cotangent,
            **_settings(q, softcap, interpret),
        )[3:6]
    )
  return *jax.tree.map(jnp.add, *gradients), None


_attend_stream.defvjp(_forward, _backward)


def _settings(q, softcap, interpret):
  block = _block(q)
  sizes = {
      name: block
      for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv",
                   "block_q_dq", "block_kv_dq")
  }
  return dict(
      mask_value=kernel.DEFAULT_MASK_VALUE,
      is_mqa=False,
      block_sizes=kernel.BlockSizes(**sizes),
      residual_checkpoint_name=None,
      mask_function=_inside,
      attn_logits_soft_cap=softcap,
      interpret=interpret,
  )


def _block(q):
  """The largest block that divides the queries: few, so that the time between
  two of them, more than that of a small product, is spent seldom."""
  block = MAX_BLOCK
  while q.shape[1] % block:
    block //= 2
  return block


def _bound(interval):
  """[...] int32, an interval of places in one number; `last` may be -1."""
  return interval.last << 16 | interval.first


def _inside(bound, place):
  """Whether a place lies in an interval; the kernel's mask."""
  return (place >= (bound & 0xFFFF)) & (place <= bound >> 16)


def _blocks_of_queries(q, k, bound, *, by_key=False):
  """Which blocks of keys each block of queries meets, for the kernel.

  `data_next` names the block to fetch: where none is met, one that is fetched
  anyway, so that nothing is copied for it. By key it is a block of queries.
  """
  block = _block(q)
  start = jnp.arange(0, k.shape[1], block)[None]
  first, last = (bound & 0xFFFF)[:, None], (bound >> 16)[:, None]
  met = (first < start + block) & (last >= start) & (first <= last)
  met = met.reshape(-1, block, met.shape[1]).any(1)  # [blocks of q, of k]
  axis = 0 if by_key else 1
  index = jax.lax.broadcasted_iota(jnp.int32, met.shape, axis)
  size = met.shape[axis]
  above = jax.lax.cummin(
      jnp.where(met, index, size), axis=axis, reverse=True
  )
  below = jax.lax.cummax(jnp.where(met, index, 0), axis=axis)
  return mask_info.MaskInfo(
      data_next=jnp.where(above < size, above, below)[None],
      mask_next=None,
      block_mask=met.astype(jnp.int32)[None],
      partial_mask_blocks=None,
      q_sequence=bound,
  )
