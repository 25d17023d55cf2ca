"""report.html: what a run did, or several beside each other, in one file.

It is made of whatever lies in the workdirs, as `workdirs` reads it; what is
missing or damaged is said on the page. Nothing is loaded from elsewhere.
However long the runs, the page stays below MAX_BYTES: curves are thinned, and
of many candidate sets some are shown.
"""

import collections
import datetime
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np

from mcpo_jax import commit, devices, errors, settings
from mcpo_jax.evaluation import explorer
from mcpo_jax.evaluation.workdirs import Curve, Run, is_number, read_run

MAX_BYTES = 3_000_000
_NUMBERS = 120_000  # of all curves, 7 bytes each
_POINTS = (40, 300)  # of a thinned curve: at least, at most
_CANDIDATE_BYTES = 1_000_000
_CHARACTERS = 400_000  # of all prompts and completions
_SHOWN = 12  # prompts of a section
_LAUNCHES = 20  # that are told, the last ones

_PAGE = pathlib.Path(__file__).with_name("report.html")
# What a reader looks at first, in this order.
_MAIN = (
    "loss", "eval/loss", "rewards/margins", "eval/margin",
    "rewards/accuracies", "eval/accuracy", "rewards/chosen",
    "rewards/rejected", "objective/kl", "eval/score", "candidates/score",
    "judge/mean", "kernel/entropy", "kernel/ess", "kernel/negative_rank",
    "candidates/length", "eval/likelihood/length_correlation",
    "grads/global_norm", "learning_rate", "perf/tokens_per_sec", "perf/mfu")
# Last part of a metric's name -> what its axis shows.
_UNITS = {
    "loss": "nats, mean over prompts", "margins": "reward, chosen − rejected",
    "margin": "reward, chosen − rejected", "accuracies": "share of pairs",
    "accuracy": "share of pairs", "kl": "nats per sample",
    "kl_per_token": "nats per token", "entropy": "nats",
    "ess": "effective number of candidates", "max_weight": "weight",
    "negative_rank": "rank of the drawn by kernel score, 0 = highest",
    "length": "tokens", "learning_rate": "per update", "mfu": "share of peak",
    "global_norm": "norm", "tokens_per_sec": "tokens per second",
    "flops_per_sec": "FLOP per second", "pad_fraction": "share of tokens",
    "compile_seconds": "seconds", "logp_gap": "nats per token",
    "score": "score"}
_UNIT_OF_GROUP = {"rewards": "reward", "logps": "nats per completion",
                  "kernel": "", "candidates": "", "perf": ""}


