"""Folders that are whole or not there: temp, hash, fsync, manifest, rename.

A folder counts as committed only with its `manifest.json`, which holds the
size and SHA-256 of every other file in it, and its own, and is written last.
Of several processes that share a disk the first alone writes: what writes here
does nothing in the others, which wait for it with `hosts`.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from mcpo_jax import errors, faults, hosts

MANIFEST = "manifest.json"
VERSION = 2  # of the manifest
_UNSAFE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".ckpt")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<pid>\d+)@(?P<host>.+)\.[0-9a-f]{8}"
    r"(?P<old>\.old)?\.tmp")
_THREADS = 4  # that hash; hashing lets other threads run


# --- files --------------------------------------------------------------------


def file_sha256(path: pathlib.Path) -> str:
  """Hex SHA-256 of a file, read in pieces."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: pathlib.Path) -> None:
  """Has the disk hold a file, or the names in a folder."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def files_of(folder: pathlib.Path) -> list[str]:
  """Names below a folder of all its files but the manifest, sorted."""
  return sorted(
      str(p.relative_to(folder)) for p in folder.rglob("*")
      if (p.is_file() or p.is_symlink()) and p != folder / MANIFEST)


def hash_files(
    folder: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """Name -> size and SHA-256 of files that the disk then holds."""

  def entry(name):
    path = folder / name
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

  names = list(names)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(entry, names)))


def storage_error(
    error: BaseException, where: pathlib.Path, needed: int | None = None
) -> errors.ResourceError:
  """What a user is told when a disk refuses.

  Args:
    error: of the file system, or of a library that tells it in words.
    where: the file or folder that was written.
    needed: bytes, if known.
  """
  words = ("no space left", "file too large", "quota exceeded",
           "resource_exhausted")
  text = str(error).lower()
  if getattr(error, "errno", None) in _FULL or any(w in text for w in words):
    return errors.ResourceError(
        "ckpt.disk_full", "the disk is full", where=str(where),
        got=f"{free_bytes(where)} bytes free",
        want="more" if needed is None else f"{needed} bytes",
        hint="free some space; the same line goes on")
  return errors.ResourceError(
      "ckpt.path", str(error).split("\n")[0][:300], where=str(where))


def free_bytes(path: pathlib.Path) -> int:
  """What is left on the disk that holds a path, there or still to be made."""
  while not path.exists():
    path = path.parent
  return shutil.disk_usage(path).free


def write_file(path: pathlib.Path, text: str, *, point: str = "file") -> None:
  """Replaces a text file at once: a reader sees the old or the new one.

  Args:
    path: of the file.
    text: all of it.
    point: names its fault points.

  Raises:
    ResourceError: ckpt.disk_full, ckpt.path.
  """
  if not hosts.writes():
    return
  temporary = temporary_of(path)
  try:
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    faults.point(f"{point}.rename")
    os.replace(temporary, path)
    sync(path.parent)
  except OSError as e:
    temporary.unlink(missing_ok=True)
    raise storage_error(e, path, len(text)) from e


def append(path: pathlib.Path, text: str) -> None:
  """Adds text to the end of a file, all of it or nothing.

  Raises:
    ResourceError: ckpt.disk_full, ckpt.path.
  """
  size = path.stat().st_size if path.exists() else 0
  try:
    with open(path, "a", encoding="utf-8") as file:
      file.write(text)
  except OSError as e:
    with contextlib.suppress(OSError):
      os.truncate(path, size)
    raise storage_error(e, path, len(text)) from e


def temporary_of(path: pathlib.Path) -> pathlib.Path:
  """A sibling to write to; its name says who does."""
  return path.with_name(
      f".{path.name}.{os.getpid()}@{socket.gethostname()}."
      f"{uuid.uuid4().hex[:8]}.tmp")


_known: set[tuple[pathlib.Path, int, int]] = set()  # folders that verified

# --- the manifest -------------------------------------------------------------


def _render(body: dict[str, Any]) -> str:
  digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
  return json.dumps({"sha256": digest, **body}, indent=1)


def write_manifest(
    folder: pathlib.Path,
    meta: dict[str, Any],
    *,
    files: dict[str, Any] | None = None,
    leaves: dict[str, Any] | None = None,
    point: str = "folder",
) -> None:
  """Commits what lies in `folder` by writing its manifest.

  Args:
    folder: with all its files.
    meta: whatever belongs to it, JSON.
    files: from `hash_files`; None: all are hashed here.
    leaves: of arrays, what lies in which files.
    point: names its fault points.
  """
  if not hosts.writes():
    return
  if files is None:
    files = hash_files(folder, files_of(folder))
  for inner in {(folder / name).parent for name in files} | {folder}:
    sync(inner)
  faults.point(f"{point}.manifest")
  body = {"version": VERSION, "meta": meta, "files": files}
  if leaves is not None:
    body["leaves"] = leaves
  write_file(folder / MANIFEST, _render(body), point=point)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a committed folder, itself unharmed.

  Raises:
    CheckpointError: ckpt.uncommitted, ckpt.metadata, ckpt.version.
  """
  path = folder / MANIFEST
  try:
    text = path.read_bytes().decode()
    body = json.loads(text)
    version = body["version"]
    del body["sha256"]
    whole = _render(body) == text
  except (FileNotFoundError, NotADirectoryError):
    raise errors.CheckpointError(
        "ckpt.uncommitted", "no manifest: the write was never finished",
        where=str(folder)) from None
  except (ValueError, KeyError, TypeError, RecursionError):
    version, whole = VERSION, False
  if version != VERSION:
    raise errors.CheckpointError(
        "ckpt.version", "written by another version", where=str(path),
        got=version, want=VERSION, hint="use a fresh --workdir or cache")
  if not whole:
    raise errors.CheckpointError(
        "ckpt.metadata", "the manifest is damaged", where=str(path))
  return body


