"""Files of rows: JSON Lines (also .gz, .zst), Parquet, `datasets` sets.

Everything streams: memory is bounded by one line or one Parquet batch. A row
that cannot be read is handed on as a `DataError` in its place, so that the
caller may list it, quarantine it or stop; a file that cannot be read raises.
"""

import collections
import glob
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from mcpo_jax import errors, storage

MAX_LINE_BYTES = 64 * 2**20
MAX_DEPTH = 64
PARQUET_BATCH_ROWS = 256
HUB_TIMEOUT_SECONDS = 10
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w\[\]%.-]+)?")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz", ".zst", ".csv", ".txt")


class Row(NamedTuple):
  """One row of a file, or why it is none."""

  where: str  # "file:line" or "file:row-group/row"
  value: dict[str, Any] | errors.DataError
  raw: bytes  # what was read, for a hash


def is_hub_name(path: str) -> bool:
  """Whether `path` can only mean a set on the hub ("owner/name:split")."""
  return (
      _HUB_NAME.fullmatch(path) is not None
      and not path.endswith(_SUFFIXES)
      and not os.path.exists(path)
  )


def find(path: str) -> list[storage.Found]:
  """The objects that a URL or a pattern of a store names, sorted.

  Raises:
    DataError: data.no_files. ResourceError: ckpt.store.
  """
  found = storage.find(path)
  if not found:
    raise errors.DataError(
        "data.no_files", "no such object, and the pattern matches nothing",
        where=path, hint="check the URL; patterns such as gs://bucket/*.jsonl "
        "work, a folder needs one")
  return found


def expand(path: str) -> list[pathlib.Path]:
  """The files that a path or a pattern names, sorted.

  Objects of a store are files of the cache, which fetches each version once.

  Raises:
    DataError: data.no_files, data.unreadable; data.changed, an object while it
      was fetched.
    ResourceError: ckpt.store, ckpt.disk_full.
  """
  if storage.is_url(path):
    return storage.copies_of(find(path))
  found = [path] if os.path.exists(path) else sorted(
      glob.glob(path, recursive=True))
  files = [pathlib.Path(p) for p in found]
  if not files:
    raise errors.DataError(
        "data.no_files", "no such file, and the pattern matches nothing",
        where=path, hint="check the path; patterns such as data/*.jsonl work")
  for file in files:
    if file.is_dir() and not _is_saved_set(file):
      raise errors.DataError(
          "data.unreadable", "a directory stands where a file is expected",
          where=str(file), hint=f"name its files: {file}/*.jsonl")
    if not os.access(file, os.R_OK):
      raise errors.DataError(
          "data.unreadable", "no permission to read", where=str(file))
  return files


def read_rows(
    path: str,
    *,
    revision: str | None = None,
    counts: collections.Counter | None = None,
) -> Iterator[Row]:
  """Streams the rows of all files that `path` names.

  Args:
    path: a file, a pattern, both also in a store, a folder written by
      `datasets`, or a hub name "owner/name" or "owner/name:split".
    revision: of a hub name; a branch, tag or commit.
    counts: grows by "blank_lines", "bom" and "crlf_lines".

  Yields:
    Rows in file order.

  Raises:
    DataError: a whole file is missing or damaged, or columns drift.
  """
  counts = collections.Counter() if counts is None else counts
  if is_hub_name(path):
    yield from _hub_rows(path, revision)
    return
  first_types: dict[str, tuple[str, str]] = {}  # column -> (type, file)
  for file in expand(path):
    if file.is_dir():
      yield from _saved_rows(file)
    elif file.suffix == ".parquet":
      yield from _parquet_rows(file, first_types)
    else:
      yield from _json_rows(file, first_types, counts)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(pairs)
  if len(row) < len(pairs):
    seen = [key for key, _ in pairs]
    twice = next(key for key in seen if seen.count(key) > 1)
    raise errors.DataError(
        "data.duplicate_key", "a key occurs twice in one object", got=twice)
  return row


def _surrogate(value: Any, field: str) -> str:
  """The field that holds half a surrogate pair, or ""."""
  stack = [(value, field)]
  while stack:
    item, name = stack.pop()
    if isinstance(item, str):
      if any("\ud800" <= c <= "\udfff" for c in item):
        return name
    elif isinstance(item, dict):
      stack += [(v, f"{name}.{k}" if name else k) for k, v in item.items()]
    elif isinstance(item, list):
      stack += [(v, f"{name}[{i}]") for i, v in enumerate(item)]
  return ""


