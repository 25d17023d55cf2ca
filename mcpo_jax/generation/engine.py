"""Continuous batching: requests come, slots decode, slots are refilled.

Groups of slots decode side by side. A group holds one prompt, prefilled once,
and its slots decode samples of that prompt, each with a cache of its own
tokens alone; a slot whose sample ends takes the prompt's next sample, a group
whose samples have all ended takes the next prompt. Shapes grow along a short
ladder and are laid out anew only while nothing is under way, so few programs
are compiled however requests come. Token ids only, one thread.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mcpo_jax import errors, sharding
from mcpo_jax.generation import sampler
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.models import decoder, lora
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Params

NUM_SLOTS = 64  # samples decoded together, unless told otherwise
_FEWEST = 8  # pages
_WIDEST = 8  # the most slots of a group
MAX_STOP_IDS = 16  # of a request, beside the engine's own
COLDEST = 1e-3  # temperature above 0: below it float32 tells nothing apart

Models = tuple[tuple[Params, float], ...]


class Request(NamedTuple):
  """Samples of one prompt."""

  request_id: int  # chosen by the caller, not in use
  prompt: np.ndarray  # [P] int32
  # With the seed and the index of the sample the address of its draws.
  prompt_id: np.ndarray  # [2] uint32
  sample_indices: np.ndarray  # [N] int32
  sampling: Sampling  # max_new_tokens set; `stop` is for whoever reads text
  seed: int


class Progress(NamedTuple):
  """What one sample has grown by since it was told last."""

  request_id: int
  sample: int  # place in sample_indices
  tokens: np.ndarray  # [n] int32, the stop token included
  behaviour_logps: np.ndarray  # [n] nats, of the law that was drawn from
  behaviour_raw_logps: np.ndarray  # [n] nats, of the raw policy
  # None while it goes on; "stop": its last token is a stop token; "length".
  finish_reason: str | None
  version: int  # of the weights that wrote it, all of it


class Scored(NamedTuple):
  """A prompt's own tokens, of P the last P - 1, each after those before it."""

  logps: np.ndarray  # [P - 1] nats, of the raw policy
  best_logps: np.ndarray  # [P - 1] nats, of the likeliest token there
  best_tokens: np.ndarray  # [P - 1] int32, that token


class _Job:
  """A request and how far it is."""

  def __init__(self, request: Request):
    self.request = request
    self.waiting = collections.deque(range(len(request.sample_indices)))
    self.left = len(request.sample_indices)  # samples that have not ended