def verify(
    folder: pathlib.Path, *, part: int = 0, parts: int = 1,
    exact: bool = False, but: str | None = None,
) -> dict[str, Any]:
  """Checks the files of a committed folder against its manifest.

  Args:
    folder: to check.
    part, parts: of several processes each hashes every parts-th file.
    exact: whether links, and files that the manifest does not name, are
      refused.
    but: files whose names end so may be anything.

  Returns:
    The `meta` that was committed with it.

  Raises:
    CheckpointError: with the file's path. ckpt.uncommitted, ckpt.metadata,
      ckpt.version: of the manifest; ckpt.unsafe_path, a name or link leads
      out; ckpt.incomplete or ckpt.missing_data, files are missing or cut;
      ckpt.hash; ckpt.unsafe_format or ckpt.unexpected, a file is too many.
  """
  body = read_manifest(folder)
  files = {name: entry for name, entry in body["files"].items()
           if but is None or not name.endswith(but)}
  check_names(folder, files, exact)
  absent = [name for name in files if not (folder / name).is_file()]
  if len(absent) > 1:
    raise errors.CheckpointError(
        "ckpt.incomplete", "files are missing", where=str(folder),
        got=f"{len(absent)} of {len(files)} are missing: "
        + ", ".join(absent[:20]))
  for name, entry in files.items():
    path = folder / name
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
      raise errors.CheckpointError(
          "ckpt.missing_data", "a file is missing or cut", where=str(path),
          got=size, want=f"{entry['bytes']} bytes")
  own = list(files)[part::parts]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    hashes = pool.map(lambda name: file_sha256(folder / name), own)
    for name, digest in zip(own, hashes):
      if digest != files[name]["sha256"]:
        raise errors.CheckpointError(
            "ckpt.hash", "a file changed since it was written",
            where=str(folder / name))
  return body["meta"]


def verify_once(folder: pathlib.Path) -> None:
  """Verifies a folder that somebody may have committed, unless this process
  has done so since its manifest was written.

  Raises:
    CheckpointError: see `verify`.
  """
  try:
    found = (folder / MANIFEST).stat()
  except (FileNotFoundError, NotADirectoryError):
    return  # from elsewhere: nothing is known of its content
  known = folder.resolve(), found.st_ino, found.st_mtime_ns
  if known in _known:
    return
  try:
    verify(folder, but=".md")  # a model's card is for its owner to write
  except errors.CheckpointError as e:
    e.hint = e.hint or f"without its {MANIFEST} a folder is taken as it is"
    raise
  _known.add(known)


