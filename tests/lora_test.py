"""LoRA: what adapters compute, that nothing else is trained, in and out."""

import dataclasses
import functools
import types as python_types

import jax
import jax.numpy as jnp
import models_streams
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax import config_keys
from mcpo_jax.models import lora, scoring
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.stages import references
from mcpo_jax.training import architecture, loop, setup, update
from mcpo_jax.training import stage as stage_lib

LLAMA = ModelConfig(
    family="llama", vocab_size=24, hidden_size=16, intermediate_size=20,
    num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6)
GEMMA = ModelConfig(
    family="gemma2", vocab_size=24, hidden_size=16, intermediate_size=20,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, norm_offset=True,
    post_norms=True, embedding_scale=True, attention_softcap=50.0,
    final_softcap=30.0, activation="gelu_tanh", tied_head=True,
    sliding_window=4, local_layers=(True, False))
ALL = config_keys.PROJECTIONS
SCALE = 1.5


def test_the_names_in_a_config_are_those_of_the_decoder():
  assert ALL == tuple(name for _, name in lora.projections())


# --- what they compute --------------------------------------------------------


def make_policy(config, *, rank=2, targets=ALL, dtype=np.float32, zero=False):
  """Random weights with adapters that have moved, or have not."""
  base = models_streams.random_params(config, dtype)
  adapters = lora.init_adapters(
      jax.random.key(3), base, rank=rank, targets=targets, dtype=dtype)
  if not zero:
    rng = np.random.default_rng(7)
    adapters = jax.tree.map(
        lambda x: (0.4 * rng.normal(size=x.shape)).astype(dtype), adapters)
  return base, lora.join(
      lora.join(base, adapters), lora.scales(adapters, SCALE))


def some_streams(config):
  rng = np.random.default_rng(4)
  return models_streams.pack(models_streams.random_sets(
      rng, config.vocab_size, (4, 3), ([5, 2], [3, 4])), 13)


@functools.partial(jax.jit, static_argnums=1)
def logps_of(policy, config, streams):
  dtype = policy["final_norm"]["scale"].dtype
  return scoring.sequence_logps(
      scoring.token_logps(policy, config, streams, compute_dtype=dtype),
      streams, num_sets=2, num_slots=2)


def test_adapters_that_have_not_moved_change_nothing():
  base, policy = make_policy(LLAMA, zero=True)
  streams = some_streams(LLAMA)
  np.testing.assert_array_equal(
      logps_of(policy, LLAMA, streams), logps_of(base, LLAMA, streams))
  trained, frozen = lora.split(policy)
  np.testing.assert_array_equal(
      logps_of(frozen, LLAMA, streams), logps_of(base, LLAMA, streams))
  assert (trained["layers"]["mlp"]["down_proj"]["lora_a"].shape,
          trained["layers"]["mlp"]["down_proj"]["lora_b"].shape) == (
              (3, 20, 2), (3, 2, 16))
  assert np.abs(trained["layers"]["mlp"]["down_proj"]["lora_a"]).max() > 0.1


@pytest.mark.parametrize("config, targets", [
    (LLAMA, ("q_proj", "down_proj")), (GEMMA, ALL)])
def test_adapters_compute_what_merged_weights_compute(config, targets):
  base, policy = make_policy(config, targets=targets)
  merged = lora.merge(policy)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  for (path, old), new in zip(
      jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(merged)):
    adapted = path[-1].key == "kernel" and path[-2].key in targets
    assert adapted != np.array_equal(old, new), path
  up = policy["layers"]["attention"]["q_proj"]
  for layer in range(config.num_layers):
    want = up["kernel"][layer].astype(np.float64) + SCALE * (
        up["lora_a"][layer].astype(np.float64) @ up["lora_b"][layer])
    np.testing.assert_allclose(
        merged["layers"]["attention"]["q_proj"]["kernel"][layer], want,
        atol=1e-6)
  streams = some_streams(config)
  got, start = (logps_of(p, config, streams) for p in (policy, base))
  np.testing.assert_allclose(
      got, logps_of(merged, config, streams), atol=2e-5)
  assert np.abs(got - start).max() > 0.1


