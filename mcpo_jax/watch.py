"""Ends a run that hangs, and says in which phase and where each thread stands.

A phase may take as long as its kind is allowed; what is in no phase may take as
long as the kind "work". A thread looks. It also ends the other processes, which
say where they stand: the one that waits is seldom the one that hangs.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mcpo_jax import errors, hosts


class Phase(NamedTuple):
  """What a thread is doing."""

  kind: str
  what: str
  since: float


_limits: dict[str, float | None] = {}  # kind -> seconds; None: any number
_open: dict[int, Phase] = {}
_numbers = itertools.count()
_moved = 0.0  # when a phase last began or ended
_NOTE_SECONDS = 5.0  # that a note may take: the disk may be what hangs
_note: Callable[[str], None] = lambda text: None


def start(
    *, compile_seconds: float | None, step_seconds: float | None,
    work_seconds: float | None, save_seconds: float | None,
) -> None:
  """Begins to watch. None: any number of seconds."""
  global _moved
  begun, _moved = bool(_limits), time.monotonic()
  _limits.update(compile=compile_seconds, step=step_seconds,
                 work=work_seconds, save=save_seconds)
  if not begun:
    threading.Thread(target=_watch, daemon=True).start()


@contextlib.contextmanager
def phase(kind: str, what: str) -> Iterator[None]:
  """Goes round what may take so long: "compile", "step", "save" or "work"."""
  global _moved
  number = next(_numbers)
  _moved = now = time.monotonic()
  _open[number] = Phase(kind, what, now)
  try:
    yield
  finally:
    del _open[number]
    _moved = time.monotonic()


@contextlib.contextmanager
def noted(note: Callable[[str], None]) -> Iterator[None]:
  """Within it `note` is told the error that ends a run that hangs."""
  global _note
  before, _note = _note, note
  try:
    yield
  finally:
    _note = before


def _watch() -> None:
  while True:
    now = time.monotonic()
    phases = list(_open.values()) or [
        Phase("work", "what is in no phase", _moved)]
    for one in phases:
      limit = _limits[one.kind]
      if limit is not None and now - one.since > limit:
        text = str(errors.ResourceError(
            "run.hangs", f"process {hosts.index()} hangs", where=one.what,
            got=f"{now - one.since:.0f} s", want=f"at most {limit:g} s",
            hint="below is where each thread stands; if all is well raise " + (
                "checkpoint.timeout_seconds" if one.kind == "save" else
                f"watchdog.{one.kind}_seconds")))
        noting = threading.Thread(target=_note, args=(text,), daemon=True)
        noting.start()
        noting.join(_NOTE_SECONDS)
        hosts.abort(text, errors.ResourceError.exit_code, stacks=True)
    shortest = min((x for x in _limits.values() if x), default=60.0)
    time.sleep(min(1.0, shortest / 10))
