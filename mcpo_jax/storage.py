"""Object stores: gs://, s3:// and whatever fsspec opens.

A store has whole objects: no rename, no append, no fsync. Files are put first,
the manifest last and only if there is none, so a folder counts as committed as
it does on a disk. What is fetched is verified before it gets its name. Objects
of others, weights and data, are told by their size and version.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import fsspec

from mcpo_jax import commit, errors, faults

_THREADS = 8
# What stores tell of an object that another content changes, the best first.
_VERSIONS = ("md5Hash", "crc32c", "etag", "ETag", "generation", "mtime",
             "created", "LastModified", "last_modified")

_cache: pathlib.Path | None = None


class Found(NamedTuple):
  """An object as it is now."""

  url: str
  bytes: int
  version: str  # changes with the content


def is_url(path: str) -> bool:
  """Whether a path is a place in an object store."""
  return "://" in path


def cache() -> pathlib.Path:
  """The folder that keeps what is fetched, the run's if there is one."""
  return _cache or pathlib.Path(
      os.environ.get("MCPO_CACHE")
      or pathlib.Path.home() / ".cache" / "mcpo_jax")


def set_cache(folder: pathlib.Path) -> None:
  """Says what `cache` is, once a run has found it."""
  global _cache
  _cache = folder


def _at(url: str) -> tuple[Any, str]:
  """The store and the place in it, as it is now.

  Raises:
    ResourceError: ckpt.store.
  """
  try:
    store, place = fsspec.core.url_to_fs(url)
  except (ImportError, ValueError) as e:
    raise errors.ResourceError(
        "ckpt.store", str(e), where=url,
        hint="gs:// needs gcsfs, s3:// needs s3fs") from e
  store.invalidate_cache()
  return store, place


def _ask(url: str, work: Callable[[Any, str], Any]) -> Any:
  """What `work` gives; errors of the store in our words."""
  store, place = _at(url)
  try:
    return work(store, place)
  except errors.McpoError:
    raise
  except Exception as e:  # each store has its own kinds
    raise errors.ResourceError(
        "ckpt.store", f"the store refuses: {str(e)[:300]}", where=url,
        got=type(e).__name__) from e


def put_once(url: str, content: bytes) -> bytes:
  """Makes an object if there is none; gives what is there then."""

  def work(store, place):
    try:
      store.pipe_file(place, content, mode="create")
    except FileExistsError:
      return store.cat_file(place)
    return content

  return _ask(url, work)


def put(url: str, content: bytes) -> None:
  """Makes an object, in place of the one that is there.

  Raises:
    ResourceError: ckpt.store.
  """
  _ask(url, lambda store, place: store.pipe_file(place, content))


def get_file(url: str) -> bytes | None:
  """The content of an object; None if there is none.

  Raises:
    ResourceError: ckpt.store.
  """

  def work(store, place):
    try:
      return store.cat_file(place)
    except FileNotFoundError:
      return None

  return _ask(url, work)


def _look(store: Any, place: str) -> Found | None:
  """What lies at a place; None if that is no object."""
  told = store.info(place)
  version = next((str(told[key]) for key in _VERSIONS if told.get(key)), "")
  return Found(store.unstrip_protocol(place), told["size"], version) if (
      told["type"] == "file") else None


def look(url: str) -> Found | None:
  """An object as it is now; None if there is none.

  Raises:
    ResourceError: ckpt.store.
  """

  def work(store, place):
    try:
      return _look(store, place)
    except FileNotFoundError:
      return None

  return _ask(url, work)


def find(url: str) -> list[Found]:
  """The objects that a URL or a pattern names, sorted.

  Raises:
    ResourceError: ckpt.store.
  """

  def work(store, place):
    try:
      names = sorted(store.glob(place))
      with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(filter(None, pool.map(
            lambda name: _look(store, name), names)))
    except FileNotFoundError:  # no such bucket
      return []

  return _ask(url, work)


