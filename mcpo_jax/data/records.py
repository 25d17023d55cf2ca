"""Records: what every layout of preference data is read into."""

import collections
from collections.abc import Iterator

from mcpo_jax import errors
from mcpo_jax.data import files, readers
from mcpo_jax.data.readers import Record

MAX_ERRORS = 20
EMBEDDED = "embedded:"

__all__ = ["Record", "read_records", "scan"]


def embedded_split(path: str) -> str | None:
  """The split that "embedded:quickstart/<split>" names, None for a file.

  Raises:
    DataError: data.no_files for an unknown name.
  """
  if not path.startswith(EMBEDDED):
    return None
  name, _, split = path.removeprefix(EMBEDDED).partition("/")
  if name != "quickstart" or split not in ("train", "eval", "sft"):
    raise errors.DataError(
        "data.no_files", "no such embedded set", where=path,
        want="embedded:quickstart/train, /eval or /sft")
  return split


def scan(
    path: str,
    *,
    format: str = "auto",
    revision: str | None = None,
    counts: collections.Counter | None = None,
) -> Iterator[tuple[str, Record | errors.DataError, bytes]]:
  """Streams records, with a DataError in the place of every bad row.

  Args:
    path: file, pattern, folder, hub name or "embedded:quickstart/<split>".
    format: a name of `readers.READERS`, or "auto": each row by its columns.
    revision: of a hub name.
    counts: grows by the odd things met on the way (blank lines, ...).

  Yields:
    ("file:line", record or error, the bytes it was read from).

  Raises:
    ConfigError: config.range for an unknown format.
    DataError: a whole file is missing or damaged.
  """
  if format != "auto" and format not in readers.READERS:
    raise errors.ConfigError(
        "config.range", "no such data format", where="data.format",
        got=format, want=f"auto, {', '.join(readers.READERS)}")
  if (split := embedded_split(path)) is not None:
    from mcpo_jax.data import quickstart

    for record in quickstart.records(split):
      yield record.where, record, b""
    return
  for row in files.read_rows(path, revision=revision, counts=counts):
    if isinstance(row.value, errors.DataError):
      yield row
      continue
    try:
      name = format
      if format == "auto":
        name = readers.recognise(row.value, row.where)
      record = readers.READERS[name](row.value, row.where)
      yield row.where, record, row.raw
    except errors.DataError as e:
      yield row.where, e, row.raw


def raise_errors(found: list[errors.DataError]) -> None:
  """Raises one error as itself and several as an ErrorGroup."""
  if len(found) == 1:
    raise found[0]
  if found:
    raise errors.ErrorGroup(found)


def read_records(
    path: str, *, format: str = "auto", revision: str | None = None
) -> Iterator[Record]:
  """Streams records; at the first bad row it reads on only to list more.

  Args:
    path, format, revision: as in `scan`.

  Yields:
    Records in file order.

  Raises:
    DataError: one bad row, or a whole file.
    ErrorGroup: several bad rows, at most MAX_ERRORS.
  """
  found: list[errors.DataError] = []
  for _, record, _ in scan(path, format=format, revision=revision):
    if isinstance(record, errors.DataError):
      found.append(record)
      if len(found) == MAX_ERRORS:
        break
    elif not found:
      yield record
  raise_errors(found)
