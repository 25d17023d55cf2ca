"""Committed folders in object stores: gs://, s3:// and whatever fsspec opens.

A store has whole objects: no rename, no append, no fsync. Files are put first,
the manifest last and only if there is none, so a folder counts as committed as
it does on a disk. What is fetched is verified before it gets its name.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import fsspec

from mcpo_jax import commit, errors, faults

_THREADS = 8


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
  manifest = (folder / commit.MANIFEST).read_bytes()
  files = commit.read_manifest(folder)["files"]
  place = f"{url}/{commit.MANIFEST}"

  def put(store, root):
    if store.exists(f"{root}/{commit.MANIFEST}"):
      return

    def one(name):
      store.put_file(str(folder / name), f"{root}/{name}")
      if store.info(f"{root}/{name}")["size"] != files[name]["bytes"]:
        raise OSError(f"{name} was not stored whole")

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(one, files))

  _ask(url, put)
  faults.point("store.manifest")
  if put_once(place, manifest) != manifest:
    raise errors.CheckpointError(
        "ckpt.locked", "another process has committed this", where=place,
        hint="does another run write to this place?")


def pull(url: str, folder: pathlib.Path) -> None:
  """Copies a committed folder from a store; it is verified here.

  Raises:
    CheckpointError: see `commit.verify`. ResourceError: ckpt.store.
  """
  temporary = commit.temporary_of(folder)

  def get(store, root):
    if not store.exists(f"{root}/{commit.MANIFEST}"):
      raise errors.CheckpointError(
          "ckpt.uncommitted", "no manifest: the write was never finished",
          where=url)
    store.get_file(f"{root}/{commit.MANIFEST}",
                   str(temporary / commit.MANIFEST))
    files = commit.read_manifest(temporary)["files"]
    commit.check_names(temporary, files)
    for parent in {(temporary / name).parent for name in files}:
      parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in files if not store.exists(f"{root}/{name}")]
    if missing:
      raise errors.CheckpointError(
          "ckpt.incomplete", "files are missing", where=url,
          got=", ".join(missing[:20]))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(lambda name: store.get_file(
          f"{root}/{name}", str(temporary / name)), files))

  try:
    temporary.mkdir(parents=True)
    _ask(url, get)
    commit.verify(temporary, exact=True)
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
