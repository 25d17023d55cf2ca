"""Asking again what did not answer: pauses that grow, and an end."""

import random
import time

from absl import logging

from mcpo_jax import hosts, preempt

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # seconds


class Patience:
  """With one that is asked, for some seconds from now on."""

  def __init__(self, seconds: float):
    self._end, self._waits = time.monotonic() + seconds, 0

  def wait(self, whom: str, why: str, *, least: float = 0.0) -> bool:
    """Sleeps before asking again: longer each time, never in step with others
    who wait for the same.

    Args:
      whom: is asked, for the log, which hears of the first time only.
      why: there was no answer.
      least: seconds of the pause.

    Returns:
      False, at once, if the pause would end too late.

    Raises:
      Preempted: run.preempted, the process was told to stop meanwhile.
    """
    pause = min(_FIRST_PAUSE * 2**self._waits, _LONGEST_PAUSE)
    pause = max(pause * random.uniform(0.5, 1.0), least)
    if time.monotonic() + pause > self._end:
      return False
    if not self._waits:
      logging.warning("%s: %s; it is asked again", whom, why)
    self._waits += 1
    time.sleep(pause)
    if preempt.asked() and hosts.count() == 1:
      raise preempt.stopped("")
    return True
