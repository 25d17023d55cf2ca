"""Folders that are whole or not there: temp, hash, fsync, manifest, rename.

A folder counts as committed only with its `manifest.json`, which holds the
size and SHA-256 of every other file in it and is written last. Of several
processes the first alone writes: what writes here does nothing in the others,
which wait for it with `hosts`.
"""

import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable
from typing import Any

from mcpo_jax import errors, hosts

MANIFEST = "manifest.json"


def file_sha256(path: pathlib.Path) -> str:
  """Hex SHA-256 of a file, read in 1 MiB pieces."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file()
                and p != folder / MANIFEST)


def write_file(path: pathlib.Path, text: str) -> None:
  """Replaces a text file at once: a reader sees the old or the new one."""
  if not hosts.is_first():
    return
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  temporary.write_text(text, encoding="utf-8")
  _fsync(temporary)
  os.replace(temporary, path)
  _fsync(path.parent)


def write_manifest(folder: pathlib.Path, meta: dict[str, Any]) -> None:
  """Hashes what lies in `folder` and commits it by writing the manifest."""
  if not hosts.is_first():
    return
  entries = {}
  for path in _files(folder):
    _fsync(path)
    entries[str(path.relative_to(folder))] = {
        "bytes": path.stat().st_size, "sha256": file_sha256(path)}
  write_file(folder / MANIFEST,
             json.dumps({"meta": meta, "files": entries}, indent=1))


def verify(folder: pathlib.Path) -> dict[str, Any]:
  """Checks every file of a committed folder against its manifest.

  Returns:
    The `meta` that was committed with it.

  Raises:
    CheckpointError: ckpt.uncommitted, ckpt.missing_data or ckpt.hash, with the
      file's path.
  """
  manifest = folder / MANIFEST
  try:
    content = json.loads(manifest.read_text())
    files, meta = content["files"], content["meta"]
  except FileNotFoundError:
    raise errors.CheckpointError(
        "ckpt.uncommitted", "no manifest: the write was never finished",
        where=str(folder)) from None
  except (ValueError, KeyError, TypeError):
    raise errors.CheckpointError(
        "ckpt.metadata", "the manifest is damaged",
        where=str(manifest)) from None
  for name, entry in files.items():
    path = folder / name
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
      raise errors.CheckpointError(
          "ckpt.missing_data", "a file is missing or cut", where=str(path),
          got=path.stat().st_size if path.is_file() else None,
          want=f"{entry['bytes']} bytes")
    if file_sha256(path) != entry["sha256"]:
      raise errors.CheckpointError(
          "ckpt.hash", "a file changed since it was written", where=str(path))
  return meta


def write_folder(
    folder: pathlib.Path,
    write: Callable[[pathlib.Path], None],
    meta: dict[str, Any],
    *,
    replace: bool = False,
) -> None:
  """Fills a temporary sibling by `write`, commits it, renames it to `folder`.

  A folder that is there already stays, as one of the same content that another
  process has made meanwhile; with `replace` it goes when the new one is whole.
  """
  if not hosts.is_first():
    return
  folder = pathlib.Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
  temporary.mkdir()
  try:
    write(temporary)
    write_manifest(temporary, meta)
    old = temporary.with_suffix(".old.tmp")
    if replace and folder.exists():
      os.rename(folder, old)
    try:
      os.rename(temporary, folder)
    except OSError:
      if old.exists():
        os.rename(old, folder)
        raise
      if not (folder / MANIFEST).exists():
        raise
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
