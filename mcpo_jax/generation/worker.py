"""One thread that owns the engine; others hand it jobs and weights.

Jobs wait in order before the engine, bounded by the samples that are under way
and waiting in all. New weights wait until what runs has ended and come before
the jobs that wait, so a job is of one version.
"""

import collections
import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from mcpo_jax import errors, faults
from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.generation.requests import Ask
from mcpo_jax.generation.text import TextStream


class Event(NamedTuple):
  """What one sample has grown by."""

  prompt: int  # place in Ask.prompts
  sample: int  # place in Ask.sample_indices
  text: str
  tokens: list[int]
  logps: list[float]  # nats, of the law that was drawn from
  raw_logps: list[float]  # nats, of the raw policy
  finish_reason: str | None
  version: int
  sha256: str  # of the weights
  scored: engine_lib.Scored | None = None  # the prompt, where it is told too


class Weights(NamedTuple):
  """A version of the weights."""

  models: tuple[tuple[Any, float], ...]  # (params, weight)
  version: int
  sha256: str


class Job:
  """An Ask at work. Lives on the engine's thread but for `ask` and `tell`."""

  def __init__(self, ask: Ask, tell: Callable[[Any], None]):
    """`tell` gets lists of Events, and at last None or an error."""
    self.ask, self.tell = ask, tell
    self.running: dict[tuple[int, int], TextStream] = {}  # by request, sample
    self.requests: dict[int, int] = {}  # id -> place in ask.prompts
    self.scored: list[engine_lib.Scored] = []  # of each prompt, if asked for
    self.over = False


