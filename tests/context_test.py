"""Streams whose tokens are split over devices: equal results, little moved."""

import functools
import re

import jax
import models_streams
import numpy as np
import pytest

from mcpo_jax import sharding
from mcpo_jax.models import decoder, scoring
from mcpo_jax.models.config import ModelConfig

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight (simulated) devices"
)
CONFIG = ModelConfig(
    family="mistral",
    vocab_size=28,
    hidden_size=20,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    sliding_window=300,
    local_layers=(True, False),
)
LENGTH = 512
# Prompts and candidates that begin and end in different parts of a stream; two
# streams on a device.
SETS = models_streams.random_sets(
    np.random.default_rng(0), CONFIG.vocab_size, [100, 301, 7, 256],
    [[170, 90, 60], [3, 128], [400], [1, 2]],
)


def params_of(config):
  return models_streams.random_params(config)


def placed(params, config, mesh):
  shardings = sharding.infer_shardings(
      decoder.param_shapes(config), decoder.PARAM_RULES, mesh
  )
  return jax.device_put(params, shardings)


def mesh_of(**sizes):
  count = int(np.prod(list(sizes.values())))
  return sharding.make_mesh(data=1, **sizes, devices=jax.devices()[:count])


@functools.cache
def step_on(fsdp, context, tensor):
  """Log-probs, gradients and the compiled program on a mesh."""
  mesh = mesh_of(fsdp=fsdp, context=context, tensor=tensor)
  params = placed(params_of(CONFIG), CONFIG, mesh)
  streams = sharding.put_global(
      models_streams.pack(SETS, LENGTH), sharding.stream_sharding(mesh)
  )

  def loss(params, streams):
    with sharding.tracing_on(mesh):
      logps = scoring.token_logps(params, CONFIG, streams, head_chunk=256)
    return (logps ** 2).mean(), logps

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  program = step.lower(params, streams).compile()
  (_, logps), gradients = program(params, streams)
  return *jax.tree.map(np.asarray, (logps, gradients)), program.as_text()


def test_a_step_is_the_same_with_streams_in_parts():
  logps, gradients, _ = step_on(1, 1, 1)
  got, got_gradients, _ = step_on(2, 2, 2)
  assert (logps < 0).sum() == 170 + 90 + 60 + 3 + 128 + 400 + 1 + 2
  np.testing.assert_allclose(got, logps, rtol=0, atol=1e-5)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale),
      got_gradients, gradients,
  )


def test_keys_and_values_are_gathered_and_no_states():
  *_, program = step_on(2, 2, 2)
  gathered = set(re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program))
  heads = CONFIG.num_kv_heads // 2
  assert f"2,{LENGTH},{heads},{CONFIG.head_dim}" in gathered
  wide = (f"{LENGTH},{CONFIG.hidden_size}", f"{LENGTH},{CONFIG.vocab_size}",
          f"{LENGTH},{CONFIG.intermediate_size}")
  assert not [x for x in gathered if x.endswith(wide)]


def test_a_stream_of_32k_tokens_is_scored_in_eight_parts():
  config = ModelConfig(
      family="llama", vocab_size=16, hidden_size=8, intermediate_size=6,
      num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
      max_positions=2**15,
  )
  sets = models_streams.random_sets(
      np.random.default_rng(1), config.vocab_size, [4000],
      [[9000, 9500, 8000, 2000]],
  )
  streams = models_streams.pack(sets, 2**15)
  params = params_of(config)

  def score(context):
    mesh = mesh_of(fsdp=1, context=context, tensor=1)

    @jax.jit
    def run(params, streams):
      with sharding.tracing_on(mesh):
        return scoring.token_logps(params, config, streams)

    split = sharding.put_global(streams, sharding.stream_sharding(mesh))
    out = run(placed(params, config, mesh), split)
    assert len(out.sharding.device_set) == context
    return np.asarray(out)

  want = score(1)
  assert (want < 0).sum() == 28_500 and want.min() < -2
  np.testing.assert_allclose(score(8), want, rtol=0, atol=1e-5)
