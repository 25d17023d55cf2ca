"""Low-rank adapters: little is trained, beside weights that stay as they are.

An adapted projection with the kernel W [L, in, out] has lora_a [L, in, r] and
lora_b [L, r, out] beside it and gives x W + scale (x A) B: W + scale A B is
never formed while training. B starts at zero, so that the first policy is the
base, to the bit.

A policy is one tree, which the decoder runs as it is; here it is taken apart
into what is trained (A and B, in the nesting of the parameters) and what is
frozen (all else). The frozen tree alone is the base, whatever scales lie in
it, so that policy and reference share one copy of the weights.

References:
  Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mcpo_jax.types import Params

# Part of a layer -> its projections, as adapters may be asked for.
_PARTS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_TRAINED = ("lora_a", "lora_b")


def projections() -> Iterator[tuple[str, str]]:
  """(part, name) of all that can be adapted, in the order of a layer."""
  for part, names in _PARTS.items():
    for name in names:
      yield part, name


def init_adapters(
    key: jax.Array,
    params: Params,
    *,
    rank: int,
    targets: tuple[str, ...],
    dtype: Any = jnp.float32,
) -> Params:
  """Adapters that change nothing yet: A uniform, B zero. Jittable.

  Args:
    key: of the draw; an adapter does not depend on which others there are.
    params: of the decoder, or their shapes.
    rank: r.
    targets: names of the adapted projections.
    dtype: of the adapters, whatever that of the weights.

  Returns:
    {"layers": {part: {name: {"lora_a": [L, in, r], "lora_b": [L, r, out]}}}}.
  """
  adapters = {}
  for number, (part, name) in enumerate(projections()):
    if name not in targets:
      continue
    layers, width, out = params["layers"][part][name]["kernel"].shape
    adapters.setdefault(part, {})[name] = {
        "lora_a": jax.random.uniform(
            jax.random.fold_in(key, number), (layers, width, rank), dtype,
            -(width**-0.5), width**-0.5,
        ),
        "lora_b": jnp.zeros((layers, rank, out), dtype),
    }
  return {"layers": adapters}


def scales(adapters: Params, scale: float) -> Params:
  """The factor alpha / r, for `join`: lora_scale [L] beside every adapter."""
  return {"layers": {
      part: {
          name: {"lora_scale": jnp.full(len(one["lora_a"]), scale, "float32")}
          for name, one in names.items()
      }
      for part, names in adapters["layers"].items()
  }}


def join(one: Params, other: Params) -> Params:
  """The union of two trees without a leaf in common; () is an empty one."""
  if not (one and other):
    return one or other
  both = dict(one)
  for name, x in other.items():
    both[name] = join(one[name], x) if name in one else x
  return both


def split(policy: Params) -> tuple[Params, Params]:
  """(trained, frozen) of a policy; ((), policy) where nothing is adapted."""

  def keep(tree, wanted):
    kept = {
        name: keep(x, wanted) if isinstance(x, dict) else x
        for name, x in tree.items()
        if isinstance(x, dict) or (name in _TRAINED) == wanted
    }
    return {
        name: x for name, x in kept.items() if not isinstance(x, dict) or x
    }

  return keep(policy, True) or (), keep(policy, False)


def merge(policy: Params, dtype: Any = None) -> Params:
  """The weights without adapters that compute the same, for all but training.

  Args:
    policy: with adapters, or without: then it is given back.
    dtype: of the kernels that are merged; None: their own. The sum is formed
      in float32 at least and rounded once.
  """
  merged = dict(policy["layers"])
  for part, name in projections():
    one = policy["layers"][part][name]
    plain = {key: x for key, x in one.items() if not key.startswith("lora_")}
    if "lora_a" in one:
      plain["kernel"] = _merged_kernel(
          one["kernel"], one["lora_a"], one["lora_b"], one["lora_scale"],
          dtype=dtype or one["kernel"].dtype,
      )
    merged[part] = merged[part] | {name: plain}
  return policy | {"layers": merged}


@jax.jit(static_argnames="dtype")
def _merged_kernel(kernel, a, b, scale, *, dtype):
  wide = jnp.promote_types(kernel.dtype, a.dtype)
  change = jnp.einsum("lir,lro->lio", a, b) * scale[:, None, None]
  return (kernel.astype(wide) + change).astype(dtype)
