"""Killed runs: the same line again ends with the weights of an unbroken run."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cases
import training_cases as cases

from mcpo_jax import errors, main
from mcpo_jax import replay as replay_lib
from mcpo_jax.evaluation import report
from mcpo_jax.training import estimator, loop, metrics, setup
from mcpo_jax.training import stage as stage_lib


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """A whole run, the flags of its data, and its metrics."""
  folder = tmp_path_factory.mktemp("a run with blanks")
  flags = run_cases.write_data(folder / "data")
  done = run_cases.run(
      "train", folder / "run", folder / "cache", *flags, "--profile")
  assert done.returncode == 0, done.stderr[-3000:]
  return folder, flags


def rows(folder, stage):
  return {r["step"]: r["loss"] for r in run_cases.metrics(folder)
          if r["stage"] == stage and "loss" in r}


def test_the_run_tells_how_fast_it_was(unbroken):
  folder, _ = unbroken
  for stage in ("sft", "preference"):
    own = [r for r in run_cases.metrics(folder / "run")
           if r["stage"] == stage and "loss" in r]
    counts = [r["perf/compiles"] for r in own]
    assert 0 < counts[0] == counts[-1]  # all programs in the first update
    assert all(r["perf/flops_per_sec"] > 0 for r in own)
    assert "perf/mfu" not in own[0]  # nobody knows the peak of a CPU
  traces = list((folder / "run" / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 2


# Kills at all other points: `soak_test.py`, which forks what it kills. Here is
# the real command line.
def test_a_killed_run_goes_on_to_the_same_weights(unbroken, tmp_path):
  folder, flags = unbroken
  cache = tmp_path / "cache"  # no finished start may be found there
  killed = run_cases.run(
      "train", tmp_path / "run", cache, *flags,
      MCPO_FAULT="step.before@13")  # between two saves, 7 updates are done
  assert killed.returncode == -9
  before = rows(tmp_path / "run", "preference")
  shown = "preference/candidates.jsonl"
  for name in ("metrics.jsonl", shown):  # as if killed in the middle of a line
    with open(tmp_path / "run" / name, "a") as file:
      file.write('{"stage": "preference", "st')
  report.write_report([tmp_path / "run"], tmp_path / "killed.html",
                      pictures=False)
  again = run_cases.run("train", tmp_path / "run", cache, *flags)
  assert again.returncode == 0, again.stderr[-3000:]
  assert (run_cases.summary(tmp_path / "run")["params/sha256"]
          == run_cases.summary(folder / "run")["params/sha256"])
  for stage in ("sft", "preference"):
    whole = rows(folder / "run", stage)
    assert rows(tmp_path / "run", stage) == whole
    assert list(whole) == sorted(whole)
  assert ((tmp_path / "run" / shown).read_text()
          == (folder / "run" / shown).read_text())
  assert 7 in before  # and again
  assert re.search("preference resumes at step [46]", again.stderr)


def test_a_run_ends_with_its_report(unbroken):
  folder, _ = unbroken
  text = (folder / "run/report.html").read_text()
  words = re.sub(r"\s+", " ", re.sub(r"<script.*?</script>|<[^>]*>", " ", text,
                                     flags=re.DOTALL))
  for shown in ("preference finished", "evaluate finished", "1 × cpu",
                "Models beside each other", "duplicate prompts", "launches: 1"):
    assert shown in words, shown
  assert run_cases.summary(folder / "run")["audit/train/rows"] == 30
  [launch] = (folder / "run/launches.jsonl").read_text().splitlines()
  assert json.loads(launch)["command"][0] == "train"


def test_a_finished_run_does_nothing_again(unbroken):
  folder, flags = unbroken
  before = run_cases.summary(folder / "run")
  again = run_cases.run("train", folder / "run", folder / "cache", *flags)
  assert again.returncode == 0
  assert run_cases.summary(folder / "run") == before
  assert "resumes" not in again.stderr


def test_another_run_takes_the_start_and_the_reference_from_the_cache(
    unbroken, tmp_path):
  folder, flags = unbroken
  other = run_cases.run("train", tmp_path / "run", folder / "cache", *flags,
                        "--config.objective.name=rnce",
                        "--config.kernel.temperature=None")
  assert other.returncode == 0, other.stderr[-3000:]
  assert "the same start was trained before" in other.stderr
  assert "reference:" not in other.stderr  # the progress bar of filling
  assert not rows(tmp_path / "run", "sft")


def test_another_config_in_the_same_workdir_is_refused(unbroken):
  folder, flags = unbroken
  done = run_cases.run("train", folder / "run", folder / "cache", *flags,
                       "--config.objective.beta=0.7")
  assert done.returncode == 2
  assert "error[config.other_run]" in done.stderr
  assert "objective.beta: 0.1 -> 0.7" in done.stderr
  assert "Traceback" not in done.stderr


def test_changed_data_is_refused_on_resume(unbroken, tmp_path):
  _, flags = unbroken
  data = tmp_path / "data"
  flags = run_cases.write_data(data)
  killed = run_cases.run("train", tmp_path / "run", tmp_path / "cache", *flags,
                         MCPO_FAULT="step.before@13")
  assert killed.returncode == -9
  text = (data / "kwise.jsonl").read_text()
  (data / "kwise.jsonl").write_text(text.replace("the cup", "a cup"))
  again = run_cases.run("train", tmp_path / "run", tmp_path / "cache", *flags)
  assert again.returncode == 3
  assert "error[data.changed_since_checkpoint]" in again.stderr
  told = (tmp_path / "run/launches.jsonl").read_text()
  assert "error[data.changed_since_checkpoint]" in told
  # Once more on a copy: it goes on from the same checkpoint to the same error.
  same = replay(tmp_path)
  assert same.returncode == 0, same.stderr[-3000:]
  assert same.stdout.count("error[data.changed_since_checkpoint]") == 2
  assert f"the same error: {tmp_path / 'run.replay'}" in same.stdout
  other = replay(tmp_path, MCPO_FAULT="file.rename:raise")
  assert other.returncode == 1 and "\nnot the same: " in other.stdout
  assert (tmp_path / "run/launches.jsonl").read_text() == told


@pytest.mark.parametrize("lines, slug", [
    ([], "none"),
    ([{"time": 1.5, "command": ["train"], "processes": 1}], "none"),
    ([{"time": 1.5, "error": "error[x.y]: of an older checkout"}], "none"),
    ([{"time": 1.5, "command": ["train"], "processes": 2},
      {"time": 2.5, "error": "error[x.y]: z"}], "processes")])
def test_what_cannot_be_replayed_is_told(tmp_path, lines, slug):
  run = tmp_path / "run"
  run.mkdir()
  (run / "launches.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
      + '{"time": 3.5, "comm')  # and a kill within a line
  with pytest.raises(errors.ConfigError) as caught:
    main.run(["replay", f"--workdir={run}"])
  assert caught.value.slug == f"replay.{slug}"
  assert caught.value.where == str(run / "launches.jsonl")
  assert os.listdir(tmp_path) == ["run"]


def test_the_same_error_may_find_something_else():
  def named(got, where="run/6"):
    return replay_lib._named(str(errors.ResourceError(
        "ckpt.disk_full", "the disk is full", where=where, got=got,
        want="9 bytes", hint="free some space")))

  assert named("3 bytes free") == named("5 bytes free") == named(None)
  assert named("3 bytes free") != named("3 bytes free", where="run/8")


def replay(folder, **extra):
  return subprocess.run(
      [sys.executable, "-m", "mcpo_jax", "replay", f"--workdir={folder}/run"],
      env=run_cases.environment(folder / "cache", **extra), cwd=run_cases.ROOT,
      capture_output=True, text=True, timeout=600)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(unbroken, tmp_path):
  folder, flags = unbroken
  killed = run_cases.run("train", tmp_path / "run", tmp_path / "cache", *flags,
                         MCPO_FAULT="step.before@13")
  assert killed.returncode == -9
  checkpoints = tmp_path / "run" / "preference" / "checkpoints"
  committed = sorted(int(p.parent.name)
                     for p in checkpoints.glob("*/manifest.json"))
  newest = checkpoints / str(committed[-1])
  largest = max((p for p in newest.rglob("*")
                 if p.is_file() and p.name != "manifest.json"),
                key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(content)
  again = run_cases.run("train", tmp_path / "run", tmp_path / "cache", *flags)
  assert again.returncode == 0, again.stderr[-3000:]
  assert f"checkpoint {committed[-1]} skipped" in again.stderr
  assert f"resumes at step {committed[-2]}" in again.stderr
  assert (run_cases.summary(tmp_path / "run")["params/sha256"]
          == run_cases.summary(folder / "run")["params/sha256"])
  shutil.rmtree(tmp_path)


def test_a_workdir_goes_on_on_another_mesh_and_with_no_other_setting(
    tmp_path):
  def resolve(*flags):
    return main.read_config(main.parse(run_cases.command(
        "train", tmp_path, "--config.data.path=x", "--config.sft.data_path=x",
        *flags)[3:]))

  setup.store_config(resolve(), tmp_path)
  setup.claim(resolve("--config.mesh.data=2", "--config.mesh.fsdp=4"), tmp_path)
  with pytest.raises(errors.ConfigError) as e:
    setup.claim(resolve("--config.seed=1"), tmp_path)
  assert e.value.slug == "config.other_run"


# One device, then 8, then 2 x 4, then one again.
MESHES = (dict(devices=1), dict(devices=8, fsdp=2), dict(
    devices=8, fsdp=2, tensor=4), dict(devices=1))


def losses_on(meshes, folder, dtype, per_mesh=2):
  """What `cases.train_on` gives: some updates on each mesh."""
  return [update for number, mesh in enumerate(meshes, 1)
          for update in cases.train_on(folder, number * per_mesh, dtype=dtype,
                                       **mesh)]


@pytest.mark.parametrize("dtype, first, later", [
    (jnp.float64, 1e-13, 1e-13),
    pytest.param(jnp.float32, 1e-6, 1e-5, marks=pytest.mark.nightly)])
def test_a_run_goes_on_on_other_meshes(tmp_path, dtype, first, later):
  with jax.enable_x64(dtype == jnp.float64):
    one, many = ((tmp_path / name) for name in ("one", "many"))
    for folder in (one, many):
      folder.mkdir()
    want = losses_on(MESHES[:1], one, dtype, per_mesh=8)
    got = losses_on(MESHES, many, dtype)
  assert len(want) == len(got) == 8
  assert len({loss for loss, _ in want}) == 8
  for step, ((a, drawn), (b, other)) in enumerate(zip(want, got)):
    assert drawn == other
    assert abs(a - b) <= (first if step <= 2 else later) * abs(a), step


def test_no_row_is_written_twice(tmp_path, monkeypatch):
  """Killed after the gradients were compared, before the next save."""
  monkeypatch.setattr(estimator, "compare_gradients", lambda *_: {"gap": 1.0})
  batch = cases.host_batch([cases.candidate_set(
      np.random.default_rng(3), 1, 4)], 4)
  stage = cases.stage(strategy="random", score=None, batch_size=1)
  model = cases.make_model()

  def train(stop_at):
    def show(step, batch, metrics):
      if step == stop_at:
        raise RuntimeError("killed")

    loop.train(
        stage, model, lambda step: batch, lambda: cases.init(model), tmp_path,
        metrics.Writer(tmp_path), loop.Schedule(
            log_every=1, save_every=2, keep=2, evaluate_every=100,
            patience=None, keep_best=False, estimate_every=2), meta={},
        reference=stage_lib.Reference(lambda batch: np.zeros((1, 4))),
        show=show)

  with pytest.raises(RuntimeError):
    train(stop_at=3)
  train(stop_at=None)
  rows = run_cases.metrics(tmp_path)
  assert [row["step"] for row in rows if "gap" in row] == [1, 3]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
