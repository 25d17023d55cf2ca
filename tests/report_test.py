"""The report: a page of whatever lies in a workdir, safe and bounded."""

import html.parser
import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from mcpo_jax import errors, main, settings
from mcpo_jax.evaluation import report, tables, workdirs
from mcpo_jax.training import launches

CANARY = "</script><b id=canary>'\"&amp;</b><!--<script>\u2028\ud800 é"
SEEN = CANARY.replace("\ud800", "?")  # half a pair is no character


class Page(html.parser.HTMLParser):
  """A page's ids, scripts, words, and what is loaded from elsewhere."""

  def __init__(self, text):
    super().__init__()
    self.ids, self.scripts, self.words, self.loads = set(), {}, [], []
    self.script = None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids.add(attrs.get("id"))
    self.script = attrs.get("id", "") if tag == "script" else None
    self.loads += [v for k, v in attrs.items() if k in ("src", "href")
                   and not v.startswith("#")]

  def handle_endtag(self, tag):
    self.script = None

  def handle_data(self, data):
    if self.script is None:
      self.words.append(data)
    else:
      self.scripts[self.script] = self.scripts.get(self.script, "") + data

  def json(self, script):
    return json.loads(self.scripts[script])

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())


def dump(path, value):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, *, word="word", beta=0.1):
  """A made-up run that was stopped at step 5 of 7; `word` is everywhere."""
  dump(folder / "config.json", {
      "version": settings.CONFIG_VERSION, "config": {
          "seed": 3, "stages": ["sft", "preference", "evaluate"],
          "num_steps": 7, "data": {"path": word},
          "objective": {"name": "mcpo", "beta": beta}}})
  lines(folder / "metrics.jsonl", [
      {"stage": "preference", "step": step, "time": 1000.0 + 10 * step,
       "loss": 1 / step, "rewards/margins": 0.5 * step, word: 1.5,
       "kernel/entropy": None if step == 2 else 2.0, "eval/score": step,
       "eval/score_ci95_low": step - 0.5, "eval/score_ci95_high": step + 0.25}
      for step in range(1, 6)])
  lines(folder / "launches.jsonl", [{
      "time": 1000.0, "command": ["train", word], "versions": {word: "1"},
      "commit": word, "devices": {"kind": "NVIDIA H100 80GB", "count": 4},
      "processes": 1, "cores": 8, "system": word}])
  dump(folder / "summary.json", {
      "score/aligned": 0.5, "score/aligned_ci95_low": 0.25,
      "score/aligned_ci95_high": 0.75, "params/sha256": word, word: 7,
      "audit/train/rows": 30, f"audit/train/origins/{word}": 2,
      "audit/overlap/exact": 1})
  dump(folder / "evaluate/samples.json", {
      "sampled/": [{"prompt": [{"role": "user", "content": f"why? {word}"}],
                    "sft": f"before {word}", "aligned": f"after {beta}"}]})
  lines(folder / "preference/samples.jsonl", [
      {"step": step, "prompt": word, "start": word, "now": f"at {step}"}
      for step in range(6)])
  lines(folder / "preference/candidates.jsonl", [
      {"step": step, "prompt_id": word, "prompt": word, "candidates": [{
          "text": word, "score": 1.0, "logp": None, "ref_logp": None,
          "weight": 0.0, "drawn": 0, "role": 1, "source": word,
          "policy_step": -1, "multiplicity": 1, "length": 3}]}
      for step in range(3)])
  tables.write(folder / "evaluate", {
      "seed": 0, "num_prompts": 2, "num_sets": 2, "reference": word,
      "baseline": word, "beta": beta, "models": [model(word), model("end")],
      "frontier": [{"model": "end", "step": 5, "kl": interval(2.5),
                    "score": interval(0.75)},
                   {"model": word, "step": 0, "kl": interval(0.0),
                    "score": interval(0.5)}],
      "benchmarks": [{
          "benchmark": "mt_bench", "benchmark_version": word, "model": word,
          "generator": word, "judge": word, "num_questions": 80,
          "win_rate": None, "tie_rate": None, "lc_win_rate": None,
          "score": interval(6.5), "by_category": {}, "mean_length": 900.0,
          "num_skipped": 0}]})
  return folder