def read(url: str, start: int, stop: int) -> bytes:
  """The bytes [start, stop) of an object, fewer where it ends.

  Raises:
    ResourceError: ckpt.store.
  """
  return _ask(url, lambda store, place: store.cat_file(place, start, stop))


def copies_of(found: list[Found]) -> list[pathlib.Path]:
  """Objects as files of the cache, fetched if they are not there yet.

  Raises: as `fetch`.
  """

  def one(entry):
    key = hashlib.sha256(json.dumps(entry).encode()).hexdigest()[:24]
    names = [name for name in re.split("[:/]+", entry.url)
             if name not in ("", ".", "..")]
    path = cache().joinpath("objects", key, *names)
    if not path.is_file() or path.stat().st_size != entry.bytes:
      fetch(entry, path)
    return path

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(one, found))


def fetch(found: Found, path: pathlib.Path) -> None:
  """Copies an object to a file, which is whole or not there.

  Raises:
    DataError: data.changed, while it was read.
    ResourceError: ckpt.store, ckpt.disk_full.
  """
  temporary = commit.temporary_of(path)

  def work(store, place):
    try:
      store.get_file(place, str(temporary))
    except OSError as e:
      told = commit.storage_error(e, path)
      if told.slug == "ckpt.disk_full":
        raise told from e
      raise

  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _ask(found.url, work)
    size = temporary.stat().st_size
    if size != found.bytes or look(found.url) != found:
      raise errors.DataError(
          "data.changed", "the file changed while it was read",
          where=found.url, got=f"{size} bytes", want=f"{found.bytes} bytes, "
          f"version {found.version}",
          hint="start again when nobody writes to it")
    commit.sync(temporary)
    os.replace(temporary, path)
    commit.sync(path.parent)
  except OSError as e:
    raise commit.storage_error(e, path) from e
  finally:
    temporary.unlink(missing_ok=True)


def steps(url: str) -> list[int]:
  """Numbers of the committed folders below a place, ascending."""
  found = _ask(url, lambda store, place: store.glob(
      f"{place}/*/{commit.MANIFEST}"))
  names = [path.rstrip("/").split("/")[-2] for path in found]
  return sorted(int(name) for name in names if name.isdecimal())


def push(folder: pathlib.Path, url: str) -> None:
  """Copies a committed folder to a store and commits it there.

  Raises:
    CheckpointError: ckpt.locked, another one was committed there.
    ResourceError: ckpt.store.
  """
  if not _ask(f"{url}/{commit.MANIFEST}",
              lambda store, place: store.exists(place)):
    put_files(folder, url, commit.read_manifest(folder)["files"])
  put_manifest(folder, url)


def replace(folder: pathlib.Path, url: str) -> None:
  """As `push`, in place of the committed folder that is there.

  Raises:
    ResourceError: ckpt.store.
  """

  def clear(store, root):
    try:
      old = json.loads(store.cat_file(f"{root}/{commit.MANIFEST}"))
    except FileNotFoundError:
      return
    store.rm_file(f"{root}/{commit.MANIFEST}")
    for name in old["files"]:
      store.rm_file(f"{root}/{name}")

  _ask(url, clear)
  push(folder, url)


def put_files(
    folder: pathlib.Path, url: str, files: dict[str, dict[str, Any]]
) -> None:
  """Copies some files of a folder, entries of its manifest, to a store.

  Raises:
    ResourceError: ckpt.store.
  """

  def put(store, root):

    def one(name):
      store.put_file(str(folder / name), f"{root}/{name}")
      if store.info(f"{root}/{name}")["size"] != files[name]["bytes"]:
        raise OSError(f"{name} was not stored whole")

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(one, files))

  _ask(url, put)


