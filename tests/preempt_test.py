"""Runs that are told to stop: real signals to real processes."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import run_cases
import serve_cases
import training_cases as cases

from mcpo_jax import commit, errors, preempt
from mcpo_jax.training import loop, metrics

SFT = ["--config.stages=sft", "--config.checkpoint.every_steps=100"]


def start(folder, name, flags, **extra):
  """A run whose messages are read as they come."""
  return subprocess.Popen(
      run_cases.command("train", folder / name, *flags),
      env=run_cases.environment(folder / f"cache {name}", **extra),
      cwd=run_cases.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
      text=True)


def read_until(process, text):
  """What the process says up to a line with `text`."""
  seen = ""
  for line in process.stderr:
    seen += line
    if text in line:
      return seen
  raise AssertionError(f"never said {text!r}:\n{seen[-3000:]}")


def end_of(process, *, within=60):
  """The exit code, what was said, and the seconds it took."""
  began = time.monotonic()
  _, said = process.communicate(timeout=within)
  return process.returncode, said, time.monotonic() - began


def losses(workdir):
  return [(r["stage"], r["step"], r["loss"])
          for r in run_cases.metrics(workdir) if "loss" in r]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  """An sft run that nobody stops, and its flags."""
  folder = tmp_path_factory.mktemp("stop")
  flags = run_cases.write_data(folder / "data") + SFT
  done = run_cases.run("train", folder / "run", folder / "cache run", *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  return folder, flags


def test_a_stopped_run_is_saved_and_goes_on_to_the_same_weights(unbroken):
  folder, flags = unbroken
  run = start(folder, "stopped", flags, MCPO_FAULT="step.after@3:term")
  code, said, _ = end_of(run, within=300)
  assert code == 75
  (line,) = [x for x in said.splitlines() if x.startswith("error")]
  assert line == ("error[run.preempted]: told to stop by SIGTERM, sft is saved "
                  "at step 3 — the same line goes on")
  assert "Traceback" not in said
  stopped_in_a_save(folder, [*flags, "--config.checkpoint.every_steps=1"])
  again = start(folder, "stopped", flags)
  code, said, _ = end_of(again, within=300)
  assert code == 0, said[-3000:]
  assert "sft resumes at step 4" in said
  assert (run_cases.summary(folder / "stopped")["params/sha256"]
          == run_cases.summary(folder / "run")["params/sha256"])
  assert losses(folder / "stopped") == losses(folder / "run")


def stopped_in_a_save(folder, flags):
  """Told while step 4 is being saved; then, of step 5, told twice."""
  steps = folder / "stopped/sft/checkpoints"
  run = start(folder, "stopped", flags, MCPO_FAULT="ckpt.begin@1:term")
  code, said, _ = end_of(run, within=300)
  assert code == 75, said[-3000:]
  assert "sft is saved at step 4 — the same line goes on" in said
  assert commit.verify(steps / "4", exact=True)["step"] == 4
  run = start(folder, "stopped", flags, MCPO_FAULT="ckpt.manifest:sleep=600")
  serve_cases.wait_for((steps / "5").exists, 300)  # and is not committed
  run.send_signal(signal.SIGTERM)
  read_until(run, "a second signal quits")
  run.send_signal(signal.SIGTERM)
  code, said, seconds = end_of(run)
  assert code == 143 and seconds < 20, said[-3000:]
  assert commit.verify(steps / "4", exact=True)["step"] == 4
  assert not (steps / "5" / commit.MANIFEST).exists()


def test_a_compilation_that_has_nothing_to_save_is_left_at_once(unbroken):
  folder, flags = unbroken
  run = start(folder, "compiling", flags, JAX_LOG_COMPILES="1")
  read_until(run, "Compiling jit(from_loss)")
  run.send_signal(signal.SIGINT)
  code, said, seconds = end_of(run)
  assert code == 75
  assert "told to stop by SIGINT — the same line goes on" in said
  assert seconds < 20
  assert not list((folder / "compiling/sft/checkpoints").glob("[0-9]*"))


# A process that has something to lose and does not come to a check.
HANGS = """
import time
from mcpo_jax import preempt
preempt.listen()
preempt.allow({grace})
with preempt.guarded():
  preempt.hold()
  print("ready", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def hang():
  started = []

  def begin(grace):
    started.append(subprocess.Popen(
        [sys.executable, "-c", HANGS.format(grace=grace)], cwd=run_cases.ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    started[-1].stdout.readline()
    return started[-1]

  yield begin
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_l10_the_second_signal_quits(hang, number, code):
  process = hang(grace=600)
  process.send_signal(signal.SIGTERM)
  read_until(process, "a second signal quits")
  process.send_signal(number)
  assert end_of(process)[0] == code


def test_the_word_of_a_supervisor_is_no_second_signal(hang):
  process = hang(grace=1)
  process.send_signal(signal.SIGUSR1)
  read_until(process, "SIGUSR1: stops")
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGUSR1)
  code, said, _ = end_of(process)
  assert code == 75  # after the grace time
  assert "not done after 1 s; what was saved before stands" in said


def test_metrics_have_no_gap_and_no_double_after_a_stop_and_a_crash(
    tmp_path, monkeypatch):
  """Stopped in the evaluation at 2, which is then made; crashed after 3."""
  stage = cases.stage("sft", strategy="none", num_steps=4)
  rng = np.random.default_rng(0)
  batch = cases.host_batch(
      [cases.candidate_set(rng, i, 1) for i in range(5)], 1)
  model, looked = cases.make_model(), []
  monkeypatch.setattr(loop.estimator, "compare_gradients",
                      lambda *args: {"estimator/bias": 0.5})

  def evaluate(functions, state):
    looked.append(int(state.step))
    if looked == [0, 2]:
      monkeypatch.setattr(preempt, "_asked", "SIGTERM")
      preempt.check()
    return {"eval/loss": 1.0, "eval/accuracy": looked[-1] / 4}

  def show(step, batch, metrics):
    if looked == [0, 2, 2] and step == 3:
      raise RuntimeError("a crash")

  def train():
    return loop.train(
        stage, model, lambda step: batch, lambda: cases.init(model), tmp_path,
        metrics.Writer(tmp_path), loop.Schedule(
            log_every=1, save_every=100, keep=2, evaluate_every=2,
            patience=None, keep_best=True, estimate_every=1), meta={},
        evaluate=evaluate, show=show)[1]

  with pytest.raises(errors.Preempted, match="saved at step 2"):
    train()
  monkeypatch.setattr(preempt, "_asked", None)
  with pytest.raises(RuntimeError, match="a crash"):
    train()
  assert train() == 4
  assert looked == [0, 2, 2, 2, 4]
  rows = run_cases.metrics(tmp_path)
  for name, steps in (("eval/loss", [0, 2, 4]), ("loss", [1, 2, 3, 4]),
                      ("estimator/bias", [1, 2, 3, 4])):
    assert [r["step"] for r in rows if name in r] == steps, name


def test_turns_of_processes_that_are_told_one_after_the_other(monkeypatch):
  """The first one decides on its next turn when all others have heard; a
  process that was ahead finds the word at that turn."""
  words = {}
  monkeypatch.setattr(preempt.hosts, "count", lambda: 2)
  monkeypatch.setattr(preempt.hosts, "say", words.__setitem__)
  monkeypatch.setattr(preempt.hosts, "said", words.get)

  def turns(first, turn, all_know, last=None):
    monkeypatch.setattr(preempt.hosts, "is_first", lambda: first)
    for name, value in (("_turn", turn), ("_asked", "SIGTERM"),
                        ("_all_know", all_know), ("_last", last)):
      monkeypatch.setattr(preempt, name, value)
    preempt.check()
    return preempt._last

  assert turns(True, 6, False) is None and not words  # turn 7
  assert turns(False, 7, False) is None  # turn 8, ahead
  assert turns(True, 7, True) == 9 and words == {"stop/turn": 9}
  for first, last in ((True, 9), (False, None)):
    with pytest.raises(errors.Preempted, match="SIGTERM"):
      turns(first, 8, first, last)
  with pytest.raises(errors.ResourceError) as caught:
    turns(False, 9, False)
  assert caught.value.slug == "hosts.apart"