def interval(mean):
  return {"mean": mean, "ci95_low": mean - 0.125, "ci95_high": mean + 0.125}


def model(name):
  """One of an evaluation, of an accuracy that falls with the rank."""
  bins = [{"low": 0.5, "high": 0.75, "confidence": None, "accuracy": None,
           "num_pairs": 0},
          {"low": 0.75, "high": 1.0, "confidence": 0.8, "accuracy": 0.9,
           "num_pairs": 10}]
  return {
      "name": name, "kind": "start", "where": "", "step": None,
      "params_sha256": "", "same_tokenizer": True, "preferences": {
          "accuracy": interval(0.625), "margin": interval(1.5),
          "by_rank": [{"accuracy": interval(0.75), "margin": interval(1.0),
                       "num_sets": 9},
                      {"accuracy": interval(0.5), "margin": interval(2.0),
                       "num_sets": 8}],
          "calibration": {"bins": bins}},
      "samples": {"sampled": {"score": interval(0.375), "kl": None,
                              "against": None}, "greedy": None}}


def write(*folders):
  """The page of the runs, which lies in the first."""
  out = folders[0] / "report.html"
  report.write_report(folders, out, pictures=False)
  return Page(out.read_text("utf-8"))


def test_a_run_that_stopped_half_way_is_a_page(tmp_path):
  page = write(write_run(tmp_path / "run"))
  for shown in ("step 5 of 7", "kernel/entropy 1×", "0.25 to 0.75",
                "why? word", "after 0.1", "4 × NVIDIA H100 80GB",
                "mt_bench", "stands in the training data too: exact 1",
                "0.0556 device-hours", "50 s in all"):
    assert shown in page.text, shown
  assert not page.loads


def test_nothing_of_a_run_is_markup(tmp_path):
  folder = write_run(tmp_path / "run", word=CANARY)
  page = write(folder)
  text = (folder / "report.html").read_text("utf-8")
  assert "canary" not in page.ids and not page.loads
  assert set(page.scripts) == {"", "rows-0", "curve-data", "explorer-page"}
  assert "innerHTML" not in text and "default-src 'none'" in text
  assert "http" not in text.replace("http-equiv", "").replace(
      "http://www.w3.org/", "")  # of namespaces: nobody asks there
  words = "".join(page.words)
  for shown in (f"why? {SEEN}", f"before {SEEN}", f"train {SEEN}"):
    assert shown in words, shown
  assert SEEN in {
      panel["name"] for panel in page.json("curve-data")["panels"]}
  assert page.json("rows-0")[0]["candidates"][0]["text"] == CANARY
  assert "{{rows}}" in page.json("explorer-page")


def test_the_curves_are_those_of_the_run(tmp_path):
  charts = write(write_run(tmp_path / "run")).json("curve-data")
  panel = {p["name"]: p for p in charts["panels"]}
  lines = {name: [(charts["steps"][grid], *rest)
                  for _, grid, *rest in p["lines"]]
           for name, p in panel.items()}
  steps = [1, 2, 3, 4, 5]
  assert lines["loss"] == [
      (steps, [1, 0.5, 0.33333, 0.25, 0.2], None, None)]
  assert lines["kernel/entropy"] == [(steps, [2, None, 2, 2, 2], None, None)]
  assert lines["eval/score"] == [(
      steps, steps, [0.5, 1.5, 2.5, 3.5, 4.5], [1.25, 2.25, 3.25, 4.25, 5.25])]
  assert lines["score against KL"] == [  # by growing KL
      ([0, 2.5], [0.5, 0.75], [0.375, 0.625], [0.625, 0.875])]
  assert lines["accuracy by rank"] == [
      ([1, 2], [0.75, 0.5], [0.625, 0.375], [0.875, 0.625])]
  assert lines["calibration"] == [([0.8], [0.9], None, None)]
  stage, evaluation = charts["stages"]
  assert (stage["name"], evaluation["name"]) == ("Stage preference",
                                                 "Evaluation")
  groups = {g["name"]: [charts["panels"][i]["name"] for i in g["panels"]]
            for g in stage["groups"]}
  assert groups["main"] == [
      "loss", "rewards/margins", "eval/score", "kernel/entropy"]
  assert groups["rewards"] == ["rewards/margins"]