def test_the_gradient_is_that_of_the_dense_weights_by_the_chain_rule(x64):
  _, policy = make_policy(LLAMA, dtype=np.float64)
  policy = jax.tree.map(jnp.asarray, policy)
  trained, frozen = lora.split(policy)
  streams, weights = some_streams(LLAMA), np.array([[1.0, -2.0], [0.5, 3.0]])
  loss = lambda policy: jnp.sum(weights * logps_of(policy, LLAMA, streams))
  ours = jax.grad(lambda trained: loss(lora.join(trained, frozen)))(trained)
  dense = jax.grad(loss)(lora.merge(policy))
  for part, name in lora.projections():
    one, got = (tree["layers"][part][name] for tree in (policy, ours))
    kernel = np.asarray(dense["layers"][part][name]["kernel"])
    a, b = np.asarray(one["lora_a"]), np.asarray(one["lora_b"])
    np.testing.assert_allclose(
        got["lora_a"], SCALE * kernel @ b.transpose(0, 2, 1), atol=1e-11)
    np.testing.assert_allclose(
        got["lora_b"], SCALE * a.transpose(0, 2, 1) @ kernel, atol=1e-11)
    assert np.abs(got["lora_a"]).max() > 0.1


def test_bfloat16_kernels_are_merged_in_float32_and_rounded_once():
  _, policy = make_policy(LLAMA)
  halved = jax.tree_util.tree_map_with_path(
      lambda path, x: x.astype(jnp.bfloat16)
      if path[-1].key == "kernel" else x, policy)
  one = halved["layers"]["mlp"]["up_proj"]
  want = one["kernel"].astype(np.float32) + SCALE * (
      one["lora_a"] @ one["lora_b"])
  for dtype, wanted in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
    got = lora.merge(halved, dtype)["layers"]["mlp"]["up_proj"]["kernel"]
    assert got.dtype == wanted
    np.testing.assert_allclose(
        got.astype(np.float32), want.astype(wanted).astype(np.float32),
        rtol=1e-6 if wanted == jnp.float32 else 2**-8, atol=1e-6)


# --- what is trained ----------------------------------------------------------


def adapt(model, start, *, rank=3, targets=ALL):
  """`architecture.open_trained` of a model of training_cases."""
  return architecture.open_trained(
      python_types.SimpleNamespace(mesh=model.mesh, config={
          "lora": {"rank": rank, "alpha": 2.0 * rank, "targets": targets},
          "model": {"adapter_path": None}, "seed": 5}), model, start)


def batch_of(count=5):
  rng = np.random.default_rng(3)
  return cases.host_batch(
      [cases.candidate_set(rng, i + 1, 3 + i) for i in range(count)], 8)


def base_reference(model, policy):
  """As reference.source=lora_base: the policy without its adapters."""
  score = jax.jit(model.sequence_logps, static_argnums=(2, 3))
  return stage_lib.Reference(
      lambda batch: np.asarray(sum(
          score(model.frozen, model.put(chunk), *batch.meta.role.shape)
          for chunk in model.pack_all(batch))), model.frozen)


def train_steps(stage, steps, **mesh):
  model = cases.make_model(**mesh)
  model, trained, policy = adapt(model, functools.partial(cases.init, model))
  functions = stage_lib.make_functions(stage, model)
  reference, state = base_reference(model, policy), functions.init(trained())
  rows = []
  for _ in range(steps):
    state, metrics = update.run_step(
        stage, model, functions, state, batch_of(), reference)
    rows.append(jax.device_get(metrics))
  return model, functions, state, rows


