"""Fused attention against NumPy in float64, and what is compiled."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from mcpo_jax import sharding
from mcpo_jax.models import attention, cudnn, decoder, spans, splash
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Streams

LENGTH, HEADS, KV_HEADS, WIDTH, SOFTCAP = 384, 6, 2, 8, 3.0
NO_WINDOW = 2**30
# (prompt slot, prompt length, candidate lengths) of the sets of each stream.
LAYOUT = [
    [(3, 50, [40, 70]), (0, 130, [10, 20, 30])],
    [(1, 9, [200, 1]), (4, 3, []), (2, 1, [66])],
]


def slots_of(layout):
  columns = []
  for sets in layout:
    rows = []
    for slot, prompt, candidates in sets:
      rows += [(i, slot, -1) for i in range(prompt)]
      for k, size in enumerate(candidates):
        rows += [(prompt + i, slot, k) for i in range(size)]
    rows += [(0, -1, -1)] * (LENGTH - len(rows))
    columns.append(np.array(rows, np.int32).T)
  return spans.Slots(*np.stack(columns, axis=1))


SLOTS = slots_of(LAYOUT)


def visible(window):
  """[S, T, T] bool, by the rule of types.Streams, word by word."""
  positions, prompt, candidate = SLOTS
  distance = positions[:, :, None] - positions[:, None]
  own = candidate[:, None] == candidate[:, :, None]
  return (
      (prompt[:, :, None] == prompt[:, None])
      & (prompt >= 0)[:, :, None]
      & ((candidate < 0)[:, None] | own)
      & (distance >= 0)
      & (distance < window)
  )


@functools.cache
def inputs():
  """q, k, v and the cotangent of the output, none on padding."""
  rng = np.random.default_rng(0)
  draw = lambda heads: rng.normal(
      size=(len(LAYOUT), LENGTH, heads, WIDTH)
  ).astype(np.float32)
  real = (SLOTS.prompt >= 0)[..., None, None]
  return 2 * draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), draw(HEADS) * real


def in_numpy(q, k, v, cotangent, mask, softcap):
  """Output and gradients in float64, all pairs at once."""
  q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, cotangent))
  group = HEADS // KV_HEADS
  k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
  bent = np.tanh(np.einsum("sihe,sjhe->shij", q, k) * WIDTH**-0.5 / softcap)
  weights = np.where(mask[:, None], np.exp(softcap * bent), 0.0)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  out = np.einsum("shij,sjhe->sihe", weights, v)
  d_weights = np.einsum("sihe,sjhe->shij", d_out, v)
  mean = (weights * d_weights).sum(-1, keepdims=True)
  d_scores = weights * (d_weights - mean) * (1 - bent**2) * WIDTH**-0.5
  summed = lambda x: x.reshape(*x.shape[:2], KV_HEADS, group, WIDTH).sum(3)
  return (
      out,
      np.einsum("shij,sjhe->sihe", d_scores, k),
      summed(np.einsum("shij,sihe->sjhe", d_scores, q)),
      summed(np.einsum("shij,sihe->sjhe", weights, d_out)),
  )


def splash_attend(q, k, v, window):
  seen = spans.intervals(spans.runs(SLOTS), window)
  return splash.attend(
      q, k, v, seen, scale=WIDTH**-0.5, softcap=SOFTCAP, interpret=True
  )


def tiled_attend(q, k, v, window):
  within = attention.stream_attention(
      SLOTS, scale=WIDTH**-0.5, softcap=SOFTCAP, windows=(37, NO_WINDOW)
  )
  return within(q, k, v, window)


@functools.cache
def by(attend):
  """(q, k, v, cotangent, window) -> output and gradients."""

  def run(q, k, v, cotangent, window):
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, window), q, k, v)
    return out, *pull(cotangent)

  return jax.jit(run)


@pytest.mark.parametrize("window", [NO_WINDOW, 37, 1])
def test_two_intervals_are_what_a_token_sees(window):
  place = np.arange(LENGTH)
  own, prompt = (
      (place >= np.array(x.first)[..., None])
      & (place <= np.array(x.last)[..., None])
      for x in spans.intervals(spans.runs(SLOTS), jnp.int32(window))
  )
  assert not (own & prompt).any() and own.any(-1).all()
  real = SLOTS.prompt >= 0
  np.testing.assert_array_equal((own | prompt)[real], visible(window)[real])
  assert not prompt[~real].any() and (own[~real].sum(-1) == 1).all()


KERNELS = pytest.mark.parametrize("attend", [splash_attend, tiled_attend])


@KERNELS
@pytest.mark.parametrize("window", [NO_WINDOW, 37])
def test_a_kernel_is_attention(attend, window):
  want = in_numpy(*inputs(), visible(window), SOFTCAP)
  got = by(attend)(*inputs(), window)
  real = SLOTS.prompt >= 0
  np.testing.assert_allclose(got[0][real], want[0][real], rtol=0, atol=1e-5)
  assert np.isfinite(got[0]).all()
  for one, other in zip(got[1:], want[1:]):
    assert np.abs(other).max() > 1
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@KERNELS
def test_no_candidate_sees_another(attend):
  """One changed candidate changes no bit of any other token's."""
  before = by(attend)(*inputs(), NO_WINDOW)
  changed = (SLOTS.prompt == 0) & (SLOTS.candidate == 1)
  other = [np.where(changed[..., None, None], x[:, ::-1], x) for x in inputs()]
  after = by(attend)(*other, NO_WINDOW)
  prompt = (SLOTS.prompt == 0) & (SLOTS.candidate < 0)
  for i, (one, two) in enumerate(zip(before, after)):
    # The gradients of the prompt's keys and values come from all candidates.
    apart = ~changed & ~prompt if i > 1 else ~changed
    np.testing.assert_array_equal(one[apart], two[apart])
    assert (one[changed] != two[changed]).any()


