"""The step: exact accumulation, the draw's layout, sharding, one trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax import checkpoints
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib
from mcpo_jax.training import update


def reference_of(batch):
  """Some fixed anchors, different for every candidate."""
  rng = np.random.default_rng(5)
  return stage_lib.Reference(
      lambda b: rng.normal(-20, 2, b.meta.role.shape).astype(np.float32))


def run(stage, model, *, sets=None, steps=1, seed=3, slots=8):
  rng = np.random.default_rng(seed)
  sets = sets or [cases.candidate_set(rng, i + 1, 3 + i) for i in range(5)]
  batch = cases.host_batch(sets, slots)
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  out = []
  for _ in range(steps):
    state, metrics = update.run_step(
        stage, model, functions, state, batch, reference_of(batch))
    out.append(jax.device_get(metrics))
  return jax.device_get(state), out, functions


def assert_trees_close(a, b, tolerance):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance),
      a, b)


SMALL = {"learning_rate": 1e-3, "name": "sgd", "b1": 0.0}


@pytest.mark.parametrize("objective,strategy", [
    ("mcpo", "mc"), ("dpo", "random"), ("rnce", "all"), ("sft", "none"),
    ("cd", "mc"), ("simpo", "fixed_worst")])
def test_more_chunks_leave_the_update_unchanged(objective, strategy, x64):
  stage = cases.stage(objective, strategy=strategy,
                      optimizer=cases.OPTIMIZER | SMALL)
  if objective == "simpo":
    stage = stage._replace(
        objective_settings={"beta": 2.0, "gamma_beta_ratio": 0.5})
  one, (a,), _ = run(stage, cases.make_model(
      num_streams=12, dtype=jnp.float64))
  many, (b,), _ = run(stage, cases.make_model(
      num_streams=2, dtype=jnp.float64))
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
  assert a["grads/global_norm"] > 1e-3
  assert_trees_close(one.params, many.params, 1e-9)


def test_cotangents_give_the_gradient_of_the_fused_path(x64):
  """A loss that is not separable goes the other way and must agree."""
  stage = cases.stage("dpo", strategy="random",
                      optimizer=cases.OPTIMIZER | SMALL)
  model = cases.make_model(num_streams=1, dtype=jnp.float64)
  fused, (a,), _ = run(stage, model)
  other, (b,), functions = run(stage._replace(
      entry=stage.entry._replace(separable=False)), model)
  assert functions.from_cotangents._cache_size() == 1
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
  assert_trees_close(fused.params, other.params, 1e-9)


def test_loss_of_equal_policy_and_reference_is_log_of_one_plus_negatives():
  model = cases.make_model()
  stage = cases.stage("mcpo", num_negatives=2)
  rng = np.random.default_rng(3)
  batch = cases.host_batch(
      [cases.candidate_set(rng, i + 1, 4) for i in range(3)], 8)
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  anchor = update.score_chunks(
      model, functions, state.params, batch, model.put_replicated(batch.meta),
      model.pack_all(batch))
  _, metrics = update.run_step(
      stage, model, functions, state, batch,
      stage_lib.Reference(lambda b: np.asarray(anchor.logps)))
  np.testing.assert_allclose(metrics["loss"], np.log(3), rtol=1e-5)
  np.testing.assert_allclose(metrics["kernel/ess"], 3, rtol=1e-4)


def test_terms_compare_with_the_weights_of_the_reference():
  model = cases.make_model()
  stage = cases.stage("tdpo1", strategy="random", score=None)
  rng = np.random.default_rng(3)
  batch = cases.host_batch(
      [cases.candidate_set(rng, i + 1, 4) for i in range(3)], 4)
  functions = stage_lib.make_functions(stage, model)
  policy, other = cases.init(model), cases.init(model, seed=1)
  (chunk,) = model.pack_all(batch)
  drawn, sets, *_ = functions.draw(
      0, 0, (), jnp.zeros((3, 4)), model.put_replicated(batch.meta))
  inputs = step_lib.Inputs(sets, drawn, (), 0)
  divergence = lambda reference: functions.features(
      policy, reference, model.put(chunk), inputs).terms["kl"]
  np.testing.assert_allclose(divergence(policy), 0.0, atol=1e-5)
  assert (divergence(other) > 0.01).all()


@functools.cache
def three_steps(devices=1, **mesh):
  """MC-PO in float64 with accumulation: 8 streams hold a pool, but a chunk
  has fewer tokens than what is drawn."""
  model = cases.make_model(num_streams=8, stream_length=20, devices=devices,
                           dtype=jnp.float64, **mesh)
  rng = np.random.default_rng(3)
  sets = [cases.candidate_set(rng, i + 1, 3 + i) for i in range(9)]
  assert len(model.pack_all(cases.host_batch(sets, 12))) > 1
  stage = cases.stage(num_negatives=2, batch_size=9)
  return run(stage, model, sets=sets, steps=3, slots=12)[1]


@pytest.mark.parametrize("mesh", [
    dict(devices=2), dict(devices=4, fsdp=2), dict(devices=8, fsdp=8),
    dict(devices=8, fsdp=2, tensor=2)])
def test_meshes_agree(mesh, x64):
  for one, many in zip(three_steps(), three_steps(**mesh), strict=True):
    np.testing.assert_allclose(one["loss"], many["loss"], rtol=0, atol=1e-13)
    for name in ("kernel/selected", "kernel/selected_mask"):
      np.testing.assert_array_equal(one[name], many[name])
    assert one["loss"] > 0.1


def test_a_restored_state_lies_as_the_first_one_did(tmp_path):
  model = cases.make_model(devices=8, data=1, fsdp=4, tensor=2)
  functions = stage_lib.make_functions(cases.stage(), model)
  state = functions.init(cases.init(model))
  keeper = checkpoints.Checkpointer(tmp_path, keep=2)
  keeper.save(0, state, {})
  keeper.close()
  keeper = checkpoints.Checkpointer(tmp_path, keep=2)
  again, _ = keeper.restore_latest(functions.state_shapes)
  keeper.close()
  places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert places(again) == places(state) == places(functions.state_shapes)


def test_moments_lie_where_their_parameters_lie():
  model = cases.make_model(devices=8, data=1, fsdp=8)
  functions = stage_lib.make_functions(cases.stage(), model)
  state = functions.init(cases.init(model))
  up = state.params["layers"]["mlp"]["up_proj"]["kernel"]
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == up.shape]
  assert len(moments) >= 2
  assert any(x.sharding == up.sharding for x in moments)
  assert len(up.sharding.device_set) == 8
  assert up.addressable_shards[0].data.size == up.size // 8


def test_factors_of_adafactor_are_whole_on_every_device():
  model = cases.make_model(devices=8, data=1, fsdp=8)
  functions = stage_lib.make_functions(
      cases.stage(optimizer=cases.OPTIMIZER | {"name": "adafactor"}), model)
  state = functions.init(cases.init(model))
  for x in jax.tree.leaves(state.opt_state):
    assert x.sharding.is_fully_replicated or x.ndim > 1


def test_each_function_is_traced_once_whatever_the_batch_looks_like():
  model, stage = cases.make_model(num_streams=2), cases.stage()
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  for step in range(3):
    rng = np.random.default_rng(step)
    batch = cases.host_batch(
        [cases.candidate_set(rng, i, 2 + (i + step) % 6) for i in range(5)], 8)
    state, _ = update.run_step(
        stage, model, functions, state, batch, reference_of(batch))
  for name in ("score", "draw", "cotangents", "from_cotangents", "update"):
    assert getattr(functions, name)._cache_size() == 1, name


def test_learning_one_batch_raises_the_margin():
  _, metrics, _ = run(cases.stage(batch_size=5), cases.make_model(), steps=25)
  first, last = metrics[0], metrics[-1]
  assert last["loss"] < first["loss"]
  assert last["logps/chosen"] > first["logps/chosen"]


def test_padded_candidates_of_another_row_have_no_gradient():
  """Only what was drawn is packed: the pool's other tokens get none."""
  stage = cases.stage(
      "dpo", strategy="fixed_worst", score=None, temperature=None)
  model = cases.make_model()
  rng = np.random.default_rng(0)
  one = cases.candidate_set(rng, 1, 5)
  batch = cases.host_batch([one], 6)
  functions = stage_lib.make_functions(stage, model)
  drawn, *_ = functions.draw(
      0, 0, (), jnp.zeros((1, 6)), model.put_replicated(batch.meta))
  (slots,) = update.drawn_slots(drawn, batch, contrast=True)
  worst = batch.order[0].index(int(np.argmin(one.scores)))
  assert list(slots) == [0, worst]


def test_a_non_finite_batch_leaves_the_weights():
  model, stage = cases.make_model(), cases.stage()
  functions = stage_lib.make_functions(stage, model)
  rng = np.random.default_rng(3)
  batch = cases.host_batch(
      [cases.candidate_set(rng, i + 1, 4) for i in range(3)], 8)
  state = functions.init(cases.init(model))
  before = jax.device_get(state)

  def poisoned(b):
    anchor = np.zeros(b.meta.role.shape, np.float32)
    anchor[1, 0] = np.nan
    return anchor

  state, metrics = update.run_step(
      stage, model, functions, state, batch, stage_lib.Reference(poisoned))
  assert not metrics["finite"]
  assert np.isnan(metrics["loss_per_set"]).tolist() == [False, True, False]
  jax.tree.map(np.testing.assert_array_equal, before._replace(step=1),
               jax.device_get(state))
