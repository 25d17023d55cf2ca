"""Faults by name, for tests: what happens at a point in the program.

MCPO_FAULT=step.accumulate@7 kills the process with SIGKILL when that point is
reached for the seventh time; without a count, for the first. An action may
follow: `name@7:term` sends SIGTERM and goes on, `:sleep=30` waits so many
seconds, `:full` raises the error of a full disk, `:raise` any other error.
Without the variable a point does nothing.
"""

import errno
import os
import signal
import time

_counts: dict[str, int] = {}


def point(name: str) -> None:
  """A named place where a test may let something happen.

  Raises:
    OSError: ENOSPC, by `:full`.
    RuntimeError: by `:raise`.
  """
  fault = os.environ.get("MCPO_FAULT")
  if not fault:
    return
  place, _, action = fault.partition(":")
  wanted, _, count = place.partition("@")
  if wanted != name:
    return
  _counts[name] = _counts.get(name, 0) + 1
  if _counts[name] != int(count or 1):
    return
  kind, _, value = action.partition("=")
  if kind == "sleep":
    time.sleep(float(value))
  elif kind == "term":
    os.kill(os.getpid(), signal.SIGTERM)
  elif kind == "full":
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
  elif kind == "raise":
    raise RuntimeError(f"fault at {name}")
  else:
    os.kill(os.getpid(), signal.SIGKILL)