def test_splash_meets_only_blocks_that_someone_sees():
  seen = spans.intervals(spans.runs(SLOTS), jnp.int32(37))
  stream = jax.tree.map(lambda x: x[0], seen)
  q = k = np.zeros((2, LENGTH, WIDTH))  # blocks of 128
  met = []
  for seen in stream:
    info = splash._blocks_of_queries(q, k, splash._bound(seen))
    met.append(np.array(info.block_mask[0]))
    fetched = np.array(info.data_next[0])
    assert (fetched[met[-1] > 0] == np.nonzero(met[-1])[1]).all()
  blocks = visible(37)[0].reshape(3, 128, 3, 128).any((1, 3))
  real = (SLOTS.prompt[0] >= 0).reshape(3, 128).any(1)
  np.testing.assert_array_equal((met[0] | met[1])[real], blocks[real])
  assert blocks.sum() < 6  # of the lower half


# --- cuDNN --------------------------------------------------------------------


def stretches(part):
  """(row of the log-sum-exps, stream, queries, keys) of every segment."""
  query, num_queries, key, num_keys = map(np.asarray, part)
  there = np.argwhere(query >= 0)
  for row, (s, m) in enumerate(there):
    yield (row, s, slice(query[s, m], query[s, m] + num_queries[s, m]),
           slice(key[s, m], key[s, m] + num_keys[s, m]))


