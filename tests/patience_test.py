"""Asking again: pauses that grow and differ, and an end."""

import pytest

from mcpo_jax import errors, patience, preempt


@pytest.fixture
def clock(monkeypatch):
  """Time passes by sleeping alone; the pauses that were slept."""
  pauses = []
  monkeypatch.setattr(patience.time, "monotonic", lambda: sum(pauses))
  monkeypatch.setattr(patience.time, "sleep", pauses.append)
  return pauses


def test_pauses_grow_to_a_longest_one_and_end_in_time(clock):
  one = patience.Patience(60.0)
  while one.wait("a server", "is away"):
    assert sum(clock) <= 60.0
  assert sum(clock) > 60.0 - 5.0  # no pause more would have fitted
  longest = [min(0.25 * 2**i, 5.0) for i in range(len(clock))]
  assert all(t / 2 <= pause <= t for pause, t in zip(clock, longest))
  other = patience.Patience(60.0)
  before = len(clock)
  other.wait("a server", "is away")
  assert clock[before] != clock[0]  # not in step


def test_a_pause_is_as_long_as_the_server_asks_for(clock):
  one = patience.Patience(20.0)
  assert one.wait("a server", "is full", least=12.0) and clock == [12.0]
  assert not one.wait("a server", "is full", least=12.0)
  assert clock == [12.0]


def test_a_process_that_is_told_to_stop_waits_no_longer(clock, monkeypatch):
  monkeypatch.setattr(preempt, "asked", lambda: "SIGTERM")
  with pytest.raises(errors.Preempted):
    patience.Patience(1e9).wait("a server", "is away")
  assert len(clock) == 1


def test_the_log_hears_of_the_first_time_only(clock, caplog):
  one = patience.Patience(60.0)
  while one.wait("http://there", "ConnectionError"):
    pass
  (said,) = [r.getMessage() for r in caplog.records]
  assert said == "http://there: ConnectionError; it is asked again"
