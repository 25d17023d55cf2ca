"""What lies on the devices: donated buffers, chunks, remat, the optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import training_cases as cases

from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import update

NO_REFERENCE = stage_lib.Reference(
    lambda batch: np.zeros(batch.meta.role.shape, np.float32))


def make_batch(count=5):
  rng = np.random.default_rng(3)
  return cases.host_batch(
      [cases.candidate_set(rng, i + 1, 3 + i) for i in range(count)], 8)


def num_bytes(tree) -> int:
  """Of the arrays of one device."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def bfloat16_run(steps=2):
  model = cases.make_model(dtype=jnp.bfloat16)
  model = model._replace(compute_dtype=jnp.float32)
  functions = stage_lib.make_functions(cases.stage(), model)
  state = functions.init(cases.init(model))
  for _ in range(steps):
    state, metrics = update.run_step(
        cases.stage(), model, functions, state, make_batch(), NO_REFERENCE)
  return functions, state, metrics


def test_bfloat16_weights_have_a_float32_copy_float32_moments_and_sums():
  functions, state, metrics = bfloat16_run()
  assert metrics["finite"]
  master, (_, (adam, *_)) = state.opt_state
  kinds = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
  assert kinds(state.params) == {"bfloat16"}
  for tree in (master, adam.mu, adam.nu):
    assert kinds(tree) == {"float32"}
  jax.tree.map(lambda half, x: np.testing.assert_array_equal(
      half, x.astype(jnp.bfloat16)), state.params, master)
  assert functions.update._cache_size() == 1
