"""How fast a stage runs: rates, share of the peak, compilations, a trace."""

import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from absl import logging
from jax import monitoring

from mcpo_jax import devices
from mcpo_jax.training import step as step_lib

# Updates after which nothing is compiled any more, but for chunks of a length
# that had not been met.
WARM_UP = 2
# Updates, counted from where a process begins, that a trace holds.
TRACED = range(3, 6)

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Meter:
  """Watches the updates of one stage in this process. Close it at the end."""

  def __init__(
      self,
      functions: step_lib.StepFunctions,
      mesh: jax.sharding.Mesh,
      trace_folder: pathlib.Path | None = None,
  ):
    """Begins to count.

    Args:
      functions: whose programs are counted as they are compiled, also those
        that come from the persistent cache.
      mesh: the devices that do the work.
      trace_folder: where a profile of a few updates goes; None: there is none.
    """
    device = devices.find(mesh.devices.flat[0].device_kind)
    self._peak = device and device.flops * mesh.size
    self._names = {getattr(f, "__name__", "") for f in functions}
    self._compiled: dict[str, list[float]] = {}  # function -> seconds
    self._before: dict[str, int] = {}  # programs before the last update
    self._shapes: set[tuple] = set()
    self._told = 0
    self._steps, self._tracing, self._folder = 0, False, trace_folder
    self.restart()
    monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, **about) -> None:
    name = str(about.get("fun_name")).removeprefix("jit(").removesuffix(")")
    if event == _COMPILED and name in self._names:
      self._compiled.setdefault(name, []).append(seconds)

  @contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Goes round one update, up to the arrival of its metrics."""
    if self._folder is not None and self._steps == TRACED.start:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    self._before = {name: len(x) for name, x in self._compiled.items()}
    with jax.profiler.StepTraceAnnotation("update", step_num=number):
      yield
    self._steps += 1
    if self._steps == TRACED.stop:
      self._end_trace()

  def add(
      self, number: int, *, tokens: int, flops: float, shapes: set[tuple]
  ) -> None:
    """Counts what the update did; `shapes` are those of its chunks."""
    self._tokens += tokens
    self._flops += flops
    met = shapes <= self._shapes
    self._shapes |= shapes
    for name, count in self._before.items():
      if self._steps > WARM_UP and met and len(self._compiled[name]) > count:
        logging.warning(
            "step %d: %s was compiled again, program %d of it, %.1f s: an "
            "argument has another shape or dtype than before", number, name,
            len(self._compiled[name]), self._compiled[name][-1])

  def restart(self) -> None:
    """Leaves out of the rates what happened since the last row."""
    self._clock, self._tokens, self._flops = time.perf_counter(), 0, 0.0

  def row(self) -> dict[str, float]:
    """Rates since the last row, compilations since the beginning.

    FLOPs are those that the update needs (`models.flops`), whatever padding
    and recomputation add; the share of the peak is known of the devices in
    the table of `devices`.
    """
    seconds = time.perf_counter() - self._clock
    row = {"perf/tokens_per_sec": self._tokens / seconds,
           "perf/flops_per_sec": self._flops / seconds}
    if self._peak:
      row["perf/mfu"] = row["perf/flops_per_sec"] / self._peak
    count = sum(map(len, self._compiled.values()))
    row |= {"perf/compiles": count,
            "perf/compile_seconds": sum(map(sum, self._compiled.values()))}
    if count > self._told:
      logging.info("compiled: %s", ", ".join(
          f"{name} {len(x)}x {sum(x):.1f} s"
          for name, x in self._compiled.items()))
      self._told = count
    self.restart()
    return row

  def close(self) -> None:
    """Stops listening, and ends a trace that is under way."""
    self._end_trace()
    monitoring.unregister_event_duration_listener(self._listen)

  def _end_trace(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
      logging.info("profile: a trace of %d updates lies in %s",
                   self._steps - TRACED.start, self._folder)
