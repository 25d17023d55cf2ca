"""Arrays as the files that orbax writes for them.

A leaf of a tree is a folder, a file in it a chunk: a piece of the array, plain,
whose name is its place in a grid.
"""

import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mcpo_jax import errors, hosts

ITEM = "default"  # the folder of the arrays in that of a step
# In that of a step: the array, the chunk's place in it.
NAME = re.compile(rf"{ITEM}/(.+)/(\d+(?:\.\d+)*)")
_BLOCK = 4096  # of a file system


def leaves_of(tree: Any) -> dict[str, Any]:
  """Name -> leaf, by the names that orbax gives their folders."""

  def word(key):
    for name in ("name", "key", "idx"):
      if hasattr(key, name):
        return str(getattr(key, name))
    raise TypeError(f"no name: {key!r}")

  return {".".join(map(word, path)): leaf for path, leaf in
          jax.tree_util.tree_leaves_with_path(tree)}


def size_of(tree: Any) -> int:
  """Bytes that a checkpoint of arrays, or of their shapes, has on this
  process's disk."""
  total = 16 * _BLOCK  # orbax's own files and the manifest
  for leaf in jax.tree.leaves(tree):
    parts = own = 1
    if getattr(leaf, "sharding", None) is not None:
      places = leaf.sharding.devices_indices_map(leaf.shape)
      parts = own = len(set(map(str, places.values())))
      if hosts.apart():
        own = len({str(places[d]) for d in leaf.sharding.addressable_devices})
    size = math.ceil(math.prod(leaf.shape) * leaf.dtype.itemsize / parts)
    total += own * math.ceil(size / _BLOCK) * _BLOCK + 2 * _BLOCK
  return total


def host_shards(state: Any) -> dict[str, list[tuple[tuple, np.ndarray]]]:
  """Name -> (where it begins, values) of each shard that no other process or
  device holds too; with disks apart of each that this one holds, for orbax has
  replicas written in parts by all that hold them. It takes such copies too."""
  shards = {
      name: {_start(s.index): s for s in leaf.addressable_shards
             if s.replica_id == 0 or hosts.apart()}
      for name, leaf in leaves_of(state).items()}
  for shard in (s for own in shards.values() for s in own.values()):
    shard.data.copy_to_host_async()
  return {name: [(start, np.asarray(s.data)) for start, s in own.items()]
          for name, own in shards.items()}


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
  return tuple(cut.start or 0 for cut in index)


def _sizes(folder: pathlib.Path) -> list[int]:
  """The shape of an array's chunks, of its folder."""
  return json.loads((folder / ".zarray").read_text())["chunks"]


def is_finite(array: np.ndarray) -> bool:
  """Whether it has no NaN or infinity; integers and booleans have none."""
  return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


def pieces(
    folder: pathlib.Path, shards: list[tuple[tuple, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
  """(file name, values) of the chunks of an array that lie in one shard."""
  sizes = _sizes(folder)
  for start, array in shards:
    counts = [n // size for n, size in zip(array.shape, sizes)]
    if any(n % size for n, size in zip(
        (*start, *array.shape), (*sizes, *sizes))):
      continue
    for index in np.ndindex(*counts):
      cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes))
      name = ".".join(str(first // n + i)
                      for first, n, i in zip(start, sizes, index))
      yield name or "0", array[cut]


def needed(folder: pathlib.Path, leaf: Any) -> set[str]:
  """File names of the chunks of an array that this process's devices read.

  Args:
    folder: of the array, with orbax's `.zarray`.
    leaf: the array that is asked for, or its shape, with a sharding.
  """
  sizes = _sizes(folder)
  names = set()
  for index in leaf.sharding.addressable_devices_indices_map(
      leaf.shape).values():
    bounds = [cut.indices(n) for cut, n in zip(index, leaf.shape)]
    spans = [range(first // size, -(-end // size))
             for (first, end, _), size in zip(bounds, sizes)]
    names |= {".".join(map(str, at)) or "0"
              for at in itertools.product(*spans)}
  return names


def check_whole(
    folder: pathlib.Path, files: dict[str, Any], leaves: dict[str, Any]
) -> None:
  """A chunk that is not there would read as zeros.

  Raises:
    CheckpointError: ckpt.incomplete, no process has written it.
  """
  for name, leaf in leaves.items():
    sizes = _sizes(folder / ITEM / name)
    counts = [math.ceil(n / size) for n, size in zip(leaf["shape"], sizes)]
    for at in np.ndindex(*counts):
      chunk = f"{ITEM}/{name}/" + (".".join(map(str, at)) or "0")
      if chunk not in files and not (folder / chunk).exists():
        raise errors.CheckpointError(
            "ckpt.incomplete", "no process has written a piece of an array",
            where=str(folder / chunk))


def check_tree(
    saved: dict[str, dict[str, Any]], abstract_state: Any, where: pathlib.Path
) -> None:
  """Whether saved arrays are those asked for.

  Args:
    saved: name -> {"shape", "dtype"}.
    abstract_state: arrays or their shapes.
    where: they lie, for messages.

  Raises:
    CheckpointError: ckpt.tree; ckpt.optimizer, only its arrays differ;
      ckpt.dtype.
  """
  wanted = leaves_of(abstract_state)
  optimizer = lambda names: all(n.startswith("opt_state.") for n in names)
  lines = [
      f"{n}: saved {saved.get(n, {}).get('shape')}, wanted "
      f"{list(wanted[n].shape) if n in wanted else None}"
      for n in sorted(saved.keys() | wanted.keys())
      if n not in saved or n not in wanted
      or saved[n]["shape"] != list(wanted[n].shape)]
  if lines:
    only = optimizer(line.split(":")[0] for line in lines)
    raise errors.CheckpointError(
        "ckpt.optimizer" if only else "ckpt.tree",
        "the checkpoint is of another optimizer" if only
        else "the checkpoint holds other arrays", where=str(where),
        got="; ".join(lines[:20]) + (
            f"; and {len(lines) - 20} more" if len(lines) > 20 else ""),
        hint="use the config that it was saved with, or a fresh --workdir")
  other = [f"{n}: saved {saved[n]['dtype']}, wanted {leaf.dtype.name}"
           for n, leaf in sorted(wanted.items())
           if saved[n]["dtype"] != leaf.dtype.name]
  if other:
    raise errors.CheckpointError(
        "ckpt.dtype", "the checkpoint is of other dtypes, and is not cast",
        where=str(where), got="; ".join(other[:20]),
        hint="use the config that it was saved with, or a fresh --workdir")
