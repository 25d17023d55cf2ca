"""Checkpoints: orbax writes the arrays, our manifest commits the step.

Orbax marks a step complete by its folder's name alone and does not check
content, so a step counts only with a manifest that holds the SHA-256 of each
of its files and is written after everything else (`commit`). Of several
processes each writes its own shards of the arrays, and the first one decides
which steps count and which go.
"""

import pathlib
from typing import Any

import orbax.checkpoint as ocp
from absl import logging

from mcpo_jax import commit, errors, hosts


class Checkpointer:
  """Saves and restores one stage's steps under `folder`.

  Saving is asynchronous: arrays are copied off the device, written by a
  thread, and committed at the next call of `poll`, `save` or `close`.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int):
    """`keep` committed steps are retained, besides protected ones."""
    self._folder = pathlib.Path(folder).resolve()
    self._keep = keep
    self._protected: int | None = None
    self._pending: tuple[int, dict[str, Any]] | None = None
    self._manager = ocp.CheckpointManager(
        self._folder, options=ocp.CheckpointManagerOptions(create=True))

  def steps(self) -> list[int]:
    """Committed steps, ascending (their content not yet verified)."""
    return sorted(s for s in self._manager.all_steps()
                  if (self._step_folder(s) / commit.MANIFEST).exists())

  def _step_folder(self, step: int) -> pathlib.Path:
    return self._folder / str(step)

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts to save; a save under way is finished first."""
    self._finish()
    if not self._manager.save(
        step, args=ocp.args.StandardSave(state), force=True):
      raise errors.CheckpointError(
          "ckpt.not_saved", "orbax refused to save", where=str(self._folder),
          got=step)
    self._pending = (step, meta | {"step": step})

  def poll(self) -> None:
    """Surfaces errors of a save under way and commits it if it is done."""
    self._manager.check_for_errors()
    if self._pending and not hosts.from_first(
        "a save", self._manager.is_saving_in_progress):
      self._finish()

  def protect(self, step: int | None) -> None:
    """Keeps this step whatever comes later (the best one)."""
    self._protected = step

  def _finish(self) -> None:
    if self._pending is None:
      return
    self._manager.wait_until_finished()
    self._manager.check_for_errors()
    step, meta = self._pending
    commit.write_manifest(self._step_folder(step), meta)
    self._pending = None
    for old in hosts.from_first(
        "a checkpoint", lambda: self.steps()[:-self._keep]):
      if old != self._protected:
        self._manager.delete(old)

  def restore_latest(
      self, abstract_state: Any
  ) -> tuple[Any, dict[str, Any]] | None:
    """The newest step that verifies, and its meta; None if there is none.

    Raises:
      CheckpointError: ckpt.none_complete, if steps exist and none verifies.
    """
    step, meta, unfinished = hosts.from_first("a checkpoint", self._newest)
    for one in unfinished:
      self._manager.delete(one)
    if step is None:
      return None
    return self._restore(step, abstract_state), meta

  def _newest(self) -> tuple[int | None, dict[str, Any] | None, list[int]]:
    """The newest step that verifies, its meta, and the steps above it."""
    skipped = []
    for step in reversed(self.steps()):
      try:
        meta = commit.verify(self._step_folder(step))
      except errors.CheckpointError as e:
        logging.warning("checkpoint %d skipped: %s", step, e)
        skipped.append(str(e))
        continue
      # What lies above was never finished or is damaged, and orbax saves no
      # step below an existing one.
      return step, meta, [s for s in self._manager.all_steps() if s > step]
    if skipped:
      raise errors.CheckpointError(
          "ckpt.none_complete", "no checkpoint verifies",
          where=str(self._folder), got="; ".join(skipped))
    return None, None, list(self._manager.all_steps())  # none was finished

  def restore(self, step: int, abstract_state: Any) -> Any:
    """The verified arrays of one step, in the shapes and shardings asked for.

    Raises:
      CheckpointError: the step is damaged, see `commit.verify`.
    """
    self._finish()
    hosts.from_first(
        "a checkpoint", lambda: commit.verify(self._step_folder(step)))
    return self._restore(step, abstract_state)

  def _restore(self, step: int, abstract_state: Any) -> Any:
    return self._manager.restore(
        step, args=ocp.args.StandardRestore(abstract_state))

  def close(self) -> None:
    """Commits what is under way."""
    self._finish()
    self._manager.close()


def steps(folder: pathlib.Path) -> list[int]:
  """Committed steps of a stage's checkpoints, ascending, not yet verified."""
  return sorted(int(path.parent.name) for path in pathlib.Path(folder).glob(
      f"*/{commit.MANIFEST}") if path.parent.name.isdecimal())


def read_params(folder: pathlib.Path, step: int, shapes: Any) -> Any:
  """The trained weights of one step alone, in these shapes and shardings.

  Raises:
    CheckpointError: the step is damaged, see `commit.verify`.
  """
  place = pathlib.Path(folder).resolve() / str(step)
  hosts.from_first("a checkpoint", lambda: commit.verify(place))
  wanted = {"params": shapes}
  restored = ocp.PyTreeCheckpointer().restore(
      place / "default", args=ocp.args.PyTreeRestore(
          wanted, partial_restore=True,
          restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)))
  return restored["params"]
