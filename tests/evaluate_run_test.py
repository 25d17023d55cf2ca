"""The verb evaluate on a real run: models side by side, benchmarks, refusals.

One process trains a tiny run and then answers one command line after the
other, so that programs are compiled once.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import models_folders
import numpy as np
import pytest
import run_cases

_SESSION = """
import json, sys
from mcpo_jax import errors, main
from absl import logging
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
  try:
    main.run(json.loads(line))
    told = []
  except errors.McpoError as e:
    told = [e.slug, str(e)]
  except Exception as e:
    told = [type(e).__name__, str(e)]
  print(json.dumps(told), file=out, flush=True)
"""


class Session:
  """A process, and the run that it trained."""

  def __init__(self, folder, shared):
    self.folder, self.workdir = folder, folder / "run"
    self.formats = shared / "data/eval_formats"
    self.flags = [*run_cases.write_data(folder / "data"),
                  "--config.reward.name=length"]
    self.process = subprocess.Popen(
        [sys.executable, "-c", _SESSION], cwd=run_cases.ROOT, text=True,
        env=run_cases.environment(folder / "cache"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=(folder / "log").open("w"))

  def __call__(self, verb, *flags, workdir=None):
    """[] or the slug and text of a refusal."""
    words = run_cases.command(
        verb, workdir or self.workdir, *self.flags, *flags)[3:]
    self.process.stdin.write(json.dumps(words) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())

  def evaluate(self, *flags):
    """The evaluation and the summary after it."""
    assert self("evaluate", *flags) == []
    return json.loads(
        (self.workdir / "evaluate/evaluation.json").read_text()
    ), run_cases.summary(self.workdir)

  def benchmark(self, name, questions, *flags):
    return (f"--config.benchmark.name={name}", *flags,
            f"--config.benchmark.questions_path={questions}",
            "--config.benchmark.max_new_tokens=6")


@pytest.fixture(scope="module")
def session(tmp_path_factory, shared):
  folder = tmp_path_factory.mktemp("a run with blanks")
  session = Session(folder, shared)
  try:
    trained = session("train", "--config.stages=sft,preference")
    assert trained == [], (folder / "log").read_text()[-3000:]
    yield session
  finally:
    session.process.stdin.close()
    session.process.wait()


@pytest.fixture(scope="module")
def both(session):
  """The evaluation of all kinds of models, and its summary."""
  foreign = session.folder / "foreign"
  shutil.copytree(session.workdir / "sft/model", foreign)
  (foreign / "manifest.json").unlink()  # as one from elsewhere
  template = foreign / "chat_template.jinja"
  template.write_text(template.read_text().replace("<|user|>", "<|user|>:"))
  return session.evaluate(
      f"--config.evaluation.models=step:*,twin={session.workdir},"
      f"foreign={foreign}", "--config.evaluation.baseline=step-6")


def model(content, name):
  return next(m for m in content["models"] if m["name"] == name)


def test_models_of_every_kind_stand_side_by_side(session, both):
  content, summary = both
  assert [(m["name"], m["kind"], m["step"]) for m in content["models"]] == [
      ("sft", "start", 0), ("step-4", "step", 4), ("step-6", "step", 6),
      ("step-8", "step", 8), ("twin", "other", 8), ("foreign", "other", None),
      ("aligned", "aligned", 8)]
  assert content["reference"] == "sft" and content["baseline"] == "step-6"
  # The last checkpoint, the folder and the other run are the same weights.
  same = [model(content, name) for name in ("step-8", "twin", "aligned")]
  assert len({m["params_sha256"] for m in same}) == 1
  assert same[0]["params_sha256"] == summary["params/sha256"]
  for table in ("preferences", "samples"):
    assert same[0][table] == same[1][table] == same[2][table]
  assert same[0]["params_sha256"] != model(content, "step-6")["params_sha256"]


def test_the_start_is_at_chance_and_knows_nothing(both):
  start = model(both[0], "sft")
  table = start["preferences"]
  assert table["accuracy"]["mean"] == 0.5 and table["margin"]["mean"] == 0.0
  assert [rank["accuracy"]["mean"] for rank in table["by_rank"]] == [0.5] * 3
  assert table["calibration"]["ece"] == 0.0
  assert start["samples"]["sampled"]["kl"]["mean"] == 0.0


def test_the_aligned_models_numbers_are_those_of_its_training(both):
  content, summary = both
  table = model(content, "aligned")["preferences"]
  assert table["accuracy"]["mean"] == pytest.approx(summary["eval/accuracy"])
  assert table["margin"]["mean"] == pytest.approx(
      summary["eval/margin"], abs=1e-5)
  ranks = [rank["margin"]["mean"] for rank in table["by_rank"]]
  assert sum(ranks) / 3 == pytest.approx(table["margin"]["mean"], abs=1e-6)
  assert summary["preferences/margin/aligned/rank_2"] == ranks[1]
  assert summary["objective/kl"] == model(
      content, "aligned")["samples"]["sampled"]["kl"]["mean"] != 0.0
  assert summary["score/aligned"] == summary["mean_length/aligned"]
  text = json.dumps(summary, allow_nan=False)  # null where there is nothing
  assert "greedy/distinct_1/aligned" in text


def test_the_frontier_is_of_this_run_by_growing_kl(both):
  points = both[0]["frontier"]
  assert {p["model"] for p in points} == {
      "sft", "step-4", "step-6", "step-8", "aligned"}
  kls = [p["kl"]["mean"] for p in points]
  assert kls == sorted(kls) and kls[0] == 0.0


def test_other_ids_have_no_log_ratio(both):
  foreign = model(both[0], "foreign")
  assert not foreign["same_tokenizer"] and foreign["preferences"] is None
  for law in ("sampled", "greedy"):
    assert foreign["samples"][law]["kl"] is None
    assert foreign["samples"][law]["against"]["win_rate"]["mean"] is not None
  assert foreign["params_sha256"] == model(both[0], "sft")["params_sha256"]


def test_scores_and_samples_have_a_column_of_each(session, both):
  names = [m["name"] for m in both[0]["models"]]
  scores = json.loads(
      (session.workdir / "evaluate/scores.json").read_text())["sampled"]
  assert list(scores) == ["prompt_ids", "start", *names[1:]]
  assert len(set(map(len, scores.values()))) == 1
  shown = json.loads((session.workdir / "evaluate/samples.json").read_text())
  assert list(shown["sampled/"][0]) == ["prompt", *names]


def test_what_is_there_is_not_made_again(session, both):
  path = session.workdir / "evaluate/evaluation.json"
  before = path.stat().st_mtime_ns
  models = f"step:*,twin={session.workdir},foreign={session.folder}/foreign"
  again = (f"--config.evaluation.models={models}",
           "--config.evaluation.baseline=step-6")
  assert session("evaluate", *again) == []
  assert path.stat().st_mtime_ns == before
  fewer, _ = session.evaluate()
  assert [m["name"] for m in fewer["models"]] == ["sft", "aligned"]
  assert path.stat().st_mtime_ns > before


def test_alpaca_eval_there_and_back(session, tmp_path):
  flags = session.benchmark(
      "alpaca_eval", session.formats / "alpaca_eval/model_outputs.json")
  content, _ = session.evaluate(*flags)
  rows = content["benchmarks"]
  assert [(r["model"], r["generator"], r["win_rate"]) for r in rows] == [
      ("sft", "run-sft", None), ("aligned", "run-aligned", None)]
  folder = session.workdir / "evaluate/benchmarks/alpaca_eval/aligned"
  [answer] = json.loads((folder / "model_outputs.json").read_text())
  bundle = json.loads((folder / "bundle.json").read_text())
  assert bundle["model"]["params_sha256"] == model(
      content, "aligned")["params_sha256"]
  assert bundle["model"]["step"] == 8 and bundle["questions"]["count"] == 1
  assert bundle["max_new_tokens"] == 6 and bundle["seed"] == 0
  assert not list(folder.parent.glob("answering*"))

  judged = tmp_path / "annotations.json"
  annotation = {
      "instruction": answer["instruction"], "output_1": "base",
      "generator_1": "gpt", "output_2": answer["output"],
      "generator_2": answer["generator"], "annotator": "a",
      "preference": 1.75}
  judged.write_text(json.dumps([annotation]))
  path = f"--config.benchmark.judgments_path={judged}"
  content, summary = session.evaluate(*flags, path)
  assert summary["alpaca_eval/win_rate/aligned"] == 0.75
  assert summary["alpaca_eval/lc_win_rate/aligned"] == pytest.approx(
      0.75, abs=1e-3)
  assert content["benchmarks"][1]["num_questions"] == 1
  assert content["benchmarks"][0]["win_rate"]["mean"] is None

  before = (session.workdir / "evaluate/evaluation.json").read_text()
  judged.write_text(json.dumps([annotation | {"output_2": "another"}]))
  assert session("evaluate", *flags, path)[0] == "benchmark.mismatch"
  hotter = session("evaluate", *flags, "--config.benchmark.temperature=0.5")
  assert hotter[0] == "benchmark.mismatch" and "temperature" in hotter[1]
  text = (folder / "model_outputs.json").read_text()
  (folder / "model_outputs.json").write_text(text.replace("e", "f"))
  assert session("evaluate", *flags)[0] == "ckpt.hash"
  (folder / "model_outputs.json").write_text(text)
  assert (session.workdir / "evaluate/evaluation.json").read_text() == before


def test_gsm8k_is_scored_by_its_answers(session, tmp_path):
  path = tmp_path / "gsm8k.jsonl"
  path.write_text("".join(json.dumps(
      {"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"}) + "\n"
      for i in range(3)))
  content, summary = session.evaluate(*session.benchmark("gsm8k", path))
  assert summary["gsm8k/score/aligned"] in (0.0, 1 / 3, 2 / 3, 1.0)
  # Those of another benchmark stay.
  assert {r["benchmark"] for r in content["benchmarks"]} >= {"gsm8k"}


def test_a_killed_benchmark_goes_on(session, tmp_path):
  path = tmp_path / "gsm8k.jsonl"
  path.write_text("".join(json.dumps(
      {"question": f"{i}?", "answer": f"#### {i}"}) + "\n"
      for i in range(70)))  # two parts
  copies = [tmp_path / name for name in ("killed", "whole")]
  for copy in copies:
    shutil.copytree(session.workdir, copy)
    shutil.rmtree(copy / "evaluate/benchmarks", ignore_errors=True)
  flags = session.benchmark("gsm8k", path)
  killed = run_cases.run(
      "evaluate", copies[0], session.folder / "cache", *session.flags, *flags,
      MCPO_FAULT="benchmark.part@2")
  assert killed.returncode == -9
  assert len(list(copies[0].glob("evaluate/answering-*/*.json"))) == 1
  assert not list(copies[0].glob("evaluate/benchmarks/gsm8k/*"))
  answers = []
  for copy in copies:
    assert session("evaluate", *flags, workdir=copy) == []
    answers.append([
        json.loads(line)["output"] for line in (
            copy / "evaluate/benchmarks/gsm8k/aligned/answers.jsonl"
        ).read_text().splitlines()])
  assert answers[0] == answers[1] and len(answers[0]) == 70


def foreign_file(workdir):
  (workdir / "evaluate").mkdir(exist_ok=True)
  (workdir / "evaluate/evaluation.json").write_text("[1")


def spoil_metrics(workdir):
  (workdir / "metrics.jsonl").write_text('{"stage": "sft"}\nnot a line\n')


def copy_model(change):
  """A copy of the aligned model, beside the run, with other weights."""

  def spoil(workdir):
    folder = workdir.parent / "other"
    shutil.copytree(workdir / "preference/model", folder)
    (folder / "manifest.json").unlink()  # as one from elsewhere
    models_folders.edit_weights(folder, lambda tensors: tensors.update(
        {WIDE: change(tensors[WIDE])}))

  return spoil


WIDE = "model.layers.0.mlp.up_proj.weight"
OTHER = ["--config.evaluation.models=other={}/other"]


@pytest.mark.parametrize("flags, spoil, slug", [
    (["--config.evaluation.baseline=alinged"], None, "config.range"),
    (["--config.evaluation.models=step:5"], None, "ckpt.none"),
    (["--config.evaluation.models=no/such/folder"], None, "hf.path"),
    (["--config.evaluation.models=x={}/empty"], None, "hf"),
    ([], lambda w: shutil.rmtree(w / "preference/model"), "ckpt.uncommitted"),
    ([], lambda w: (w / "preference/result.json").unlink(), "ckpt.none"),
    (["--config.evaluation.models=step:*"],
     lambda w: shutil.rmtree(w / "preference/checkpoints"), "ckpt.none"),
    ([], spoil_metrics, "evaluate.metrics"),
    (OTHER, copy_model(models_folders.nan_at), "hf.non_finite"),
    (OTHER, copy_model(lambda x: x + np.float32(3e38)), "model.non_finite"),
    ([], foreign_file, "evaluate.foreign"),
    (["--config.benchmark.name=mt_bench",
      "--config.benchmark.questions_path={}/none.jsonl"], None,
     "data.no_files"),
    (["--config.benchmark.name=gsm8k",
      "--config.benchmark.questions_path={}/data/kwise.jsonl"], None,
     "data.field_missing"),
])
def test_a_refusal_leaves_nothing_half_written(
    session, tmp_path, flags, spoil, slug):
  workdir = tmp_path / "run"
  shutil.copytree(session.workdir, workdir)
  (tmp_path / "empty").mkdir()
  shutil.copytree(session.folder / "data", tmp_path / "data")
  for path in workdir.glob("evaluate/*.json"):
    if spoil is not None and path.exists():
      path.unlink()
  if spoil is not None:
    spoil(workdir)
  files = lambda: {str(p): p.read_bytes() for p in sorted(
      pathlib.Path(workdir, "evaluate").rglob("*")) if p.is_file()}
  before, summary = files(), (workdir / "summary.json").read_bytes()
  told = session(
      "evaluate", *(flag.format(tmp_path) for flag in flags), workdir=workdir)
  assert told and told[0].startswith(slug), told
  left = set(files()) - set(before)
  assert not {p for p in left if "evaluation.json" in p or "tmp" in p}
  assert (workdir / "summary.json").read_bytes() == summary