def write_report(
    workdirs: Sequence[pathlib.Path],
    out: pathlib.Path,
    *,
    price: float | None = None,
    pictures: bool = True,
) -> None:
  """Writes the page.

  Args:
    workdirs: of the runs; of several the page opens with how their configs
      differ, and their curves lie over each other.
    out: of the page, replaced at once when all of it is there.
    price: of a chip for an hour, in whatever currency.
    pictures: the main curves as PNG too, in a folder beside the page.

  Raises:
    CheckpointError: ckpt.none, a workdir holds no run.
    ResourceError: report.path.
  """
  runs = [read_run(folder, name, _CANDIDATE_BYTES // len(workdirs))
          for folder, name in zip(workdirs, _names(workdirs))]
  charts = _charts(runs)
  figures = out.with_name(f"{out.stem}_png")
  environment = jinja2.Environment(
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
      lstrip_blocks=True)
  environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
  page = environment.from_string(_PAGE.read_text("utf-8"))
  text = page.render(
      title=" · ".join(run.name for run in runs) if len(runs) < 5
      else f"{len(runs)} runs", runs=runs,
      states=[_state(run) for run in runs],
      differences=_differences([run.config for run in runs]),
      charts=charts, models=_models(runs), benchmarks=_benchmarks(runs),
      results=_results(runs), samples=_samples(runs),
      explorer=explorer.PAGE.read_text("utf-8"),
      audits=[_audit(run.summary) for run in runs],
      costs=[_cost(run, price) for run in runs], price=price,
      launches=[[_launch(one) for one in run.launches[-_LAUNCHES:]]
                for run in runs],
      figures=figures.name if pictures else None)
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    if pictures:
      commit.write_folder(
          figures, lambda folder: _draw(runs, folder), {}, replace=True)
    # Half a surrogate pair, which files of JSON can hold, is no character.
    commit.write_file(out, text.encode("utf-8", "replace").decode("utf-8"))
  except OSError as e:
    raise errors.ResourceError(
        "report.path", "the page cannot be written", where=str(out),
        got=e.strerror, hint="--out=FILE.html") from e


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
  """As many folders of the end of each path as tell them apart."""
  paths = [folder.resolve().parts for folder in folders]
  for length in range(1, max(map(len, paths)) + 1):
    names = [str(pathlib.PurePath(*path[-length:])) for path in paths]
    if len(set(names)) == len(set(paths)):
      break
  return names


def _state(run: Run) -> dict[str, Any]:
  """Stages and how far they came, and the figures that head the page."""
  stages, total = [], {"preference": run.config.get("num_steps"),
                       "sft": run.config.get("sft.num_steps"),
                       "reward_model": run.config.get("reward_model.num_steps")}
  for stage in run.config.get("stages") or list(run.curves):
    steps = [curve.steps[-1] for curve in run.curves.get(stage, {}).values()]
    text = f"step {max(steps):.0f}" if steps else "not begun"
    if steps and total.get(stage):
      text += f" of {total[stage]}"
    done = any((run.folder / stage / name).exists() for name in (
        "result.json", commit.MANIFEST))
    stages.append({"name": stage, "done": done,
                   "text": "finished" if done else text})
  return {
      "stages": stages,
      "as_of": _date(max(time for time, _ in run.times)) if run.times else None,
      "figures": [{"name": key, **cell} for key in (
          "score/difference", "score/aligned", "eval/accuracy", "objective/kl")
                  if (cell := _cell(run.summary, key))]}


def _differences(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The keys in which the configs differ, and all values."""
  keys = sorted({key for config in configs for key in config})
  rows = [{"key": key, "values": [
      settings.redact(str(config[key])) if key in config else "–"
      for config in configs]} for key in keys]
  for row in rows:
    row["differs"] = len(set(row["values"])) > 1
  return rows


def _charts(runs: Sequence[Run]) -> dict[str, Any]:
  """The curves as the page's script draws them.

  Returns:
    "runs": names; "steps": lists of updates, which lines share; "stages":
    [{"name", "groups": [{"name", "panels": [index]}]}]; "panels": [{"name",
    "across": what goes to the right, "unit", "lines": [[run, index in steps,
    values, low, high]]}], None where nothing is known; low and high are the
    interval that was written, or what lies between the points of a thinned
    curve.
  """
  grids: dict[tuple[float, ...], int] = {}
  panels, stages = [], []
  # Those of the stage evaluate have no updates: they stand in the tables.
  names = [s for s in dict.fromkeys(s for run in runs for s in run.curves)
           if s != "evaluate"]
  found = {stage: dict.fromkeys(
      name for run in runs for name in run.curves.get(stage, {})
      if not name.endswith(("_ci95_low", "_ci95_high"))) for stage in names}
  count = sum(name in run.curves.get(stage, {}) for run in runs
              for stage in names for name in found[stage])
  most = min(max(_NUMBERS // max(3 * count, 1), _POINTS[0]), _POINTS[1])
  for stage in names:
    groups: dict[str, list[int]] = {"main": []}
    order = [name for name in _MAIN if name in found[stage]]
    for name in [*order, *(n for n in found[stage] if n not in order)]:
      lines = []
      for i, run in enumerate(runs):
        metrics = run.curves.get(stage, {})
        if name in metrics:
          steps, *values = _thin(
              metrics[name], metrics.get(f"{name}_ci95_low"),
              metrics.get(f"{name}_ci95_high"), most)
          lines.append([i, grids.setdefault(tuple(steps), len(grids)),
                        *values])
      if name in order:
        groups["main"].append(len(panels))
      group = name.rpartition("/")[0] or "training"
      groups.setdefault(group, []).append(len(panels))
      panels.append({"name": name, "across": "update", "unit": _unit(name),
                     "lines": lines})
    stages.append({"name": f"Stage {stage}", "groups": [
        {"name": group, "panels": members}
        for group, members in groups.items() if members]})
  evaluated = [panel for panel in _evaluation_panels(runs, grids)
               if panel["lines"]]
  if evaluated:
    stages.append({"name": "Evaluation", "groups": [{
        "name": "main", "panels": list(range(
            len(panels), len(panels) + len(evaluated)))}]})
    panels += evaluated
  return {"runs": [run.name for run in runs], "steps": list(grids),
          "stages": stages, "panels": panels}


def _evaluation_panels(
    runs: Sequence[Run], grids: dict[tuple[float, ...], int]
) -> Iterator[dict[str, Any]]:
  """Score against KL, and of the aligned models accuracy by rank and
  calibration, in the form of `_charts`."""

  def aligned(evaluation):
    models = evaluation["models"]
    return (models[-1]["preferences"] if models else None) or {}

  def frontier(evaluation):
    return [(_interval(one["kl"])[0], *_interval(one["score"]))
            for one in evaluation["frontier"]]

  def by_rank(evaluation):
    return [(rank, *_interval(one["accuracy"])) for rank, one in enumerate(
        aligned(evaluation).get("by_rank", []), 1)]

  def calibration(evaluation):
    found = aligned(evaluation).get("calibration", {"bins": []})
    return [(one["confidence"], one["accuracy"], None, None)
            for one in found["bins"]]

  for points_of, name, across, unit in (
      (frontier, "score against KL", "KL to the reference, nats per sample",
       "score"),
      (by_rank, "accuracy by rank", "rank of the negative, 1 = best scored",
       "share of sets"),
      (calibration, "calibration", "probability by the implicit reward",
       "share of pairs in the order of their scores")):
    lines = []
    for i, run in enumerate(runs):
      points = sorted(point for point in (
          points_of(run.evaluation) if run.evaluation else [])
          if None not in point[:2])
      if points:
        xs, *columns = zip(*points)
        lines.append([i, grids.setdefault(xs, len(grids)), *(
            None if None in column else list(column) for column in columns)])
    yield {"name": name, "across": across, "unit": unit, "lines": lines,
           "diagonal": points_of is calibration}


def _interval(value: dict[str, Any] | None) -> tuple[float | None, ...]:
  """Mean, low and high of an interval of `tables`."""
  return tuple((value or {}).get(key) for key in (
      "mean", "ci95_low", "ci95_high"))


def _unit(name: str) -> str:
  head, _, last = name.rpartition("/")
  return _UNITS.get(last) or _UNIT_OF_GROUP.get(head.rpartition("/")[2], "")


def _thin(
    curve: Curve, low: Curve | None, high: Curve | None, most: int
) -> tuple[list, list, list | None, list | None]:
  """Steps, values, low, high. More than twice `most` points become `most`:
  means of neighbours, between the least and the largest of them."""
  whole = [curve.values] + [
      bound.values for bound in (low, high)
      if bound is not None and np.array_equal(bound.steps, curve.steps)]
  if len(curve.steps) <= 2 * most:
    lists = [_round(values) for values in whole]
    return _round(curve.steps), *(
        lists if len(lists) == 3 else [lists[0], None, None])
  edges = np.linspace(0, len(curve.steps), most + 1).astype(int)[:-1]
  known = np.isfinite(curve.values)
  total = np.add.reduceat(np.where(known, curve.values, 0.0), edges)
  number = np.add.reduceat(known.astype(float), edges)
  mean = np.where(number, total / np.maximum(number, 1), np.nan)
  return (_round(curve.steps[edges]), _round(mean),
          _round(np.fmin.reduceat(curve.values, edges)),
          _round(np.fmax.reduceat(curve.values, edges)))


def _round(values: np.ndarray) -> list[float | None]:
  """Five digits; None for NaN."""
  return [None if math.isnan(v) else int(v) if v == int(v) and abs(v) < 1e9
          else float(f"{v:.5g}") for v in values.tolist()]


def _cell(summary: dict[str, Any], key: str) -> dict[str, Any] | None:
  """A number of the summary with its interval, as text and to be drawn."""
  value = summary.get(key)
  if value is None or isinstance(value, dict | list):
    return None
  bounds = [summary.get(f"{key}_ci95_{side}") for side in ("low", "high")]
  known = all(is_number(x) and math.isfinite(x) for x in [value, *bounds])
  return {"text": _number(value), "value": value,
          "long": isinstance(value, str),
          "interval": f"{bounds[0]:.3g} to {bounds[1]:.3g}" if known else None,
          "bounds": bounds if known else None}


def _models(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Tables of the models of all evaluations, one for each way of drawing."""
  heads = {
      "accuracy": ("preferences", "accuracy"),
      "margin": ("preferences", "margin"),
      "score": ("samples", "score"),
      "win rate": ("samples", "against", "win_rate"),
      "ties": ("samples", "against", "tie_rate"),
      "win rate at equal length": ("samples", "against", "lc_win_rate"),
      "KL": ("samples", "kl"),
      "tokens": ("samples", "length"),
      "perplexity to the reference": ("samples", "ref_perplexity"),
      "distinct-2": ("samples", "distinct_2"),
      "repetition": ("samples", "repetition"),
      "empty": ("samples", "empty_rate")}
  out = []
  for law in ("sampled", "greedy"):
    rows = []
    for i, run in enumerate(runs):
      for model in run.evaluation.get("models", []):
        shown = model | {"samples": (model["samples"] or {}).get(law)}
        rows.append({"run": i, "name": model["name"], "cells": [
            _value_cell(_reach(shown, path)) for path in heads.values()]})
    kept = [j for j in range(len(heads))
            if any(row["cells"][j] for row in rows)]
    out.append({
        "law": law, "heads": [list(heads)[j] for j in kept],
        "rows": [row | {"cells": [row["cells"][j] for j in kept]}
                 for row in rows],
        "baselines": {run.evaluation["baseline"] for run in runs
                      if run.evaluation.get("models")}})
  return [table for table in out if table["rows"]]


def _benchmarks(runs: Sequence[Run]) -> dict[str, Any]:
  """What judges said of exported answers."""
  heads = {"questions": "num_questions", "win rate": "win_rate",
           "ties": "tie_rate", "win rate at equal length": "lc_win_rate",
           "score": "score", "characters": "mean_length"}
  rows = [{"run": i, "name": f"{one['benchmark']} {one['benchmark_version']}",
           "model": one["model"], "judge": one["judge"] or "–",
           "cells": [_value_cell(one.get(key)) for key in heads.values()]}
          for i, run in enumerate(runs)
          for one in run.evaluation.get("benchmarks", [])]
  return {"heads": list(heads), "rows": rows}


def _reach(tree: Any, path: Sequence[str]) -> Any:
  """The value at the end of a path; None where it breaks off."""
  for key in path:
    tree = tree.get(key) if isinstance(tree, dict) else None
  return tree


def _value_cell(value: Any) -> dict[str, Any] | None:
  """A number or an interval of `tables` as text; None of nothing."""
  if isinstance(value, dict):
    return _cell({"x": value["mean"], "x_ci95_low": value["ci95_low"],
                  "x_ci95_high": value["ci95_high"]}, "x")
  return _cell({"x": value}, "x")


def _results(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Groups of the summary's numbers; those with intervals come first, each
  with its place on a scale that the group shares, in 0..100."""
  keys = dict.fromkeys(
      key for run in runs for key in run.summary
      if not key.startswith("audit/")
      and not key.endswith(("_ci95_low", "_ci95_high")))
  groups: dict[str, list[dict[str, Any]]] = {}
  for key in keys:
    cells = [_cell(run.summary, key) for run in runs]
    if any(cells):
      group, _, name = key.rpartition("/")
      groups.setdefault(group, []).append({"name": name, "cells": cells})
  out = []
  for group, rows in groups.items():
    drawn = [cell for row in rows for cell in row["cells"]
             if cell and cell["bounds"]]
    ends = [x for cell in drawn for x in cell["bounds"]]
    if drawn:
      low, high = min(ends), max(ends)
      place = lambda x, low=low, high=high: round(
          4 + 92 * (x - low) / (high - low or 1), 2)
      for cell in drawn:
        cell["places"] = [place(cell["bounds"][0]), place(cell["value"]),
                          place(cell["bounds"][1])]
    out.append({
        "name": group or "run", "rows": rows, "drawn": bool(drawn),
        "zero": place(0.0) if drawn and low < 0 < high else None})
  return sorted(out, key=lambda group: not group["drawn"])


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Sections of prompts, each with the completions side by side."""
  laws = dict.fromkeys(law for run in runs for law in run.samples)
  found = {f"held-out prompts, {law}": [
      (i, row.get("prompt"), {k: v for k, v in row.items() if k != "prompt"})
      for i, run in enumerate(runs) for row in run.samples.get(law, [])
      if isinstance(row, dict)] for law in laws}
  found["while training, greedy"] = [
      (i, row["prompt"], {"start": row["start"],
                          f"step {row['step']}": row["now"]})
      for i, run in enumerate(runs) for steps in [_spread(run, len(runs))]
      for row in run.progress if row["step"] in steps]
  # Before, and after of each run or at three steps.
  most = _CHARACTERS // (len(found) * _SHOWN * (len(runs) + 4))
  sections = []
  for name, rows in found.items():
    cards: dict[str, list[dict[str, Any]]] = {}
    for i, prompt, texts in rows:
      prompt = _text(prompt, most)
      if prompt in cards or len(cards) < _SHOWN:
        _add(cards.setdefault(prompt, []), i, {
            title: _text(text, most) for title, text in texts.items()})
    sections.append({"name": name, "cards": list(cards.items())})
  return [section for section in sections if section["cards"]]


def _spread(run: Run, num_runs: int) -> set[float]:
  """Steps with samples that are shown: the last, and two before if the run is
  alone."""
  steps = sorted({row["step"] for row in run.progress if row["step"] > 0})
  few = min(1 if num_runs > 1 else 3, len(steps))
  return {steps[int(i)] for i in np.linspace(len(steps) - 1, 0, few)}


def _add(cells: list[dict[str, Any]], run: int, texts: dict[str, str]) -> None:
  """Adds a run's completions of a prompt; what another run has too, as a
  common start, stands there once."""
  for name, text in texts.items():
    same = [c for c in cells if (c["name"], c["text"]) == (name, text)]
    if not same:
      cells.append({"runs": [run], "name": name, "text": text})
    elif run not in same[0]["runs"]:
      same[0]["runs"].append(run)


def _text(value: Any, most: int) -> str:
  """A prompt or completion to read, cut after `most` characters."""
  if isinstance(value, list):
    value = "\n\n".join(
        f"{m.get('role')}: {m.get('content') or ''}" if isinstance(m, dict)
        else str(m) for m in value)
  text = str(value)
  return text if len(text) <= most else (
      f"{text[:most]} … ({len(text) - most} characters more)")


def _audit(summary: dict[str, Any]) -> dict[str, Any] | None:
  """The keys that the verb audit writes, a column for each side."""
  sides: dict[str, dict[str, list[str]]] = {}
  for key, value in summary.items():
    head, *path = key.split("/")
    if head == "audit" and len(path) >= 2:
      side, name, *rest = path
      if isinstance(value, list):
        value = "; ".join(map(str, value)) or "none"
      sides.setdefault(side, {}).setdefault(name.replace("_", " "), []).append(
          " ".join(["/".join(rest), _number(value)]).strip())
  overlap = sides.pop("overlap", {})
  names = dict.fromkeys(name for rows in sides.values() for name in rows)
  return {
      "sides": list(sides),
      "rows": [(name, [", ".join(rows.get(name, ["–"]))
                       for rows in sides.values()]) for name in names],
      "overlap": ", ".join(
          f"{name} {''.join(texts)}" for name, texts in overlap.items()),
  } if sides else None


def _cost(run: Run, price: float | None) -> dict[str, Any]:
  """Stages with their time and speed, and what all of it took.

  Time is that between the rows of metrics.jsonl, or from the launch to the
  first of them: pauses between launches do not count, nor what was lost when
  the run ended without a row.
  """
  seconds: collections.Counter = collections.Counter()
  device_seconds, chip_seconds = 0.0, 0.0
  starts = sorted(run.launches, key=lambda one: one["time"])
  before, i = None, 0
  for time, stage in sorted(run.times):
    while i < len(starts) and starts[i]["time"] <= time:
      before, i = starts[i]["time"], i + 1
    if before is not None:
      kind = _devices(starts[i - 1] if i else {})
      seconds[stage] += time - before
      device_seconds += (time - before) * kind["count"]
      chip_seconds += (time - before) * kind["count"] / kind["per_chip"]
    before = time
  stages = []
  for stage, metrics in run.curves.items():
    middle = lambda name, metrics=metrics: float(np.nanmedian(
        metrics[name].values)) if name in metrics and np.isfinite(
            metrics[name].values).any() else None
    speed, mfu = middle("perf/tokens_per_sec"), middle("perf/mfu")
    stages.append({
        "name": stage, "time": _duration(seconds[stage]) if (
            run.times) else "not recorded",
        "updates": "–" if stage == "evaluate" else _number(max(
            c.steps[-1] for c in metrics.values())),
        "speed": "–" if speed is None else f"{_number(speed)} tokens/s",
        "mfu": "–" if mfu is None else f"{100 * mfu:.1f} %"})
  return {
      "stages": stages, "total": _duration(sum(seconds.values())),
      "recorded": bool(run.times), "launches": len(run.launches),
      "device_hours": f"{device_seconds / 3600:.3g}",
      "cost": None if price is None else _number(chip_seconds / 3600 * price)}


def _devices(launch: dict[str, Any]) -> dict[str, Any]:
  """Kind, count and devices of a chip."""
  found = launch.get("devices")
  found = found if isinstance(found, dict) else {}
  known = devices.find(str(found.get("kind")))
  return {"kind": str(found.get("kind", "unknown")),
          "count": found["count"] if is_number(found.get("count")) else 1,
          "per_chip": known.per_chip if known else 1}


def _launch(one: dict[str, Any]) -> dict[str, str]:
  """A launch as rows of the table."""
  kind, versions = _devices(one), one.get("versions")
  return {
      "started": _date(one["time"]),
      "error": one.get("error", ""),
      "devices": f"{kind['count']} × {kind['kind']}",
      "processes": str(one.get("processes", "–")),
      "host": f"{one.get('system', '–')}, {one.get('cores', '–')} cores",
      "commit": str(one.get("commit") or "–"),
      "versions": ", ".join(f"{k} {v}" for k, v in versions.items())
      if isinstance(versions, dict) else "–",
      "command": " ".join(map(str, one.get("command") or []))}


def _date(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(
      seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  return (f"{minutes} min" if minutes < 120
          else f"{minutes // 60} h {minutes % 60:02d} min")


def _number(value: Any) -> str:
  """A number to read; other things as they are."""
  if not is_number(value):
    return str(value)
  if not math.isfinite(value):
    return "–"
  if value == int(value) and abs(value) < 1e15:
    return f"{int(value):,}".replace(",", " ")
  return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _draw(runs: Sequence[Run], folder: pathlib.Path) -> None:
  """A PNG of the main curves of every stage."""
  from mcpo_jax.evaluation import plots  # matplotlib takes a second

  for stage in dict.fromkeys(s for run in runs for s in run.curves):
    titles = {name: name for name in _MAIN if stage != "evaluate" and any(
        name in run.curves.get(stage, {}) for run in runs)}
    if titles:
      plots.curves(folder / f"{stage}.png", {
          run.name: {name: dict(zip(*_thin(curve, None, None, _POINTS[1])[:2]))
                     for name, curve in run.curves.get(stage, {}).items()
                     if name in titles} for run in runs}, titles)