def check_names(
    folder: pathlib.Path, files: Iterable[str], exact: bool = False
) -> None:
  """Names stay inside; with `exact` links do too and nothing else lies there.

  Raises:
    CheckpointError: ckpt.unsafe_path, ckpt.unsafe_format, ckpt.unexpected.
  """
  root = folder.resolve()
  for name in files:
    path = folder / name
    inside = not pathlib.PurePath(name).is_absolute() and (
        ".." not in pathlib.PurePath(name).parts)
    if not inside or exact and (
        path.is_symlink() or not path.resolve().is_relative_to(root)):
      raise errors.CheckpointError(
          "ckpt.unsafe_path", "a name or link leads out of the folder",
          where=str(folder), got=name)
  for name in sorted(set(files_of(folder)) - set(files)) if exact else ():
    unsafe = pathlib.PurePath(name).suffix in _UNSAFE
    raise errors.CheckpointError(
        "ckpt.unsafe_format" if unsafe else "ckpt.unexpected",
        "a pickled file, which is never opened" if unsafe
        else "a file that was not there when it was written",
        where=str(folder / name))


# --- folders ------------------------------------------------------------------


def write_folder(
    folder: pathlib.Path,
    write: Callable[[pathlib.Path], None],
    meta: dict[str, Any],
    *,
    replace: bool = False,
    point: str = "folder",
) -> None:
  """Fills a temporary sibling by `write`, commits it, renames it to `folder`.

  A folder that is there already stays, as one of the same content that another
  process has made meanwhile; with `replace` it goes when the new one is whole.

  Raises:
    ResourceError: ckpt.disk_full, ckpt.path.
  """
  if not hosts.writes():
    return
  folder = pathlib.Path(folder)
  temporary = temporary_of(folder)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    faults.point(f"{point}.write")
    write(temporary)
    write_manifest(temporary, meta, point=point)
    faults.point(f"{point}.move")
    old = temporary.with_suffix(".old.tmp")
    if replace and folder.exists():
      os.rename(folder, old)
      faults.point(f"{point}.moved")
    try:
      os.rename(temporary, folder)
    except OSError:
      if old.exists():
        os.rename(old, folder)
        raise
      if not (folder / MANIFEST).exists():
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
  except OSError as e:
    raise storage_error(e, folder) from e
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: pathlib.Path) -> None:
  """Takes a folder away: what is left of it at any moment is uncommitted."""
  (folder / MANIFEST).unlink(missing_ok=True)
  shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: pathlib.Path) -> None:
  """Removes what killed writers left in a folder and those below; a folder
  that was about to be replaced comes back.

  Writers are told by the names of their temporary files: those of this host
  that no longer live have no use for theirs.
  """
  if not hosts.writes() or not folder.exists():
    return
  for path in list(folder.rglob(".*.tmp")):
    found = _TEMPORARY.fullmatch(path.name)
    if not found or found["host"] != socket.gethostname() or _lives(
        int(found["pid"])):
      continue
    target = path.with_name(found["name"])
    if found["old"] and not target.exists():
      os.rename(path, target)
    elif path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


# --- one writer ---------------------------------------------------------------

_locks: dict[pathlib.Path, Any] = {}  # open files; a lock ends with its process


def lock(folder: pathlib.Path) -> None:
  """Makes this process the only writer of a folder, until it ends.

  The kernel holds the lock, so that a killed process leaves none; a note in
  the file says whose it is.

  Raises:
    CheckpointError: ckpt.locked, with the holder's host, process and time.
    ResourceError: ckpt.path.
  """
  if folder.resolve() in _locks:
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
  except OSError as e:
    raise storage_error(e, folder) from e
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    file.seek(0)
    note = file.read()
    file.close()
    if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
      raise errors.ResourceError(
          "ckpt.path", f"files here cannot be locked: {e}", where=str(folder),
          hint="use a file system with flock") from e
    raise errors.CheckpointError(
        "ckpt.locked", "another process writes to this folder",
        where=str(folder), got=note.strip()) from None
  file.truncate(0)
  now = datetime.datetime.now().isoformat(" ", "seconds")
  file.write(json.dumps(
      {"process": os.getpid(), "host": socket.gethostname(), "since": now}))
  file.flush()
  _locks[folder.resolve()] = file
