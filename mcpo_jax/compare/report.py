"""Table, numbers and figures of a comparison."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from mcpo_jax import commit
from mcpo_jax.compare import results, runs
from mcpo_jax.compare.results import Outcome, Result
from mcpo_jax.compare.rows import Overrides
from mcpo_jax.evaluation import comparison, plots, statistics
from mcpo_jax.training import launches

# Further columns: key of the runs' summary.json -> head.
FIGURES = {
    "score/difference": "sampled, to the start",
    "greedy/score/aligned": "greedy",
    "greedy/score/difference": "greedy, to the start",
    "mean_length/aligned": "tokens",
    "objective/kl": "KL",
    "distinct_2/aligned": "distinct-2",
    "repetition/aligned": "repetition",
    "empty_rate/aligned": "empty",
    "ref_perplexity/aligned": "perplexity to the start",
    "eval/accuracy": "accuracy",
    "eval/margin": "margin",
    "calibration/rank_correlation/aligned": "rank correlation",
}


class Line(NamedTuple):
  """The numbers of a row."""

  outcome: Outcome
  mean: comparison.Estimate
  difference: comparison.Estimate  # to the reference row, paired by seed
  p_holm: float
  prompts: statistics.Interval  # of the difference, over prompts


def write(
    outcomes: Sequence[Outcome],
    metric: str,
    reference: str,
    workdir: pathlib.Path,
    flags: Sequence[str],
) -> None:
  """compare.md, compare.json, summary.json and the two figures."""
  lines = lines_of(outcomes, reference)
  text = markdown(lines, metric, reference, shlex.join(
      ["python", "-m", "mcpo_jax", "compare", *flags, f"--workdir={workdir}"]))
  commit.write_file(workdir / "compare.md", text)
  table = {line.outcome.row.slug: _numbers(line) for line in lines}
  commit.write_file(workdir / "compare.json", json.dumps(
      {"metric": metric, "reference": reference, "rows": table}, indent=1))
  commit.write_file(workdir / "summary.json", json.dumps({
      f"compare/{slug}/{name}": value for slug, row in table.items()
      for name, value in row.items() if isinstance(value, int | float)},
      indent=1))
  plots.scores(
      workdir / "compare_score.png",
      [plots.Dot(line.outcome.row.name, line.mean.mean, line.mean.half_width,
                 [r.value for r in line.outcome.results.values()],
                 _state(line.outcome)) for line in lines],
      metric=metric, reference=reference, start=_start(outcomes))
  plots.curves(
      workdir / "compare_curves.png",
      {o.row.name: results.curves(o) for o in outcomes if o.results},
      results.CURVES, symlog=("eval/margin",))
  print(text)


def lines_of(outcomes: Sequence[Outcome], reference: str) -> list[Line]:
  """Means over seeds, and differences to the reference row."""
  base = next(o for o in outcomes if o.row.name == reference).results
  lines = []
  for outcome in outcomes:
    ours = outcome.results
    # The reference row against itself is no test.
    seeds = [] if outcome.row.name == reference else [
        seed for seed in ours if seed in base]
    lines.append(Line(
        outcome,
        comparison.estimate([r.value for r in ours.values()]),
        comparison.estimate([ours[s].value - base[s].value for s in seeds]),
        math.nan,
        comparison.over_prompts({s: ours[s].scores for s in seeds},
                                {s: base[s].scores for s in seeds})))
  adjusted = comparison.holm([line.difference.p for line in lines])
  return [line._replace(p_holm=p) for line, p in zip(lines, adjusted)]


def _start(outcomes: Sequence[Outcome]) -> plots.Dot | None:
  """What the rows started from, a value per seed; None if nothing says so."""
  values = {seed: r.start for o in outcomes for seed, r in o.results.items()
            if not math.isnan(r.start)}
  if not values:
    return None
  mean = comparison.estimate(list(values.values()))
  return plots.Dot("start", mean.mean, mean.half_width, list(values.values()))


def _numbers(line: Line) -> dict[str, Any]:
  """A row as JSON; what could not be calculated is null."""
  row, trial = line.outcome.row, line.outcome.trial
  values = {
      "name": row.name,
      "settings": dict(row.trials[trial]),
      "seeds": {seed: (line.outcome.results[seed].value
                       if seed in line.outcome.results
                       else line.outcome.missing[seed]) for seed in row.seeds},
      "trials": [{"settings": dict(t), "validation": v} for t, v in zip(
          row.trials, line.outcome.validation)],
      "num_seeds": line.mean.num,
      "p": line.difference.p,
      "p_holm": line.p_holm,
      "over_prompts": line.prompts.mean,
      "over_prompts_ci95_low": line.prompts.ci95_low,
      "over_prompts_ci95_high": line.prompts.ci95_high,
  }
  for name, (mean, half_width, _, _) in (
      ("mean", line.mean), ("difference", line.difference)):
    values |= {name: mean, f"{name}_ci95_low": mean - half_width,
               f"{name}_ci95_high": mean + half_width}
  return json.loads(
      json.dumps(values), parse_constant=lambda _: None)


def markdown(
    lines: Sequence[Line], metric: str, reference: str, command: str
) -> str:
  """The table, and what one must know to read it."""
  outcomes = [line.outcome for line in lines]
  seeds = list(dict.fromkeys(s for o in outcomes for s in o.row.seeds))
  cells = [c for o in outcomes for trial in o.row.cells for c in trial]
  done = sum(runs.finished(cell, metric) for cell in cells)
  tests = sum(not math.isnan(line.difference.p) for line in lines)
  split = any(len(o.row.trials) > 1 for o in outcomes)
  prompts = {len(r.scores) for o in outcomes for r in o.results.values()} - {0}
  out = [
      f"# {metric} of {len(lines)} rows", "", f"Command: `{command}`", "",
      f"{_versions()}; {done} of {len(cells)} runs"
      + "".join(f"; {n} held-out prompts" for n in sorted(prompts))
      + ". Seed by seed, rows share the start, the data and its order, and "
      "differ in the settings named below only. Behind ± is the half width of "
      "a 95 % t interval over seeds. Differences are to "
      f"“{reference}”, paired by seed; p is that of a two-sided t test, "
      f"then as Holm adjusts it (tests: {tests}). The last column is the same "
      "difference over prompts, averaged over seeds first, with its 95 % "
      "bootstrap interval.", ""]
  if split:
    out += [
        f"Every row had {len(outcomes[0].row.trials)} trials; the one with the "
        "best mean over seeds on one half of the prompts is reported, on the "
        "other half.", ""]
  start = _start(outcomes)
  table = [["start", str(len(start.values)), _pm(start), *["–"] * 4]] if (
      start) else []
  for line in lines:
    table.append([
        line.outcome.row.name,
        f"{line.mean.num} of {len(line.outcome.row.seeds)}",
        _pm(line.mean) if line.mean.num else _state(line.outcome),
        _pm(line.difference, "+"), _p(line.difference.p), _p(line.p_holm),
        _interval(line.prompts)])
  out += _table(["row", "seeds", metric, "difference", "p", "p, adjusted",
                 "over prompts"], table)

  out += ["## Other figures, over all held-out prompts", ""]
  shown = [key for key in FIGURES if key != metric and any(
      key in r.summary for o in outcomes for r in o.results.values())]
  out += _table(["row", *(FIGURES[key] for key in shown)], [[
      o.row.name, *(_pm(comparison.estimate(
          [r.summary[key] for r in o.results.values() if key in r.summary]),
          "+" if key.endswith("difference") else "") for key in shown)]
      for o in outcomes])
  out += ["## Seed by seed", ""]
  out += _table(["row", *(f"seed {seed}" for seed in seeds)], [[
      o.row.name, *(_number(o.results[s].value) if s in o.results
                    else o.missing.get(s, "–") for s in seeds)]
      for o in outcomes])
  gains = [[o.row.name, *(_gain(o.results.get(s), metric) for s in seeds)]
           for o in outcomes]
  if any(cell != "–" for row in gains for cell in row[1:]):
    out += ["## Difference to the start of the same seed", "",
            "Over all held-out prompts, paired by prompt; in brackets the 95 % "
            "bootstrap interval over prompts.", ""]
    out += _table(["row", *(f"seed {seed}" for seed in seeds)], gains)
  out += ["## Settings", ""]
  out += _table(["row", "differs in"], [[
      o.row.name, _code(o.row.trials[o.trial])] for o in outcomes])
  if split:
    out += ["## Trials, on the validation prompts", ""]
    out += _table(["row", "settings", metric], [[
        o.row.name, _code(trial), _number(value)] for o in outcomes
        for trial, value in zip(o.row.trials, o.validation)])
  return "\n".join(out)


def _gain(result: Result | None, metric: str) -> str:
  """A run's difference to its start with its interval."""
  key = metric.removesuffix("aligned") + "difference"
  bounds = [f"{key}{bound}" for bound in ("", "_ci95_low", "_ci95_high")]
  if result is None or not all(b in result.summary for b in bounds):
    return "–"
  mean, low, high = (result.summary[b] for b in bounds)
  return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _versions() -> str:
  """Commit, JAX, machine."""
  code = launches.commit_of_code()
  return (f"{f'Commit {code}, ' if code else ''}"
          f"jax {importlib.metadata.version('jax')}, {platform.machine()}, "
          f"{os.cpu_count()} cores")


def _state(outcome: Outcome) -> str:
  """Why a row has no numbers."""
  return ", ".join(sorted(set(outcome.missing.values())))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  return ["| " + " | ".join(cells) + " |" for cells in (
      head, ["---"] * len(head), *rows)] + [""]


def _code(overrides: Overrides) -> str:
  return " ".join(f"`{key}={text}`" for key, text in overrides) or "–"


def _number(value: float, sign: str = "") -> str:
  return "–" if math.isnan(value) else f"{value:{sign}.3f}"


def _pm(mean: comparison.Estimate | plots.Dot, sign: str = "") -> str:
  half = mean.half_width
  return _number(mean.mean, sign) + (
      "" if math.isnan(half) else f" ± {half:.3f}")


def _p(value: float) -> str:
  return "< 0.001" if value < 0.001 else _number(value)


def _interval(interval: statistics.Interval) -> str:
  if math.isnan(interval.ci95_low):
    return _number(interval.mean, "+")
  return (f"{interval.mean:+.3f} [{interval.ci95_low:+.3f}, "
          f"{interval.ci95_high:+.3f}]")
