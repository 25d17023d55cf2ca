"""Safetensors folders: which tensor lies in which file, checked both ways.

Nothing is read but headers until a slice is asked for, on a disk or in an
object store, and files are written tensor by tensor. No pickled format is ever
opened, no path leaves the folder.
"""

import concurrent.futures
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 — makes bfloat16 a name that numpy knows
import numpy as np
import safetensors

from mcpo_jax import commit, errors, storage
from mcpo_jax.models import hub

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16",
           "BF16": "bfloat16"}
_MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
_THREADS = 16


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


class _Tensor(NamedTuple):
  """A tensor in an object store; as the slices of safetensors."""

  url: str
  code: str  # of its dtype
  shape: list[int]
  begin: int  # its first byte
  end: int

  def get_shape(self) -> list[int]:
    return self.shape

  def get_dtype(self) -> str:
    return self.code

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads the rows of a slice, all that lies between the first and last."""
    dtype = np.dtype(_DTYPES[self.code])
    first, last, _ = index[0].indices(self.shape[0])
    row = dtype.itemsize * math.prod(self.shape[1:])
    want = row * (last - first)
    content = storage.read(
        self.url, self.begin + row * first, self.begin + row * last)
    if len(content) != want:
      raise errors.ModelDirError(
          "hf.safetensors", "a weights file is damaged: it ends too early",
          where=self.url, got=len(content), want=f"{want} bytes")
    rows = np.frombuffer(content, dtype).reshape(-1, *self.shape[1:])
    return rows[(slice(None), *index[1:])]


class _Remote:
  """A file of tensors in an object store; as safetensors.safe_open gives one.

  Raises:
    ValueError: the header says what cannot be.
  """

  def __init__(self, url: str, size: int):
    length = int.from_bytes(storage.read(url, 0, 8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
      raise ValueError(f"no header of {length} bytes fits in {size} bytes")
    self._tensors, end = {}, 8 + length
    header = json.loads(storage.read(url, 8, end))
    header.pop("__metadata__", None)
    for name, entry in sorted(
        header.items(), key=lambda item: item[1]["data_offsets"]):
      code, shape = entry["dtype"], entry["shape"]
      last, (begin, end) = end, (8 + length + x for x in entry["data_offsets"])
      whole = all(type(x) is int and x >= 0
                  for x in (*shape, *entry["data_offsets"]))
      width = np.dtype(_DTYPES[code]).itemsize if code in _DTYPES else None
      if not whole or begin != last or end < begin or (
          width and end - begin != width * math.prod(shape)):
        raise ValueError(f"{name} has not the bytes that its shape says")
      self._tensors[name] = _Tensor(url, code, shape, begin, end)
    if end != size:
      raise ValueError(f"the header is of {end} bytes, the file has {size}")

  def keys(self) -> Iterable[str]:
    return self._tensors.keys()

  def get_slice(self, name: str) -> _Tensor:
    return self._tensors[name]


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
    self.folder, self._single, self._url = folder, single, None
    if (folder / hub.ORIGIN).exists():
      origin = json.loads((folder / hub.ORIGIN).read_text())
      self._url, self._sizes = origin["url"], origin["files"]
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
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      self._files = dict(zip(names, pool.map(self._open, names)))
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
    return f"{self._place(self._file_of[tensor])}: {tensor}"

  def _place(self, name: str) -> str:
    return f"{self._url}/{name}" if self._url else str(self.folder / name)

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

  def check_unchanged(self) -> None:
    """After the last slice: all of them are of the same files.

    Raises:
      ModelDirError: `hf.changed`.
    """
    for name in self._files if self._url else ():
      now = storage.look(self._place(name))
      if not now or [now.bytes, now.version] != self._sizes[name]:
        raise errors.ModelDirError(
            "hf.changed", "a weights file changed while it was read",
            where=self._place(name),
            hint="start again when nobody writes to it")

  def _open(self, name: str):
    path, place = safe_path(self.folder, name), self._place(name)
    there = set(self._sizes) if self._url else {
        other.name for other in self.folder.iterdir() if other.exists()}
    if name not in there:
      pickles = sorted(
          other for other in there
          if other.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
      if pickles and name == self._single:
        raise errors.ModelDirError(
            "hf.unsafe_format",
            "the folder has pickled weights only, which are never opened",
            where=self._url or str(self.folder),
            got=pickles[0],
            want="safetensors",
            hint="convert them with transformers: from_pretrained, then"
            " save_pretrained",
        )
      raise errors.ModelDirError(
          "hf.shard_missing", "a weights file is missing", where=place
      )
    try:
      if self._url:
        return _Remote(place, self._sizes[name][0])
      return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError, ValueError, TypeError,
            KeyError, AttributeError, RecursionError) as error:
      start = storage.read(place, 0, 64) if self._url else b""
      if not self._url:
        with open(path, "rb") as file:
          start = file.read(64)
      start = start.lstrip().lower()
      hint = "download it again"
      if start.startswith(b"version https://git-lfs"):
        hint = "this is a git-lfs pointer: run `git lfs pull`"
      elif start.startswith(b"<"):
        hint = "this is a web page, not weights: " + hint
      raise errors.ModelDirError(
          "hf.safetensors", f"a weights file is damaged: {error}",
          where=place, hint=hint,
      ) from None