def _depth_exceeds(line: bytes, limit: int) -> bool:
  """Whether brackets outside strings nest deeper than `limit`."""
  if line.count(b"[") + line.count(b"{") <= limit:
    return False
  depth = 0
  outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line)
  for bracket in re.findall(rb"[\[\]{}]", outside):
    depth += 1 if bracket in b"[{" else -1
    if depth > limit:
      return True
  return False


def parse_line(line: bytes, where: str) -> dict[str, Any] | errors.DataError:
  """One JSON object, or the reason why the line is none."""
  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as e:
    return errors.DataError(
        "data.encoding", f"not UTF-8 at byte {e.start} of the line",
        where=where, hint="convert the file to UTF-8")
  if _depth_exceeds(line, MAX_DEPTH):
    return errors.DataError(
        "data.too_deep", "the value is nested too deeply", where=where,
        want=f"at most {MAX_DEPTH} levels")
  try:
    row = json.loads(text, object_pairs_hook=_no_duplicates)
  except json.JSONDecodeError as e:
    return errors.DataError(
        "data.json", f"not JSON: {e.msg}", where=f"{where}:{e.colno}",
        hint="a cut last line is the sign of a killed writer")
  except errors.DataError as e:
    return errors.DataError(
        e.slug, e.message, where=f"{where}, {e.got}", got=e.got)
  if not isinstance(row, dict):
    return errors.DataError(
        "data.not_object", "the line is no JSON object", where=where,
        got=type(row).__name__,
        hint="write one object a line (JSON Lines), not one array")
  if b"\\u" in line and (field := _surrogate(row, "")):
    return errors.DataError(
        "data.surrogate", "half a surrogate pair, no text can hold it",
        where=f"{where}, {field}")
  return row


def _open(file: pathlib.Path) -> io.BufferedIOBase:
  """Opens for reading, through the compression that the content shows."""
  with open(file, "rb") as stream:
    head = stream.read(4)
  named = _COMPRESSION.get(file.suffix)
  found = next((k for k, v in _MAGIC.items() if head.startswith(v)), None)
  if named != found and head:
    raise errors.DataError(
        "data.compression", "name and content disagree", where=str(file),
        got=found or "plain", want=named or "plain")
  if found == "zstd":
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(
        str(file), compression="zstd"))
  return gzip.open(file) if found else open(file, "rb")


def _lines(file: pathlib.Path) -> Iterator[tuple[int, bytes, bool]]:
  """Line number, bytes without the end, and whether it was too long."""
  number = 0
  with _open(file) as stream:
    while True:
      try:
        line = stream.readline(MAX_LINE_BYTES + 1)
        too_long = len(line) > MAX_LINE_BYTES
        rest = line
        while too_long and rest and not rest.endswith(b"\n"):
          rest = stream.readline(2**20)
      except (EOFError, zlib.error, OSError) as e:
        raise errors.DataError(
            "data.compression", f"the compressed data is damaged or cut: {e}",
            where=f"{file}:{number + 1}") from None
      if not line:
        return
      number += 1
      yield number, line[:4096] if too_long else line, too_long


def _drift(types, first_types, file) -> None:
  for column, kind in types.items():
    known, where = first_types.setdefault(column, (kind, str(file)))
    if known != kind and where != str(file):
      raise errors.DataError(
          "data.schema_drift",
          f"a column changes its type between {where} and {file}",
          where=f"{file}, {column}", got=kind, want=known)


def _json_kind(value: Any) -> str:
  return "number" if isinstance(value, int | float) and not isinstance(
      value, bool) else type(value).__name__


def _json_rows(file, first_types, counts) -> Iterator[Row]:
  first = True
  for number, line, too_long in _lines(file):
    where = f"{file}:{number}"
    if too_long:
      yield Row(where, errors.DataError(
          "data.line_too_long", "the line is too long", where=where,
          want=f"at most {MAX_LINE_BYTES} bytes"), line)
      continue
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
      counts["bom"] += 1
      line = line[3:]
    line = line.removesuffix(b"\n")
    if line.endswith(b"\r"):
      counts["crlf_lines"] += 1
      line = line[:-1]
    if not line.strip():
      counts["blank_lines"] += 1
      continue
    row = parse_line(line, where)
    if first and isinstance(row, dict):
      first = False
      _drift({k: _json_kind(v) for k, v in row.items()}, first_types, file)
    yield Row(where, row, line)


def _plain_row(where: str, row: dict[str, Any]) -> Row:
  """A row that came typed: only its text needs a look."""
  raw = json.dumps(row, default=str).encode()
  if field := _surrogate(row, ""):
    return Row(where, errors.DataError(
        "data.surrogate", "half a surrogate pair", where=f"{where}, {field}"),
        raw)
  return Row(where, row, raw)