class Worker:
  """The engine's thread and the queue before it.

  Attributes:
    counts: samples that "stop", "length" and "cancelled" ended, "tokens",
      "updates"; for reading.
    failure: why nothing is served until other weights come, or None.
    version, sha256: of the weights.
    num_active, num_waiting: samples that are decoded, and that wait.
  """

  def __init__(
      self,
      engine: engine_lib.Engine,
      tokenizer: Any,
      version: int,
      sha256: str,
      *,
      max_samples: int,
      tokens_per_step: int,
      num_slots: int,
  ):
    """Starts nothing yet.

    Args:
      engine: given over to this object.
      tokenizer: makes the text, see TextStream.
      version, sha256: of the weights that the engine has.
      max_samples: under way and waiting, in all.
      tokens_per_step: decoded between two looks at what has come in.
      num_slots: samples the engine decodes at a time: so many more are handed
        to it ahead.
    """
    self._engine, self._tokenizer = engine, tokenizer
    self._max_samples, self._num_slots = max_samples, num_slots
    self._tokens_per_step = tokens_per_step
    self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    self._waiting: collections.deque[Job] = collections.deque()
    self._jobs: dict[int, Job] = {}  # by request id
    self._ids = itertools.count()
    self._update: tuple[Weights, Future] | None = None
    self._lock = threading.Lock()
    self._taken = 0  # samples of the jobs that are not over
    self._closing = False
    self._thread = threading.Thread(
        target=self._run, name="engine", daemon=True)
    self.counts: collections.Counter[str] = collections.Counter()
    self.failure: errors.McpoError | None = None
    self.num_active = self.num_waiting = 0
    self.version, self.sha256 = version, sha256

  # From other threads.

  def start(self) -> None:
    self._thread.start()

  def close(self) -> None:
    """Cancels what runs and waits for the thread to end."""
    self._inbox.put(self._close)
    self._thread.join()

  def submit(self, ask: Ask, tell: Callable[[Any], None]) -> Job:
    """Queues a job.

    Raises:
      ServiceError: `service.full`; the failure, if there is one.
    """
    if self.failure is not None:
      raise self.failure.with_traceback(None)
    with self._lock:
      if self._taken + ask.num_samples > self._max_samples:
        raise errors.ServiceError(
            "service.full", "too many samples are waiting",
            got=self._taken, want=f"at most {self._max_samples}")
      self._taken += ask.num_samples
    job = Job(ask, tell)
    self._inbox.put(lambda: self._waiting.append(job))
    return job

  def cancel(self, job: Job) -> None:
    """Frees what a job holds; nothing more is told of it."""
    self._inbox.put(functools.partial(self._cancel, job))

  def update(self, weights: Weights) -> Future:
    """Serves these weights once what runs has ended; one update at a time."""
    future: Future = Future()

    def put():
      self._update = weights, future

    self._inbox.put(put)
    return future

  # On the engine's thread.

  def _run(self) -> None:
    while not self._closing:
      busy = self._jobs or self._waiting or self._update
      self._take_commands(block=not busy)
      try:
        self._apply_update()
        self._hand_over()
        if not self._engine.idle:
          self._tell(self._engine.step(self._tokens_per_step))
          faults.point("gen.request")  # some are under way
      except errors.NonFiniteError as e:
        self._fail(e)
      except Exception as e:  # a bug: said once, and to everyone who waits
        logging.exception("the engine failed")
        self._fail(errors.ServiceError(
            "service.failed", f"the engine raised {type(e).__name__}"))
      self.num_active = self._engine.num_active
      self.num_waiting = self._engine.num_waiting + sum(
          job.ask.num_samples for job in self._waiting)

  def _take_commands(self, *, block: bool) -> None:
    if block:
      self._inbox.get()()
    while not self._closing:
      try:
        self._inbox.get_nowait()()
      except queue.Empty:
        return

  def _apply_update(self) -> None:
    if self._update is None or not self._engine.idle:
      return
    (weights, future), self._update = self._update, None
    try:
      self._engine.update(weights.models, weights.version)
    except Exception as e:
      future.set_exception(e)
      return
    self.version, self.sha256 = weights.version, weights.sha256
    self.counts["updates"] += 1
    self.failure = None
    future.set_result(None)

  def _hand_over(self) -> None:
    """Gives the engine the next jobs, unless new weights come first."""
    while (self._waiting and self._update is None
           and self._engine.num_waiting < self._num_slots):
      job = self._waiting.popleft()
      if self.failure is not None:
        self._end(job, self.failure)
        continue
      wanted = job.ask.require_version
      if wanted is not None and wanted != self.version:
        self._end(job, wrong_version(self.version, wanted))
        continue
      self._begin(job)

  def _begin(self, job: Job) -> None:
    ask = job.ask
    for place, prompt in enumerate(ask.prompts):
      number = next(self._ids)
      job.requests[number] = place
      self._jobs[number] = job
      for sample in range(len(ask.sample_indices)):
        job.running[number, sample] = TextStream(
            self._tokenizer, ask.sampling.stop)
      try:
        self._engine.submit(engine_lib.Request(
            number, prompt, ask.prompt_ids[place], ask.sample_indices,
            ask.sampling, ask.seed))
      except errors.ServiceError as e:
        self._end(job, e)
        return
    if ask.echo and ask.logprobs:
      job.scored = self._engine.score(ask.prompts)

  def _tell(self, news: list[engine_lib.Progress]) -> None:
    events: dict[Job, list[Event]] = collections.defaultdict(list)
    for one in news:
      job = self._jobs[one.request_id]
      events[job].append(self._event(job, one))
    for job, some in events.items():
      job.tell(some)
      self.counts["tokens"] += sum(len(event.tokens) for event in some)
      if not job.running:
        self._end(job, None)

  def _event(self, job: Job, one: engine_lib.Progress) -> Event:
    stream = job.running[one.request_id, one.sample]
    before, reason = stream.num_tokens, one.finish_reason
    tokens = one.tokens
    text = stream.push(tokens[:-1] if reason == "stop" else tokens)
    if stream.stopped:
      if reason is None:
        self._engine.cancel(one.request_id, one.sample)
      tokens, reason = tokens[: stream.num_tokens - before], "stop"
    if reason is not None:
      text += stream.finish()
      del job.running[one.request_id, one.sample]
      self.counts[reason] += 1
    count = len(tokens)
    return Event(
        job.requests[one.request_id], one.sample, text, tokens.tolist(),
        np.asarray(one.behaviour_logps)[:count].tolist(),
        np.asarray(one.behaviour_raw_logps)[:count].tolist(), reason,
        one.version, self.sha256,
        job.scored[job.requests[one.request_id]] if job.scored else None)

  def _cancel(self, job: Job, error: Exception | None = None) -> None:
    if job.over:
      return
    if not job.requests:
      self._waiting.remove(job)
    self.counts["cancelled"] += len(job.running) or job.ask.num_samples
    self._end(job, error)

  def _end(self, job: Job, error: Exception | None) -> None:
    """Frees what a job still holds and tells its end."""
    for number in {number for number, _ in job.running}:
      with contextlib.suppress(KeyError):  # the engine has dropped it itself
        self._engine.cancel(number)
    for number in job.requests:
      del self._jobs[number]
    job.running.clear()
    job.over = True
    with self._lock:
      self._taken -= job.ask.num_samples
    job.tell(error)

  def _fail(self, error: errors.McpoError) -> None:
    self.failure = error
    for job in {*self._jobs.values()}:
      self._end(job, error)

  def _close(self) -> None:
    self._closing = True
    for job in [*{*self._jobs.values()}, *self._waiting]:
      self._cancel(job, errors.ServiceError(
          "service.stopping", "the server has been stopped"))


def wrong_version(served: Any, wanted: Any) -> errors.ServiceError:
  """The refusal where other weights are required than there are."""
  return errors.ServiceError(
      "service.version", "the service has other weights than required",
      where="require_version", got=served, want=wanted)
