"""Metrics: a row a step, no doubles after a restart, sinks may fail."""

import contextlib
import errno
import json
import resource
import time

import pytest

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


def test_f29_a_sink_that_fails_is_dropped_and_the_rest_goes_on(
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


@contextlib.contextmanager
def largest_file(size):
  """As `ulimit -f`: a file that would grow beyond is cut off there."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_f7_rows_that_a_full_disk_refuses_are_written_when_there_is_room(
    tmp_path, caplog):
  writer = metrics.Writer(tmp_path)
  for step in range(1, 8):
    with largest_file(160 if step < 6 else 10_000):
      writer.write("sft", step, {"loss": step / 4})
    got = [r["step"] for r in rows(tmp_path)]  # whole rows, at any time
    assert got == ([1, 2] if 2 <= step < 6 else list(range(1, step + 1)))
  said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert len(said) == 2, said
  assert "waits from step 3" in said[0] and "3 rows" in said[1]


def test_tensorboard_reads_what_was_written(tmp_path):
  record = pytest.importorskip("tensorboardX.event_file_writer")
  from tensorboardX.proto.event_pb2 import Event

  writer = metrics.Writer(tmp_path, tensorboard=True)
  writer.write("sft", 3, {"loss": 0.5, "rewards/margins": -2})
  [file] = (tmp_path / "tensorboard" / "sft").iterdir()
  data, events = file.read_bytes(), []
  while data:  # length, its checksum, the event, its checksum
    size = int.from_bytes(data[:8], "little")
    events.append(Event.FromString(data[12:12 + size]))
    data = data[16 + size:]
  assert events[0].file_version == "brain.Event:2"
  assert events[1].step == 3 and len(events) == 2
  assert {v.tag: v.simple_value for v in events[1].summary.value} == {
      "loss": 0.5, "rewards/margins": -2}
  assert record.EventsWriter


def test_f29_a_tensorboard_that_cannot_write_neither_hangs_nor_stops(
    tmp_path, monkeypatch, caplog):
  events = pytest.importorskip("tensorboardX.event_file_writer")
  writer = metrics.Writer(tmp_path, tensorboard=True)
  writer.write("sft", 1, {"loss": 1})

  def full(self, event):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(events.EventsWriter, "write_event", full)
  many = {f"metric {i}": i for i in range(99)}  # more than a queue holds
  for step in (2, 3, 4):
    writer.write("sft", step, many)
  said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert len(said) == 1 and "tensorboard is off from step 2" in said[0]
  assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4]


def test_tensorboard_that_is_not_installed_does_not_stop_the_run(
    tmp_path, monkeypatch):
  def missing(workdir):
    raise ImportError("tensorboardX")

  monkeypatch.setattr(metrics, "_tensorboard_sink", missing)
  metrics.Writer(tmp_path, tensorboard=True).write("sft", 1, {"loss": 1})
  assert len(rows(tmp_path)) == 1
