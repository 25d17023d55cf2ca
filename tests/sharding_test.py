"""Meshes, rules, and one scoring step on one and on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models_streams
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mcpo_jax import errors, sharding
from mcpo_jax.models import decoder, scoring
from mcpo_jax.models.config import ModelConfig

needs_eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight (simulated) devices"
)
CONFIG = ModelConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    initializer_range=0.3,
    qkv_bias=True,
)


def mesh_of(data, fsdp, tensor):
  devices = jax.devices()[: data * fsdp * tensor]
  return sharding.make_mesh(
      data=data, fsdp=fsdp, tensor=tensor, devices=devices
  )


@needs_eight
def test_minus_one_takes_the_devices_that_are_left():
  mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
  assert dict(mesh.shape) == dict(data=2, fsdp=2, context=1, tensor=2)
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "sizes, numbers",
    [
        ((3, 1, 1, 1), ["data=3", "8 devices"]),
        ((3, -1, 1, 1), ["data=3", "8 devices"]),
        ((-1, -1, 1, 1), ["data=-1", "fsdp=-1"]),
        ((0, 8, 1, 1), ["data=0"]),
    ],
)
@needs_eight
def test_a_mesh_that_does_not_fit_names_the_numbers(sizes, numbers):
  with pytest.raises(errors.ConfigError) as caught:
    sharding.make_mesh(**dict(zip(sharding.AXES, sizes)))
  assert caught.value.slug == "config.mesh"
  assert all(number in str(caught.value) for number in numbers)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks of a device."""

  id: int
  slice_index: int
  device_kind: str = "H100"
  platform: str = "gpu"


def two_slices(data, fsdp, tensor, chips):
  sizes = dict(data=data, fsdp=fsdp, context=1, tensor=tensor)
  return sharding.arrange_devices(sizes, chips)


# Slices alternate in the order that JAX may give.
CHIPS = [Chip(i, i % 2) for i in range(8)]


def test_the_data_axis_spans_the_slices():
  array = two_slices(2, 2, 2, CHIPS)
  assert array.shape == (2, 2, 1, 2)
  for i in range(2):
    assert {chip.slice_index for chip in array[i].flat} == {i}


def test_what_data_cannot_span_fsdp_does():
  array = two_slices(1, 4, 2, CHIPS)
  for half, i in ((array[:, :2], 0), (array[:, 2:], 1)):
    assert {chip.slice_index for chip in half.flat} == {i}


def test_slices_that_do_not_divide_the_mesh_are_refused():
  with pytest.raises(errors.ConfigError) as caught:
    two_slices(1, 1, 8, CHIPS)
  assert caught.value.slug == "config.mesh"
  for number in ("2 slices (4 devices, 4 devices)", "data=1 x fsdp=1"):
    assert number in str(caught.value)
  with pytest.raises(errors.ConfigError, match="do not divide"):
    two_slices(2, 2, 2, [*CHIPS[:7], Chip(7, 0)])


def test_devices_of_two_kinds_are_refused():
  mixed = [*CHIPS[:5], *(
      dataclasses.replace(c, device_kind="A100") for c in CHIPS[5:])]
  with pytest.raises(errors.ResourceError) as caught:
    two_slices(2, 2, 2, mixed)
  assert caught.value.slug == "device.mixed"
  assert "3 x A100, 5 x H100" in str(caught.value)


@needs_eight
def test_the_first_rule_that_matches_decides():
  mesh = mesh_of(2, 2, 2)
  tree = {"a": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}
  rules = [("a/kernel$", P("fsdp", "tensor")), (".*", P())]
  got = sharding.infer_shardings(tree, rules, mesh)
  assert got["a"]["kernel"].spec == P("fsdp", "tensor")

  with pytest.raises(errors.ConfigError) as caught:
    sharding.infer_shardings(tree, [("b", P())], mesh)
  assert caught.value.slug == "config.sharding_rule"
  assert caught.value.where == "a/kernel"

  with pytest.raises(errors.ConfigError) as caught:
    sharding.infer_shardings(tree, [("a", P(None, ("data", "fsdp")))], mesh)
  assert caught.value.slug == "config.divisible"
  assert caught.value.where == "a/kernel"
  for number in ("size 6", "data=2", "fsdp=2", "multiple of 4"):
    assert number in str(caught.value)


