"""Attention over streams and over a key-value cache.

Letters beside those of types.py: H query heads, N key-value heads, E head
width; of the cache G groups of W slots, C own tokens of each, and in each of F
parts Q pages of T tokens of prompts.
How streams are attended is chosen here, by `choose_kernel`: by the kernel that
an accelerator has for it (splash.py, cudnn.py), or in tiles (tiles.py).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax
from jax.sharding import PartitionSpec as P

from mcpo_jax import sharding
from mcpo_jax.models import cudnn, spans, splash, tiles

MASKED = -1e30  # finite: a query that sees nothing stays finite
FUSED = {"splash": splash.NAME, "cudnn": cudnn.NAME}


# --- streams ------------------------------------------------------------------


def stream_attention(
    slots: spans.Slots,
    *,
    scale: float,
    softcap: float | None,
    windows: tuple[int, ...],
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
  """Attention of streams to themselves, by the visibility rule of Streams.

  Under a mesh each device works on its own streams and heads, and on its part
  of their tokens: it gathers the keys and values of the others' parts.

  Args:
    slots: [S, T] each. A set's prompt stands before its candidates, each
      candidate's tokens side by side, padding at the end.
    scale: factor on q·k.
    softcap: cap·tanh(x / cap) on the scaled scores, or None.
    windows: of all layers.

  Returns:
    (q [S, T, H, E], k [S, T, N, E], v [S, T, N, E], window [] int32) ->
    [S, T, H, E] in the dtype of v; finite, of no meaning, on padding. A key at
    distance window or more is not seen.
  """
  length = slots.prompt.shape[1]
  parts = sharding.axis_size("context")
  if length % (parts * splash.LANES):  # the short prompts of a sampler
    parts = 1
  tile = splash.LANES if _on_tpu() else min(tiles.TILE, length)
  fill = -length % tile
  pad = lambda x, value=0: jnp.pad(
      x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2), constant_values=value
  )
  slots = spans.Slots(pad(slots.positions), *(pad(x, -1) for x in slots[1:]))
  runs = spans.runs(slots)

  def attend(q, k, v, window):
    kernel = choose_kernel(
        q.dtype, q.shape[3], length=length, parts=parts, softcap=softcap,
        window=min(windows),
    )
    seen = spans.intervals(runs, window)
    if kernel == "splash":
      marks = (seen,)
      run = functools.partial(splash.attend, scale=scale, softcap=softcap)
    else:
      marks = (seen, tiles.met(*seen, tile))
      run = functools.partial(
          tiles.attend, scale=scale, softcap=softcap, tile=tile
      )
    if kernel == "cudnn":
      marks = (cudnn.segments(slots), *marks)
      run = functools.partial(_packed, tiled=run, scale=scale)
    run = _split(run, q.shape[0], k.shape[2], parts)
    return run(pad(q), pad(k), pad(v), marks)[:, :length]

  return attend


def choose_kernel(
    dtype: jnp.dtype,
    width: int,
    *,
    length: int,
    parts: int,
    softcap: float | None,
    window: int,
) -> str:
  """What computes attention on the devices that a function is traced for.

  Args:
    dtype: of queries, keys and values.
    width: of a head.
    length: tokens of a stream.
    parts: of the mesh axis "context".
    softcap: on the scores, or None.
    window: the narrowest of all layers.

  Returns:
    "splash" on TPU, "cudnn" on NVIDIA GPUs, else "tiles". A TPU or GPU that
    has to do without its kernel is warned of, once, with the reason.
  """
  if sharding.traced_devices()[0] == "cpu":
    return "tiles"
  if _on_tpu():
    kernel, refused = "splash", {
        f"{dtype} is not float32 or bfloat16":
            dtype not in (jnp.float32, jnp.bfloat16),
        f"streams of {length} tokens are longer than {splash.MAX_LENGTH}":
            length > splash.MAX_LENGTH,
    }
  else:
    # Of the device that is here, if there is one: else it is compiled for.
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    kernel, refused = "cudnn", {
        f"{dtype} is not float16 or bfloat16":
            dtype not in (jnp.float16, jnp.bfloat16),
        "packed segments need a Hopper GPU or a later one":
            float(capability) < 9.0,
        f"heads of width {width} are not a multiple of 8 up to 256":
            width % 8 or width > 256,
        "soft-capped scores": softcap is not None,
        f"a window of {window} in streams of {length} tokens":
            window < length,
        "streams are split over the mesh axis context": parts > 1,
    }
  reasons = [reason for reason, holds in refused.items() if holds]
  if not reasons:
    return kernel
  _warn(f"attention without the {kernel} kernel: {', '.join(reasons)}")
  return "tiles"


def _on_tpu():
  return sharding.traced_devices()[0].startswith("TPU")


@functools.cache
def _warn(message):
  logging.warning("%s", message)


def fused_kernels(program: str) -> set[str]:
  """The kernels "splash" and "cudnn" that a compiled program calls.

  Args:
    program: `compiled.as_text()`.
  """
  calls = [line for line in program.splitlines() if "custom-call(" in line]
  return {kernel for kernel, name in FUSED.items()
          if any(name in line for line in calls)}


def _split(run, num_streams, kv_heads, parts):
  """`run` on each device's own streams, heads and part of the queries."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return lambda q, k, v, marks: run(q, k, v, *marks)
  batch, heads = sharding.BATCH_SPEC[0], "tensor"
  if num_streams % (mesh.shape["data"] * mesh.shape["fsdp"]):
    batch = None
  if kv_heads % mesh.shape["tensor"]:
    heads = None
  rows = P(batch, "context") if parts > 1 else P(batch)
  states = P(batch, "context" if parts > 1 else None, heads)

  def on_device(q, k, v, marks):
    if parts > 1:
      k, v = (lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
    return run(q, k, v, *marks)

  return jax.shard_map(
      on_device, in_specs=(states, states, states, rows), out_specs=states,
      check_vma=False,
  )


def _packed(q, k, v, segments, *marks, tiled, scale):
  """cuDNN's kernel, or tiles where there are more runs than it has room for."""
  own, prompt, fit = segments
  return lax.cond(
      fit.all(),
      lambda *qkv: cudnn.attend(*qkv, own, prompt, scale=scale),
      lambda *qkv: tiled(*qkv, *marks),
      q, k, v,
  )


# --- cache --------------------------------------------------------------------


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
