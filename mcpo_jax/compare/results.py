"""What the finished cells of a comparison say."""

import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax.compare import runs
from mcpo_jax.compare.rows import BY_PROMPT, Cell, Row
from mcpo_jax.evaluation import comparison

# Metric over updates -> what stands above its figure.
CURVES = {
    "eval/accuracy": "accuracy, held-out pairs",
    "eval/margin": "reward margin, held-out pairs",
    "eval/logps/chosen": "log-prob of the chosen, held out (nats)",
}


class Result(NamedTuple):
  """What a finished cell says."""

  value: float  # of the metric, with a grid on the test prompts
  validation: float  # with a grid on the other prompts, else NaN
  start: float  # what the metric is of the start, NaN if nothing says so
  scores: dict[str, float]  # prompt -> score behind `value`, or empty
  summary: dict[str, Any]


class Outcome(NamedTuple):
  """What became of a row."""

  row: Row
  trial: int  # the chosen one
  results: dict[int, Result]  # seed ->
  missing: dict[int, str]  # seed -> "not run" or "failed: ..."
  validation: tuple[float, ...]  # of every trial, mean over seeds


def outcome(
    row: Row, metric: str, failed: dict[pathlib.Path, str]
) -> Outcome:
  """What became of a row; of its trials, the best on the validation prompts.

  A trial with a failed run is out of the choice, and nothing is chosen before
  all trials have run with all seeds.
  """
  split = len(row.trials) > 1
  results = [{c.seed: read_result(c, metric, split=split) for c in trial
              if runs.finished(c, metric)} for trial in row.cells]
  missing = [{c.seed: f"failed: {failed[c.folder]}" if c.folder in failed
              else "not run" for c in trial if c.seed not in done}
             for trial, done in zip(row.cells, results)]
  if not split:
    return Outcome(row, 0, results[0], missing[0], ())
  validation = tuple(
      math.nan if gone else comparison.estimate(
          [r.validation for r in done.values()]).mean
      for done, gone in zip(results, missing))
  states = {state for gone in missing for state in gone.values()}
  if "not run" in states or np.isnan(validation).all():
    state = "not run" if "not run" in states else max(states)
    return Outcome(row, 0, {}, dict.fromkeys(row.seeds, state), validation)
  best = int(np.nanargmax(validation))
  return Outcome(row, best, results[best], {}, validation)


def read_result(cell: Cell, metric: str, *, split: bool) -> Result:
  """A finished cell; with `split`, its value is that of the test prompts."""
  summary = runs.summary_of(cell)
  starts = [summary[key] for name in ("sft", "start") if metric in BY_PROMPT
            and (key := metric.replace("aligned", name)) in summary]
  value, start = float(summary[metric]), (starts or [math.nan])[0]
  path = cell.folder / "evaluate" / "scores.json"
  if metric not in BY_PROMPT or not path.exists():
    return Result(value, math.nan, start, {}, summary)
  table = json.loads(path.read_text())[BY_PROMPT[metric]]
  prompts = list(map(str, table["prompt_ids"]))
  scores = dict(zip(prompts, table["aligned"]))
  if not split:
    return Result(value, math.nan, start, scores, summary)
  test = {p: s for p, s in scores.items() if not for_validation(p)}
  return Result(
      float(np.mean(list(test.values()))),
      float(np.mean([s for p, s in scores.items() if for_validation(p)])),
      float(np.mean([s for p, s in zip(prompts, table["start"])
                     if not for_validation(p)])),
      test, summary)


def for_validation(prompt: str) -> bool:
  """Half of the prompts, by a hash: the same half in every run."""
  return hashlib.sha256(prompt.encode()).digest()[0] % 2 == 0


def curves(outcome: Outcome) -> dict[str, dict[int, float]]:
  """Metric -> update -> mean over the seeds that have run."""
  points: dict[str, dict[int, list[float]]] = {}
  for cell in outcome.row.cells[outcome.trial]:
    if cell.seed not in outcome.results:
      continue
    for text in (cell.folder / "metrics.jsonl").read_text().splitlines():
      line = json.loads(text)
      for metric in CURVES:
        if line["stage"] == "preference" and line.get(metric) is not None:
          points.setdefault(metric, {}).setdefault(
              line["step"], []).append(line[metric])
  return {metric: {
      step: float(np.mean(values)) for step, values in steps.items()
      if len(values) == len(outcome.results)}
      for metric, steps in points.items()}