def scores_of(q, k, s, queries, keys, causal, scale):
  k = np.repeat(k[s, keys], HEADS // KV_HEADS, axis=1)
  scores = np.einsum("ihe,jhe->hij", q[s, queries], k) * scale
  if causal:
    scores[:, ~np.tri(*scores.shape[1:], dtype=bool)] = -np.inf
  return scores


def run_segments(q, k, v, part, causal, scale):
  """The kernel as documented: nothing is written outside of segments."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.full(q.shape, np.nan)
  stats = np.full((part.query.size, HEADS, LENGTH), np.nan)
  for row, s, queries, keys in stretches(part):
    scores = scores_of(q, k, s, queries, keys, causal, scale)
    top = scores.max(-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    v_seen = np.repeat(v[s, keys], HEADS // KV_HEADS, axis=1)
    out[s, queries] = np.einsum("hij,jhe->ihe", np.exp(scores - lse), v_seen)
    stats[row, :, :lse.shape[1]] = lse[..., 0]
  return out.astype(np.float32), stats.astype(np.float32)


def pull_segments(q, k, v, part, causal, scale, stats, out, cotangent):
  """Its backward pass, of the output and log-sum-exps that it is given."""
  q, k, v, stats, out, d_out = (
      np.asarray(x, np.float64) for x in (q, k, v, stats, out, cotangent)
  )
  d_q, d_k, d_v = (np.full(x.shape, np.nan) for x in (q, k, v))
  for row, s, queries, keys in stretches(part):
    scores = scores_of(q, k, s, queries, keys, causal, scale)
    weights = np.exp(scores - stats[row, :, :scores.shape[1], None])
    k_seen, v_seen = (
        np.repeat(x[s, keys], HEADS // KV_HEADS, axis=1) for x in (k, v)
    )
    d_here, mean = d_out[s, queries], (out * d_out)[s, queries].sum(-1)
    d_scores = np.einsum("ihe,jhe->hij", d_here, v_seen) - mean.T[..., None]
    d_scores *= weights * scale
    summed = lambda x: x.reshape(len(x), KV_HEADS, -1, WIDTH).sum(2)
    d_q[s, queries] = np.einsum("hij,jhe->ihe", d_scores, k_seen)
    d_k[s, keys] = summed(np.einsum("hij,ihe->jhe", d_scores, q[s, queries]))
    d_v[s, keys] = summed(np.einsum("hij,ihe->jhe", weights, d_here))
  return tuple(x.astype(np.float32) for x in (d_q, d_k, d_v))


def test_cudnn_is_attention_given_its_kernel(monkeypatch):
  """All around the kernel, which itself needs a GPU."""

  def run(q, k, v, part, causal, scale):
    stats = (part.query.size, HEADS, LENGTH)
    shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in (q.shape, stats)]
    f = lambda *arrays: run_segments(*arrays, causal, scale)
    return jax.pure_callback(f, shapes, q, k, v, part)

  def pull(q, k, v, part, causal, scale, *rest):
    f = lambda q, k, v, part, *rest: pull_segments(
        q, k, v, part, causal, scale, *rest
    )
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v)]
    return jax.pure_callback(f, shapes, q, k, v, part, *rest)

  monkeypatch.setattr(cudnn, "_run", run)
  monkeypatch.setattr(cudnn, "_pull", pull)

  @jax.jit
  def attend(q, k, v, cotangent):
    own, prompt, fit = cudnn.segments(SLOTS)
    f = lambda *qkv: cudnn.attend(*qkv, own, prompt, scale=WIDTH**-0.5)
    out, pull = jax.vjp(f, q, k, v)
    return fit, out, *pull(cotangent)

  fit, *got = attend(*inputs())
  assert fit.all()
  # A cap as far away as this is none.
  want = in_numpy(*inputs(), visible(NO_WINDOW), softcap=1e6)
  for one, other in zip(got, want):
    assert np.abs(other).max() > 1
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_cudnn_says_when_there_are_too_many_runs():
  short = [[(b, 3, [2, 1]) for b in range(3)]] * 2  # 9 runs, room for 8
  short[1] = short[1][:2]
  assert cudnn.segments(slots_of(short))[2].tolist() == [False, True]


def test_cudnn_is_called_for_both_parts():
  """Forward and backward, in the program that a GPU would compile."""
  shape = lambda heads: jax.ShapeDtypeStruct(
      (len(LAYOUT), LENGTH, heads, WIDTH), jnp.bfloat16
  )

  def run(q, k, v, cotangent):
    own, prompt, _ = cudnn.segments(SLOTS)
    attend = lambda *qkv: cudnn.attend(*qkv, own, prompt, scale=1.0)
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(cotangent)

  text = jax.jit(run).trace(
      shape(HEADS), shape(KV_HEADS), shape(KV_HEADS), shape(HEADS)
  ).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("fmhaSoftmax(") == 2
  assert text.count("fmhaSoftmaxBackward(") == 2
  assert text.count("PADDING_CAUSAL") == 2


# --- the choice ---------------------------------------------------------------


def choose(kind, monkeypatch, dtype=jnp.bfloat16, width=64, **changes):
  """The kernel on devices of a kind, and what was warned of."""
  warned = []
  monkeypatch.setattr(sharding, "traced_devices", lambda: (kind, 4))
  monkeypatch.setattr(attention, "_warn", warned.append)
  settings = dict(length=1024, parts=1, softcap=None, window=NO_WINDOW)
  kernel = attention.choose_kernel(
      jnp.dtype(dtype), width, **settings | changes
  )
  return kernel, " ".join(warned)


@pytest.mark.parametrize(
    "kind, kernel", [("cpu", "tiles"), ("TPU v5 lite", "splash"),
                     ("TPU7x", "splash"), ("NVIDIA H200", "cudnn")]
)
def test_each_backend_has_its_kernel(kind, kernel, monkeypatch):
  assert choose(kind, monkeypatch) == (kernel, "")


@pytest.mark.parametrize(
    "kind, changes, reason",
    [
        ("TPU v5p", dict(dtype=jnp.float16), "float16"),
        ("TPU v5p", dict(length=2**16), "65536 tokens"),
        ("NVIDIA H100", dict(dtype=jnp.float32), "float32"),
        ("NVIDIA H100", dict(width=60), "width 60"),
        ("NVIDIA H100", dict(softcap=50.0), "soft-capped"),
        ("NVIDIA H100", dict(window=512), "window of 512"),
        ("NVIDIA H100", dict(parts=2), "context"),
    ],
)
def test_doing_without_a_kernel_is_said_with_the_reason(
    kind, changes, reason, monkeypatch
):
  kernel, warned = choose(kind, monkeypatch, **changes)
  assert kernel == "tiles" and reason in warned
  assert ("splash" if "TPU" in kind else "cudnn") in warned


def test_a_kernel_is_told_by_the_program_that_calls_it():
  call = '%{} = f32[8]{{0}} custom-call(%a), custom_call_target="{}"'
  splash_call = call.format("splash_mha_fwd_residuals.1", "tpu_custom_call")
  cudnn_call = call.format("x.2", "__cudnn$fmhaSoftmax")
  dot = '%dot = f32[8]{0} dot(%a), metadata={op_name="splash_mha"}'
  program = "\n".join((splash_call, cudnn_call, dot))
  assert attention.fused_kernels(program) == {"splash", "cudnn"}
  assert attention.fused_kernels(splash_call) == {"splash"}
  assert attention.fused_kernels(cudnn_call) == {"cudnn"}
  assert not attention.fused_kernels(dot)


def test_a_tpu_program_of_the_decoder_has_the_kernel(monkeypatch):
  """Compiled for four chips that share each stream and the weights."""
  if not importlib.util.find_spec("libtpu"):
    pytest.skip("needs libtpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chips = topologies.get_topology_desc(
      platform="tpu", topology_name="v5e:2x2"
  ).devices
  mesh = sharding.make_mesh(data=1, fsdp=1, context=2, tensor=2, devices=chips)
  config = ModelConfig(
      family="gemma2", vocab_size=256, hidden_size=256, intermediate_size=512,
      num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
      attention_softcap=30.0, sliding_window=100, local_layers=(True, False),
  )
  place = lambda shapes, split: jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, split,
  )
  shapes = decoder.param_shapes(config, dtype=jnp.bfloat16)
  params = place(
      shapes, sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  )
  tokens = jax.ShapeDtypeStruct(
      (2, 256), jnp.int32, sharding=sharding.stream_sharding(mesh)
  )
  streams = Streams(*[tokens] * 6)

  @jax.jit
  def hidden(params, streams):
    with sharding.tracing_on(mesh):
      return decoder.hidden_states(
          params, config, streams, compute_dtype=jnp.bfloat16
      )

  # What is compiled is not this machine's to run: no cache can keep it.
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    program = hidden.lower(params, streams).compile().as_text()
  finally:
    jax.config.update("jax_enable_compilation_cache", True)
  assert attention.fused_kernels(program) == {"splash"}


def test_an_accelerator_gives_what_numpy_gives():
  """With JAX_PLATFORMS=cuda or tpu, on the device itself."""
  if jax.default_backend() == "cpu":
    pytest.skip("needs an accelerator")
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]

  def run(q, k, v, cotangent):
    within = attention.stream_attention(
        SLOTS, scale=WIDTH**-0.5, softcap=None, windows=(NO_WINDOW,)
    )
    attend = lambda *qkv: within(*qkv, jnp.int32(NO_WINDOW))
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent)

  program = jax.jit(run).lower(*rounded).compile()
  assert attention.fused_kernels(program.as_text())
  exact = [np.asarray(x, np.float64) for x in rounded]
  want = in_numpy(*exact, visible(NO_WINDOW), softcap=1e6)
  real = SLOTS.prompt >= 0
  for one, other in zip(program(*rounded), want):
    error = np.abs(np.asarray(one, np.float64) - other)[real]
    assert error.max() < 0.02 * np.abs(other).max()
