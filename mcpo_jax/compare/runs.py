"""Runs of the cells of a comparison, each in a process of its own.

Cells of a seed share the start and the reference log-probs through the cache,
and all cells their compiled programs. What is done is not done again.
"""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from mcpo_jax import errors, preempt, settings
from mcpo_jax.compare.rows import Cell, Row

_POLL_SECONDS = 0.2


def run(
    rows: Sequence[Row],
    flags: Sequence[str],
    workdir: pathlib.Path,
    *,
    metric: str,
    jobs: int,
    seconds: float,
) -> dict[pathlib.Path, str]:
  """Runs the cells that are not finished, `jobs` at a time.

  Args:
    rows: with their cells.
    flags: of the command line, for every cell: --config and its overrides.
    workdir: of the comparison.
    metric: what a finished cell's summary must have.
    jobs: runs at a time, each on its share of the cores.
    seconds: after which no further run begins.

  Returns:
    Folders of the cells that failed -> why.

  Raises:
    ConfigError: config.range, a finished run has no such metric.
    KeyboardInterrupt: told to stop, as the runs were; they have saved.
  """
  cells = in_order([c for row in rows for trial in row.cells for c in trial])
  waiting = [cell for cell in cells if not finished(cell, metric)]
  running: dict[int, tuple[Cell, subprocess.Popen]] = {}
  failed: dict[pathlib.Path, str] = {}
  deadline = time.monotonic() + seconds
  logging.info("compare: %d of %d runs are done", len(cells) - len(waiting),
               len(cells))
  with preempt.guarded():
    preempt.hold()  # the runs may have to save
    try:
      while preempt.asked() is None and (
          running or (waiting and time.monotonic() < deadline)):
        for slot, (cell, process) in list(running.items()):
          if process.poll() is not None:
            del running[slot]
            if process.returncode == errors.Preempted.exit_code:
              waiting.insert(0, cell)  # it alone was told to stop
            else:
              _end(cell, process.returncode, metric, failed)
        for slot in set(range(jobs)) - running.keys():
          cell = _next(waiting, cells, [c.seed for c, _ in running.values()])
          if cell and time.monotonic() < deadline:
            waiting.remove(cell)
            running[slot] = cell, _begin(cell, flags, workdir, slot, jobs)
        time.sleep(_POLL_SECONDS)
    finally:
      for _, process in running.values():
        process.send_signal(signal.SIGUSR1)  # see `preempt`
      for _, process in running.values():
        process.wait()
  return failed


def in_order(cells: Sequence[Cell]) -> list[Cell]:
  """Seed after seed, so that a table cut short has all rows; first those that
  fill the cache of reference log-probs."""
  seeds = list(dict.fromkeys(cell.seed for cell in cells))
  return sorted(cells, key=lambda cell: (
      seeds.index(cell.seed), cell.config["reference"]["source"] != "cached"))


def _next(waiting, cells, busy: Sequence[int]) -> Cell | None:
  """The first cell whose start is in the cache, or that may make it."""
  # A run makes this folder after its start and its reference are in the cache.
  shared = {cell.seed for cell in cells
            if (cell.folder / "preference").exists()}
  return next((cell for cell in waiting
               if cell.seed in shared or cell.seed not in busy), None)


def finished(cell: Cell, metric: str) -> bool:
  """Whether the folder holds the result of this config. Other settings of
  `compare` change no run; all else that changed is for `train` to judge."""
  saved = cell.folder / "config.json"
  if not saved.exists() or not _is_number(summary_of(cell).get(metric)):
    return False
  ours = json.loads(json.dumps(cell.config))
  return (settings.read_saved(saved) | {"compare": None}
          == ours | {"compare": None})


def summary_of(cell: Cell) -> dict[str, Any]:
  """What a run left so far."""
  path = cell.folder / "summary.json"
  return json.loads(path.read_text()) if path.exists() else {}


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _begin(cell: Cell, flags, workdir, slot: int, jobs: int):
  """Starts `train`; what it says goes to a file beside its workdir."""
  cell.folder.parent.mkdir(parents=True, exist_ok=True)
  cache = workdir.resolve() / "cache"
  shared = {"MCPO_CACHE": str(cache),
            "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  command = [
      sys.executable, "-m", "mcpo_jax", "train", *flags,
      f"--workdir={cell.folder}",
      *(f"--config.{key}={text}" for key, text in cell.overrides)]
  logging.info("compare: %s begins", cell.folder)
  with open(f"{cell.folder}.log", "w") as log:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env=shared | os.environ, preexec_fn=lambda: _settle(slot, jobs))


def _settle(slot: int, jobs: int) -> None:
  """In a new process: it ends with ours, even if ours is killed, and has its
  share of the cores."""
  preempt.end_with_parent(signal.SIGKILL)
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[slot % len(cores)::jobs])


def _end(cell: Cell, code: int, metric: str, failed) -> None:
  """Notes how a run ended."""
  log = pathlib.Path(f"{cell.folder}.log")
  if code:
    slugs = re.findall(r"^error\[([\w.]+)\]", log.read_text(errors="replace"),
                       re.MULTILINE)
    failed[cell.folder] = slugs[-1] if slugs else (
        signal.Signals(-code).name if code < 0 else f"exit code {code}")
    logging.warning("compare: %s failed: %s", cell.folder, failed[cell.folder])
    return
  summary = summary_of(cell)
  if not isinstance(summary.get(metric), int | float):
    raise errors.ConfigError(
        "config.range", "a finished run has no such number",
        where="compare.metric", got=metric,
        hint=errors.nearest(metric, summary))
  if not _is_number(summary[metric]):
    failed[cell.folder] = f"{metric} {summary[metric]}"
  logging.info("compare: %s is done, %s %s", cell.folder, metric,
               summary[metric])
