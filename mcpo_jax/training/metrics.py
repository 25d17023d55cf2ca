"""Where metrics go: metrics.jsonl always, TensorBoard and W&B if asked.

A sink that fails is dropped with one warning; training goes on. Of several
processes the first alone has sinks.
"""

import hashlib
import json
import math
import pathlib
import time
from typing import Any

from absl import logging

from mcpo_jax import commit, hosts


def one_line(values: dict[str, Any]) -> str:
  """The scalars worth a glance, for a log line."""
  shown = ("loss", "rewards/margins", "rewards/accuracies", "kernel/ess",
           "eval/loss", "eval/accuracy", "eval/margin", "eval/score")
  return " ".join(f"{k}={float(values[k]):.4g}" for k in shown if k in values)


class Writer:
  """Writes flat dicts of scalars. The step is the key: a resumed stage first
  cuts off what it is about to write again."""

  def __init__(self, workdir: pathlib.Path, *, tensorboard: bool = False,
               wandb: bool = False):
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._sinks = {}
    if not hosts.is_first():
      return
    self._sinks["metrics.jsonl"] = self._write_line
    if tensorboard:
      self._add("tensorboard", _tensorboard_sink, workdir)
    if wandb:
      self._add("wandb", _wandb_sink, workdir)

  def _add(self, name: str, make, workdir) -> None:
    try:
      self._sinks[name] = make(pathlib.Path(workdir))
    except Exception as e:  # a logger must never stop a run
      logging.warning("%s is off: %s", name, e)

  def rewind(self, stage: str, step: int) -> None:
    """Drops lines of `stage` after `step`, and a half-written last line."""
    if not self.path.exists():
      return
    kept = []
    for line in self.path.read_text().split("\n"):
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if row["stage"] != stage or row["step"] <= step:
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
    with open(self.path, "a") as file:
      file.write(json.dumps(row) + "\n")


def _tensorboard_sink(workdir: pathlib.Path):
  import tensorboardX

  writers = {}

  def write(stage, step, values):
    if stage not in writers:
      writers[stage] = tensorboardX.SummaryWriter(
          str(workdir / "tensorboard" / stage))
    for name, value in values.items():
      writers[stage].add_scalar(name, value, step)

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