def test_policy_and_reference_share_the_arrays_of_the_base():
  whole = cases.make_model()
  model, trained, policy = adapt(whole, functools.partial(cases.init, whole))
  config = {"reference": {"source": "lora_base", "path": None}}
  reference, _ = references.reference_params(
      python_types.SimpleNamespace(config=config), model, policy)
  assert jax.tree.structure(reference) == jax.tree.structure(
      whole.param_shapes)
  for place in (("embed", "embedding"),
                ("layers", "mlp", "up_proj", "kernel")):
    first, now, of_base = (
        functools.reduce(lambda tree, key: tree[key], place, tree)
        for tree in (policy(), model.policy(trained()), reference))
    assert first is of_base and now is of_base
  # What is trained is given away at every update: never twice the same.
  assert not any(x is y for x, y in zip(
      jax.tree.leaves(trained()), jax.tree.leaves(trained())))


@functools.cache
def one_device():
  return train_steps(cases.stage(), 4)


def is_adapter(path):
  return path[-1].key in ("lora_a", "lora_b")


def test_only_adapters_are_trained():
  model, functions, state, rows = one_device()
  assert all(is_adapter(path) for path, _ in
             jax.tree_util.tree_leaves_with_path(state.params))
  size = sum(x.size for x in jax.tree.leaves(state.params))
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sum(x.size for x in moments) == 2 * size
  shapes = functions.state_shapes
  assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(
      lambda x: x.shape, shapes)
  assert np.isclose(rows[0]["loss"], np.log(2), atol=1e-5)
  assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
  before = cases.init(model._replace(
      param_shapes=jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
          lora.merge(model.frozen)), frozen=()))
  jax.tree.map(np.testing.assert_array_equal, before, lora.merge(model.frozen))