class Engine:
  """The slots and the queue before them.

  update(models, version) -> None: models is a tuple of (params, weight);
    refused (ServiceError `service.busy`) while a sample is under way: the
    caller stops submitting, steps until `idle`, then updates. So a sample is
    of one version. The weights are copied.
  submit(request) -> None: queues it. ServiceError `request.*` for what can not
    be served: checked before anything is compiled.
  cancel(request_id, sample=None) -> None: frees its slots at once; nothing
    more is told of it. With `sample`, that sample alone (a stop string).
  step(max_tokens) -> list[Progress]: refills what is free, decodes at most
    max_tokens tokens in every slot, fewer when slots ended that someone waits
    for. NonFiniteError `generation.non_finite`: the model gave NaN or
    infinity; no sample of that step is told, and all requests are dropped.
  score(prompts) -> list[Scored]: at once, whatever is under way.
  idle -> bool, num_active -> int (samples), num_waiting -> int (samples).
  """

  def __init__(
      self,
      config: ModelConfig,
      models: Models,
      version: int,
      *,
      max_new_tokens: int,
      stop_ids: Sequence[int],
      vocab_size: int | None = None,
      compute_dtype: Any = jnp.float32,
      num_slots: int = NUM_SLOTS,
      mesh: Mesh | None = None,
  ):
    """Compiles nothing yet.

    Args:
      config: of all the models.
      models: tuple of (params, weight). Tokens are drawn from the law whose
        log-probabilities are the weighted sum of theirs; the first model is
        the raw policy.
      version: of these weights, for example the policy step.
      max_new_tokens: C, the most that a request may ask for.
      stop_ids: tokens that end every sample.
      vocab_size: ids of the tokenizer; see sampler.make_kernels.
      compute_dtype: of products, activations and the cache.
      num_slots: samples decoded together, about; the number of groups is
        always a multiple of the mesh's batch axes.
      mesh: from sharding.make_mesh; groups are split over "data" and "fsdp".
    """
    self._config, self._mesh = config, mesh
    self._max_new, self._dtype = max_new_tokens, compute_dtype
    self._num_tokens = vocab_size or config.vocab_size
    self._stop_ids = sorted(set(stop_ids))
    self._parts = 1
    if mesh is not None:
      self._parts = mesh.shape["data"] * mesh.shape["fsdp"]
    self._num_slots = num_slots
    self._kernels = sampler.make_kernels(
        config, compute_dtype=compute_dtype, vocab_size=vocab_size, mesh=mesh
    )
    self._jobs: dict[int, _Job] = {}
    self.reset()
    self.update(models, version)

  def update(self, models: Models, version: int) -> None:
    """Serves these weights from now on; see the class."""
    if self.num_active:
      raise errors.ServiceError(
          "service.busy",
          "the weights cannot change while samples are under way",
          where="update",
          got=f"{self.num_active} samples",
      )
    self._clear()
    with self._context():
      self._models = tuple(self._copy(params) for params, _ in models)
    self._weights = np.array([weight for _, weight in models], np.float32)
    self._version = version

  def reset(self) -> None:
    """Forgets what earlier requests left: shapes and the place in the ring,
    and so the last bits of what follows. Nothing may be under way."""
    assert self.idle
    self._clear()
    self._clock = 0
    self._layout = 0, 0  # slots of a group and pages of a part, the last ones

  def submit(self, request: Request) -> None:
    """Queues a request; see the class."""
    self.check(request)
    self._jobs[request.request_id] = _Job(request)

  def cancel(self, request_id: int, sample: int | None = None) -> None:
    """Ends a request or one of its samples; see the class."""
    job = self._jobs.get(request_id)
    if job is None:  # it has ended
      return
    for waits in [s for s in job.waiting if sample in (None, s)]:
      job.waiting.remove(waits)
      self._count_out(job)
    for place, (held, held_sample) in list(self._held.items()):
      if held is job and sample in (None, held_sample):
        self._free(place)

  @property
  def num_active(self) -> int:
    return len(self._held)

  @property
  def num_waiting(self) -> int:
    return sum(len(job.waiting) for job in self._jobs.values())

  @property
  def idle(self) -> bool:
    return not self._jobs

  def step(self, max_tokens: int) -> list[Progress]:
    """Refills and decodes; see the class."""
    max_tokens = min(max_tokens, sampler.STRETCH)
    self._refill()
    if not self._held:
      return []
    slots = self._slots
    for group, job in enumerate(self._prompts):
      slots.wanted[group] = job is not None and bool(job.waiting)
    slots.queued[...] = any(job.waiting for job in self._jobs.values())
    ends = np.minimum(slots.counts + max_tokens, slots.max_new_tokens)
    self._grow(own_length=ring(ends[slots.active].max()))
    with self._context():
      self._memory, drawn = self._kernels.decode(
          self._models, self._weights, self._memory, self._put(slots),
          np.int32(self._clock), np.int32(max_tokens),
      )
    drawn = jax.tree.map(np.asarray, drawn)
    # Every length of the ring divides 2^30.
    self._clock = (self._clock + int(drawn.numbers.max())) % 2**30
    return self._tell(drawn)

  def _tell(self, drawn: sampler.Drawn) -> list[Progress]:
    told = []
    for place, (job, sample) in self._held.items():
      number = drawn.numbers[place]
      tokens, *logps = (x[:number, *place].copy() for x in drawn[2:])
      if not np.isfinite(logps).all():
        self._jobs.clear()
        self._clear()
        raise errors.NonFiniteError(
            "generation.non_finite",
            "the model gave log-probabilities that are not finite",
            where=f"weights of version {self._version}",
            got=f"request {job.request.request_id}",
        )
      reason = None
      if drawn.ended[place]:
        stopped = tokens[-1] in self._slots.stop_ids[place]
        reason = "stop" if stopped else "length"
      told.append(Progress(
          job.request.request_id, sample, tokens, *logps, reason, self._version
      ))
      self._slots.tokens[place] = tokens[-1]
      self._slots.counts[place] += number
    for place in zip(*np.nonzero(drawn.ended)):
      self._free(tuple(map(int, place)))
    return told

  def score(self, prompts: Sequence[np.ndarray]) -> list[Scored]:
    """What the first model says of the tokens of prompts.

    Raises:
      NonFiniteError: `generation.non_finite`.
    """
    out = []
    for first in range(0, len(prompts), self._parts):
      some = prompts[first : first + self._parts]
      width = decoder.PAGE * _rung(num_pages(max(map(len, some))), 2)
      tokens = np.zeros((self._parts, width), np.int32)
      lengths = np.zeros(self._parts, np.int32)
      for part, ids in enumerate(some):
        tokens[part, : len(ids)], lengths[part] = ids, len(ids)
      with self._context():
        told = self._kernels.score(
            self._models[0], *self._put((tokens, lengths)))
      told = [np.asarray(x) for x in told]
      for part, ids in enumerate(some):
        one = Scored(*(x[part, 1 : len(ids)] for x in told))
        if not np.isfinite(one.logps).all():
          raise errors.NonFiniteError(
              "generation.non_finite",
              "the model gave log-probabilities that are not finite",
              where=f"weights of version {self._version}")
        out.append(one)
    return out

  # --- who sits where ---------------------------------------------------------

  def _clear(self) -> None:
    """Empties the slots and gives their memory back."""
    self._memory = self._slots = None
    self._held: dict[tuple[int, int], tuple[_Job, int]] = {}
    self._prompts: list[_Job | None] = []  # whose prompt each group has

  def _free(self, place: tuple[int, int]) -> None:
    """Empties a slot; what its sample asked for costs nothing any more."""
    job, _ = self._held.pop(place)
    self._slots.active[place] = False
    self._ask(place, Sampling())
    self._count_out(job)

  def _count_out(self, job: _Job) -> None:
    job.left -= 1
    if not job.left:
      del self._jobs[job.request.request_id]

  def _refill(self) -> None:
    """Gives free slots the samples that wait."""
    waiting = [job for job in self._jobs.values() if job.waiting]
    if not waiting:
      return
    if not self._held:
      self._lay_out(waiting)
    for group, job in enumerate(self._prompts):
      if job is not None:
        self._seat(group, job)
    size = len(self._prompts) // self._parts
    while True:
      busy = {group for group, _ in self._held}
      batch = {}  # one free group of each part, as far as there are some
      for part in range(self._parts):
        first = part * size
        free = [g for g in range(first, first + size) if g not in busy]
        waiting = [job for job in waiting if job.waiting]
        if free and waiting:
          # A prompt that no group has comes first; the oldest of those.
          job = min(waiting, key=self._prompts.count)
          self._prompts[free[0]] = job
          self._seat(free[0], job)
          batch[part] = free[0] - first, job.request
      if not batch:
        return
      self._prefill(batch)

  def _lay_out(self, waiting: list[_Job]) -> None:
    """Arranges the slots, all of them free, for what waits."""
    groups, width, pages = arrange(
        [len(job.waiting) for job in waiting],
        [num_pages(len(job.request.prompt)) for job in waiting],
        num_slots=self._num_slots, parts=self._parts, last=self._layout)
    self._layout = width, pages
    self._memory = None  # before the new one is made
    with self._context():
      self._memory = self._kernels.init(
          groups, width, ring(1), self._parts, pages, len(self._models)
      )
    self._slots = empty_slots(
        groups, width, len(self._stop_ids) + MAX_STOP_IDS, self._parts, pages
    )
    self._prompts = [None] * groups

  def _grow(self, *, own_length: int = 0, pages: int = 0) -> None:
    """Makes room for longer samples or for more pages."""
    owner, start = self._slots.pages
    more = max(0, pages - owner.shape[1])
    now = self._memory.own.shape[2]
    if not more and own_length <= now:
      return
    pad = lambda x, value: np.pad(
        x, ((0, 0), (0, more)), constant_values=value
    )
    self._slots = self._slots._replace(
        pages=decoder.Pages(pad(owner, -1), pad(start, 0))
    )
    pages = owner.shape[1] + more
    self._layout = self._layout[0], pages
    with self._context():
      self._memory = self._kernels.grow(
          self._memory, max(own_length, now), pages
      )

  def _seat(self, group: int, job: _Job) -> None:
    """Begins samples of the group's prompt in its free slots."""
    request, slots = job.request, self._slots
    for slot in range(slots.active.shape[1]):
      place = group, slot
      if not job.waiting or place in self._held:
        continue
      sample = job.waiting.popleft()
      self._held[place] = job, sample
      slots.active[place] = True
      slots.tokens[place] = request.prompt[-1]
      slots.counts[place] = 0
      slots.seeds[place] = request.seed
      slots.sample_index[place] = request.sample_indices[sample]
      self._ask(place, request.sampling)
    slots.prompt_lengths[group] = len(request.prompt) - 1
    slots.prompt_ids[group] = request.prompt_id

  def _ask(self, place: tuple[int, int], how: Sampling) -> None:
    """Sets how the sample of a slot is drawn."""
    slots = self._slots
    for name in sampler.SETTINGS:
      getattr(slots, name)[place] = getattr(how, name)
    slots.max_new_tokens[place] = how.max_new_tokens or self._max_new
    stops = [*self._stop_ids, *how.stop_ids]
    slots.stop_ids[place] = -1
    slots.stop_ids[place][: len(stops)] = stops

  def _prefill(self, batch: dict[int, tuple[int, Request]]) -> None:
    """Runs prompts, at most one in each part: part -> group in it, request."""
    most = 0
    for part, (group, request) in batch.items():
      owner = self._slots.pages.groups[part]
      owner[owner == group] = -1  # of the group's prompt before
      used = int((owner >= 0).sum())
      most = max(most, used + num_pages(len(request.prompt)))
    if most > self._slots.pages.groups.shape[1]:
      self._grow(pages=_rung(most, 4))
    owner, start = self._slots.pages
    longest = max(num_pages(len(r.prompt)) for _, r in batch.values())
    width = _rung(longest, 2)
    tokens = np.zeros((self._parts, width * decoder.PAGE), np.int32)
    lengths = np.zeros(self._parts, np.int32)
    pages = np.full((self._parts, width), owner.shape[1], np.int32)
    for part, (group, request) in batch.items():
      ids = request.prompt[:-1]  # the last is the first that a slot runs
      tokens[part, : len(ids)], lengths[part] = ids, len(ids)
      number = num_pages(len(request.prompt))
      free = np.nonzero(owner[part] < 0)[0][:number]
      pages[part, :number], owner[part, free] = free, group
      start[part, free] = decoder.PAGE * np.arange(number)
    with self._context():
      self._memory = self._kernels.prefill(
          self._models, self._memory, *self._put((tokens, lengths, pages))
      )

  # --- devices ----------------------------------------------------------------

  def _context(self):
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _put(self, arrays):
    """Host arrays where the compiled functions want them."""
    if self._mesh is None:
      return arrays
    split = sharding.batch_sharding(self._mesh)
    whole = sharding.replicated(self._mesh)
    return jax.tree.map(
        lambda x: sharding.put_global(x, split if x.ndim else whole), arrays
    )

  def _copy(self, params: Params) -> Params:
    """The weights as the kernels read them, on this engine's devices."""
    if self._mesh is None:
      return _unstack(params, self._dtype)
    placed = sharding.infer_shardings(params, decoder.PARAM_RULES, self._mesh)
    params = jax.device_put(params, placed)
    return _unstack(params, self._dtype)

  # --- what can be served -----------------------------------------------------

  def check(self, request: Request) -> None:
    """Refuses what can not be served.

    Raises:
      ServiceError: `request.FIELD`, with FIELD of Request or of Sampling.
    """

    def refuse(field, message, **kw):
      return errors.ServiceError(
          f"request.{field}", message,
          where=f"{field} of request {request.request_id}", **kw,
      )

    if request.request_id in self._jobs:
      raise refuse("request_id", "a request with this id is being served")
    how, prompt = request.sampling, np.asarray(request.prompt)
    new = how.max_new_tokens
    if not 1 <= new <= self._max_new:
      raise refuse(
          "max_new_tokens", "max_new_tokens is out of range", got=new,
          want=f"1 to {self._max_new}",
      )
    positions = self._config.max_positions
    if not 1 <= len(prompt) <= positions - new:
      raise refuse(
          "prompt", "the prompt does not fit the context beside its completion",
          got=f"{len(prompt)} tokens",
          want=f"1 to {positions - new}: {positions} positions less {new} new",
      )
    if prompt.min() < 0 or prompt.max() >= self._num_tokens:
      raise refuse(
          "prompt", "the prompt has a token id outside the vocabulary",
          want=f"0 to {self._num_tokens - 1}",
      )
    if np.shape(request.prompt_id) != (2,):
      raise refuse(
          "prompt_id", "a prompt id of two words is needed",
          got=np.shape(request.prompt_id), want=(2,),
      )
    stops_known = all(0 <= i < self._num_tokens for i in how.stop_ids)
    temperature, penalty = how.temperature, how.repetition_penalty
    for field, value, right, want in (
        ("sample_indices", len(request.sample_indices),
         len(request.sample_indices) >= 1, "at least one"),
        ("temperature", temperature,
         temperature == 0 or COLDEST <= temperature < math.inf,
         f"0 (greedy) or {COLDEST} and more"),
        ("top_k", how.top_k, how.top_k >= 0, "0 (all) or more"),
        ("top_p", how.top_p, 0 < how.top_p <= 1, "above 0 and at most 1"),
        ("min_p", how.min_p, 0 <= how.min_p <= 1, "0 to 1"),
        ("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0"),
        ("min_new_tokens", how.min_new_tokens,
         0 <= how.min_new_tokens <= new, f"0 to {new}, the most tokens"),
        ("stop_ids", how.stop_ids,
         stops_known and len(how.stop_ids) <= MAX_STOP_IDS,
         f"at most {MAX_STOP_IDS} ids of 0 to {self._num_tokens - 1}"),
        ("seed", request.seed, 0 <= request.seed < 2**32, "0 to 2^32 - 1"),
    ):
      if not right:
        raise refuse(field, f"{field} is out of range", got=value, want=want)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(params, dtype):
  """Adapters are merged, once for the thousands of tokens to come."""
  return decoder.unstack_layers(lora.merge(params, dtype), dtype)


