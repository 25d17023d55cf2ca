"""Chains that go on where an example was left last; states of losses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax import checkpoints, errors, types
from mcpo_jax.data import packing
from mcpo_jax.models import decoder
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import loop, metrics, update
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib

N, B, K, M = 7, 3, 5, 2


def candidate_sets():
  rng = np.random.default_rng(2)
  return [cases.candidate_set(rng, i + 1, 3 + i % 3) for i in range(N)]


def make_batch(step: int) -> batch_lib.HostBatch:
  """Three of seven examples, in order; the next visit begins in the third."""
  places = np.arange(step * B, step * B + B)
  sets = [candidate_sets()[i % N] for i in places]
  order = [packing.order_candidates(s, preferred="best")[0] for s in sets]
  return batch_lib.HostBatch(
      places % N, sets, order, packing.make_set_batch(
          sets, places // N, num_slots=K, order=order, rows=places % N))


def reference(batch):
  rng = np.random.default_rng(int(batch.meta.example_id[0, 0]))
  return rng.normal(-20, 2, (B, K)).astype(np.float32)


def stage_of(objective="mcpo", **kernel):
  stage = cases.stage(objective, batch_size=B, num_steps=6)
  return stage._replace(
      kernel=stage.kernel | kernel, num_examples=N, num_slots=K)


def state_of_chains(row):
  memory = step_lib.Memory(
      jnp.arange(N * M, dtype=jnp.int32).reshape(N, M) % K,
      jnp.arange(N * K, dtype=jnp.int32).reshape(N, K))
  return memory, step_lib.recollect(memory, jnp.asarray(row))


def test_a_batch_finds_the_chains_of_its_examples_and_held_out_ones_begin():
  memory, state = state_of_chains([4, -1, 0])
  np.testing.assert_array_equal(state.selected, [[3, 4], [0, 0], [0, 1]])
  np.testing.assert_array_equal(
      state.selected_mask, [[True, True], [False, False], [False, True]])
  np.testing.assert_array_equal(
      state.history, [memory.history[4], np.zeros(K), memory.history[0]])


def test_what_is_written_is_the_later_of_two_draws_and_nothing_held_out():
  row = jnp.array([4, -1, 4])
  memory, before = state_of_chains(row)
  after = types.KernelState(
      jnp.array([[1, 1], [2, 2], [3, 0]]), jnp.ones((3, M), bool),
      before.history + jnp.eye(3, K, dtype=jnp.int32))
  now = step_lib.remember(memory, row, before, after)
  want = np.array(memory.selected)
  want[4] = 3, 0
  np.testing.assert_array_equal(now.selected, want)
  counts = np.array(memory.history)
  counts[4] += [1, 0, 1, 0, 0]  # both visits count
  np.testing.assert_array_equal(now.history, counts)


class Rounds:
  """Tells what the loop asks of rounds, and breaks when told to."""

  def __init__(self, told, breaks_at=None, lost=False):
    self.told, self.breaks_at, self.lost = told, breaks_at, lost

  def advance(self, step, state):
    self.told.append(f"advance {step}")
    if step == self.breaks_at:
      raise errors.ServiceError("reward.unreachable", "")
    return state, {"round": step} if step % 2 == 0 else {}

  def settle(self):
    self.told.append("settle")
    if self.lost and self.told.count("settle") > 1:
      raise errors.ServiceError("reward.unreachable", "")

  def close(self):
    self.told.append("close")


def test_rounds_are_ready_before_a_batch_and_on_disk_before_a_checkpoint(
    tmp_path, monkeypatch):
  told = []
  save = checkpoints.Checkpointer.save
  monkeypatch.setattr(checkpoints.Checkpointer, "save", lambda self, step, *a: (
      told.append(f"save {step}"), save(self, step, *a)))
  stage = stage_of("dpo", strategy="fixed_worst", score=None,
                   temperature=None)._replace(num_steps=4)
  model = cases.make_model()

  def run(rounds, folder=tmp_path):
    return loop.train(
        stage, model, lambda step: told.append(f"batch {step}") or make_batch(
            step), lambda: cases.init(model), folder,
        metrics.Writer(tmp_path), loop.Schedule(
            log_every=9, save_every=2, keep=2, evaluate_every=9, patience=None,
            keep_best=False), meta={},
        reference=stage_lib.Reference(reference), rounds=rounds)

  with pytest.raises(errors.ServiceError):
    run(Rounds(told, breaks_at=3))
  assert told == [
      "advance 0", "batch 0", "advance 1", "batch 1", "settle", "save 2",
      "advance 2", "batch 2", "advance 3", "settle", "save 3", "close"]
  del told[:]
  run(Rounds(told))  # a round's metrics belong to its first update
  assert told == ["advance 3", "batch 3", "settle", "save 4", "close"]
  rows = [json.loads(line) for line in (
      tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [(r["step"], r["round"]) for r in rows if "round" in r] == [
      (1, 0), (3, 2)]
  # A round whose weights would be gone: the checkpoint before it stays last.
  del told[:]
  with pytest.raises(errors.ServiceError):
    run(Rounds(told, breaks_at=3, lost=True), tmp_path / "lost")
  assert told[-3:] == ["advance 3", "settle", "close"]


def train(folder, stage, *, patience=None):
  """Six steps; `patience` 1 ends them after the fourth."""
  folder.mkdir(exist_ok=True)
  params, step = loop.train(
      stage, cases.make_model(), make_batch,
      lambda: cases.init(cases.make_model()), folder, metrics.Writer(folder),
      loop.Schedule(log_every=1, save_every=100, keep=2, evaluate_every=2,
                    patience=patience, keep_best=False), meta={},
      reference=stage_lib.Reference(reference),
      evaluate=(lambda *_: {"eval/loss": 1.0, "eval/accuracy": 0.5}
                ) if patience else None)
  return jax.device_get(params), step


@pytest.mark.parametrize("stage", [
    stage_of(transition="self_repellent", init="persistent", num_negatives=M,
             num_steps=2, block_size=1, include_preferred=True, repulsion=1.0,
             temperature_schedule="geometric", temperature_end=0.2),
    stage_of("bco", strategy="fixed_worst", score=None, temperature=None),
], ids=["chains", "bco"])
def test_memory_and_state_survive_a_restart(stage, tmp_path):
  if stage.objective == "bco":
    stage = stage._replace(
        objective_settings={"beta": 0.3, "moving_rate": 0.2})
  whole, steps = train(tmp_path / "whole", stage)
  assert steps == 6
  _, steps = train(tmp_path / "broken", stage, patience=1)
  assert steps == 4
  again, steps = train(tmp_path / "broken", stage)
  assert steps == 6
  jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_without_its_memory_a_chain_goes_another_way():
  """The restart test above would pass if nothing were remembered."""
  stage = stage_of(transition="self_repellent", init="persistent",
                   num_negatives=M, include_preferred=True, repulsion=3.0)
  model = cases.make_model()
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  for step in range(5):
    state, _ = update.run_step(
        stage, model, functions, state, make_batch(step),
        stage_lib.Reference(reference))
  memory = jax.device_get(state.memory)
  visits = np.bincount(np.arange(5 * B) % N, minlength=N)
  np.testing.assert_array_equal(memory.history.sum(1), M * visits)
  batch = update.with_anchors(
      make_batch(5), stage, stage_lib.Reference(reference))
  logps = jnp.full((B, K), -20.0)
  ways = [functions.draw(stage.seed, state.step, some, logps, batch.meta)[0]
          for some in (state.memory, jax.tree.map(jnp.zeros_like, memory))]
  assert (ways[0].selected != ways[1].selected).any()


def test_what_a_loss_learns_is_trained_but_no_part_of_the_policy():
  stage = cases.stage("sparse_po", strategy="fixed_worst", score=None,
                      temperature=None, batch_size=B, num_steps=3)._replace(
      objective_settings={
          "beta": 0.3, "mask_penalty": 0.1, "shared_mask": False})
  model = cases.make_model()
  start = cases.init(model)
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(start)
  first = jax.device_get(state.params["objective"])
  other = cases.init(model, seed=1)  # equal weights have no divergence to mask
  for step in range(2):
    state, values = update.run_step(
        stage, model, functions, state, make_batch(step),
        stage_lib.Reference(reference, other))
    assert values["finite"]
  moved = jax.tree.map(
      lambda a, b: bool(np.any(a != b)), first,
      jax.device_get(state.params["objective"]))
  assert any(jax.tree.leaves(moved))
  assert step_lib.policy_of(state.params).keys() == start.keys()
  assert functions.from_loss._cache_size() == 1


def test_the_reference_may_be_of_another_architecture():
  stage = stage_of("tdpo1", strategy="fixed_worst", score=None,
                   temperature=None)
  model = cases.make_model()
  config = dataclasses.replace(model.config, num_layers=3, hidden_size=24)
  other = decoder.init_params(jax.random.key(5), config)
  functions = stage_lib.make_functions(stage, model, config)
  state, values = update.run_step(
      stage, model, functions, functions.init(cases.init(model)),
      make_batch(0), stage_lib.Reference(reference, other, config))
  assert values["finite"] and values["grads/global_norm"] > 0
  with pytest.raises((TypeError, ValueError)):  # taken for the policy's
    update.run_step(
        stage, model, stage_lib.make_functions(stage, model), state,
        make_batch(1), stage_lib.Reference(reference, other))