def product_shapes(jaxpr):
  """Of all matrix products of a jaxpr, those in its scans included."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found |= {var.aval.shape for var in equation.outvars}
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          found |= product_shapes(inner)
  return found


def test_no_gradient_of_a_base_weight_is_ever_computed():
  stage, whole = cases.stage("sft", strategy="none"), cases.make_model()
  model, trained, _ = adapt(whole, functools.partial(cases.init, whole))
  (chunk,) = model.pack_all(batch_of())
  products = {}
  for name, of, params in (("all", whole, cases.init(whole)),
                           ("lora", model, trained())):
    functions = stage_lib.make_functions(stage, of)
    sets = of.put_replicated(batch_of().meta)
    drawn, sets, *_ = functions.draw(0, 0, (), jnp.zeros((5, 8)), sets)
    inputs = update.step_lib.Inputs(sets, drawn, (), 0)
    total = functions.zeros(params, of.no_features(batch_of()), inputs)
    args = (params, of.frozen, (), total, of.put(chunk), inputs,
            np.ones(5, bool))
    products[name] = product_shapes(
        jax.make_jaxpr(functions.from_loss)(*args).jaxpr)
  kernels = {x["kernel"].shape[1:] for part in ("attention", "mlp")
             for x in model.frozen["layers"][part].values()}
  kernels |= {shape[::-1] for shape in kernels}
  kernels |= {(40, 16), (16, 40)}  # of the head
  assert kernels & products["all"] and not kernels & products["lora"]


def test_the_backward_pass_does_half_the_work():
  config = dataclasses.replace(
      LLAMA, hidden_size=128, head_dim=32, intermediate_size=320)
  policy = jax.eval_shape(lambda: make_policy(config)[1])
  streams = some_streams(config)

  def flops_of(trained, frozen):
    step = jax.grad(lambda trained, frozen: jnp.sum(
        logps_of(lora.join(trained, frozen), config, streams)))
    return jax.jit(step).lower(trained, frozen).cost_analysis()["flops"]

  base = jax.eval_shape(lora.merge, policy)
  # Forward 1, through the activations 1, to the weights 1.
  assert 0.6 < flops_of(*lora.split(policy)) / flops_of(base, ()) < 0.75


def test_a_mesh_agrees_and_adapters_lie_beside_their_kernels():
  if jax.device_count() < 8:
    pytest.skip("needs eight (simulated) devices")
  _, _, state, rows = one_device()
  _, _, other, more = train_steps(
      cases.stage(), 3, devices=8, data=2, fsdp=2, tensor=2)
  for one, two in zip(rows, more):
    np.testing.assert_allclose(two["loss"], one["loss"], atol=1e-5)
  up = other.params["layers"]["mlp"]["up_proj"]
  assert up["lora_a"].addressable_shards[0].data.shape == (2, 16 // 2, 3)
  assert up["lora_b"].addressable_shards[0].data.shape == (2, 3, 24 // 2)


def test_the_base_as_reference_is_what_a_cache_of_it_holds():
  model, _, _, rows = one_device()
  base = lora.merge(model.frozen)
  cached = jax.jit(model.token_logps)
  batch = batch_of()
  known = sum(np.asarray(scoring.sequence_logps(
      cached(base, model.put(chunk)), model.put(chunk), num_sets=5,
      num_slots=8)) for chunk in model.pack_all(batch))
  np.testing.assert_allclose(rows[-1]["ref_logps"], known, atol=1e-6)
  assert np.abs(rows[-1]["logps"] - known).max() > 1e-2


def test_terms_compare_with_the_base():
  whole = cases.make_model()
  model, trained, _ = adapt(whole, functools.partial(cases.init, whole))
  stage = cases.stage("tdpo1", strategy="random", score=None)
  functions = stage_lib.make_functions(stage, model)
  reference = base_reference(model, None)
  state, rows = functions.init(trained()), []
  for _ in range(3):
    state, metrics = update.run_step(
        stage, model, functions, state, batch_of(), reference)
    rows.append(float(metrics["loss"]))
  assert np.isclose(rows[0], np.log(2), atol=1e-4) and rows[2] < rows[0]


def test_a_restart_is_bit_equal_and_its_checkpoint_holds_adapters_alone(
    tmp_path):
  whole, stage = cases.make_model(), cases.stage()
  when = loop.Schedule(1, 2, 2, 100, None, False)

  class Writer:
    def rewind(self, *_, **__): pass
    def keep(self): pass
    def write(self, *_): pass

  def train(folder, stop_at=None):
    def make_batch(step):
      if step == stop_at:
        raise RuntimeError("killed")
      return batch_of()

    own, trained, policy = adapt(whole, functools.partial(cases.init, whole))
    return loop.train(
        stage, own, make_batch, trained, folder, Writer(), when,
        meta={"start": "x"}, reference=base_reference(own, policy),
        expect_start=True)

  once, _ = train(tmp_path / "a")
  with pytest.raises(RuntimeError):
    train(tmp_path / "b", stop_at=3)
  held = next((tmp_path / "b").rglob("_METADATA")).read_text()
  assert "lora_a" in held and "kernel" not in held and "scale" not in held
  again, step = train(tmp_path / "b")
  assert step == 4
  jax.tree.map(np.testing.assert_array_equal, once, again)


# --- what is said at the start ------------------------------------------------


@pytest.mark.parametrize("capability, dtype, warned", [
    ("7.5", "bfloat16", True), ("7.5", "float32", False),
    ("8.0", "bfloat16", False), (None, "bfloat16", False)])
def test_the_dtype_is_said_and_a_slow_one_warned_of(
    capability, dtype, warned, caplog):
  device = python_types.SimpleNamespace(device_kind="Tesla T4")
  if capability is not None:
    device.compute_capability = capability
  with caplog.at_level("INFO"):
    setup.say_precision(
        {"compute_dtype": dtype, "param_dtype": "float32"}, device)
  said = [(r.levelname, r.getMessage()) for r in caplog.records]
  assert ("INFO", f"Tesla T4: products in {dtype}, weights in float32") in said
  assert any(level == "WARNING" for level, _ in said) == warned
