"""Faults by name, for tests: MCPO_FAULT=step.accumulate@7 kills the process
with SIGKILL when that point is reached for the seventh time. Without the
variable a point does nothing."""

import os
import signal

_counts: dict[str, int] = {}


def point(name: str) -> None:
  """A named place where a test may kill the process."""
  fault = os.environ.get("MCPO_FAULT")
  if not fault:
    return
  wanted, _, count = fault.partition("@")
  if wanted == name:
    _counts[name] = _counts.get(name, 0) + 1
    if _counts[name] == int(count or 1):
      os.kill(os.getpid(), signal.SIGKILL)