def _check_arrow_type(field, file) -> None:
  import pyarrow as pa

  stack = [field.type]
  while stack:
    kind = stack.pop()
    if isinstance(kind, pa.BaseExtensionType) or (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
      raise errors.DataError(
          "data.unsafe_type", "extension and binary columns are refused",
          where=f"{file}, {field.name}", got=str(kind),
          hint="keep text, numbers, lists and structs")
    stack += [kind.field(i).type for i in range(kind.num_fields)]


def _parquet_rows(file, first_types) -> Iterator[Row]:
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    with pq.ParquetFile(file, page_checksum_verification=True) as table:
      schema = table.schema_arrow
      for field in schema:
        _check_arrow_type(field, file)
      _drift({f.name: str(f.type) for f in schema}, first_types, file)
      for group in range(table.num_row_groups):
        number = 0
        for batch in table.iter_batches(
            PARQUET_BATCH_ROWS, row_groups=[group]):
          for row in batch.to_pylist():
            yield _plain_row(f"{file}:{group}/{number}", row)
            number += 1
  except (pa.ArrowException, OSError) as e:
    raise errors.DataError(
        "data.parquet", f"damaged: {str(e).splitlines()[0]}",
        where=str(file), got=f"{file.stat().st_size} bytes",
        hint="fetch the file again") from None


def _is_saved_set(folder: pathlib.Path) -> bool:
  return any((folder / name).is_file()
             for name in ("state.json", "dataset_dict.json"))


def _saved_rows(folder: pathlib.Path) -> Iterator[Row]:
  import datasets

  try:
    saved = datasets.load_from_disk(str(folder))
  except Exception as e:  # datasets raises many kinds for a bad folder
    raise errors.DataError(
        "data.unreadable", f"no set of `datasets`: {type(e).__name__}",
        where=str(folder), hint="write it again: save_to_disk") from None
  if isinstance(saved, datasets.DatasetDict):
    raise errors.DataError(
        "data.no_files", "the folder holds several splits", where=str(folder),
        got=", ".join(saved), hint=f"name one: {folder}/{next(iter(saved))}")
  yield from _set_rows(str(folder), saved)


def _set_rows(path: str, rows) -> Iterator[Row]:
  """The rows of a `datasets.Dataset`."""
  for field in rows.data.schema:
    _check_arrow_type(field, path)
  for number, row in enumerate(rows):
    yield _plain_row(f"{path}:{number}", row)


def resolve_revision(path: str, revision: str | None) -> str | None:
  """The commit hash that a hub name's revision stands for now.

  Offline (HF_HUB_OFFLINE=1) the revision is returned as given.

  Raises:
    DataError: data.hub_gated, data.hub_missing, data.hub_unauthorised, or
      data.hub if the hub cannot be reached.
  """
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  name = path.split(":")[0]
  page = f"https://huggingface.co/datasets/{name}"
  if huggingface_hub.constants.HF_HUB_OFFLINE:
    return revision
  try:
    return huggingface_hub.HfApi().dataset_info(
        name, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
  except hub_errors.GatedRepoError:
    slug, text = "data.hub_gated", "the set is gated"
    hint = f"accept its terms at {page}, then log in: hf auth login"
  except hub_errors.RepositoryNotFoundError as e:
    status = getattr(getattr(e, "response", None), "status_code", None)
    if status == 401:
      slug, text = "data.hub_unauthorised", "the set is private or unknown"
      hint = f"log in (hf auth login) with an account that sees {page}"
    else:
      slug, text, hint = "data.hub_missing", "no such set", f"see {page}"
  except hub_errors.RevisionNotFoundError:
    slug, text = "data.hub_missing", "no such revision"
    hint = f"see {page}/commits"
  except Exception as e:  # the many ways in which a network is absent
    slug, text = "data.hub", f"the hub cannot be reached: {type(e).__name__}"
    hint = (f"no local file {path} either; give a local path, or fetch once "
            "and set HF_HUB_OFFLINE=1")
  raise errors.DataError(slug, text, where=path, got=revision, hint=hint)


def _hub_rows(path: str, revision: str | None) -> Iterator[Row]:
  revision = resolve_revision(path, revision)
  import datasets

  name, _, split = path.partition(":")
  try:
    rows = datasets.load_dataset(
        name, split=split or "train", revision=revision)
  except Exception as e:  # datasets raises many kinds for one absence
    raise errors.DataError(
        "data.hub", f"the set cannot be loaded: {type(e).__name__}",
        where=path, got=revision,
        hint="no local file of this name either; offline only sets that were "
        "fetched before can be read (HF_HUB_OFFLINE is their switch)",
    ) from None
  yield from _set_rows(path, rows)