def put_manifest(folder: pathlib.Path, url: str) -> None:
  """Commits what lies at a place of a store, by a folder's manifest.

  Raises:
    CheckpointError: ckpt.locked, another one was committed there.
    ResourceError: ckpt.store.
  """
  manifest = (folder / commit.MANIFEST).read_bytes()
  place = f"{url}/{commit.MANIFEST}"
  faults.point("store.manifest")
  if put_once(place, manifest) != manifest:
    raise errors.CheckpointError(
        "ckpt.locked", "another process has committed this", where=place,
        hint="does another run write to this place?")


def get_manifest(url: str, folder: pathlib.Path) -> dict[str, Any]:
  """Takes the manifest of a place of a store into a folder; its content.

  Raises:
    CheckpointError: see `commit.read_manifest`; ckpt.unsafe_path.
    ResourceError: ckpt.store.
  """
  place = f"{url}/{commit.MANIFEST}"
  content = get_file(place)
  if content is None:
    raise errors.CheckpointError(
        "ckpt.uncommitted", "no manifest: the write was never finished",
        where=url)
  (folder / commit.MANIFEST).write_bytes(content)
  body = commit.read_manifest(folder)
  commit.check_names(folder, body["files"])
  return body


def get_files(
    url: str, folder: pathlib.Path, files: dict[str, dict[str, Any]]
) -> None:
  """Has a folder hold some files of a place of a store, by their entries in
  its manifest, verified; those that it holds already are not fetched.

  Raises:
    CheckpointError: ckpt.incomplete, ckpt.missing_data, ckpt.hash.
    ResourceError: ckpt.store.
  """

  def get(store, root):

    def one(name):
      """What is wrong with a file."""
      path, entry = folder / name, files[name]
      if _holds(path, entry):
        return None
      try:
        store.get_file(f"{root}/{name}", str(path))
      except FileNotFoundError:
        path.unlink(missing_ok=True)
        return "ckpt.incomplete", "a file is missing", name
      if path.stat().st_size != entry["bytes"]:
        return "ckpt.missing_data", "a file is cut", name
      if not _holds(path, entry):
        return "ckpt.hash", "a file changed since it was written", name
      return None

    for parent in {(folder / name).parent for name in files}:
      parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      for slug, message, name in filter(None, pool.map(one, files)):
        raise errors.CheckpointError(slug, message, where=f"{url}/{name}")

  _ask(url, get)


def _holds(path: pathlib.Path, entry: dict[str, Any]) -> bool:
  return (path.is_file() and path.stat().st_size == entry["bytes"]
          and commit.file_sha256(path) == entry["sha256"])


def pull(url: str, folder: pathlib.Path) -> None:
  """Copies a committed folder from a store; it is verified here.

  Raises:
    CheckpointError: see `commit.verify`. ResourceError: ckpt.store.
  """
  temporary = commit.temporary_of(folder)
  try:
    temporary.mkdir(parents=True)
    get_files(url, temporary, get_manifest(url, temporary)["files"])
    for path in (*temporary.rglob("*"), temporary):
      commit.sync(path)
    os.rename(temporary, folder)
    commit.sync(folder.parent)
  except OSError as e:
    raise commit.storage_error(e, folder) from e
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def remove(url: str) -> None:
  """Takes a folder away, its manifest first."""

  def work(store, place):
    store.rm_file(f"{place}/{commit.MANIFEST}")
    store.rm(place, recursive=True)

  _ask(url, work)


def claim(url: str, run_id: str, *, fresh: bool) -> str:
  """The id of the run that keeps its checkpoints here: this one's if it is the
  first, or fresh.

  Raises:
    CheckpointError: ckpt.run_id.
  """
  there = json.loads(put_once(
      f"{url}/run.json", json.dumps({"run": run_id}).encode()))["run"]
  if there != run_id and not fresh:
    raise errors.CheckpointError(
        "ckpt.run_id", "another run keeps its checkpoints there", where=url,
        got=there, want=run_id, hint="give each run a place of its own")
  return there
