"""Rounds of on-policy candidates: when they are made, where they lie, and
which of them make a batch.

Round r belongs to the updates r * S .. (r + 1) * S - 1. Its candidates are
written by the weights published `lag` rounds before it begins, never by those
that happen to be there: with a lag a thread makes them while earlier rounds
train, and a round that is not ready is waited for. Each round is one committed
folder, so a run that restarts in the middle of one trains on the same sets.
Beside it lie the samples of a round whose reward has not answered yet. A mirror
has every round too, for a machine whose disk has none.
Several processes make a round between two updates, whatever the lag: what runs
on the devices of all must be begun by all in the same order.
"""

import concurrent.futures
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mcpo_jax import commit, errors, faults, hosts, storage, types
from mcpo_jax.data import batches
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import step as step_lib

_FILE = "candidates.jsonl"


class Plan(NamedTuple):
  """How long rounds are and what they are made of."""

  num_prompts: int  # of a round
  num_steps: int  # S, updates of a round
  num_rounds: int
  lag: int  # rounds between the weights that write and those that train
  replay: int  # earlier rounds whose sets are trained on again
  ema_decay: float | None  # of reference weights, per round
  extrapolation: float  # see `guide`

  @property
  def moves(self) -> bool:
    """Whether the train state carries weights beside the policy's."""
    return self.ema_decay is not None or self.extrapolation > 0


class PoolSet(NamedTuple):
  """The scored candidates of one prompt, with where each came from."""

  row: int  # of the prompt, in the data
  candidates: types.CandidateSet
  prompt: Any  # text or messages
  texts: list[str]  # [K]
  sources: list[str]  # [K] "policy" or "data"
  finish_reasons: list[str | None]  # [K] None: not sampled
  anchors: dict[str, np.ndarray]  # name -> [K] float32 nats

  @property
  def has_contrast(self) -> bool:
    """Whether one candidate is better than another."""
    scores = self.candidates.scores
    if len(scores) < 2:
      return False
    if self.candidates.preferred >= 0:  # it is preferred whatever the scores
      return True
    return scores.max() > scores.min()


class Pool(NamedTuple):
  """The sets of one round."""

  sets: list[PoolSet]
  policy_step: int  # updates behind the weights that wrote them
  metrics: dict[str, float]


class Weights(NamedTuple):
  """Of which weights a round is made."""

  policy: types.Params  # write the candidates
  moving: types.Params | tuple[()]  # the moving average, if there is one


Fill = Callable[[int, Weights, int], Pool]  # (round, weights, policy step)


@jax.jit
def guide(params: types.Params, last: types.Params, strength) -> types.Params:
  """Weights ahead of the policy: params + strength * (params - last), with
  those of the round before. Accelerated preference optimization writes the
  next round's candidates by them and measures from them.

  References:
    He et al. 2024, https://arxiv.org/abs/2410.06293, on parameters.
  """
  return jax.tree.map(
      lambda new, old: (new + strength * (new - old)).astype(new.dtype),
      params, last)


@jax.jit
def average(mean: types.Params, params: types.Params, decay) -> types.Params:
  """decay * mean + (1 - decay) * params."""
  return jax.tree.map(
      lambda m, x: (decay * m + (1.0 - decay) * x).astype(m.dtype), mean,
      params)


