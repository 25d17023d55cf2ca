"""Several processes, one run: which of them this is, and how they agree.

All processes run the same program with the same config, and the devices of all
make one mesh. The first one alone speaks. It also writes the files, which the
others wait for and read, where all of them share a file system; where none do
(`apart`), each has a workdir and a cache of its own and writes there what the
first one would. An error of one of them ends all. A process learns its place
from

  MCPO_COORDINATOR    host:port of the first process, or "auto": JAX finds the
                      place, as it does on TPU pods, GKE, Slurm and Open MPI
  MCPO_NUM_PROCESSES  how many there are, unless "auto"
  MCPO_PROCESS_ID     0, 1, ..., unless "auto"

Without MCPO_COORDINATOR a process is alone, and nothing here costs anything.
"""

import contextlib
import ctypes
import faulthandler
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from absl import logging

from mcpo_jax import errors

JOIN_SECONDS = 300  # until all processes have come
# Without a sign of life a process is lost; then all others end.
HEARTBEAT_SECONDS = 30
# The first process may tokenise for hours while the others wait; the config's
# watchdog.work_seconds takes its place.
PATIENCE_SECONDS = 6 * 3600.0
_LOOK_SECONDS = 60  # after which a process that waits says so
_LEAVE_SECONDS = 5  # for all to hear of an error

_ERROR = "error"
_HEARD = "error/heard"


class Place(NamedTuple):
  """Which process this is."""

  index: int = 0
  count: int = 1
  client: Any = None  # of JAX's coordination service


_place = Place()
_listeners: dict[str, threading.Thread] = {}  # word -> who waits for it
_alone = False  # whether the others wait for what this process does now
_apart = False
_turns = itertools.count()
_patience = PATIENCE_SECONDS


def count() -> int:
  """How many processes there are."""
  return _place.count


def index() -> int:
  """Which of them this is, from 0."""
  return _place.index


def is_first() -> bool:
  """Whether this process speaks; true of one that is alone."""
  return _place.index == 0


def apart() -> bool:
  """Whether there are several processes and each has a disk of its own."""
  return _apart


def set_apart(value: bool) -> None:
  """Says what `apart` is, once it is known; the same in all processes."""
  global _apart
  _apart = value


def writes() -> bool:
  """Whether this process writes the disk that it sees."""
  return is_first() or _apart


def expected() -> bool:
  """Whether the environment says that there are several processes."""
  return bool(os.environ.get("MCPO_COORDINATOR"))


def allow(seconds: float | None) -> None:
  """How long the others wait for the first one; None: as long as it takes."""
  global _patience
  _patience = math.inf if seconds is None else seconds


