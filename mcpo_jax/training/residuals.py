"""A forward pass in one jitted function and its backward pass in another."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from mcpo_jax import types


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"],
    meta_fields=["places", "structure"])
@dataclasses.dataclass(frozen=True)
class Residuals:
  """What a backward pass needs of its forward pass, beside the weights."""

  arrays: list[jax.Array]
  # Of each residual the leaf of the weights that it is; None: the next one of
  # `arrays`.
  places: tuple[int | None, ...]
  structure: Any  # the tree of all residuals


def forward(
    f: Callable[[types.Params], jax.Array],
    params: types.Params,
    frozen: types.Params,
) -> tuple[jax.Array, Residuals]:
  """f(params), and what `backward` needs. Inside of a jitted function.

  A jitted function copies arguments that it returns: weights among the
  residuals, trained or frozen, are left out, to be handed over again.
  """
  value, pull = jax.vjp(f, params)
  arrays, structure = jax.tree.flatten(pull)
  leaves = {id(x): i for i, x in enumerate(jax.tree.leaves((params, frozen)))}
  places = tuple(leaves.get(id(x)) for x in arrays)
  return value, Residuals(
      [x for x, place in zip(arrays, places) if place is None], places,
      structure)


def backward(
    params: types.Params,
    frozen: types.Params,
    residuals: Residuals,
    cotangent: jax.Array,
) -> types.Params:
  """d <cotangent, f> / d params, given the weights of the forward pass."""
  leaves, rest = jax.tree.leaves((params, frozen)), iter(residuals.arrays)
  arrays = [next(rest) if place is None else leaves[place]
            for place in residuals.places]
  return jax.tree.unflatten(residuals.structure, arrays)(cotangent)[0]
