"""Safetensors folders: which tensor lies in which file, checked both ways.

Nothing is read but headers until a slice is asked for, and files are written
tensor by tensor. No pickled format is ever opened, no path leaves the folder.
"""

import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors

from mcpo_jax import commit, errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16",
           "BF16": "bfloat16"}


def read_json(folder: pathlib.Path, name: str, slug: str) -> dict[str, Any]:
  """A JSON object of the folder; {} is never returned for a missing file.

  A folder with a manifest is verified when it is first read from.
  """
  path = safe_path(folder, name)
  commit.verify_once(folder)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.ModelDirError(
        slug, f"{name} is missing", where=str(path)
    ) from None
  except (ValueError, OSError) as error:
    raise errors.ModelDirError(
        slug, f"{name} cannot be read as JSON: {error}", where=str(path)
    ) from None
  if not isinstance(content, dict):
    raise errors.ModelDirError(
        slug, f"{name} is not a JSON object", where=str(path)
    )
  return content


def safe_path(folder: pathlib.Path, name: str) -> pathlib.Path:
  """folder / name, if that stays inside the folder.

  The hub's cache is a folder of links to its own blobs: those are inside.

  Raises:
    ModelDirError: `hf.unsafe_path`.
  """
  path = folder / name
  roots = [folder.resolve()]
  if folder.resolve().parent.name == "snapshots":
    roots.append(folder.resolve().parent.parent / "blobs")
  plain = re.fullmatch(r"\w[\w.-]*", name) is not None
  if not plain or path.resolve().parent not in roots:
    raise errors.ModelDirError(
        "hf.unsafe_path",
        "a file name or link leads out of the model folder",
        where=str(folder),
        got=name,
    )
  return path


def write_file(
    path: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[np.ndarray],
) -> None:
  """Writes a file of tensors, one in memory at a time, and reads it back.

  Args:
    path: of the file.
    shapes: tensor name -> shape.
    dtype: of all tensors.
    tensors: in the order of `shapes`.

  Raises:
    ModelDirError: `hf.export`, the disk does not hold what was written.
  """
  code = next(c for c, name in _DTYPES.items() if name == dtype.name)
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape in shapes.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {
        "dtype": code, "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # so that the tensors are aligned
  digests = []
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for array in tensors:
      content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
      digests.append(hashlib.sha256(content).digest())
      file.write(content)
  with safetensors.safe_open(path, framework="numpy") as file:
    for name, digest in zip(shapes, digests, strict=True):
      written = file.get_tensor(name).reshape(-1).view(np.uint8)
      if hashlib.sha256(written).digest() != digest:
        raise errors.ModelDirError(
            "hf.export", "the file differs from the weights in memory",
            where=f"{path.name}: {name}", hint="check the disk",
        )


class Shards:
  """The tensors of a folder.

  Attributes:
    shapes: tensor name -> shape.
  """

  def __init__(self, folder: pathlib.Path, *, single: str = SINGLE):
    """Opens all headers.

    Args:
      folder: of the files.
      single: name of the one file of a folder without an index.

    Raises:
      ModelDirError: `hf.unsafe_format`, `hf.shard_missing`, `hf.index`,
        `hf.safetensors`, `hf.dtype`, `hf.unsafe_path`.
    """
    commit.verify_once(folder)
    self.folder, self._single = folder, single
    index = None
    if (folder / INDEX).exists():
      index = read_json(folder, INDEX, "hf.index").get("weight_map")
      if not isinstance(index, dict) or not index:
        raise errors.ModelDirError(
            "hf.index", "the index has no weight_map", where=INDEX
        )
      names = sorted(set(map(str, index.values())))
    else:
      names = [single]
    self._files = {name: self._open(name) for name in names}
    self._file_of = {}
    for name, file in self._files.items():
      for tensor in file.keys():
        if index is not None and index.get(tensor) != name:
          raise errors.ModelDirError(
              "hf.index",
              "a shard holds a tensor that the index does not place there",
              where=f"{name}: {tensor}",
              got=index.get(tensor),
              want=name,
          )
        self._file_of[tensor] = name
    for tensor, name in (index or {}).items():
      if tensor not in self._file_of:
        raise errors.ModelDirError(
            "hf.index",
            "the index places a tensor in a shard that does not hold it",
            where=f"{name}: {tensor}",
        )
    self.shapes = {}
    for tensor in self._file_of:
      piece = self._slice(tensor)
      self.shapes[tensor] = tuple(piece.get_shape())
      if piece.get_dtype() not in _DTYPES:
        raise errors.ModelDirError(
            "hf.dtype",
            "the dtype of a tensor is not supported",
            where=f"{self._file_of[tensor]}: {tensor}",
            got=piece.get_dtype(),
            want=f"one of {', '.join(_DTYPES)}",
        )

  def where(self, tensor: str) -> str:
    """The place of a tensor, for messages."""
    return f"{self.folder / self._file_of[tensor]}: {tensor}"

  def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of a tensor in its own dtype.

    Raises:
      ModelDirError: `hf.non_finite`.
    """
    array = self._slice(tensor)[index]
    if not np.isfinite(array).all():
      raise errors.ModelDirError(
          "hf.non_finite", "a weight is NaN or infinite",
          where=self.where(tensor),
      )
    return array

  def _slice(self, tensor: str):
    return self._files[self._file_of[tensor]].get_slice(tensor)

  def _open(self, name: str):
    path = safe_path(self.folder, name)
    if not os.path.exists(path):  # or no file can be called so
      pickles = sorted(
          p.name for p in self.folder.glob("*")
          if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
      )
      if pickles and name == self._single:
        raise errors.ModelDirError(
            "hf.unsafe_format",
            "the folder has pickled weights only, which are never opened",
            where=str(self.folder),
            got=pickles[0],
            want="safetensors",
            hint="convert them with transformers: from_pretrained, then"
            " save_pretrained",
        )
      raise errors.ModelDirError(
          "hf.shard_missing", "a weights file is missing", where=str(path)
      )
    try:
      return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
      hint = "download it again"
      if start.startswith(b"version https://git-lfs"):
        hint = "this is a git-lfs pointer: run `git lfs pull`"
      elif start.startswith(b"<"):
        hint = "this is a web page, not weights: " + hint
      raise errors.ModelDirError(
          "hf.safetensors", f"a weights file is damaged: {error}",
          where=str(path), hint=hint,
      ) from None
