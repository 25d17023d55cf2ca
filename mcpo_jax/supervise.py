"""Runs a command until it has gone well.

    python -m mcpo_jax.supervise [--processes=N] -- COMMAND ... --workdir=DIR

A run that was told to stop by somebody else (exit code 75) begins again, and
so does one that crashed, after a pause, unless it crashed three times at one
step. A mistake of the user's, or a loss that is not finite, ends it: the same
line would end the same way. Told to stop itself, it tells the run, which saves.

With N > 1 the command runs in so many processes on this machine, one run; they
begin again together. On several machines each has a supervisor of its own.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

from mcpo_jax import errors, preempt

CRASHES = 3  # at one step
PAUSES = 5.0, 60.0  # seconds after the first crash, and after the second
PEER_SECONDS = 90.0  # for the others to notice that one has ended

# Of no use to try again: errors of config, data, model folder and checkpoint,
# not-a-number, told twice to stop, nobody reads the output.
FINAL = (2, 3, 4, 5, 8, 128 + signal.SIGINT, 128 + signal.SIGTERM, 141)
_AGAIN = errors.Preempted.exit_code


class Supervisor:
  """The processes of one run."""

  def __init__(self, command: list[str], processes: int):
    self._command, self._processes = command, processes
    self._running: list[subprocess.Popen] = []
    self._told: int | None = None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
      signal.signal(number, self._tell)

  def _tell(self, number: int, frame: Any) -> None:
    """Passes the first signal on; at the second all ends."""
    if self._told is not None and number != signal.SIGUSR1:
      for process in self._running:
        process.kill()
      os._exit(128 + number)
    self._told = number
    for process in self._running:
      process.send_signal(signal.SIGUSR1)

  def run(self) -> int:
    """The exit code of the last try."""
    crashes, place = 0, None
    while True:
      code = self._once()
      if code == 0 or code in FINAL:
        return code
      if self._told is not None:
        return _AGAIN
      now = progress(self._command)
      crashes = 0 if code == _AGAIN else (
          crashes + 1 if crashes and now == place else 1)
      place = now
      if crashes == CRASHES:
        _say(f"ended with {code} for the third time at {place}; no more")
        return code if code > 0 else 128 - code
      _say(f"ended with {code} at {place}; begins again")
      if crashes and self._pause(PAUSES[crashes - 1]):
        return _AGAIN

  def _pause(self, seconds: float) -> bool:
    """Whether a signal came meanwhile."""
    end = time.monotonic() + seconds
    while self._told is None and time.monotonic() < end:
      time.sleep(0.1)
    return self._told is not None

  def _once(self) -> int:
    """Runs all processes to their end: 0, or the code that says most."""
    shared = {"MCPO_COORDINATOR": f"127.0.0.1:{_port()}",
              "MCPO_NUM_PROCESSES": str(self._processes)}
    for index in range(self._processes):
      place = shared | {"MCPO_PROCESS_ID": str(index)}
      # What a terminal sends to all would be their second signal.
      self._running.append(subprocess.Popen(
          self._command, start_new_session=True,
          env=os.environ | (place if self._processes > 1 else {}),
          preexec_fn=lambda: preempt.end_with_parent(signal.SIGTERM)))
    if self._told is not None:  # before all were there
      self._tell(signal.SIGUSR1, None)
    codes = [process.poll() for process in self._running]
    late = None
    while None in codes:
      if late is None and any(code is not None for code in codes):
        late = time.monotonic() + PEER_SECONDS
      if late is not None and time.monotonic() > late:
        for process in self._running:
          process.kill()
      time.sleep(0.1)
      codes = [process.poll() for process in self._running]
    self._running.clear()
    for wanted in (FINAL, (1, 6, 7), range(-64, 0), (_AGAIN,)):
      for code in codes:
        if code in wanted:
          return code
    return max(codes)


def progress(command: list[str]) -> str:
  """How far the run of a command got: stage and step of the last metrics, or
  the shards that it made."""
  flags = [x for x in command if x.startswith("--workdir=")]
  if not flags:
    return "the start"
  workdir = pathlib.Path(flags[-1].removeprefix("--workdir="))
  shards = len(list((workdir / "generating").glob("*.jsonl")))
  if shards:
    return f"shard {shards}"
  try:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
  except OSError:
    return "the start"
  for line in reversed(lines):
    try:
      row = json.loads(line)
    except ValueError:  # half a line
      continue
    return f"{row['stage']} {row['step']}"
  return "the start"


def _port() -> int:
  if "PORT" in os.environ:
    return int(os.environ["PORT"])
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _say(text: str) -> None:
  print(f"supervise: {text}", file=sys.stderr, flush=True)


def main() -> NoReturn:
  """See above."""
  parser = argparse.ArgumentParser(prog="python -m mcpo_jax.supervise")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("command", nargs="+", help="after --")
  typed = parser.parse_args()
  sys.exit(Supervisor(typed.command, typed.processes).run())


if __name__ == "__main__":
  main()
