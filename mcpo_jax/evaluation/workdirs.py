"""What lies in the workdir of a run, also of one that goes on or has failed.

Of a workdir is read

  config.json, summary.json          of the run, as `settings` and `verbs` have
                                     them
  metrics.jsonl, launches.jsonl      curves; time, devices and versions
  STAGE/result.json, manifest.json   whether a stage has finished
  STAGE/non_finite.jsonl             sets of updates that were not made
  evaluate/evaluation.json           models side by side, as `tables` has it
  evaluate/samples.json              completions before and after
  preference/samples.jsonl           the same while it was training
  preference/candidates.jsonl        rows of `explorer`

What is missing is empty, and what is damaged a note.
"""

import array
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import errors, settings
from mcpo_jax.evaluation import explorer, tables


class Curve(NamedTuple):
  """A metric over updates; NaN where the run wrote none."""

  steps: np.ndarray  # [N] ascending
  values: np.ndarray  # [N]


class Run(NamedTuple):
  """What was found in a workdir."""

  name: str
  folder: pathlib.Path
  config: dict[str, Any]  # dotted key -> value
  summary: dict[str, Any]
  curves: dict[str, dict[str, Curve]]  # stage -> metric -> curve
  times: list[tuple[float, str]]  # Unix seconds and stage of the rows
  launches: list[dict[str, Any]]
  evaluation: dict[str, Any]  # as `tables` has it, or {}
  samples: dict[str, list[dict[str, Any]]]  # how drawn -> rows
  progress: list[dict[str, Any]]  # rows of preference/samples.jsonl
  candidates: list[str]  # rows as JSON
  left_out: str  # of the candidates
  notes: list[str]


def read_run(folder: pathlib.Path, name: str, candidate_bytes: int) -> Run:
  """Reads what there is.

  Args:
    folder: the workdir.
    name: of the run.
    candidate_bytes: about so many of candidates are read, spread over the run.

  Raises:
    CheckpointError: ckpt.none.
  """
  notes: list[str] = []
  saved = _read_json(folder / "config.json", notes)
  config = saved.get("config")
  if saved and not isinstance(config, dict):
    notes.append("config.json is not that of a run")
  config = settings.flatten(config) if isinstance(config, dict) else {}
  summary = _read_json(folder / "summary.json", notes)
  curves, times = _read_metrics(folder / "metrics.jsonl", notes)
  if not (config or summary or curves):
    raise errors.CheckpointError(
        "ckpt.none", "no run lies in this workdir", where=str(folder),
        got="; ".join(notes) or None,
        want="a config.json, metrics.jsonl or summary.json of a run")
  if not config:
    notes.append("there is no config of the run")
  if not curves:
    notes.append("there are no metrics yet")
  for path in sorted(folder.glob("*/non_finite.jsonl")):
    steps = dict.fromkeys(
        str(row.get("step")) for row in _read_lines(path, notes))
    notes.append(f"{path.parent.name}: updates whose loss or gradient was not "
                 f"finite: {len(steps)}, at step {', '.join([*steps][:8])}")
  samples = {
      str(law).strip("/"): rows for law, rows in _read_json(
          folder / "evaluate/samples.json", notes).items()
      if isinstance(rows, list)}
  launches = read_launches(folder / "launches.jsonl", notes)
  if launches and "error" in launches[-1]:
    notes.append(f"the last launch ended so: {launches[-1]['error']}")
  try:
    evaluation = tables.read(folder / "evaluate") or {}
  except errors.CheckpointError as e:
    evaluation = {}
    notes.append(f"evaluate/{tables.FILE}: {e.message}")
  return Run(
      name, folder, config, summary, curves, times, launches, evaluation,
      samples,
      [row for row in _read_lines(folder / "preference/samples.jsonl", notes)
       if {"prompt", "start", "now"} <= row.keys()
       and is_number(row.get("step"))],
      *_read_candidates(folder / "preference/candidates.jsonl",
                        candidate_bytes, notes),
      notes)


def read_launches(
    path: pathlib.Path, notes: list[str]
) -> list[dict[str, Any]]:
  """The launches of a workdir, see `training.launches`, each with the `error`
  that ended it, if one did; what is damaged is left out with a note."""
  launches: list[dict[str, Any]] = []
  for row in _read_lines(path, notes):
    if "error" in row and launches:
      launches[-1]["error"] = str(row["error"])
    elif is_number(row.get("time")):
      launches.append(row)
  return launches


def _read_json(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
  """A file that holds an object; {} with a note if it does not."""
  try:
    value = json.loads(path.read_text("utf-8"))
    if isinstance(value, dict):
      return value
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError):
    pass
  notes.append(f"{_short(path)} is damaged or no file of a run; it is left out")
  return {}