def test_several_runs_open_with_what_differs(tmp_path):
  one = write_run(tmp_path / "a" / "run")
  two = write_run(tmp_path / "b" / "run", beta=0.5)
  page = write(one, two)
  first = page.text.index("How the runs differ")
  assert first < page.text.index("Overview", first)
  head = page.text[first:page.text.index("Overview", first)]
  assert head.split() == ("How the runs differ key a/run b/run "
                          "objective.beta 0.1 0.5").split()
  charts = page.json("curve-data")
  assert charts["runs"] == ["a/run", "b/run"]
  panel = next(p for p in charts["panels"] if p["name"] == "loss")
  assert [line[0] for line in panel["lines"]] == [0, 1]
  # The start that both have stands there once, their ends side by side.
  shown = page.text[page.text.index("Completions, before and after"):]
  assert shown.index("before word") < shown.index("after 0.1") < (
      shown.index("after 0.5"))
  assert shown.count("before word") == 1


@pytest.mark.parametrize("name, content, note", [
    ("metrics.jsonl", '{"stage": "sft", "step": 1, "loss": 2}\n{"stage": "s',
     "metrics.jsonl ends in half a line, as after a kill"),
    ("metrics.jsonl", '[1]\nnot json\n{"stage": "sft", "step": 1, "loss": 2}\n',
     "metrics.jsonl: lines that are no rows: 2, the first is line 1"),
    ("metrics.jsonl", '{"stage": "sft", "step": 1, "x": "y"}\n', "no metrics"),
    ("metrics.jsonl", '{"loss": 2}\n', "rows without stage and step: 1"),
    ("metrics.jsonl", "\xff\x00", "there are no metrics yet"),
    ("metrics.jsonl",
     '{"stage": "sft", "step": 0, "loss": NaN}\n'
     '{"stage": "sft", "step": 1, "loss": NaN, "x": "y", "z": Infinity}\n',
     "shown as gaps: sft loss 1×, sft z 1×"),
    ("config.json", '{"model_type": "llama"}', "config.json is not that of"),
    ("config.json", '{"version": -1, "config": {}}', "There is no config"),
    ("config.json", "[" * 9999, "config.json is damaged or no file of a run"),
    ("summary.json", "[]", "summary.json is damaged or no file of a run"),
    ("evaluate/samples.json", "{", "evaluate/samples.json is damaged"),
    ("evaluate/evaluation.json", '{"version": 0}', "of another version"),
    ("preference/candidates.jsonl", '{"step": 1}\n', "that are no sets: 1"),
    ("preference/non_finite.jsonl", '{"step": 3}\n{"step": 3}\n',
     "preference: updates whose loss or gradient was not finite: 1, at step 3"),
    ("launches.jsonl", '{"time": "noon"}\n', None),
    ("preference/samples.jsonl", '{"step": "x"}\n', None),
])
def test_a_damaged_file_is_a_note(tmp_path, name, content, note):
  folder = write_run(tmp_path / "run")
  (folder / name).write_bytes(content.encode("latin-1"))
  text = write(folder).text
  assert note is None or note in text


def test_files_that_are_missing_are_not_missed(tmp_path):
  dump(tmp_path / "run/summary.json", {"loss": math.nan})
  text = write(tmp_path / "run").text
  for shown in ("There are no metrics yet", "No candidates were kept",
                "no completions", "Not made yet", "There is no config"):
    assert shown in text, shown


