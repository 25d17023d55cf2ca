"""What lies on the devices: donated buffers, chunks, remat, the optimizer."""

import contextlib
import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax import checkpoints, errors, sharding
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib
from mcpo_jax.training import update

NO_REFERENCE = stage_lib.Reference(
    lambda batch: np.zeros(batch.meta.role.shape, np.float32))


B, K = 12, 8


def make_batch(count=B):
  """`count` sets in B rows."""
  rng = np.random.default_rng(3)
  sets = [cases.candidate_set(rng, i + 1, 3 + i % 6) for i in range(count)]
  return batch_lib.arrange(
      sets, np.arange(count), np.zeros(count, np.int32), seed=0, num_slots=K,
      preferred="best", top_k=None, batch_size=B)


def num_bytes(tree) -> int:
  """Of the arrays of one device."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def parts(remat="none"):
  """Functions and arguments of one step: of a chunk, and of the update."""
  model = cases.make_model(num_streams=1)._replace(remat=remat)
  functions = stage_lib.make_functions(cases.stage(), model)
  state = functions.init(cases.init(model))
  batch = update.with_anchors(make_batch(), cases.stage(), NO_REFERENCE)
  values = model.no_features(batch)
  drawn, sets, memory, _ = functions.draw(
      0, 0, (), values.logps, model.put_replicated(batch.meta))
  inputs = step_lib.Inputs(sets, drawn, (), state.step)
  total = functions.zeros(state.params, values, inputs)
  chunk = model.put(model.pack_all(batch)[0])
  return (functions,
          (state.params, (), (), total, chunk, inputs, values),
          (state, total, inputs, memory))


def memory_of(function, args):
  return function.lower(*args).compile().memory_analysis()


def test_state_and_sums_are_given_away_and_used_again():
  functions, of_chunk, of_update = parts()
  state, total, inputs, _ = of_update
  of_loss = (*of_chunk[:-1], np.ones(len(inputs.sets.role), bool))
  for function, args, given in (
      (functions.update, of_update, state),
      (functions.from_cotangents, of_chunk, total),
      (functions.from_loss, of_loss, total)):
    assert memory_of(function, args).alias_size_in_bytes == num_bytes(given)


def test_each_remat_policy_keeps_less_than_the_one_before():
  sizes = []
  for remat in ("none", "dots", "full"):
    functions, of_chunk, _ = parts(remat)
    sizes.append(memory_of(
        functions.from_cotangents, of_chunk).temp_size_in_bytes)
  assert sizes[0] > 1.1 * sizes[1] > 1.1 * 1.1 * sizes[2]


def test_more_chunks_need_no_more_memory():
  """One program serves every chunk, and nothing is left of those before."""
  model = cases.make_model(num_streams=1)
  stage = cases.stage()._replace(scoring="separate")
  functions = stage_lib.make_functions(stage, model)
  seen, peaks = [], []

  def watch(*args):
    gc.collect()
    seen.append(num_bytes(jax.live_arrays()))
    return functions.from_cotangents(*args)

  watched = functions._replace(from_cotangents=watch)
  for count in (1, B):
    state = functions.init(cases.init(model))
    update.run_step(
        stage, model, watched, state, make_batch(count), NO_REFERENCE)
    peaks.append((len(seen), max(seen)))
    seen.clear()
    del state
  (few, first), (many, last) = peaks
  assert many >= few + 3 and last - first < num_bytes(model.param_shapes) / 10
  assert functions.from_cotangents._cache_size() == 1


def run(stage, model):
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  for _ in range(2):
    state, _ = update.run_step(
        stage, model, functions, state, make_batch(), NO_REFERENCE)
  return functions, state


def test_bfloat16_weights_have_a_float32_copy_float32_moments_and_sums():
  model = cases.make_model(num_streams=1, dtype=jnp.bfloat16)
  functions, state = run(
      cases.stage(), model._replace(compute_dtype=jnp.float32))
  master, (_, (adam, *_)) = state.opt_state
  kinds = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
  assert kinds(state.params) == {"bfloat16"}
  for tree in (master, adam.mu, adam.nu):
    assert kinds(tree) == {"float32"}
  jax.tree.map(lambda half, x: np.testing.assert_array_equal(
      half, x.astype(jnp.bfloat16)), state.params, master)
  assert functions.update._cache_size() == 1


def test_what_waits_in_the_hosts_memory_trains_alike(tmp_path):
  """Optimizer and products, on a mesh that splits both."""
  model = cases.make_model(devices=8, data=1, fsdp=8)
  _, want = run(cases.stage(), model)
  functions, state = run(
      cases.stage(optimizer=cases.OPTIMIZER | {"offload": True}),
      model._replace(remat="offload"))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
               want, state)
  kinds = {(x.ndim > 0, x.sharding.memory_kind)
           for x in jax.tree.leaves(state.opt_state)}
  assert kinds == {(True, "pinned_host"), (False, "device")}
  assert functions.update._cache_size() == 1
  keeper = checkpoints.Checkpointer(tmp_path, keep=2)
  with contextlib.closing(keeper):
    keeper.save(2, state, {})
  keeper = checkpoints.Checkpointer(tmp_path, keep=2)
  with contextlib.closing(keeper):
    back, _ = keeper.restore_latest(functions.state_shapes)
  jax.tree.map(np.testing.assert_array_equal, state, back)
  assert all(jax.tree.leaves(jax.tree.map(
      lambda x, y: x.sharding == y.sharding, state, back)))


def test_devices_that_do_not_reach_the_hosts_memory_are_refused():
  kind = types.SimpleNamespace(kind="device")
  device = types.SimpleNamespace(
      device_kind="Abacus", addressable_memories=lambda: [kind])
  with pytest.raises(errors.ResourceError) as caught:
    sharding.check_host_memory(
        types.SimpleNamespace(local_devices=[device]), "model.remat")
  assert (caught.value.slug, caught.value.where) == ("device", "model.remat")
  assert "Abacus with device" in str(caught.value)