def join() -> None:
  """Finds the other processes, if there are any. Before any use of a device.

  Raises:
    ConfigError: hosts.place, a variable is missing or makes no sense.
    ResourceError: hosts.join, JAX did not find the others.
  """
  global _place
  if not expected() or _place.client is not None:
    return
  options = _options()
  import jax
  from jax._src import distributed  # its client has no public name

  # It would take SIGTERM from `preempt`, and tell nobody but orbax.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
        **options, initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS)
  except (RuntimeError, ValueError) as e:
    raise errors.ResourceError(
        "hosts.join", str(e).split("\n")[0], where="MCPO_COORDINATOR",
        got=os.environ["MCPO_COORDINATOR"]) from e
  state = distributed.global_state
  _place = Place(state.process_id, state.num_processes, state.client)
  hear(_ERROR, _on_error)
  if not is_first():
    logging.set_verbosity(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    sys.stdout = open(os.devnull, "w")


def _options() -> dict[str, Any]:
  """Arguments of jax.distributed.initialize, from the environment."""
  address = os.environ["MCPO_COORDINATOR"]
  if address == "auto":
    return {}
  numbers = []
  for name in ("MCPO_NUM_PROCESSES", "MCPO_PROCESS_ID"):
    text = os.environ.get(name, "")
    if not text.isdecimal():
      raise errors.ConfigError(
          "hosts.place", "goes with MCPO_COORDINATOR", where=name,
          got=text or None, want="a whole number",
          hint="MCPO_COORDINATOR=auto where JAX can find it")
    numbers.append(int(text))
  number, index = numbers
  if not index < number:
    raise errors.ConfigError(
        "hosts.place", "processes are counted from 0", where="MCPO_PROCESS_ID",
        got=index, want=f"below MCPO_NUM_PROCESSES={number}")
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise errors.ConfigError(
        "hosts.place", "no address", where="MCPO_COORDINATOR", got=address,
        want="host:port of the first process, or auto")
  # By itself the service listens on every network of the machine.
  local = host in ("localhost", "127.0.0.1")
  return {"coordinator_address": address, "num_processes": number,
          "process_id": index, "cluster_detection_method": "deactivate",
          "coordinator_bind_address": address if local else None}


# --- agreement ----------------------------------------------------------------


def from_first(what: str, make: Callable[[], Any]) -> Any:
  """What `make` gives, a JSON value, in the first process, told to all.

  Only the first process calls `make`; the others wait until it is done, so
  this is also how they wait for its files. All call it, in the same order.

  Args:
    what: is made, for messages.
    make: () -> a JSON value; what it raises ends the others too. What it asks
      of the first process it asks of itself.

  Raises:
    ResourceError: hosts.timeout, the first process is too late; hosts.apart,
      it is elsewhere in the program.
  """
  global _alone
  if count() == 1 or _alone:
    return make()
  key = f"mcpo_jax/{next(_turns)}"
  if is_first():
    _alone = True
    value = make()
    _alone = False
    _place.client.key_value_set(key, json.dumps([what, value]))
  told, value = json.loads(_await(key, what))
  if told != what:
    raise errors.ResourceError(
        "hosts.apart", "the processes do different things",
        where=f"process {_place.index}", got=what, want=told,
        hint="do all of them run the same code?")
  return value


def on_disk(what: str, work: Callable[[], Any]) -> Any:
  """As `from_first`, for what is done to a disk: where each process has its
  own each does it, gets what it gave itself, and waits for nobody."""
  return work() if _apart else from_first(what, work)


def gather(what: str, value: Any) -> list[Any]:
  """A JSON value of each process, told to all."""
  told = to_first(f"gather/{next(_turns)}", value)
  return from_first(what, lambda: told)


def on_all_disks(what: str, look: Callable[[], Any]) -> Any:
  """A JSON value that is read from the disk: the first process's; None if
  another one's disk says otherwise."""
  if not _apart:
    return from_first(what, look)
  found = gather(what, json.dumps(look(), sort_keys=True))
  return json.loads(found[0]) if len(set(found)) == 1 else None


@contextlib.contextmanager
def first_goes_ahead(what: str) -> Iterator[None]:
  """The others enter when the first process has left: what it makes there,
  they find; all at once where each has a disk of its own. For work of the host
  alone."""
  if not writes():
    from_first(what, lambda: None)
  yield
  if is_first() and not _apart:
    from_first(what, lambda: None)


def check_same(slug: str, what: str, own: dict[str, Any], *, hint: str) -> None:
  """Compares named JSON values with those of the first process.

  Args:
    slug: of the error.
    what: is compared, for the message.
    own: names and values.
    hint: what to do.

  Raises:
    ConfigError: `slug`, with the difference.
  """
  if count() == 1:
    return
  own = json.loads(json.dumps(own))
  first = from_first(what, lambda: own)
  changed = [f"{k}: {first.get(k)!r} -> {own.get(k)!r}"
             for k in sorted(first.keys() | own.keys())
             if first.get(k) != own.get(k)]
  if changed:
    raise errors.ConfigError(
        slug, f"not {what} of the first process", where=f"process {index()}",
        got="; ".join(changed[:20]), hint=hint)


def wait_for_first(what: str) -> None:
  """Returns when the first process has come here, with its files."""
  from_first(what, lambda: None)


def to_first(key: str, value: Any) -> list[Any] | None:
  """What each process gives, told to the first one; None in the others.

  Any thread may call this: it goes by its key, not by an order. The first one
  waits for as long as it takes.

  Args:
    key: never used before.
    value: a JSON value.
  """
  if count() == 1:
    return [value]
  place = f"mcpo_jax/{key}"
  if not is_first():
    _place.client.key_value_set(f"{place}/{index()}", json.dumps(value))
    return None
  told = [value] + [json.loads(_await(f"{place}/{i}", key))
                    for i in range(1, count())]
  _place.client.key_value_delete(place)
  return told


def meet(what: str) -> None:
  """Returns when all processes have come here."""
  if count() > 1:
    _place.client.wait_at_barrier(
        f"mcpo_jax/{next(_turns)}/{what}",
        int(1000 * min(_patience, 365 * 24 * 3600)))


def _await(key: str, what: str) -> str:
  deadline = time.monotonic() + _patience
  while True:
    try:
      return _place.client.blocking_key_value_get(key, 1000 * _LOOK_SECONDS)
    except RuntimeError as e:
      if "DEADLINE_EXCEEDED" not in str(e):
        raise
    if time.monotonic() > deadline:
      raise errors.ResourceError(
          "hosts.timeout", "the first process does not come",
          where=f"process {_place.index}", got=what,
          want=f"within {_patience:g} s")
    logging.warning("process %d waits for the first one: %s", _place.index,
                    what)


# --- words --------------------------------------------------------------------


def say(word: str, value: Any) -> None:
  """Tells all processes a JSON value; of several the first one stands."""
  if count() > 1:
    with contextlib.suppress(RuntimeError):  # said already, or nobody is there
      _place.client.key_value_set(f"mcpo_jax/{word}", json.dumps(value))


def said(word: str) -> Any:
  """What was said, or None."""
  try:
    return json.loads(_place.client.key_value_try_get(f"mcpo_jax/{word}"))
  except RuntimeError as e:
    if "NOT_FOUND" not in str(e):
      raise
    return None


def await_word(word: str) -> Any:
  """Waits until something is said; None also if JAX ends this process."""
  while True:
    try:
      return json.loads(_place.client.blocking_key_value_get(
          f"mcpo_jax/{word}", 1000 * _LOOK_SECONDS))
    except RuntimeError as e:
      if "DEADLINE_EXCEEDED" not in str(e):
        return None


def hear(word: str, act: Callable[[Any], None]) -> None:
  """Has `act` called, in a thread, with what will be said."""
  if count() == 1:
    return

  def listen():
    value = await_word(word)
    if value is not None:  # None: the run is over
      act(value)

  _listeners[word] = threading.Thread(target=listen, daemon=True)
  _listeners[word].start()


# --- the end ------------------------------------------------------------------


def leave() -> None:
  """Ends what `join` began, where all has gone well."""
  if count() == 1:
    return
  wait_for_first("the end")
  for word, listener in _listeners.items():
    if is_first():
      say(word, None)
    listener.join()  # a thread that runs at exit crashes the interpreter
  import jax

  jax.distributed.shutdown()


def fail(text: str, code: int) -> NoReturn:
  """Ends this process, and with it all others, which say `text`."""
  if count() > 1:
    say(_ERROR, [index(), text, code, False])
    _leave(code)
  sys.exit(code)


def abort(text: str, code: int, *, stacks: bool = False) -> NoReturn:
  """As `fail`, at once and from any thread; says `text` here too, and with
  `stacks` where each thread of each process stands."""
  print(text, file=sys.stderr)
  if stacks:
    faulthandler.dump_traceback()
  say(_ERROR, [index(), text, code, stacks])
  _leave(code)


def _on_error(told: tuple[int, str, int, bool]) -> None:
  """In a thread: another process has failed."""
  other, text, code, stacks = told
  if other != index():
    print(f"process {other}: {text}", file=sys.stderr)
    if stacks:
      faulthandler.dump_traceback()
    _leave(code)


def _leave(code: int) -> NoReturn:
  """Ends this process at once: an orderly end would wait for the others."""
  sys.stdout.flush()
  sys.stderr.flush()
  if count() == 1:
    os._exit(code)
  deadline = time.monotonic() + _LEAVE_SECONDS
  with contextlib.suppress(RuntimeError):
    if is_first():  # what all are told lies in this process
      for i in range(1, count()):
        left = max(deadline - time.monotonic(), 0.1)
        _place.client.blocking_key_value_get(
            f"mcpo_jax/{_HEARD}/{i}", int(1000 * left))
    else:
      _hold_aborts()
      say(f"{_HEARD}/{index()}", "")
  os._exit(code)


def _hold_aborts() -> None:
  """From now on a thread that aborts waits instead: JAX's does as soon as the
  first process has gone, and this one would end by SIGABRT, not its code."""
  libc = ctypes.CDLL(None)
  signal.alarm(_LEAVE_SECONDS)  # if that thread has what this one needs
  libc.signal(int(signal.SIGABRT), ctypes.cast(libc.pause, ctypes.c_void_p))
