"""Rows are refused before any run, runs are paired, lost ones stay lost."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import run_cases

from mcpo_jax import errors, main, settings
from mcpo_jax.compare import report, results, rows, runs, verb

CONFIG = run_cases.ROOT / "configs" / "quickstart.py"

# What stands for the program in tests of the runner: it does what its
# objective's name says and writes when, where and on which cores it ran.
PROGRAM = """
import json, os, pathlib, sys, time
from mcpo_jax import settings
words = dict(w.lstrip("-").split("=", 1) for w in sys.argv[2:])
workdir = pathlib.Path(words["workdir"])
name, seed = words["config.objective.name"], int(words["config.seed"])
workdir.mkdir(parents=True, exist_ok=True)
events = pathlib.Path("events.jsonl")
def note(what):
  with open(events, "a") as file:
    file.write(json.dumps([what, name, seed, sorted(os.sched_getaffinity(0)),
                           os.environ["MCPO_CACHE"], os.getpid()]) + "\\n")
note("begins")
config = {"objective": {"name": name}, "seed": seed,
          "reference": {"source": "cached"}, "compare": {},
          "stages": ["preference", "evaluate"]}
(workdir / "config.json").write_text(json.dumps(
    {"version": settings.CONFIG_VERSION, "config": config}))
time.sleep(0.3)
if name == "explode":
  print("error[step.non_finite]: loss", file=sys.stderr)
  sys.exit(8)
(workdir / "preference").mkdir(exist_ok=True)
note("shared")
if name == "hang":
  time.sleep(60)
score = {"good": 0.8, "bad": 0.5, "nan": float("nan")}[name] + 0.01 * seed
(workdir / "summary.json").write_text(json.dumps(
    {"score/aligned": score, "score/sft": 0.4}))
(workdir / "metrics.jsonl").write_text(json.dumps(
    {"stage": "preference", "step": 4, "eval/accuracy": score}) + "\\n")