class Rounds:
  """The on-policy candidates of one training run."""

  def __init__(
      self,
      plan: Plan,
      folder: pathlib.Path,
      fill: Fill,
      *,
      batch_size: int,
      seed: int,
      arrange: Callable[..., batch_lib.HostBatch],
      check: Callable[[int, Pool], None],
      mirror: str | None = None,
  ):
    """Reads nothing yet.

    Args:
      plan: of the rounds.
      folder: one folder a round is written there.
      fill: makes the pool of a round; a function of its arguments alone.
      batch_size: B.
      seed: of the order of the sets.
      arrange: (sets, rows, visits) -> HostBatch, see `batch.arrange`.
      check: (step, pool) -> None at the start of every round: alarms.
      mirror: place of the rounds in an object store.
    """
    self._plan, self._folder, self._fill = plan, folder, fill
    self._batch_size, self._seed = batch_size, seed
    self._arrange, self._check, self._mirror = arrange, check, mirror
    self._usable: tuple[int, list[PoolSet]] | None = None
    self._pending: dict[int, concurrent.futures.Future] = {}
    self._thread = concurrent.futures.ThreadPoolExecutor(1)

  def advance(
      self, step: int, state: step_lib.TrainState
  ) -> tuple[step_lib.TrainState, dict[str, float]]:
    """Has the candidates of update `step` ready. Called before every update.

    Returns:
      the state, with its moving weights moved where a round begins, and the
      metrics of that round, {} within one.

    Raises:
      ServiceError: `reward.tie`, no set of the round has a better candidate;
        and what generation and rewards raise.
      CheckpointError: the round's folder is damaged or not there.
    """
    plan, metrics = self._plan, {}
    current, place = divmod(step, plan.num_steps)
    if self._usable is None:
      hosts.on_disk("rounds", lambda: self._discard_after(step))
      hosts.from_first("the store's rounds", lambda: self._discard_copies(step))
    if place == 0:
      policy, moving = state.params, state.moving
      if plan.extrapolation:
        policy = guide(policy, moving, plan.extrapolation)
        moving = jax.tree.map(jnp.copy, state.params)
      elif plan.ema_decay is not None:
        moving = average(moving, policy, plan.ema_decay)
      state = state._replace(moving=moving)
      weights = Weights(
          step_lib.policy_of(policy), () if plan.extrapolation else moving)
      last = min(current + plan.lag, plan.num_rounds - 1)
      for number in range(last + 1) if step == 0 else [current + plan.lag]:
        if number <= last:
          self._begin(number, weights, step)
    if self._usable is None or self._usable[0] != current:
      pool = self._open(current)
      if place == 0:
        metrics = pool.metrics
        hosts.from_first("alarms", lambda: self._check(step, pool))
      self._usable = current, self._contrast_sets(current, pool)
    return state, metrics

  def make_batch(self, step: int) -> batch_lib.HostBatch:
    """The sets of update `step`, a function of (seed, step) and the pools."""
    current, place = divmod(step, self._plan.num_steps)
    number, usable = self._usable
    assert number == current
    picked, epochs = batches.example_indices(
        place, batch_size=self._batch_size, num_examples=len(usable),
        seed=self._seed + current)
    sets = [usable[i] for i in picked]
    batch = self._arrange(
        [s.candidates for s in sets], np.array([s.row for s in sets]),
        # Another visit whenever a prompt may come with the same candidates.
        (current * self._plan.num_steps + epochs).astype(np.int32))
    anchors = {}
    for name in sets[0].anchors:
      values = np.zeros(batch.meta.role.shape, np.float32)
      for b, (one, slots) in enumerate(zip(sets, batch.order)):
        own = one.anchors[name]
        values[b, :len(own)] = own[slots[:len(own)]]
      anchors[name] = values
    return batch._replace(meta=batch.meta._replace(anchors=anchors))

  def settle(self) -> None:
    """Waits until every round under way is on disk: a checkpoint needs the
    candidates whose weights it does not hold."""
    for future in self._pending.values():
      future.result()
    self._pending.clear()

  def close(self) -> None:
    """Waits for the thread; what it was making is not used."""
    self._thread.shutdown(cancel_futures=True)

  def _place(self, number: int) -> pathlib.Path:
    return place_of(self._folder, number)

  def _begin(self, number: int, weights: Weights, step: int) -> None:
    """Starts to make a round that is not on disk already."""
    place = self._place(number)
    if hosts.on_all_disks("a round", lambda: self._is_there(number)):
      hosts.from_first("a round's copy", lambda: self._copy(number))
      return
    hosts.on_disk("a round", lambda: shutil.rmtree(place, ignore_errors=True))
    hosts.from_first("a round's copy", lambda: self._drop_copy(number))

    def make(weights):
      try:
        pool = self._fill(number, weights, step)
      except errors.ServiceError as e:
        if samples_of(place).exists():
          e.hint = (f"the samples of round {number} lie in "
                    f"{samples_of(place)}; the same line has them scored")
        raise
      faults.point("online.scored")
      write_pool(place, pool)
      if hosts.writes():
        commit.remove_folder(samples_of(place))
      hosts.from_first("candidates", lambda: self._copy(number))
      faults.point("online.committed")

    if self._plan.lag == 0 or hosts.count() > 1:
      make(weights)
    else:  # the trainer gives its own arrays away at the next update
      copied = jax.tree.map(jnp.copy, weights)
      self._pending[number] = self._thread.submit(make, copied)

  def _open(self, number: int) -> Pool:
    if number in self._pending:
      self._pending[number].result()
      del self._pending[number]
    return self._read(number)

  def _read(self, number: int) -> Pool:
    if self._mirror is not None:
      hosts.on_disk("a round", lambda: self._is_there(number))
    return read_pool(self._place(number))

  def _is_there(self, number: int) -> bool:
    """Whether a round lies on disk, after a look in the store."""
    place = self._place(number)
    if is_there(place):
      return True
    if self._mirror is None:
      return False
    try:
      storage.pull(self._copy_of(number), place)
      return True
    except errors.CheckpointError as e:
      if e.slug != "ckpt.uncommitted":
        logging.warning("the store's round %s: %s", place.name, e)
      return False

  def _copy(self, number: int) -> None:
    """Has the store hold a round."""
    if self._mirror is not None:
      storage.push(self._place(number), self._copy_of(number))

  def _copy_of(self, number: int) -> str:
    return f"{self._mirror}/{self._place(number).name}"

  def _discard_copies(self, step: int) -> None:
    """As `_discard_after`, of the store."""
    plan = self._plan
    for number in storage.steps(self._mirror) if self._mirror else ():
      if max(0, number - plan.lag) * plan.num_steps > step:
        storage.remove(self._copy_of(number))

  def _drop_copy(self, number: int) -> None:
    """Makes room in the store for a round that is made again."""
    if self._mirror is not None and number in storage.steps(self._mirror):
      storage.remove(self._copy_of(number))

  def _discard_after(self, step: int) -> None:
    """Drops rounds written by weights that the restored run has yet to
    reach."""
    for place in sorted(self._folder.glob("[0-9]*")):
      try:
        newer = commit.verify(place)["policy_step"] > step
      except errors.CheckpointError:
        continue  # told when it is opened
      if newer:
        shutil.rmtree(place)

  def _contrast_sets(self, current: int, pool: Pool) -> list[PoolSet]:
    """Sets to train on: of this round and of those replayed."""
    usable = [s for s in pool.sets if s.has_contrast]
    if not usable:
      raise errors.ServiceError(
          "reward.tie", "the reward tells no candidate of the round from "
          "another", where=f"round {current}",
          got=f"{len(pool.sets)} sets, all tied",
          hint="raise generation.temperature or online.num_candidates, or take "
          "a finer reward")
    for number in range(max(0, current - self._plan.replay), current):
      usable += [s for s in self._read(number).sets if s.has_contrast]
    return usable