def _read_lines(
    path: pathlib.Path, notes: list[str]
) -> Iterator[dict[str, Any]]:
  """The objects of a file of lines, with a note of what is none."""
  bad = []
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, 1):
        row = _object(line)
        if row is None:
          bad.append((number, line))
        else:
          yield row
  except FileNotFoundError:
    return
  except OSError as e:
    notes.append(f"{_short(path)} cannot be read: {e.strerror}")
  if bad and not bad[-1][1].endswith(b"\n"):
    notes.append(f"{_short(path)} ends in half a line, as after a kill")
    bad.pop()
  if bad:
    notes.append(f"{_short(path)}: lines that are no rows: {len(bad)}, the "
                 f"first is line {bad[0][0]}")


def _object(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) else None


def _read_metrics(
    path: pathlib.Path, notes: list[str]
) -> tuple[dict[str, dict[str, Curve]], list[tuple[float, str]]]:
  """Curves of every stage, and when their rows were written."""
  found: dict[str, dict[str, tuple[array.array, array.array]]] = {}
  times, foreign = [], 0
  for row in _read_lines(path, notes):
    stage, step = row.pop("stage", None), row.pop("step", None)
    if not isinstance(stage, str) or not is_number(step):
      foreign += 1
      continue
    time = row.pop("time", None)
    if is_number(time):
      times.append((time, stage))
    metrics = found.setdefault(stage, {})
    for name, value in row.items():
      if value is None or is_number(value):
        if name not in metrics:
          metrics[name] = array.array("d"), array.array("d")
        metrics[name][0].append(step)
        metrics[name][1].append(math.nan if value is None else value)
  if foreign:
    notes.append(f"{path.name}: rows without stage and step: {foreign}")
  curves = {stage: {name: _curve(*arrays) for name, arrays in metrics.items()}
            for stage, metrics in found.items() if metrics}
  # Before the first update some are not known.
  gaps = {f"{stage} {name}": int(np.isnan(curve.values[curve.steps > 0]).sum())
          for stage, metrics in curves.items()
          for name, curve in metrics.items()
          if not name.endswith(("_ci95_low", "_ci95_high"))}
  gaps = {name: count for name, count in gaps.items() if count}
  if gaps:
    shown = sorted(gaps.items(), key=lambda item: -item[1])[:8]
    notes.append(
        "values that are not finite, shown as gaps: " + ", ".join(
            f"{name} {count}×" for name, count in shown)
        + (f" and {len(gaps) - 8} metrics more" if len(gaps) > 8 else ""))
  return curves, times


def _curve(steps: array.array, values: array.array) -> Curve:
  """In order of the steps; of two values of a step the later one."""
  steps, values = np.frombuffer(steps), np.frombuffer(values)
  values = np.where(np.isfinite(values), values, np.nan)
  order = np.argsort(steps, kind="stable")
  last = np.append(np.diff(steps[order]) > 0, True)
  return Curve(steps[order][last], values[order][last])


def is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _read_candidates(
    path: pathlib.Path, most: int, notes: list[str]
) -> tuple[list[str], str]:
  """Rows of the explorer as JSON, of `most` bytes, and which these are."""
  if not path.is_file():
    return [], ""
  size, rows, bad, read = path.stat().st_size, [], 0, 0
  with open(path, "rb") as file:
    lines = file if size <= most else _spread_lines(file, size, most)
    for line in lines:
      row = _object(line)
      try:
        text = explorer.embed(row or {}, str(path))
      except errors.DataError:
        bad += line.endswith(b"\n")  # half a line: the run was killed there
        continue
      rows.append(text)
      read += len(text)
      if read > most:
        break
  if bad:
    notes.append(f"{_short(path)}: lines that are no sets: {bad}")
  if size <= most:
    return rows, ""
  return rows, (f"{len(rows)} sets, spread over the run, of {size / 1e6:.1f} "
                "MB; candidates.html of a finished run has all")


def _spread_lines(file, size: int, most: int) -> Iterator[bytes]:
  """Whole lines at even distances, so many that they make about `most`."""
  length = len(file.readline()) or 1
  seen = set()
  for place in np.linspace(0, size, max(2, most // length), endpoint=False):
    file.seek(int(place))
    if place >= 1:
      file.readline()  # the rest of a line
    if file.tell() not in seen:
      seen.add(file.tell())
      yield file.readline()


def _short(path: pathlib.Path) -> str:
  """A file's name, with its folder if that is one of a stage."""
  folder = path.parent.name
  return (f"{folder}/{path.name}" if folder in ("preference", "evaluate")
          else path.name)
