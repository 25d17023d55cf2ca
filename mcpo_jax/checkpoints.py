"""Checkpoints: orbax writes the arrays, our manifest commits the step.

Orbax marks a step complete by its folder's name alone and does not check
content, so a step counts only with a manifest that holds the SHA-256 of each
of its files and is written after everything else (`commit`). Arrays are stored
plain, so the hash of a file is the hash of a piece of one array: it is taken
from memory and from the disk, and both must agree. Of several processes each
hashes the pieces that it holds, and the first one decides which steps count
and which go.

With a mirror each process then copies its pieces to an object store and the
first one, when all have, puts the manifest. Where each process has a disk of
its own (`hosts.apart`) there is no whole step on any: the store's manifest is
what commits, and to restore a process fetches what its devices read.
"""

import contextlib
import hashlib
import json
import logging as std_logging
import pathlib
import re
import shutil
import threading
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from mcpo_jax import chunks, commit, errors, faults, hosts, storage

# Its import gives the root logger a handler, which is the user's to do.
_handlers = std_logging.root.handlers[:]
import orbax.checkpoint as ocp  # noqa: E402

std_logging.root.handlers[:] = _handlers

TIMEOUT_SECONDS = 1800.0
_NEWEST = "newest.json"  # the last step that was committed here
_METADATA = re.compile(
    r"(_METADATA|_CHECKPOINT_METADATA|_sharding|\.zarray|commit_success\.txt|"
    r"process_\d+)$")


class _Save:
  """One save under way."""

  def __init__(self, step, meta, state, timeout):
    self.step, self.meta = step, meta
    self.size = chunks.size_of(state)
    self.leaves = {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        for name, leaf in chunks.leaves_of(state).items()}
    # What this process holds, on the host: (start, array) of each shard.
    self.shards = chunks.host_shards(state)
    self.deadline = time.monotonic() + timeout
    self.phase = "writing arrays"
    self.error: BaseException | None = None
    self.thread: threading.Thread | None = None


