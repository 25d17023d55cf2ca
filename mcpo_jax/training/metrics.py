"""Where metrics go: metrics.jsonl always, TensorBoard and W&B if asked.

A sink that fails is dropped with one warning; training goes on. The file is
tried again: rows that a full disk refused are written when there is room. Of
several processes the first alone has sinks, but for the file, which lies on
every disk.
"""

import collections
import hashlib
import json
import math
import pathlib
import time
from typing import Any

from absl import logging

from mcpo_jax import commit, errors, hosts, storage

_UNWRITTEN_ROWS = 10_000  # kept for a disk that has no room


def one_line(values: dict[str, Any]) -> str:
  """The scalars worth a glance, for a log line."""
  shown = ("loss", "rewards/margins", "rewards/accuracies", "kernel/ess",
           "eval/loss", "eval/accuracy", "eval/margin", "eval/score")
  return " ".join(f"{k}={float(values[k]):.4g}" for k in shown if k in values)


def read(workdir: pathlib.Path, stage: str) -> list[dict[str, Any]]:
  """The rows of a stage in the workdir's metrics.jsonl, so far; what JSON
  cannot hold, not a number, is that again."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [{key: math.nan if value is None else value
           for key, value in row.items()}
          for row in map(json.loads, lines) if row["stage"] == stage]


class Writer:
  """Writes flat dicts of scalars. The step is the key: a resumed stage first
  cuts off what it is about to write again."""

  def __init__(self, workdir: pathlib.Path, *, tensorboard: bool = False,
               wandb: bool = False, mirror: str | None = None):
    """Takes the file from `mirror`, a place in an object store, if the workdir
    has none."""
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._copy = mirror and f"{mirror}/metrics.jsonl"
    if self._copy and hosts.writes() and not self.path.exists():
      content = storage.get_file(self._copy)
      if content is not None:
        commit.write_file(self.path, content.decode())
    self._sinks = {}
    self._unwritten = collections.deque(maxlen=_UNWRITTEN_ROWS)
    if hosts.writes():
      self._sinks["metrics.jsonl"] = self._write_line
    if tensorboard and hosts.is_first():
      self._add("tensorboard", _tensorboard_sink, workdir)
    if wandb and hosts.is_first():
      self._add("wandb", _wandb_sink, workdir)

  def _add(self, name: str, make, workdir) -> None:
    try:
      self._sinks[name] = make(pathlib.Path(workdir))
    except Exception as e:  # a logger must never stop a run
      logging.warning("%s is off: %s", name, e)

  def keep(self) -> None:
    """Has the store hold the file as it is now."""
    if self._copy and hosts.is_first() and self.path.exists():
      try:
        storage.put(self._copy, self.path.read_bytes())
      except errors.ResourceError as e:
        logging.warning("metrics.jsonl is not copied: %s", e)

  def rewind(self, stage: str, step: int, *, evaluated: bool = True) -> None:
    """Drops lines of `stage` after `step`, those of an evaluation at `step`
    too if it is to come yet, and a half-written last line."""
    if not self.path.exists():
      return
    again = lambda row: row["step"] > step or (
        not evaluated and row["step"] == step
        and any(key.startswith("eval/") for key in row))
    kept = []
    for line in self.path.read_text().split("\n"):
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if row["stage"] != stage or not again(row):
        kept.append(line + "\n")
    commit.write_file(self.path, "".join(kept))

  def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
    """One row. Not-a-number becomes null, which JSON can hold; "time" in the
    file is that of the clock, in seconds."""
    values = {k: float(v) for k, v in values.items()}
    for name, sink in list(self._sinks.items()):
      try:
        sink(stage, step, values)
      except Exception as e:  # disk full, server gone
        logging.warning("%s is off from step %d: %s", name, step, e)
        del self._sinks[name]

  def _write_line(self, stage, step, values) -> None:
    row = {"stage": stage, "step": step, "time": round(time.time(), 3)} | {
        k: v if math.isfinite(v) else None for k, v in values.items()}
    waited = len(self._unwritten)
    self._unwritten.append(json.dumps(row) + "\n")
    try:
      commit.append(self.path, "".join(self._unwritten))
    except errors.ResourceError as e:
      if not waited:
        logging.warning("metrics.jsonl waits from step %d: %s", step, e)
      return
    self._unwritten.clear()
    if waited:
      logging.warning("metrics.jsonl has the %d rows that waited", waited)


def _tensorboard_sink(workdir: pathlib.Path):
  # Its SummaryWriter writes from a thread, and waits for ever when that has
  # died of a full disk.
  from tensorboardX import summary
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event

  writers = {}

  def write(stage, step, values):
    if stage not in writers:
      folder = workdir / "tensorboard" / stage
      folder.mkdir(parents=True, exist_ok=True)
      writers[stage] = EventsWriter(str(folder / "events"))
    event = Event(wall_time=time.time(), step=step)
    for name, value in values.items():
      event.summary.MergeFrom(summary.scalar(name, value))
    writers[stage].write_event(event)
    writers[stage].flush()

  return write


def _wandb_sink(workdir: pathlib.Path):
  import wandb

  identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
  run = wandb.init(project="mcpo_jax", name=workdir.name, dir=str(workdir),
                   id=identity, resume="allow")  # a restart goes on in its run

  def write(stage, step, values):
    run.log({f"{stage}/{k}": v for k, v in values.items()}
            | {f"{stage}/step": step})

  return write
