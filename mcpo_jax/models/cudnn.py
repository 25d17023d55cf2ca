"""Fused attention on NVIDIA GPUs: cuDNN's flash kernel over packed segments.

The kernel takes segments: stretches of queries with the keys that all of them
see, or see causally. A run (a prompt or one candidate's completion) is a
segment with itself; all candidates of a set together are one whose keys are
the prompt's, which so are read once. Both kinds lie in the stream as they
stand, so nothing is copied or padded, and the two results are merged by their
log-sum-exps.

JAX's gradient of the kernel ignores the gradient of its log-sum-exp. None is
needed: with the merged output and log-sum-exp, each part's backward pass is
that of one softmax over both. That, and packed segments, are not in JAX's
public interface: its primitives are called as they are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.ad_checkpoint import checkpoint_name

from mcpo_jax.models.spans import OUTPUT, Slots

RUN_LENGTH = 128  # tokens of a run, on average at least
NAME = "__cudnn$fmha"  # part of the kernel's name in a compiled program


class Segments(NamedTuple):
  """M stretches of queries and the keys they see; -1 where there is none."""

  query: jax.Array  # [S, M] int32, first place
  num_queries: jax.Array  # [S, M] int32
  key: jax.Array  # [S, M] int32, first place
  num_keys: jax.Array  # [S, M] int32


def num_segments(length: int) -> int:
  """M: how many runs a stream of `length` tokens may have."""
  return max(8, length // RUN_LENGTH)


def segments(slots: Slots) -> tuple[Segments, Segments, jax.Array]:
  """The runs of each stream, and the candidates of each prompt.

  Args:
    slots: [S, T] each.

  Returns:
    own, prompt, and [S] bool, whether all of a stream's runs are among them.
  """
  length = slots.prompt.shape[1]
  number = num_segments(length)
  place = _places(slots.prompt)
  new_set = slots.prompt != _before(slots.prompt)
  new = new_set | (slots.candidate != _before(slots.candidate))
  new &= slots.prompt >= 0
  begin = jnp.sort(jnp.where(new, place, length), axis=1)[:, :number]
  at = lambda x: jnp.take_along_axis(x, jnp.minimum(begin, length - 1), axis=1)
  there = begin < length
  stop = (slots.prompt >= 0).sum(1, keepdims=True)  # padding is at the end
  following = lambda x: jnp.minimum(
      jnp.pad(x, ((0, 0), (0, 1)), constant_values=length)[:, 1:], stop
  )
  end = following(begin)
  sets = jnp.where(at(new_set), begin, length)
  end_of_set = following(jax.lax.cummin(sets, axis=1, reverse=True))
  shared = there & (at(slots.candidate) < 0) & (end_of_set > end)
  keep = lambda mask, *arrays: (jnp.where(mask, x, -1) for x in arrays)
  size = end - begin
  own = Segments(*keep(there, begin, size, begin, size))
  prompt = Segments(*keep(shared, end, end_of_set - end, begin, size))
  return own, prompt, new.sum(1) <= number


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own: Segments,
    prompt: Segments,
    *,
    scale: float,
) -> jax.Array:
  """Attention of streams to themselves, without a window.

  Args:
    q: [S, T, H, E] float16 or bfloat16.
    k: [S, T, N, E].
    v: [S, T, N, E].
    own, prompt: from segments.
    scale: factor on q·k.

  Returns:
    [S, T, H, E] in the dtype of q; 0 on padding.
  """
  return _attend(q, k, v, (own, prompt), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, parts, scale):
  return _forward(q, k, v, parts, scale)[0]


def _forward(q, k, v, parts, scale):
  outs, sums = [], []
  for part, causal in zip(parts, (True, False)):
    out, stats = _run(q, k, v, part, causal, scale)
    inside, row, column = _rows(part, q)
    # Where no segment is, the kernel leaves what was in memory.
    outs.append(jnp.where(inside[..., None, None], out, 0))
    sums.append(jnp.where(inside[..., None], stats[row, :, column], -jnp.inf))
  padding = jnp.isneginf(sums[0])
  lse = jnp.where(padding, 0.0, jnp.logaddexp(*sums))  # [S, T, H]
  out = sum(
      x.astype(jnp.float32) * jnp.exp(y - lse)[..., None]
      for x, y in zip(outs, sums)
  )
  out, lse = checkpoint_name((out.astype(q.dtype), lse), OUTPUT)
  return out, (q, k, v, parts, out, lse)


def _backward(scale, saved, cotangent):
  q, k, v, parts, out, lse = saved
  total = None
  for part, causal in zip(parts, (True, False)):
    inside, row, column = _rows(part, q)
    shape = (part.query.size, q.shape[2], q.shape[1])
    stats = jnp.zeros(shape, jnp.float32).at[
        jnp.where(inside, row, shape[0]), :, column
    ].set(lse, mode="drop")
    gradients = _pull(q, k, v, part, causal, scale, stats, out, cotangent)
    seen = _covered(part.key, part.num_keys, q).any(1)
    gradients = [
        jnp.where(mask[..., None, None], x, 0)
        for mask, x in zip((inside, seen, seen), gradients)
    ]
    total = gradients if total is None else jax.tree.map(
        jnp.add, total, gradients
    )
  return *total, None


_attend.defvjp(_forward, _backward)


def _run(q, k, v, part, causal, scale):
  """Output [S, T, H, E] and log-sum-exps [segments, H, T]: each segment has a
  row, those that there are first, and each of its queries a column."""
  return fused._dot_product_attention_fwd_p_wrapper.bind(
      *_operands(q, k, v, part), **_settings(causal, scale), is_training=True
  )


def _pull(q, k, v, part, causal, scale, stats, out, cotangent):
  """Gradients of q, k, v."""
  return fused._dot_product_attention_bwd_p_wrapper.bind(
      *_operands(q, k, v, part), stats, out, cotangent,
      **_settings(causal, scale),
  )


def _operands(q, k, v, part):
  none = jnp.zeros(0, q.dtype)
  # The last offset of a row is the next row's business.
  offsets = lambda x: jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1)
  return (
      q, k, v, none, part.num_queries, part.num_keys,
      offsets(part.query), offsets(part.key), none, none,
  )


def _settings(causal, scale):
  mask = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
  return dict(
      scale=scale,
      seed=0,
      dropout_rate=0.0,
      variadic_args=(False, False),  # no bias
      mask_type=mask,
      layout=fused.AttentionLayout.BTNH.value,
      sliding_window_length=None,
  )


def _rows(part, q):
  """Of each query, [S, T] each: whether it is in a segment, and where its
  log-sum-exp stands."""
  covered = _covered(part.query, part.num_queries, q)
  which = covered.argmax(1)
  there = part.query >= 0
  rank = (jnp.cumsum(there.ravel()) - 1).reshape(there.shape)
  of_token = lambda x: jnp.take_along_axis(x, which, axis=1)
  return (
      covered.any(1), of_token(rank), _places(which) - of_token(part.query)
  )


def _covered(begin, size, q):
  """[S, M, T] bool, the places of each segment."""
  place = jnp.arange(q.shape[1])[None, None]
  begin, size = begin[..., None], size[..., None]
  return (place >= begin) & (place < begin + size) & (begin >= 0)


def _places(x):
  return jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape)


def _before(x):
  """[S, T], each row one place later, -2 in front."""
  return jnp.pad(x, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