class Checkpointer:
  """Saves and restores one stage's steps under `folder`.

  Saving is asynchronous: arrays are copied off the device; a thread writes,
  hashes and commits them and removes old steps. An error of that thread comes
  at the next call of `poll`, `save` or `close`.
  """

  def __init__(
      self, folder: pathlib.Path, *, keep: int,
      timeout: float = TIMEOUT_SECONDS, finite: tuple[str, ...] = ("params",),
      mirror: str | None = None,
  ):
    """Makes the folder.

    Args:
      folder: of the steps; the caller is its only writer.
      keep: committed steps that are retained, at least 2, besides a protected
        one.
      timeout: seconds that a save may take.
      finite: parts of the state whose values must be finite.
      mirror: place in an object store that has every committed step too; with
        disks apart it is the only place that has all of one.

    Raises:
      ResourceError: ckpt.path.
    """
    assert keep >= 2, keep
    self._folder = pathlib.Path(folder).resolve()
    self._keep, self._timeout, self._finite = keep, timeout, finite
    self._mirror = mirror
    self._key = mirror or str(self._folder)  # the same in all processes
    self._protected: int | None = None
    self._save: _Save | None = None
    self._failed = self._given_up = False  # a save; one that takes too long
    self._verified: set[int] = set()  # in the first process
    self._bad: set[int] = set()  # steps of the store that did not verify
    self._checks = 0
    hosts.on_disk("checkpoints", self._prepare)
    own, handlers = {}, {}
    if hosts.apart():  # each process makes the folders that it writes to
      own = {"multiprocessing_options": ocp.options.MultiprocessingOptions(
          primary_host=None)}
      handlers = {"type_handler_registry":
                  ocp.type_handlers.create_type_handler_registry((
                      jax.Array, ocp.type_handlers.ArrayHandler(
                          primary_host=None)))}
    self._manager = ocp.CheckpointManager(
        self._folder, options=ocp.CheckpointManagerOptions(create=True, **own),
        item_handlers=ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_compression=False, **own, **handlers))

  def _prepare(self) -> None:
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      probe = self._folder / ".probe"
      probe.write_bytes(b"")
      probe.unlink()
    except OSError as e:
      raise commit.storage_error(e, self._folder) from e

  def steps(self) -> list[int]:
    """Committed steps, ascending (their content not yet verified)."""
    if hosts.apart():
      return storage.steps(self._mirror)
    return steps(self._folder)

  def _all(self) -> list[int]:
    return sorted(int(p.name) for p in self._folder.iterdir()
                  if p.name.isdecimal())

  def _step_folder(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  def check_room(self, state: Any, *, best: bool) -> None:
    """Looks at the start whether the disk holds what will be kept.

    Args:
      state: arrays or their shapes.
      best: whether one more step will be protected.

    Raises:
      ResourceError: ckpt.disk_full.
    """

    def check():
      count = self._keep + 1 + best  # one is being written
      there = sum(p.stat().st_size for p in self._folder.rglob("*")
                  if p.is_file())
      want = max(0, count * chunks.size_of(state) - there)
      free = commit.free_bytes(self._folder)
      if free < want:
        raise errors.ResourceError(
            "ckpt.disk_full", f"the disk does not hold {count} checkpoints of "
            f"{chunks.size_of(state)} bytes", where=str(self._folder),
            got=f"{free} bytes free", want=f"{want} bytes",
            hint="free some space, or lower checkpoint.keep")

    hosts.on_disk("room on the disk", check)

  # --- saving -----------------------------------------------------------------

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts to save; a save under way is finished first.

    Raises:
      ResourceError: ckpt.disk_full, ckpt.timeout; of this save or the last.
      CheckpointError: ckpt.not_saved. NonFiniteError: ckpt.non_finite.
    """
    self._finish()
    save = _Save(step, meta | {"step": step}, state, self._timeout)
    try:
      faults.point("ckpt.begin")
      self._manager.save(step, args=ocp.args.PyTreeSave(state), force=True)
    except Exception as e:
      self._failed = True
      raise self._as_ours(e, save) from e
    self._save = save
    save.thread = threading.Thread(
        target=self._commit, args=(save,), daemon=True)
    save.thread.start()

  def poll(self) -> None:
    """Surfaces errors of a save under way, and that it takes too long."""
    if self._save is None:
      return
    if self._save.error is not None or time.monotonic() > self._save.deadline:
      self._finish()
    if hosts.from_first(
        "a save", lambda: not self._save.thread.is_alive()):
      self._finish()

  def protect(self, step: int | None) -> None:
    """Keeps this step whatever comes later (the best one)."""
    self._protected = step

  def _finish(self) -> None:
    """Waits for the save under way and raises what it ended with."""
    if self._save is None:
      return
    save, self._save = self._save, None
    self._failed = True
    while save.thread.is_alive() and save.error is None:
      save.thread.join(min(1.0, max(0.0, save.deadline - time.monotonic())))
      if save.thread.is_alive() and time.monotonic() > save.deadline:
        self._given_up = True
        raise errors.ResourceError(
            "ckpt.timeout", f"a save takes too long, while {save.phase}",
            where=str(self._step_folder(save.step)),
            want=f"within {self._timeout:g} s",
            hint="look at the disk, or raise checkpoint.timeout_seconds")
    if save.error is not None:
      raise self._as_ours(save.error, save) from save.error
    stay = hosts.from_first("a save", self.steps)
    if not hosts.is_first() and hosts.apart():
      for step in set(self._all()) - set(stay):
        shutil.rmtree(self._step_folder(step), ignore_errors=True)
    self._failed = False

  def _as_ours(self, error: BaseException, save: _Save) -> errors.McpoError:
    if isinstance(error, errors.McpoError):
      return error
    place = self._step_folder(save.step)
    ours = commit.storage_error(error, place, save.size)
    if ours.slug == "ckpt.disk_full" or isinstance(error, OSError):
      return ours
    return errors.CheckpointError(
        "ckpt.not_saved", ours.message, where=str(place),
        got=type(error).__name__)

  def _commit(self, save: _Save) -> None:
    """The thread of a save."""
    try:
      self._check_finite(save)
      self._manager.wait_until_finished()
      faults.point("ckpt.shard")
      save.phase = "hashing files"
      folder = self._step_folder(save.step)
      own = self._hash_own(save, folder)
      save.phase = "waiting for the other processes"
      told = hosts.to_first(f"save/{self._key}/{save.step}", own)
      save.shards = {}
      if told is not None:
        save.phase = "committing"
        files = {name: entry for part in told for name, entry in part.items()}
        rest = commit.hash_files(
            folder, [n for n in commit.files_of(folder) if n not in files])
        chunks.check_whole(folder, files, save.leaves)
        commit.write_manifest(
            folder, save.meta, files=dict(sorted((files | rest).items())),
            leaves=save.leaves, point="ckpt")
        own |= rest
        commit.write_file(
            self._folder / _NEWEST, json.dumps({"step": save.step}))
        self._verified.add(save.step)
      if self._mirror:
        save.phase = f"copying to {self._mirror}"
        copy = self._copy_of(save.step)
        storage.put_files(folder, copy, own)
        if hosts.to_first(f"copy/{copy}", None) is not None:
          storage.put_manifest(folder, copy)
      if told is not None:
        save.phase = "removing old steps"
        self._retain()
    except BaseException as e:  # told in the main thread
      with contextlib.suppress(Exception):
        self._discard(save)
      save.error = e

  def _discard(self, save: _Save) -> None:
    """Leaves nothing of a save that has failed."""
    with contextlib.suppress(Exception):
      self._manager.wait_until_finished()
    for path in self._folder.glob(f"{save.step}*"):
      name = path.name.removeprefix(str(save.step))
      if hosts.writes() and (
          name.startswith(".orbax-checkpoint-tmp")
          or not name and not (path / commit.MANIFEST).exists()):
        shutil.rmtree(path, ignore_errors=True)

  def _check_finite(self, save: _Save) -> None:
    for name, shards in save.shards.items():
      if name.split(".")[0] not in self._finite:
        continue
      for _, array in shards:
        if not chunks.is_finite(array):
          raise errors.NonFiniteError(
              "ckpt.non_finite", "a weight is NaN or infinite, and is not "
              "saved", where=f"{self._step_folder(save.step)}: {name}")

  def _hash_own(self, save: _Save, folder: pathlib.Path) -> dict[str, Any]:
    """Name -> entry of the files that hold what this process has in memory;
    with disks apart of those that it has written.

    Raises:
      CheckpointError: ckpt.hash, the disk holds something else.
    """
    wanted = {}
    for name, shards in save.shards.items():
      for chunk, array in chunks.pieces(folder / chunks.ITEM / name, shards):
        if hosts.apart() and not (folder / chunks.ITEM / name / chunk).exists():
          continue
        wanted[f"{chunks.ITEM}/{name}/{chunk}"] = hashlib.sha256(
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()
    entries = commit.hash_files(folder, wanted)
    for name, entry in entries.items():
      if entry["sha256"] != wanted[name]:
        raise errors.CheckpointError(
            "ckpt.hash", "the disk does not hold what was written",
            where=str(folder / name), hint="check the disk")
    return entries

  def _retain(self) -> None:
    """Removes old steps, once as many newer ones as are kept are verified."""
    steps, kept, stay = self.steps(), 0, {self._protected}
    for step in reversed(steps):
      if kept < self._keep:
        stay.add(step)
        kept += step in self._verified or (
            not hosts.apart() and self._problem(step) is None)
      elif step != self._protected:
        faults.point("ckpt.gc")
        commit.remove_folder(self._step_folder(step))
    if self._mirror:
      for step in storage.steps(self._mirror):
        if step < steps[-1] and step not in stay:
          storage.remove(self._copy_of(step))
    if kept >= 2:
      for path in self._folder.glob("*.damaged"):
        shutil.rmtree(path, ignore_errors=True)

  # --- restoring --------------------------------------------------------------

  def restore_latest(
      self, abstract_state: Any
  ) -> tuple[Any, dict[str, Any]] | None:
    """The newest step that verifies, and its meta; None if there is none.

    What is newer, and was never finished or is damaged, goes out of the way.

    Raises:
      CheckpointError: ckpt.none_complete, if steps exist or existed and none
        verifies; ckpt.tree, ckpt.dtype, ckpt.optimizer: see `restore`.
    """
    here = hosts.from_first("checkpoints", self.steps)
    there = hosts.from_first("the store's checkpoints", lambda: (
        storage.steps(self._mirror) if self._mirror else []))
    skipped = []
    for step in sorted({*here, *there}, reverse=True):
      try:
        state = self.restore(step, abstract_state)
      except (errors.CheckpointError, errors.NonFiniteError) as e:
        if e.slug in ("ckpt.tree", "ckpt.dtype", "ckpt.optimizer"):
          raise
        logging.warning("checkpoint %d skipped: %s", step, e)
        skipped.append(str(e))
        if step in there:
          self._bad.add(step)
        continue
      self._clear_above(step)
      return state, commit.read_manifest(self._step_folder(step))["meta"]
    newest = self._folder / _NEWEST
    if skipped or hosts.from_first("checkpoints", newest.exists):
      raise errors.CheckpointError(
          "ckpt.none_complete", "no checkpoint verifies",
          where=str(self._folder), got="; ".join(skipped) or (
              "steps were committed here, and none is left"),
          hint="restore a step from a copy, or use a fresh --workdir")
    self._clear_above(-1)
    return None

  def _hold(self, step: int) -> None:
    """Has the shared disk hold a step that verifies, from the store if need be.

    Raises:
      CheckpointError: what is wrong with it, with its copy if there is one.
    """
    try:
      self._agree(self._problem(step, *_part()))
    except errors.CheckpointError as e:
      if not hosts.from_first("the store's checkpoints", lambda: (
          self._mirror and step in storage.steps(self._mirror))):
        raise
      why = "the disk has none" if e.slug == "ckpt.uncommitted" else e
      logging.warning(
          "checkpoint %d is taken from %s: %s", step, self._mirror, why)
      self._agree(self._pull(step) if hosts.is_first() else None)

  def _pull(self, step: int) -> errors.CheckpointError | None:
    """Takes a step from the store, in place of the one that is here; what is
    wrong with it."""
    folder = self._step_folder(step)
    self._put_aside(step)
    try:
      storage.pull(self._copy_of(step), folder)
    except errors.CheckpointError as e:
      return e
    return self._step_problem(step, commit.read_manifest(folder)["meta"])

  def _put_aside(self, step: int) -> None:
    """Has the folder of a step out of the way, for nothing is written over one
    that is there; what was never committed goes."""
    folder = self._step_folder(step)
    aside = folder.with_name(f"{step}.damaged")
    if (folder / commit.MANIFEST).exists():
      shutil.rmtree(aside, ignore_errors=True)
      folder.rename(aside)
    else:  # or its removal was killed
      shutil.rmtree(folder, ignore_errors=True)

  def _bring(
      self, step: int, abstract_state: Any
  ) -> errors.CheckpointError | None:
    """Takes from the store what this process's devices read of a step, and is
    not on its disk yet; what is wrong with it."""
    folder, url = self._step_folder(step), self._copy_of(step)
    try:
      folder.mkdir(exist_ok=True)
      files = storage.get_manifest(url, folder)["files"]
      leaves = chunks.leaves_of(abstract_state)
      data = {name: chunks.NAME.fullmatch(name) for name in files}
      wanted = {n: entry for n, entry in files.items() if not data[n]}
      storage.get_files(url, folder, wanted)
      needed = {name: chunks.needed(folder / chunks.ITEM / name, leaf)
                for name, leaf in leaves.items()
                if f"{chunks.ITEM}/{name}/.zarray" in files}
      wanted |= {n: files[n] for n, found in data.items()
                 if found and found[2] in needed.get(found[1], ())}
      storage.get_files(url, folder, wanted)
      for name in set(commit.files_of(folder)) - wanted.keys():
        (folder / name).unlink()
    except errors.CheckpointError as e:
      return e
    except OSError as e:
      raise commit.storage_error(e, folder) from e
    return self._step_problem(step, commit.read_manifest(folder)["meta"])

  def _copy_of(self, step: int) -> str:
    return f"{self._mirror}/{step}"

  def _clear_above(self, step: int) -> None:
    """Has what is newer, and what killed saves left, go out of the way."""

    def clear():
      commit.sweep(self._folder)
      for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
      for other in self._all():
        folder = self._step_folder(other)
        if hosts.apart():  # the store has them
          if other > step:
            shutil.rmtree(folder)
        elif other > step or not (folder / commit.MANIFEST).exists():
          self._put_aside(other)

    def clear_store():
      while self._bad:  # a manifest that is there stops the next save
        storage.remove(self._copy_of(self._bad.pop()))

    hosts.on_disk("checkpoints", clear)
    hosts.from_first("the store's checkpoints", clear_store)
    self._manager.reload()

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The verified arrays of one step, in the shapes and shardings asked for;
    if the disk has none that verifies, those of its copy in the store.

    Raises:
      CheckpointError: the step is damaged, see `commit.verify`;
        ckpt.step_mismatch, it is another one; ckpt.tree, ckpt.dtype,
        ckpt.optimizer: it is of other arrays.
      NonFiniteError: ckpt.non_finite.
    """
    self._finish()
    folder = self._step_folder(step)
    if hosts.apart():
      self._agree(self._bring(step, abstract_state))
    else:
      self._hold(step)
    chunks.check_tree(
        commit.read_manifest(folder)["leaves"], abstract_state, folder)
    state, problem = None, None
    try:
      state = self._manager.restore(step, args=ocp.args.PyTreeRestore(
          item=abstract_state,
          restore_args=ocp.checkpoint_utils.construct_restore_args(
              abstract_state)))
    except Exception as e:  # though its files are those that were written
      problem = errors.CheckpointError(
          "ckpt.restore", str(e).split("\n")[0][:300], where=str(folder),
          got=type(e).__name__)
    self._agree(problem or self._value_problem(step, state))
    self._verified.add(step)
    return state

  def _agree(self, problem: errors.McpoError | None) -> None:
    """Raises in all processes what one of them has found."""
    self._checks += 1
    told = hosts.to_first(
        f"check/{self._key}/{self._checks}",
        problem and [type(problem).__name__, problem.slug, problem.message,
                     problem.where, problem.got, problem.want])
    found = hosts.from_first(
        "a checkpoint", lambda: next(filter(None, told), None))
    if found is not None:
      kind, slug, message, where, got, want = found
      raise getattr(errors, kind)(
          slug, message, where=where, got=got, want=want)

  def _problem(
      self, step: int, part: int = 0, parts: int = 1
  ) -> errors.CheckpointError | None:
    """What is wrong with the files of a step."""
    folder = self._step_folder(step)
    try:
      meta = commit.verify(folder, part=part, parts=parts, exact=True)
    except errors.CheckpointError as e:
      if e.slug == "ckpt.missing_data" and _METADATA.search(e.where):
        e.slug = "ckpt.metadata"
      return e
    return self._step_problem(step, meta)

  def _step_problem(
      self, step: int, meta: dict[str, Any]
  ) -> errors.CheckpointError | None:
    """Whether a folder's name and its manifest's meta are of one step."""
    found = {meta["step"], meta.get("cursor", {}).get("step", step)}
    if found != {step}:
      return errors.CheckpointError(
          "ckpt.step_mismatch", "the folder's name is another step than its "
          "manifest says", where=str(self._step_folder(step)),
          got=sorted(found), want=step)
    return None

  def _value_problem(self, step: int, state: Any) -> errors.McpoError | None:
    leaves, where = chunks.leaves_of(state), self._step_folder(step)
    for name, leaf in leaves.items():
      if name.split(".")[0] in self._finite and not all(
          chunks.is_finite(np.asarray(s.data))
          for s in leaf.addressable_shards):
        return errors.NonFiniteError(
            "ckpt.non_finite", "a weight is NaN or infinite",
            where=f"{where}: {name}")
    if "step" in leaves and not leaves["step"].shape:
      inside = int(np.asarray(leaves["step"].addressable_data(0)))
      if inside != step:
        return errors.CheckpointError(
            "ckpt.step_mismatch", "the state is of another step than the "
            "folder's name says", where=str(where), got=inside, want=step)
    return None

  def close(self) -> None:
    """Commits what is under way."""
    self._finish()
    if self._given_up:  # else it would wait on
      return
    with contextlib.suppress(*([Exception] if self._failed else [])):
      self._manager.close()  # it tells again what was told


def steps(folder: pathlib.Path) -> list[int]:
  """Committed steps of a stage's checkpoints, ascending, not yet verified."""
  return sorted(
      int(path.parent.name)
      for path in pathlib.Path(folder).glob(f"*/{commit.MANIFEST}")
      if path.parent.name.isdecimal())


def read_params(folder: pathlib.Path, step: int, shapes: Any) -> Any:
  """The trained weights of one step alone, in these shapes and shardings.

  Raises:
    CheckpointError: the step is damaged, see `commit.verify`.
  """
  place = pathlib.Path(folder).resolve() / str(step)
  hosts.from_first("a checkpoint", lambda: commit.verify(place))
  wanted = {"params": shapes}
  restored = ocp.PyTreeCheckpointer().restore(
      place / chunks.ITEM, args=ocp.args.PyTreeRestore(
          wanted, partial_restore=True,
          restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)))
  return restored["params"]


def _part() -> tuple[int, int]:
  return hosts.index(), hosts.count()