def place_of(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Where a round lies."""
  return folder / f"{number:06d}"


def is_there(place: pathlib.Path) -> bool:
  """Whether a round, or its samples, lie on disk; what is damaged is
  removed."""
  if not place.exists():
    return False
  try:
    commit.verify(place)
    return True
  except errors.CheckpointError as e:
    logging.warning("round %s is made again: %s", place.name, e)
    shutil.rmtree(place)
    return False


def samples_of(place: pathlib.Path) -> pathlib.Path:
  """Where the samples of a round lie until it is there itself."""
  return place.with_name(f"{place.name}.samples")


def write_pool(place: pathlib.Path, pool: Pool) -> None:
  """Commits a pool as one folder: JSON Lines, a set a line."""

  def write(folder):
    with open(folder / _FILE, "w") as file:
      for one in pool.sets:
        file.write(json.dumps(_to_json(one)) + "\n")

  commit.write_folder(place, write, {
      "policy_step": pool.policy_step, "metrics": pool.metrics})


def read_pool(place: pathlib.Path) -> Pool:
  """What `write_pool` wrote, to the bit.

  Raises:
    CheckpointError: the folder is damaged or was never committed.
  """
  meta = commit.verify(place)
  lines = (place / _FILE).read_text().splitlines()
  return Pool([_from_json(json.loads(line)) for line in lines],
              meta["policy_step"], meta["metrics"])


def to_numbers(values: Any) -> list[float | None] | None:
  """A list for JSON, which has no NaN; None stays."""
  return None if values is None else [
      None if v != v else v for v in np.asarray(values).tolist()]


def numbers_of(values: list[float | None], dtype: Any) -> np.ndarray:
  """What `to_numbers` was given."""
  return np.array([np.nan if v is None else v for v in values], dtype)


def _to_json(one: PoolSet) -> dict[str, Any]:
  """Arrays as lists; a float32 as a number reads back to the same float32."""
  plain, own = to_numbers, one.candidates
  return {
      "prompt_id": own.prompt_id, "row": one.row, "prompt": one.prompt,
      "completions": one.texts, "scores": plain(own.scores),
      "sources": one.sources, "finish_reasons": one.finish_reasons,
      "multiplicity": plain(own.multiplicity), "preferred": own.preferred,
      "policy_step": own.policy_step,
      "behaviour_logps": plain(own.behaviour_logps),
      "behaviour_raw_logps": plain(own.behaviour_raw_logps),
      "anchors": {name: plain(x) for name, x in one.anchors.items()},
      "candidate_ids": plain(own.candidate_ids),
      "example_id": plain(own.example_id), "prompt_tokens": plain(own.prompt),
      "completion_tokens": [plain(c) for c in own.completions],
      "completion_masks": [plain(m) for m in own.completion_masks],
  }


def _from_json(line: dict[str, Any]) -> PoolSet:
  floats = lambda x: numbers_of(x, np.float32)
  return PoolSet(
      row=line["row"], prompt=line["prompt"], texts=line["completions"],
      sources=line["sources"], finish_reasons=line["finish_reasons"],
      anchors={name: floats(x) for name, x in line["anchors"].items()},
      candidates=types.CandidateSet(
          example_id=np.array(line["example_id"], np.uint32),
          prompt_id=line["prompt_id"],
          prompt=np.array(line["prompt_tokens"], np.int32),
          completions=[
              np.array(c, np.int32) for c in line["completion_tokens"]],
          completion_masks=[
              np.array(m, bool) for m in line["completion_masks"]],
          candidate_ids=np.array(line["candidate_ids"], np.uint32),
          multiplicity=np.array(line["multiplicity"], np.int32),
          scores=floats(line["scores"]), preferred=line["preferred"],
          policy_step=line["policy_step"],
          behaviour_logps=floats(line["behaviour_logps"]),
          behaviour_raw_logps=floats(line["behaviour_raw_logps"])))