def arrange(
    samples: Sequence[int], needs: Sequence[int], *, num_slots: int, parts: int,
    last: tuple[int, int] = (0, 0),
) -> tuple[int, int, int]:
  """Arranges free slots for prompts that wait.

  Args:
    samples, needs: of each prompt the samples that wait, and its pages.
    num_slots: samples decoded together, about.
    parts: F.
    last: slots of a group and pages of a part that programs are compiled for.

  Returns:
    groups G, slots W of a group, pages Q of a part.
  """
  # Slots of a group share the product with the prompt's keys, but those that
  # end early wait for the last: with a queue, half as many slots take turns.
  width = _width(max(samples), num_slots, parts)
  if sum(samples) > num_slots:
    width = max(1, width // 2)
  # What was compiled for will do: half the width, and pages of which no more
  # than half are empty.
  last_width, last_pages = last
  if last_width <= width <= 2 * last_width:
    width = last_width
  groups = max(1, num_slots // (width * parts)) * parts
  pages = max(max(needs), math.ceil(sum(needs[:groups]) / parts))
  if width == last_width and pages <= last_pages <= max(2 * pages, _FEWEST):
    return groups, width, last_pages
  return groups, width, max(_FEWEST, _rung(pages, 4))


def _width(samples: int, num_slots: int, parts: int) -> int:
  """Slots of a group for so many samples of a prompt."""
  width = min(_WIDEST, samples, max(1, num_slots // parts))
  return 2 ** (width.bit_length() - 1)


def _rung(number: int, steps: int) -> int:
  """The next of a ladder with so many steps from a power of two to the next."""
  step = max(1, (1 << (number - 1).bit_length()) // (2 * steps))
  return -(-number // step) * step


def ring(length: int) -> int:
  """The length of the ring for so many own tokens."""
  return decoder.PAGE * _rung(-(-int(length) // decoder.PAGE), 1)


def num_pages(length: int) -> int:
  """Pages of a prompt of so many tokens, at least one; its last is in none."""
  return max(1, -(-(length - 1) // decoder.PAGE))


def empty_slots(
    groups: int, width: int, num_stops: int, parts: int, pages: int
) -> sampler.Slots:
  """Slots that nobody has, as numpy arrays that are written in place."""
  shape = groups, width
  floats = lambda value: np.full(shape, value, np.float32)
  ints = lambda dtype=np.int32: np.zeros(shape, dtype)
  return sampler.Slots(
      active=ints(bool), tokens=ints(), counts=ints(), seeds=ints(np.uint32),
      sample_index=ints(), temperature=floats(1), top_k=ints(),
      top_p=floats(1), min_p=floats(0), repetition_penalty=floats(1),
      min_new_tokens=ints(), max_new_tokens=ints(),
      stop_ids=np.full((*shape, num_stops), -1, np.int32), wanted=ints(bool),
      queued=np.zeros((), bool), prompt_lengths=np.zeros(groups, np.int32),
      prompt_ids=np.zeros((groups, 2), np.uint32),
      pages=decoder.Pages(
          groups=np.full((parts, pages), -1, np.int32),
          starts=np.zeros((parts, pages), np.int32),
      ),
  )
