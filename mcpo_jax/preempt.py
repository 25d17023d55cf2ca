"""Told to stop: by SIGTERM or SIGINT, to one process or to all.

What would be lost is guarded: there a signal is only noted, and the work asks
by `check`, between two steps, whether to stop. Of several processes the first
one decides at which call of `check`, so that all save the same step. Anywhere
else a signal ends the run at once, for what lies on disk is whole at any time.
A second signal quits. Who has not stopped within the grace time is ended.

SIGUSR1 asks too, and is never a second signal: `supervise` and `compare` send
it to runs that a terminal or a scheduler may have told already.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from mcpo_jax import errors, hosts

GRACE_SECONDS = 25.0  # machines are taken away 30 s after they have said so
_QUICK_SECONDS = 2.0  # for what has nothing to save, such as a compilation

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

_STOP = "stop"
_TURN = "stop/turn"
_HEARD = "stop/heard"

_lock = threading.RLock()  # a signal may interrupt who holds it
_asked: str | None = None  # name of the signal
_all_know = False  # in the first process: whether all others have heard
_holds = False  # whether something would be lost
_grace = GRACE_SECONDS
_turn = 0  # calls of `check`
_last: int | None = None  # the turn at which all stop


def listen() -> None:
  """From now on signals are heard, by a thread: the main one may be compiling
  for minutes."""
  incoming, outgoing = os.pipe()
  os.set_blocking(outgoing, False)
  signal.set_wakeup_fd(outgoing)
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, _interrupt)
  # A forked process has the pipe too: its signals are not ours.
  os.register_at_fork(after_in_child=_forget)
  _start(_hear, incoming)


def follow() -> None:
  """Hears of signals to other processes; after `hosts.join`."""
  hosts.hear(_STOP, _on_stop)


def allow(seconds: float) -> None:
  """Sets the grace time."""
  global _grace
  _grace = seconds


def asked() -> str | None:
  """The signal that told this process, or another one, to stop."""
  return _asked


def hold() -> None:
  """From now on there is something to lose."""
  global _holds
  _holds = True


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Within, from a call of `hold` on, signals wait for `check`; one that came
  after the last check raises at the end."""
  global _holds
  try:
    yield
  finally:
    _holds = False
  if _asked is not None:
    raise KeyboardInterrupt


def check() -> None:
  """Raises if this is where to stop.

  All processes call it equally often, and between two calls each waits for
  something that all of them do. In another thread than the main one it does
  nothing: whose work that is waits for it.

  Raises:
    Preempted: run.preempted.
    ResourceError: hosts.apart, this process is ahead of the others.
  """
  global _turn
  if threading.current_thread() is not threading.main_thread():
    return
  _turn += 1
  if _asked is not None and (hosts.count() == 1 or _is_last_turn()):
    raise stopped("")


def stopped(saved: str) -> errors.Preempted:
  """The error that ends the run; `saved` says what was."""
  return errors.Preempted(
      "run.preempted", f"told to stop by {_asked}{saved and ', '}{saved}",
      hint="the same line goes on")


def end_with_parent(number: int) -> None:
  """In a new process: has it sent this signal when its parent ends, however
  that ends."""
  if _LIBC:
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def _is_last_turn() -> bool:
  """Whether all stop now. Costs nothing before one is told.

  No process is further than one turn ahead of the first, which decides when
  all others know that they have to look.
  """
  global _last
  if hosts.is_first() and _last is None and _all_know:
    _last = _turn + 1
    hosts.say(_TURN, _last)
  elif _last is None:
    _last = hosts.said(_TURN)
  if _last is not None and _last < _turn:
    raise errors.ResourceError(
        "hosts.apart", "this process was not there when all stopped",
        got=_turn, want=_last)
  return _last == _turn


def _interrupt(number, frame) -> None:
  """In the main thread, when it comes to it."""
  _note(signal.Signals(number).name, here=True)  # the other may be late
  if not _holds:
    raise KeyboardInterrupt


def _forget() -> None:
  signal.set_wakeup_fd(-1)
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)


def _hear(incoming: int) -> None:
  """In a thread: notes the first signal, quits at the second."""
  told = 0
  while True:
    for number in os.read(incoming, 64):
      name = signal.Signals(number).name
      told += number != signal.SIGUSR1
      if told == 2:
        hosts.abort(f"told twice to stop, by {name}", 128 + number)
      _note(name, here=True)


def _start(function, *args) -> None:
  threading.Thread(target=function, args=args, daemon=True).start()


def _note(name: str, *, here: bool) -> None:
  """The first time: this process, or another one, was told to stop."""
  global _asked
  with _lock:
    if _asked is not None:
      return
    _asked = name
  if hosts.is_first():
    print(f"{name}: stops; a second signal quits", file=sys.stderr)
  _start(_end, _QUICK_SECONDS if here and not _holds else _grace)
  if here:
    _start(hosts.say, _STOP, name)


def _end(seconds: float) -> None:
  """In a thread: ends a process that does not stop by itself."""
  time.sleep(seconds)
  hosts.abort(str(stopped(
      f"not done after {seconds:g} s; what was saved before stands")),
              errors.Preempted.exit_code)


def _on_stop(name: str) -> None:
  """In a thread: one of the processes was told."""
  global _all_know
  _note(name, here=False)
  if hosts.is_first():
    for index in range(1, hosts.count()):
      hosts.await_word(f"{_HEARD}/{index}")
    _all_know = True
  else:
    hosts.say(f"{_HEARD}/{hosts.index()}", "")