@needs_eight
def test_moments_lie_where_their_parameters_lie():
  mesh = mesh_of(1, 4, 2)
  shapes = decoder.param_shapes(CONFIG)
  shardings = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  init = functools.partial(decoder.init_params, config=CONFIG)
  params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
  tx = optax.adamw(1e-3)
  placed = sharding.optimizer_shardings(tx, shapes, shardings)
  state = jax.jit(tx.init, out_shardings=placed)(params)
  for moments in (state[0].mu, state[0].nu):
    jax.tree.map(
        lambda m, p: m.sharding == p.sharding or pytest.fail(str(m.sharding)),
        moments, params,
    )
  assert state[0].count.sharding.is_fully_replicated
  kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16 // 4, 24 // 2)
  # born sharded, and the same numbers as on one device
  jax.tree.map(
      np.testing.assert_array_equal, params, jax.jit(init)(jax.random.key(0))
  )


@needs_eight
def test_host_arrays_are_split_over_the_devices():
  mesh = mesh_of(2, 2, 2)
  tree = {"x": np.arange(24).reshape(8, 3)}
  got = sharding.put_global(tree, sharding.batch_sharding(mesh))["x"]
  np.testing.assert_array_equal(got, tree["x"])
  assert {s.data.shape for s in got.addressable_shards} == {(2, 3)}
  whole = sharding.put_global(tree, sharding.replicated(mesh))["x"]
  assert whole.sharding.is_fully_replicated
  with pytest.raises(errors.ConfigError) as caught:
    sharding.put_global(
        {"x": np.zeros((6, 3))}, sharding.batch_sharding(mesh)
    )
  assert caught.value.slug == "config.divisible"


@needs_eight
def test_a_traced_function_knows_its_mesh_and_not_the_machine():
  assert sharding.traced_devices() == ("cpu", jax.device_count())
  seen = []

  @jax.jit
  def f(x):
    with sharding.tracing_on(mesh_of(1, 4, 1)):
      seen.append(sharding.traced_devices())
      return sharding.constrain(x * 2, "fsdp")

  x = jax.device_put(jnp.arange(8.0), sharding.replicated(mesh_of(1, 4, 1)))
  assert f(x).sharding.spec == P("fsdp")
  assert seen == [("cpu", 4)]


@functools.cache
def step_on(sizes):
  """Log-probabilities and gradients of a loss of them, on a mesh."""
  rng = np.random.default_rng(4)
  sets = models_streams.random_sets(
      rng, CONFIG.vocab_size, rng.integers(2, 6, 8),
      [[int(n), 4] for n in rng.integers(1, 9, 8)],
  )
  streams = models_streams.pack(sets, 19)
  mesh = mesh_of(*sizes)
  shapes = decoder.param_shapes(CONFIG)
  shardings = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  params = models_streams.random_params(CONFIG)
  params = jax.tree.map(jax.device_put, params, shardings)

  def loss(params, streams):
    logps = scoring.token_logps(
        params, CONFIG, streams, head_chunk=48
    )
    logps = scoring.sequence_logps(logps, streams, num_sets=8, num_slots=2)
    return -jax.nn.log_sigmoid(logps[:, 0] - logps[:, 1]).mean(), logps

  whole = sharding.replicated(mesh)
  step = jax.jit(
      jax.value_and_grad(loss, has_aux=True),
      out_shardings=((whole, whole), shardings),
  )
  with jax.set_mesh(mesh):
    streams = sharding.put_global(streams, sharding.batch_sharding(mesh))
    (value, logps), gradients = step(params, streams)
  placed = jax.tree.map(lambda g: g.sharding, gradients)
  assert placed == shardings
  return jax.tree.map(np.asarray, (value, logps, gradients))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@needs_eight
def test_the_step_is_the_same_on_one_and_on_eight_devices(sizes):
  value, logps, gradients = step_on((1, 1, 1))
  assert (logps < -1).all() and value > 0.1
  other_value, other_logps, other_gradients = step_on(sizes)
  np.testing.assert_allclose(other_value, value, rtol=0, atol=1e-5)
  np.testing.assert_allclose(other_logps, logps, rtol=0, atol=2e-5)
  scale = optax.tree.norm(gradients)
  assert scale > 0.1
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale),
      other_gradients, gradients,
  )
