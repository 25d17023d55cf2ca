"""The decoder on streams: sharing of prompts, isolation, cache, precision."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import models_streams
import numpy as np
import pytest

from mcpo_jax import sharding
from mcpo_jax.models import attention, decoder, scoring, spans
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Streams

LLAMA = ModelConfig(
    family="llama",
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    initializer_range=0.3,
)
GEMMA = dataclasses.replace(
    LLAMA,
    family="gemma3_text",
    num_layers=3,
    norm_offset=True,
    post_norms=True,
    embedding_scale=True,
    qk_norm=True,
    attention_softcap=2.0,
    final_softcap=3.0,
    sliding_window=4,
    local_layers=(True, False, True),
    local_rope_theta=50.0,
    activation="gelu_tanh",
    tied_head=True,
)
CONFIGS = pytest.mark.parametrize(
    "config", [LLAMA, GEMMA], ids=["llama", "gemma"]
)
LENGTH = 33
SETS = models_streams.random_sets(
    np.random.default_rng(0), 29, [5, 8], [[3, 7, 1], [4, 9]]
)


def make_params(config, dtype=jnp.float32):
  return models_streams.random_params(config, dtype)


@functools.cache
def scorer(config, dtype, remat="none", head_chunk=16):
  return jax.jit(
      functools.partial(
          scoring.token_logps,
          config=config,
          compute_dtype=dtype,
          remat=remat,
          head_chunk=head_chunk,
      )
  )


def sequence(config, params, sets, dtype, length=LENGTH):
  streams = models_streams.pack(sets, length)
  logps = scorer(config, dtype)(params, streams=streams)
  return np.asarray(
      scoring.sequence_logps(
          logps, streams, num_sets=len(sets), num_slots=3
      )
  )


@CONFIGS
def test_a_shared_prompt_gives_the_logps_of_separate_texts(config, x64):
  params = make_params(config, jnp.float64)
  got = sequence(config, params, SETS, jnp.float64)
  apart = [(p, [c]) for p, cs in SETS for c in cs]
  want = sequence(config, params, apart, jnp.float64)[:, 0]
  assert got.dtype == np.float64 and (want < -1).all()
  np.testing.assert_allclose(got[0], want[:3], rtol=0, atol=1e-12)
  np.testing.assert_allclose(got[1, :2], want[3:], rtol=0, atol=1e-12)
  assert got[1, 2] == 0


@CONFIGS
def test_other_candidates_do_not_change_a_bit(config):
  params = make_params(config)
  before = sequence(config, params, SETS, jnp.float32)
  (prompt, completions), other = SETS
  changed = [completions[0], (completions[1] + 3) % 29, completions[2]]
  after = sequence(config, params, [(prompt, changed), other], jnp.float32)
  np.testing.assert_array_equal(before[[0, 0, 1, 1], [0, 2, 0, 1]],
                                after[[0, 0, 1, 1], [0, 2, 0, 1]])
  assert before[0, 1] != after[0, 1]


@functools.cache
def gradient(config, remat="none", head_chunk=16):
  score = scorer(config, jnp.float64, remat, head_chunk)
  loss = lambda params, streams: (score(params, streams=streams) ** 2).sum()
  return jax.jit(jax.grad(loss))


def assert_close(one, other, atol):
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
      one, other,
  )


def test_padding_changes_nothing_and_has_finite_gradients(x64):
  params = make_params(GEMMA, jnp.float64)
  long = models_streams.pack(SETS, LENGTH + 14, pad_id=7)
  np.testing.assert_allclose(
      scorer(GEMMA, jnp.float64)(params, streams=long)[:, :LENGTH],
      scorer(GEMMA, jnp.float64)(
          params, streams=models_streams.pack(SETS, LENGTH)
      ),
      rtol=0, atol=1e-12,
  )
  want = gradient(GEMMA)(params, models_streams.pack(SETS, LENGTH))
  other = models_streams.pack(SETS, LENGTH, pad_id=7)
  assert_close(gradient(GEMMA)(params, other), want, 0)
  empty = models_streams.pack([([], []), ([], [])], LENGTH)
  nothing = gradient(GEMMA)(params, empty)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))


def test_remat_and_head_chunks_change_no_gradient(x64):
  params = make_params(GEMMA, jnp.float64)
  streams = models_streams.pack(SETS, LENGTH)
  want = gradient(GEMMA)(params, streams)
  for remat, head_chunk in (("dots", 10_000), ("full", 6)):
    got = gradient(GEMMA, remat, head_chunk)(params, streams)
    assert_close(got, want, 1e-9)


def test_the_gradient_is_that_of_finite_differences(x64):
  params = make_params(GEMMA, jnp.float64)
  streams = models_streams.pack(SETS, LENGTH)
  score = scorer(GEMMA, jnp.float64)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(2)
  step = [rng.normal(size=leaf.shape) for leaf in leaves]

  def moved(size):
    there = [leaf + size * s for leaf, s in zip(leaves, step)]
    there = jax.tree.unflatten(tree, there)
    return (score(there, streams=streams) ** 2).sum()

  want = (moved(1e-6) - moved(-1e-6)) / 2e-6
  slope = jax.tree.leaves(gradient(GEMMA)(params, streams))
  got = sum((g * s).sum() for g, s in zip(slope, step))
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "config, dtype, tolerance",
    [(LLAMA, jnp.float32, 1e-5), (GEMMA, jnp.float64, 1e-11)],
    ids=["llama", "gemma"],
)
def test_cached_decoding_gives_the_logits_of_the_full_forward(
    config, dtype, tolerance, x64
):
  params = make_params(config, dtype)
  rows = [np.arange(9) % 29, (np.arange(12) * 5) % 29, np.array([4] * 10)]
  lengths = np.array([3, 6, 1], np.int32)
  texts = models_streams.pack([(row, []) for row in rows], 12)
  full = jax.jit(
      lambda p: decoder.head_logits(
          p,
          config,
          decoder.hidden_states(p, config, texts, compute_dtype=dtype),
      )
  )(params)

  # Three prompts of two slots each; the second slot of each is a token behind
  # the first, and the ring begins in the middle and comes round.
  # The pages lie in a wrong order.
  prompts = np.full((3, 64), 28, np.int32)  # a pad id that is a token too
  for row, size, prompt in zip(rows, lengths, prompts):
    prompt[: size - 1] = row[: size - 1]
  weights = jax.jit(decoder.unstack_layers, static_argnums=1)(params, dtype)
  cache = decoder.init_cache(
      config, groups=3, slots=2, own_length=6, parts=1, pages=4, dtype=dtype
  )
  prefill = jax.jit(decoder.prefill, static_argnums=1)
  pages = decoder.Pages(np.array([[1, -1, 0, 2]]), np.zeros((1, 4), int))
  for group, page in ((0, 2), (1, 0), (2, 3), (1, 4)):  # 4: stored nowhere
    which = slice(group, group + 1)
    cache = prefill(
        weights, config, cache, prompts[which], lengths[which] - 1,
        np.array([[page]], np.int32),
    )
  step = jax.jit(decoder.decode_step, static_argnums=1)
  for i in range(6):
    ages = np.maximum(np.array([[i, i - 1]] * 3), 0)
    at = lengths[:, None] + ages - 1
    tokens = np.stack([row[here] for row, here in zip(rows, at)])
    logits, cache = step(
        weights, config, cache, pages, tokens, lengths - 1, ages, (i + 4) % 6
    )
    assert logits.dtype == dtype
    want = full[np.arange(3)[:, None], at]
    np.testing.assert_allclose(logits, want, rtol=0, atol=tolerance)


def test_a_mesh_of_all_axes_gives_what_one_device_gives():
  """Few rows of wide tokens: XLA has split such products in a wrong order."""
  config = dataclasses.replace(LLAMA, vocab_size=34, hidden_size=26)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.infer_shardings(
      decoder.param_shapes(config), decoder.PARAM_RULES, mesh
  )
  params = make_params(config)
  rng = np.random.default_rng(4)
  sets = models_streams.random_sets(rng, 34, [2] * 8, [[1]] * 8)
  streams = models_streams.pack(sets, 3)
  lengths = np.array([3, 1, 2, 3, 2, 1, 1, 3], np.int32)

  def run(params, streams, lengths):
    logps = lambda p: scoring.token_logps(p, config, streams)
    grads = jax.grad(lambda p: (logps(p) ** 2).sum())(params)
    cache = decoder.init_cache(
        config, groups=8, slots=2, own_length=2, parts=8, pages=2
    )
    weights = decoder.unstack_layers(params, jnp.float32)
    prompts = jnp.pad(streams.tokens, ((0, 0), (0, 61)))
    page = jnp.ones((8, 1), int)
    cache = decoder.prefill(weights, config, cache, prompts, lengths, page)
    pages = decoder.Pages(jnp.array([[-1, 0]] * 8), jnp.zeros((8, 2), int))
    tokens, ages = streams.tokens[:, :2], jnp.zeros((8, 2), int)
    after, cache = decoder.decode_step(
        weights, config, cache, pages, tokens, lengths, ages, 0
    )
    return grads, (logps(params), after, cache)

  want = jax.jit(run)(params, streams, lengths)
  with jax.set_mesh(mesh):
    got = jax.jit(run, out_shardings=(shardings, None))(
        jax.device_put(params, shardings),
        *sharding.put_global((streams, lengths), sharding.batch_sharding(mesh)),
    )
  assert_close(got[1], want[1], 1e-5)
  assert_close(got[0], want[0], 1e-3)  # values up to 100; wrong ones differ


def test_logps_are_float32_under_bfloat16():
  params = make_params(LLAMA)
  streams = models_streams.pack(SETS, LENGTH)
  narrow = scorer(LLAMA, jnp.bfloat16)(params, streams=streams)
  exact = scorer(LLAMA, jnp.float32)(params, streams=streams)
  assert narrow.dtype == jnp.float32
  error = np.abs(narrow - exact).max()
  assert 0 < error < 0.3  # bfloat16 computed, near the float32 result
  hidden, logits = jax.eval_shape(
      lambda: (
          h := decoder.hidden_states(
              params, LLAMA, streams, compute_dtype=jnp.bfloat16
          ),
          decoder.head_logits(params, LLAMA, h),
      )
  )
  assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
  # The sum over the vocabulary is float32: its probabilities add up to 1.
  whole = [[token] for token in range(29)]
  streams = models_streams.pack([([4], whole), ([7, 2], whole)], LENGTH)
  logps = scorer(LLAMA, jnp.bfloat16)(params, streams=streams)
  probs = np.where(streams.completion_mask, np.exp(logps), 0.0)
  np.testing.assert_allclose(probs.sum(axis=1), 1.0, atol=1e-5)


def test_logps_under_bfloat16_are_near_float64():
  """Goal: 2e-3 nats a token on average, at weights as a model starts with."""
  streams = models_streams.pack(SETS, LENGTH)
  with jax.enable_x64():
    params = models_streams.random_params(LLAMA, np.float64, scale=0.02)
    exact = np.asarray(scorer(LLAMA, jnp.float64)(params, streams=streams))
  narrow = scorer(LLAMA, jnp.bfloat16)(
      jax.tree.map(np.float32, params), streams=streams)
  error = np.abs(narrow - exact)[streams.completion_mask].mean()
  assert exact.dtype == np.float64 and 1e-5 < error < 2e-3


def test_attention_sees_what_the_rule_says():
  """A NumPy loop over all pairs of tokens against both ways to compute."""
  rng = np.random.default_rng(3)
  sets = models_streams.random_sets(
      rng, 29, [100, 40, 30], [[60, 50], [90], [20, 25]]
  )
  streams = models_streams.pack(sets, 230)
  for column in streams:  # the third set moves in behind the second
    column[1, 130:205] = column[2, :75]
  streams = Streams(*(column[:2] for column in streams))
  slots = spans.Slots(
      streams.positions, streams.prompt_slot, streams.candidate_slot
  )
  q = rng.normal(size=(2, 230, 4, 6)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 230, 2, 6)).astype(np.float32)
  window = 70

  want = np.zeros_like(q)
  for s in range(2):
    for i in range(230):
      prompt, candidate = slots.prompt[s, i], slots.candidate[s, i]
      seen = [
          j for j in range(230)
          if prompt >= 0
          and slots.prompt[s, j] == prompt
          and slots.candidate[s, j] in (-1, candidate)
          and 0 <= slots.positions[s, i] - slots.positions[s, j] < window
      ]
      for h in range(4) if seen else ():
        x = k[s, seen, h // 2].astype(np.float64) @ q[s, i, h] * 0.4
        p = np.exp(2 * np.tanh(x / 2))
        want[s, i, h] = p @ v[s, seen, h // 2] / p.sum()
  real = streams.prompt_slot >= 0

  def attend(q, k, v):
    within = attention.stream_attention(
        slots, scale=0.4, softcap=2.0, windows=(window,)
    )
    return within(q, k, v, jnp.int32(window))

  got = jax.jit(attend)(q, k, v)
  np.testing.assert_allclose(got[real], want[real], atol=2e-6)
  assert np.isfinite(got).all()


def test_every_parameter_has_a_rule_and_starts_scaled():
  biased = dataclasses.replace(
      LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, hidden_size=64
  )
  for config in (biased, GEMMA):
    init = functools.partial(decoder.init_params, config=config)
    params = jax.jit(init)(jax.random.key(1))
    shapes = decoder.param_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
      name = sharding.path_name(path)
      assert any(re.search(rule, name) for rule, _ in decoder.PARAM_RULES)
      outward = re.search("(o|down)_proj/kernel", name) is not None
      depth = 2 * config.num_layers if outward else 1
      want = 0.3 / depth**0.5
      if name.endswith(("kernel", "embedding")):
        assert abs(leaf.std() / want - 1) < 0.1, name
      else:
        start = 1.0 if "norm" in name and not config.norm_offset else 0.0
        assert (leaf == start).all(), name