def test_an_evaluation_without_held_out_data_is_shown(tmp_path):
  folder = write_run(tmp_path / "run")
  tables.write(folder / "evaluate", {
      "seed": 0, "num_prompts": 0, "num_sets": 0, "reference": None,
      "baseline": None, "beta": None, "gain": None, "models": [],
      "frontier": [], "benchmarks": []})
  assert "Models beside each other" not in write(folder).text


def test_the_verb_needs_workdirs_and_nothing_else(tmp_path, capsys):
  one, two = (write_run(tmp_path / name, beta=beta)
              for name, beta in (("one, too", 0.1), ("two", 0.2)))
  main.run(["report", f"--workdir={one}"])  # a comma of a folder's own
  assert capsys.readouterr().out.strip() == str(one / "report.html")
  assert (one / "report_png/preference.png").exists()
  both = ["report", f"--workdir={two},{tmp_path / 'one'}"]
  for argv, where in (
      (both, "--out"),
      ([*both, "--out=x.html", "--config.seed=1"], "--config.seed"),
      ([*both, "--out=x.html", "--config=x.py"], "--config"),
      (["report", f"--workdir={one}", "--price-per-chip-hour=cheap"],
       "--price-per-chip-hour"),
      (["report"], "--workdir")):
    with pytest.raises(errors.ConfigError) as caught:
      main.run(argv)
    assert (caught.value.slug, caught.value.where) == ("cli.flag", where)


