"""Metrics: a row a step, no doubles after a restart, sinks may fail."""

import json
import time

from mcpo_jax.training import metrics


def rows(folder):
  return [json.loads(line)
          for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rewind_drops_what_will_be_written_again(tmp_path):
  writer = metrics.Writer(tmp_path)
  for step in (1, 2, 3):
    writer.write("sft", step, {"loss": step})
    writer.write("preference", step, {"loss": 10 * step})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"stage": "sft", "st')  # killed while writing
  writer.rewind("preference", 1)
  assert [(r["stage"], r["step"]) for r in rows(tmp_path)] == [
      ("sft", 1), ("preference", 1), ("sft", 2), ("sft", 3)]


def test_not_a_number_is_written_as_null(tmp_path):
  before = time.time()
  metrics.Writer(tmp_path).write("sft", 1, {"a": float("nan"), "b": 2})
  [row] = rows(tmp_path)
  assert before - 1 < row.pop("time") < time.time() + 1
  assert row == {"stage": "sft", "step": 1, "a": None, "b": 2.0}


def test_a_sink_that_fails_is_dropped_and_the_rest_goes_on(
    tmp_path, monkeypatch):
  calls = []

  def broken(workdir):
    def write(stage, step, values):
      calls.append(step)
      raise ConnectionError("gone")
    return write

  monkeypatch.setattr(metrics, "_wandb_sink", broken)
  writer = metrics.Writer(tmp_path, wandb=True)
  writer.write("sft", 1, {"loss": 1})
  writer.write("sft", 2, {"loss": 2})
  assert calls == [1]
  assert [r["step"] for r in rows(tmp_path)] == [1, 2]


def test_tensorboard_that_is_not_installed_does_not_stop_the_run(
    tmp_path, monkeypatch):
  def missing(workdir):
    raise ImportError("tensorboardX")

  monkeypatch.setattr(metrics, "_tensorboard_sink", missing)
  metrics.Writer(tmp_path, tensorboard=True).write("sft", 1, {"loss": 1})
  assert len(rows(tmp_path)) == 1