note("ends")
"""


# A comparison of that program's which does not end.
HANGS = """
import sys
sys.path[:0] = sys.argv[1:]
import compare_test
compare_test.hang()
"""


def read(overrides):
  """Overrides -> what the program above calls its config."""
  values = dict(overrides)
  return {"objective": {"name": values["objective.name"]},
          "seed": int(values["seed"]), "reference": {"source": "cached"},
          "compare": {}, "stages": ["preference", "evaluate"]}


@pytest.fixture
def program(tmp_path, monkeypatch):
  """A folder in which `python -m mcpo_jax` is the program above."""
  (tmp_path / "mcpo_jax").mkdir()
  (tmp_path / "mcpo_jax" / "__main__.py").write_text(PROGRAM)
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("PYTHONPATH", raising=False)
  return tmp_path


def options(*lines, **more):
  return {"rows": lines, "seeds": (0, 1), "reference": None, "jobs": 2,
          "metric": "score/aligned", "minutes": None} | more


def plan(*lines, workdir=pathlib.Path("work"), **more):
  return rows.plan(options(*lines, **more), read, workdir)


def go(planned, **more):
  return runs.run(planned, ["--config=x"], pathlib.Path("work"), **{
      "metric": "score/aligned", "jobs": 2, "seconds": math.inf} | more)


def hang():
  line = options("a | objective.name=hang")
  verb.compare(lambda more: read(more) if more else {"compare": line}, [],
               pathlib.Path("work"))


def events(folder):
  return [json.loads(line) for line in (
      folder / "events.jsonl").read_text().splitlines()]


# Rows.


def test_a_row_is_a_name_settings_seeds_and_a_grid():
  row = rows.parse_row(
      "MC-PO, tau 1/3 | a.b=1 c='x y' | seeds=3,4 | grid: lr=1e-4,3e-4 d=0,1",
      "here", (0,))
  assert (row.name, row.slug, row.seeds) == (
      "MC-PO, tau 1/3", "mc_po_tau_1_3", (3, 4))
  fixed = (("a.b", "1"), ("c", "x y"))
  assert row.trials == tuple(
      (*fixed, ("lr", lr), ("d", d)) for lr in ("1e-4", "3e-4") for d in "01")
  plain = rows.parse_row("DPO", "here", (0, 1))
  assert plain.trials == ((),) and plain.seeds == (0, 1)


@pytest.mark.parametrize("text, slug", [
    ("", "config.type"), ("| a=1", "config.type"),
    ("DPO | beta", "config.type"), ("DPO | a='1", "config.type"),
    ("DPO | seeds=a", "config.type"),
    ("DPO | seeds=1,1", "config.type"), ("DPO | seed=1", "config.conflict"),
    ("DPO | compare.jobs=1", "config.conflict"),
    ("DPO | grid: seed=1,2", "config.conflict"),
])
def test_a_line_that_is_no_row_is_refused_with_its_place(text, slug):
  with pytest.raises(errors.ConfigError) as caught:
    rows.parse_row(text, "compare.rows[2]", (0,))
  assert (caught.value.slug, caught.value.where) == (slug, "compare.rows[2]")


@pytest.mark.parametrize("lines, more, slug, where", [
    ((), {}, "config.missing", "compare.rows"),
    (("a | objective.name=x", "A | objective.name=y"), {}, "config.conflict",
     "compare.rows[1]"),
    (("a | objective.name=x", "b | grid: objective.name=x,y"), {},
     "config.conflict", "compare.rows[1]"),
    (("a | objective.name=x",), {"reference": "aa"}, "config.range",
     "compare.reference"),
    (("a | objective.name=x", "b | objective.name=y"), {"seeds": ("x",)},
     "config.type", "compare.seeds"),
    (("a | grid: objective.name=x,y",), {"metric": "eval/margin"},
     "config.range", "compare.metric"),
])
def test_rows_that_do_not_fit_together_are_refused(lines, more, slug, where):
  with pytest.raises(errors.ConfigError) as caught:
    plan(*lines, **more)
  assert (caught.value.slug, caught.value.where) == (slug, where)


def test_every_mistake_in_a_cells_config_is_told_with_its_row():
  command = main.parse(["train", f"--config={CONFIG}", "--workdir=none"])
  with pytest.raises(errors.ErrorGroup) as caught:
    rows.plan(
        options("MC-PO", "DPO | objective.name=dpoo", "IPO | objective.btea=1"),
        lambda more: main.read_config(
            command._replace(overrides=[*command.overrides, *more])),
        pathlib.Path("work"))
  assert [(e.slug, e.where) for e in caught.value.errors] == [
      ("config.range", "compare.rows[1]: objective.name"),
      ("config.unknown_key", "compare.rows[2]: objective.btea")]
  assert "'dpo'" in str(caught.value)


def test_cells_differ_in_the_named_settings_alone():
  one, two = plan("a | objective.name=good", "b | objective.name=bad")
  for ours, other in zip(one.cells[0], two.cells[0]):
    assert ours.config | {"objective": None} == other.config | {
        "objective": None}
    assert ours.seed == other.seed
  folders = [cell.folder for row in (one, two) for cell in row.cells[0]]
  assert len(set(folders)) == 4


def test_rows_are_checked_without_jax():
  code = ("import sys, mcpo_jax.main, mcpo_jax.compare.verb;"
          "assert 'jax' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True, cwd=run_cases.ROOT)


# Runs.


def test_one_run_of_a_seed_makes_the_start_and_the_others_wait(program):
  planned = plan("a | objective.name=good", "b | objective.name=bad",
                 "c | objective.name=good")
  assert not go(planned, jobs=3)
  seen = set()
  for what, _, seed, _, cache, _ in events(program):
    if what == "shared":
      seen.add(seed)
    elif what == "begins":
      assert seed in seen or f"{seed} begins" not in seen
      seen.add(f"{seed} begins")
    assert cache == str(program / "work" / "cache")
  assert len(events(program)) == 6 * 3


def test_runs_at_a_time_have_cores_of_their_own(program):
  go(plan("a | objective.name=good", "b | objective.name=bad"))
  used = {tuple(cores) for _, _, _, cores, _, _ in events(program)}
  mine = sorted(os.sched_getaffinity(0))
  assert used <= {tuple(mine[i % len(mine)::2]) for i in range(2)}


def test_a_finished_run_is_not_run_again_and_a_new_row_is(program):
  go(plan("a | objective.name=good"))
  go(plan("a | objective.name=good", "b | objective.name=bad", jobs=1))
  begun = [name for what, name, *_ in events(program) if what == "begins"]
  assert begun == ["good"] * 2 + ["bad"] * 2


def test_a_run_of_another_config_is_not_taken_for_this_one(program):
  go(plan("a | objective.name=good"))
  changed = plan("a | objective.name=bad")
  assert not any(runs.finished(c, "score/aligned")
                 for c in changed[0].cells[0])


def test_a_lost_run_loses_one_cell(program):
  planned = plan("a | objective.name=good", "b | objective.name=explode",
                 "c | objective.name=nan")
  failed = go(planned)
  assert set(failed.values()) == {"step.non_finite", "score/aligned nan"}
  found = [results.outcome(row, "score/aligned", failed) for row in planned]
  assert [len(o.results) for o in found] == [2, 0, 0]
  report.write(found, "score/aligned", "a", program / "work", [])
  text = (program / "work" / "compare.md").read_text()
  assert "| b | 0 of 2 | failed: step.non_finite | –" in text
  assert text.count("failed: score/aligned nan") == 3
  planned = plan("b | objective.name=explode")
  assert len(go(planned)) == 2  # tried again


def test_no_run_begins_after_the_time_is_up(program):
  planned = plan("a | objective.name=good", "b | objective.name=bad")
  assert go(planned, seconds=0.0) == {}
  report.write([results.outcome(row, "score/aligned", {}) for row in planned],
               "score/aligned", "a", program, [])
  assert not (program / "events.jsonl").exists()
  assert go(planned, jobs=1, seconds=0.5) == {}
  found = [results.outcome(row, "score/aligned", {}) for row in planned]
  done = sum(len(o.results) for o in found)
  assert 1 <= done < 4
  assert set.union(*(set(o.missing.values()) for o in found)) == {"not run"}
  report.write(found, "score/aligned", "a", program / "work", [])
  assert "not run" in (program / "work" / "compare.md").read_text()


def test_a_metric_that_no_run_has_stops_the_comparison(program):
  with pytest.raises(errors.ConfigError) as caught:
    go(plan("a | objective.name=good", "b | objective.name=hang"),
       metric="score/algined")
  assert caught.value.where == "compare.metric"
  assert "'score/aligned'" in caught.value.hint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT,
                                    signal.SIGKILL])
def test_a_signal_stops_the_runs_too(program, number):
  places = [str(run_cases.ROOT), str(run_cases.ROOT / "tests")]
  process = subprocess.Popen(
      [sys.executable, "-P", "-c", HANGS, *places], stderr=subprocess.DEVNULL)
  while not (program / "events.jsonl").exists() or len(events(program)) < 4:
    assert process.poll() is None
    time.sleep(0.1)
  process.send_signal(number)
  assert process.wait(timeout=20) != 0
  children = {event[-1] for event in events(program)}
  deadline = time.monotonic() + 20
  while any(_alive(pid) for pid in children):
    assert time.monotonic() < deadline
    time.sleep(0.1)


def _alive(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
  except OSError:
    return False


# Results, of cells that were made up.


def make_cell(cell, *, start, aligned, accuracy=0.5):
  """A finished run with scores by prompt, p0, p1, ..."""
  prompts = [f"p{i}" for i in range(len(aligned))]
  mean = lambda values: sum(values) / len(values)
  for name, value in (
      ("config.json", {"version": settings.CONFIG_VERSION,
                       "config": cell.config}),
      ("summary.json", {"score/aligned": mean(aligned),
                        "score/sft": mean(start), "eval/accuracy": accuracy,
                        "score/difference": mean(aligned) - mean(start),
                        "score/difference_ci95_low": -0.5,
                        "score/difference_ci95_high": 0.75}),
      ("evaluate/scores.json", {"sampled": {
          "prompt_ids": prompts, "start": start, "aligned": aligned}})):
    path = cell.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
  (cell.folder / "metrics.jsonl").write_text("".join(
      json.dumps({"stage": "preference", "step": step, "loss": 1.0,
                  "eval/accuracy": accuracy + step}) + "\n"
      for step in (2, 4)))


def test_the_table_by_hand(tmp_path):
  planned = plan("ours | objective.name=good", "DPO | objective.name=bad",
                 "lost | objective.name=bad",
                 workdir=tmp_path, seeds=(0, 1, 2))
  for row, shift in zip(planned, ((0.1, 0.2, 0.3), (0.0, 0.0, 0.0))):
    for cell, more in zip(row.cells[0], shift):
      make_cell(cell, start=[0.0, 0.2, 0.4], aligned=[
          0.1 + more, 0.3 + more, 0.2 + more])
  found = [results.outcome(row, "score/aligned", {}) for row in planned]
  report.write(found, "score/aligned", "DPO", tmp_path, ["--config=c.py"])
  text = (tmp_path / "compare.md").read_text()
  # Differences 0.1, 0.2, 0.3: error 0.1 / sqrt 3, half width 4.3027 times it
  # = 0.248; t = 2 sqrt 3, p = 1 - sqrt(12 / 14) = 0.074. Every prompt has the
  # mean over seeds, 0.2.
  assert ("| ours | 3 of 3 | 0.400 ± 0.248 | +0.200 ± 0.248 | 0.074 | 0.074 "
          "| +0.200 [+0.200, +0.200] |") in text
  assert "| DPO | 3 of 3 | 0.200 ± 0.000 | – | – | – | – |" in text
  assert "| start | 3 | 0.200 ± 0.000 |" in text
  assert "| lost | 0 of 3 | not run | – | – | – | – |" in text
  assert "(tests: 1)" in text and "6 of 9 runs" in text
  assert "3 held-out prompts" in text
  assert "| ours | `objective.name=good` |" in text
  gain = "+0.000 [-0.500, +0.750]"
  assert f"| DPO | {gain} | {gain} | {gain} |" in text

  row = json.loads((tmp_path / "compare.json").read_text())["rows"]["ours"]
  assert row["seeds"] == {"0": pytest.approx(0.3), "1": pytest.approx(0.4),
                          "2": pytest.approx(0.5)}
  assert row["difference"] == pytest.approx(0.2)
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["compare/ours/p"] == pytest.approx(1 - math.sqrt(12 / 14))
  assert "compare/lost/mean" not in summary
  for figure in ("score", "curves"):
    assert (tmp_path / f"compare_{figure}.png").stat().st_size > 5000


def test_curves_are_means_over_the_seeds(tmp_path):
  (row,) = plan("a | objective.name=good", workdir=tmp_path)
  for cell, accuracy in zip(row.cells[0], (0.5, 0.7)):
    make_cell(cell, start=[0.0], aligned=[1.0], accuracy=accuracy)
  found = results.outcome(row, "score/aligned", {})
  assert results.curves(found) == {
      "eval/accuracy": {2: pytest.approx(2.6), 4: pytest.approx(4.6)}}


def test_a_trial_is_chosen_on_one_half_of_the_prompts_and_told_on_the_other(
    tmp_path):
  (row,) = plan("a | grid: objective.name=one,two,three", workdir=tmp_path)
  prompts = [f"p{i}" for i in range(40)]
  half = list(map(results.for_validation, prompts))
  assert 10 < sum(half) < 30
  # Trial 1 is the best on the validation prompts and the worst on the others.
  for trial, (validation, test) in zip(
      row.cells, ((0.5, 0.9), (0.7, 0.1), (0.6, 0.8))):
    for cell in trial:
      make_cell(cell, start=[0.0] * 40, aligned=[
          validation if h else test for h in half])
  found = results.outcome(row, "score/aligned", {})
  assert found.trial == 1
  assert found.validation == pytest.approx((0.5, 0.7, 0.6))
  for result in found.results.values():
    assert result.value == pytest.approx(0.1)
    assert len(result.scores) == 40 - sum(half)
  report.write([found], "score/aligned", "a", tmp_path, [])
  text = (tmp_path / "compare.md").read_text()
  assert "Every row had 3 trials" in text
  assert "| a | `objective.name=two` | 0.700 |" in text

  # A failed trial is out; one that was not run leaves the row open.
  lost = row.cells[1][0]
  (lost.folder / "summary.json").unlink()
  found = results.outcome(row, "score/aligned", {lost.folder: "signal"})
  assert found.trial == 2 and math.isnan(found.validation[1])
  found = results.outcome(row, "score/aligned", {})
  assert not found.results and set(found.missing.values()) == {"not run"}


def test_rows_with_seeds_of_their_own_are_paired_by_those_they_share(tmp_path):
  planned = plan("a | objective.name=good | seeds=1", "b | objective.name=bad",
                 workdir=tmp_path)
  for row, values in zip(planned, ([0.9], [0.1, 0.6])):
    for cell, value in zip(row.cells[0], values):
      make_cell(cell, start=[0.0], aligned=[value])
  one, two = report.lines_of(
      [results.outcome(row, "score/aligned", {}) for row in planned], "b")
  assert one.difference.mean == pytest.approx(0.3)
  assert one.difference.num == 1 and math.isnan(one.p_holm)
  assert two.difference.num == 0


# The whole, once.


@pytest.mark.nightly
def test_a_killed_comparison_goes_on_to_the_end(tmp_path):
  flags = run_cases.write_data(tmp_path / "data")
  command = run_cases.command(
      "compare", tmp_path / "work", *flags,
      "--config.stages=sft,preference,evaluate",
      "--config.compare.rows=MC-PO,RNCE | objective.name=rnce "
      "kernel.temperature=None", "--config.compare.seeds=0,1",
      "--config.compare.jobs=2", "--config.compare.metric=eval/margin")
  env = run_cases.environment(tmp_path / "cache")
  process = subprocess.Popen(command, cwd=run_cases.ROOT, env=env)
  first = tmp_path / "work" / "cells" / "mc_po" / "0"
  while not (first / "preference").exists():
    assert process.poll() is None
    time.sleep(0.2)
  process.kill()
  process.wait()
  done = subprocess.run(command, cwd=run_cases.ROOT, env=env, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "| RNCE | 2 of 2 | " in done.stdout
  table = json.loads((tmp_path / "work" / "compare.json").read_text())["rows"]
  for row in ("mc_po", "rnce"):
    for seed in ("0", "1"):
      folder = tmp_path / "work" / "cells" / row / seed
      assert table[row]["seeds"][seed] == run_cases.summary(folder)[
          "eval/margin"]
  # The cell that was killed ends as the run does that nobody killed.
  alone = run_cases.run("train", tmp_path / "alone", tmp_path / "other cache",
                        *flags, "--config.stages=sft,preference")
  assert alone.returncode == 0, alone.stderr[-3000:]
  assert (run_cases.summary(first)["params/sha256"]
          == run_cases.summary(tmp_path / "alone")["params/sha256"])
  log = (tmp_path / "work" / "cells" / "rnce" / "1.log").read_text()
  assert "the same start was trained before" in log
  assert "reference:" not in log  # the progress bar of filling