def test_no_run_is_refused_and_the_old_page_stays(tmp_path):
  folder, out = write_run(tmp_path / "run"), tmp_path / "run/report.html"
  out.write_text("old")
  before = sorted(folder.rglob("*"))
  for other in (tmp_path / "none", tmp_path):
    with pytest.raises(errors.CheckpointError) as caught:
      report.write_report([folder, other], out)
    assert caught.value.slug == "ckpt.none"
    assert caught.value.where == str(other)
  assert out.read_text() == "old" and sorted(folder.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  folder = write_run(tmp_path / "run")
  with pytest.raises(errors.ResourceError) as caught:
    report.write_report([folder], folder / "config.json/x.html")
  assert caught.value.slug == "report.path"
  assert "config.json/x.html" in caught.value.where


def test_of_a_long_curve_points_are_means_between_extremes():
  curve = workdirs.Curve(np.arange(10.0), np.array(
      [1, 3, np.nan, 5, 5, 5, 0, 8, np.nan, np.nan]))
  assert report._thin(curve, None, None, 4) == (
      [0, 2, 5, 7], [2, 5, 2.5, 8], [1, 5, 0, 8], [3, 5, 5, 8])
  assert report._thin(curve, None, None, 5)[1:] == (
      [1, 3, None, 5, 5, 5, 0, 8, None, None], None, None)


def test_of_two_values_of_a_step_the_later_counts(tmp_path):
  lines(tmp_path / "metrics.jsonl", [
      {"stage": "sft", "step": step, "loss": loss}
      for step, loss in ((2, 5.0), (1, 4.0), (2, 3.0))])
  panel = write(tmp_path).json("curve-data")
  assert (panel["steps"][0], panel["panels"][0]["lines"][0][2]) == (
      [1, 2], [4, 3])


def test_pauses_between_launches_are_no_time_of_the_run(tmp_path):
  folder = write_run(tmp_path / "run")
  lines(folder / "metrics.jsonl", [
      {"stage": stage, "step": 1, "time": time, "x": 1}
      for stage, time in (("sft", 130.0), ("sft", 150.0), ("evaluate", 640.0))])
  lines(folder / "launches.jsonl", [
      {"time": time, "devices": {"kind": "TPU7x", "count": count}}
      for time, count in ((100.0, 2), (600.0, 4))])
  cost = report._cost(workdirs.read_run(folder, "run", 1), price=90.0)
  assert {s["name"]: s["time"] for s in cost["stages"]} == {
      "sft": "50 s", "evaluate": "40 s"}
  seconds = 50 * 2 + 40 * 4
  assert cost["device_hours"] == f"{seconds / 3600:.3g}"
  # Of TPU v7 a chip is two devices.
  assert cost["cost"] == f"{seconds / 2 / 3600 * 90:.4g}"


def test_how_a_launch_ended_is_told(tmp_path):
  folder = write_run(tmp_path / "run")
  with pytest.raises(errors.NonFiniteError), launches.errors_told(folder):
    raise errors.NonFiniteError("train.non_finite", "stopped", where="step 5")
  wanted = "error[train.non_finite]: stopped (step 5)"
  assert f"the last launch ended so: {wanted}" in write(folder).text
  with open(folder / "launches.jsonl", "a") as file:
    file.write('{"time": 2000}\n')  # it went on
  text = write(folder).text
  assert "ended so" not in text and wanted in text


def test_a_long_run_is_a_small_page(tmp_path):
  folder = write_run(tmp_path / "run")
  names = [f"group_{i}/metric" for i in range(12)]
  with open(folder / "metrics.jsonl", "w") as file:
    for step in range(10_000):
      file.write(json.dumps({"stage": "preference", "step": step} | {
          name: math.sin(step + i) for i, name in enumerate(names)}) + "\n")
  row = (folder / "preference/candidates.jsonl").read_text().split("\n")[0]
  with open(folder / "preference/candidates.jsonl", "w") as file:
    for step in range(10_000):
      file.write(row.replace('"step": 0', f'"step": {step}') + "\n")
  page = write(folder)
  assert (folder / "report.html").stat().st_size < report.MAX_BYTES
  assert max(map(len, page.json("curve-data")["steps"])) <= 600
  steps = [row["step"] for row in page.json("rows-0")]
  assert len(set(steps)) == len(steps) > 100  # from beginning to end
  assert steps[0] == 0 and steps[-1] > 9_900 and max(np.diff(steps)) < 10


def test_the_main_curves_are_pictures_beside_the_page(tmp_path):
  folder = write_run(tmp_path / "run")
  (folder / "report_png").mkdir()
  report.write_report([folder], folder / "report.html")  # replaces
  assert (folder / "report_png/preference.png").read_bytes()[1:4] == b"PNG"
  assert "report_png" in (folder / "report.html").read_text("utf-8")


# What the script of the page does, by the script itself.

CHECK = """
console.log(JSON.stringify([
  ticks(0, 1, 5), ticks(-3, 7, 5), ticks(0.1, 0.11, 4).length > 2,
  [0, null, 12345, 1500, 2.5e9, 0.00012, -0.25].map(short),
  smooth([4, null, 1], 0.5), smooth([3, 5], 0), range([null]), range([2, 2]),
  range([...Array(99).fill(1).map((_, i) => i / 98), 1e9])[1] < 10,
  line([1, 2, 3, 4], [5, null, 6, 7]), nearest([1, 5, 9], 6)]));
"""


def test_the_script_calculates(tmp_path):
  node = shutil.which("node")
  if node is None:
    pytest.skip("needs node")
  page = write(write_run(tmp_path / "run"))
  done = subprocess.run([node, "-e", page.scripts[""] + CHECK],
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [
      [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1], [-2, 0, 2, 4, 6], True,
      ["0", "–", "12.35k", "1500", "2.5G", "1.2e-4", "-0.25"],
      [4, None, 2], [3, 5], None, [1.8, 2.2], True,
      "M1.0 5.0M3.0 6.0L4.0 7.0", 1]


def test_a_browser_draws_the_page(tmp_path):
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  if browser is None:
    pytest.skip("needs chromium")
  one = write_run(tmp_path / "one", word=CANARY)
  write(one, write_run(tmp_path / "two"))
  done = subprocess.run([
      browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
      "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
      f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000",
      "--dump-dom", f"file://{one / 'report.html'}"],
      capture_output=True, text=True, timeout=120)
  assert done.stdout.count("<svg viewBox=\"0 0 340 190\"") == 7  # two stages
  assert "canary" not in Page(done.stdout).ids
  assert "CONSOLE" not in done.stderr, done.stderr
