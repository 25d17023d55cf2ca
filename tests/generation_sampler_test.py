"""The compiled sampler against the full forward pass and transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax.generation import sampler
from mcpo_jax.models import decoder, scoring
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import Streams

CONFIG = ModelConfig(
    family="llama", vocab_size=31, hidden_size=24, intermediate_size=40,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64,
    initializer_range=0.4,
)
PAD, LENGTH = 0, 12
STOPS = (5, 9, 17)


@functools.cache
def params_of(seed, dtype="float32"):
  init = jax.jit(lambda k: decoder.init_params(k, CONFIG, dtype=dtype))
  return init(jax.random.key(seed))


@functools.cache
def scorer(dtype):
  """(logps [S, T] of the scorer, logits [S, T, V]) of streams, compiled."""

  def score(params, streams):
    hidden = decoder.hidden_states(
        params, CONFIG, streams, compute_dtype=dtype
    )
    return (
        scoring.token_logps(params, CONFIG, streams, compute_dtype=dtype),
        decoder.head_logits(params, CONFIG, hidden),
    )

  return jax.jit(score)


@functools.cache
def make(stop_ids=STOPS, length=LENGTH, dtype="float32", vocab_size=None):
  return sampler.make_generate_fn(
      CONFIG, max_completion_length=length, stop_ids=stop_ids, pad_id=PAD,
      compute_dtype=dtype, vocab_size=vocab_size,
  )


def prompts_of(seed, lengths=(3, 7, 5), width=8):
  """tokens [R, P] with noise on the padding, lengths [R], prompt_ids [R, 2]."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 31, (len(lengths), width)).astype(np.int32)
  ids = rng.integers(0, 2**32, (len(lengths), 2), dtype=np.uint32)
  return tokens, np.array(lengths, np.int32), ids


def run(
    models, prompts, *, num_samples=2, seed=0, temperature=1.0, top_p=1.0,
    **made,
):
  tokens, lengths, ids = prompts
  index = np.tile(np.arange(num_samples, dtype=np.int32), (len(lengths), 1))
  out = make(**made)(
      models, jax.random.key(seed), tokens, lengths, ids, index,
      temperature=np.float32(temperature), top_p=np.float32(top_p),
  )
  return sampler.Samples(*(np.asarray(x) for x in out))


def one(params):
  return ((params, np.float32(1.0)),)


def streams_of(prompts, out, sample=0):
  """One stream per prompt: the prompt and one of its samples."""
  tokens, lengths, _ = prompts
  rows, width = len(lengths), max(lengths) + out.tokens.shape[-1]
  s = Streams(
      tokens=np.zeros((rows, width), np.int32),
      positions=np.tile(np.arange(width, dtype=np.int32), (rows, 1)),
      prompt_slot=np.full((rows, width), -1, np.int32),
      candidate_slot=np.full((rows, width), -1, np.int32),
      completion_mask=np.zeros((rows, width), bool),
      source=np.tile(np.arange(width, dtype=np.int32) - 1, (rows, 1)),
  )
  for r, start in enumerate(lengths):
    end = start + out.mask[r, sample].sum()
    s.tokens[r, :start] = tokens[r, :start]
    s.tokens[r, start:end] = out.tokens[r, sample][out.mask[r, sample]]
    s.prompt_slot[r, :end], s.candidate_slot[r, start:end] = r, 0
    s.completion_mask[r, start:end] = True
  return s._replace(source=np.maximum(s.source, 0))


def first_logps(params, prompts):
  """[R, V] of the first token after the prompts, by the full forward pass."""
  shape = (len(prompts[1]), 1, LENGTH)
  none = np.zeros(shape, np.int32)
  empty = sampler.Samples(none, none.astype(bool), none, none)
  _, logits = scorer("float32")(params, streams_of(prompts, empty))
  last = np.take_along_axis(logits, prompts[1][:, None, None] - 1, axis=1)
  return jax.nn.log_softmax(np.asarray(last, np.float32)[:, 0])


def test_greedy_is_the_argmax_of_the_full_forward():
  params, prompts = params_of(0), prompts_of(0)
  out = run(one(params), prompts, temperature=0.0)
  streams = streams_of(prompts, out)
  _, logits = scorer("float32")(params, streams)
  best = np.argmax(logits, -1)
  predicted = np.take_along_axis(best, streams.source, 1)
  mask = streams.completion_mask
  assert mask.sum() > LENGTH
  np.testing.assert_array_equal(streams.tokens[mask], predicted[mask])
  assert (out.behaviour_logps == 0).all()
  again = run(one(params), prompts, temperature=0.0, seed=9)
  np.testing.assert_array_equal(out.tokens, again.tokens)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5),
                                          ("float64", 1e-11)])
def test_logps_are_those_of_the_scorer(dtype, bound):
  with jax.enable_x64(dtype == "float64"):
    params, prompts = params_of(0, dtype), prompts_of(1)
    plain = run(one(params), prompts, dtype=dtype)
    other = run(
        one(params), prompts, temperature=0.6, top_p=0.8, dtype=dtype
    )
    for out in (plain, other):
      for sample in range(2):
        streams = streams_of(prompts, out, sample)
        want = np.asarray(scorer(dtype)(params, streams)[0])
        want = want[streams.completion_mask]
        got = out.behaviour_raw_logps[:, sample][out.mask[:, sample]]
        np.testing.assert_allclose(got, want, atol=bound, rtol=0)
  np.testing.assert_allclose(
      plain.behaviour_logps, plain.behaviour_raw_logps, atol=bound
  )
  differs = other.behaviour_logps - other.behaviour_raw_logps
  assert (np.abs(differs)[other.mask] > 1e-3).all()


def test_nothing_but_pad_after_a_stop_token():
  found = set()
  for seed in range(4):
    out = run(one(params_of(0)), prompts_of(seed), seed=seed)
    is_stop = np.isin(out.tokens, STOPS) & out.mask
    ended = np.cumsum(is_stop, -1) - is_stop > 0  # strictly after the first
    assert (~out.mask == ended).all()
    assert (out.tokens[ended] == PAD).all()
    assert (out.behaviour_logps[ended] == 0).all()
    assert (out.behaviour_raw_logps[ended] == 0).all()
    assert (out.behaviour_raw_logps[out.mask] < 0).all()
    found.update(out.mask.sum(-1).ravel().tolist())
  assert LENGTH in found and len(found) > 3


@pytest.fixture(scope="module")
def counted():
  """generate(params, seed, ...), the steps it ran, the traces of it."""
  steps, traces = [], []
  prefill, step = decoder.prefill, decoder.decode_step

  def counted_step(*args):
    jax.debug.callback(lambda: steps.append(1))
    return step(*args)

  generate = sampler.make_generate_fn(
      CONFIG, max_completion_length=40, stop_ids=range(8), pad_id=PAD,
      vocab_size=20,
  )

  def run(params, seed, temperature=1.0, top_p=1.0):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(decoder, "decode_step", counted_step)
      patch.setattr(
          decoder, "prefill", lambda *a: traces.append(1) or prefill(*a)
      )
      steps.clear()
      out = generate(
          one(params), jax.random.key(seed), *prompts_of(2),
          np.zeros((3, 1), np.int32), temperature=temperature, top_p=top_p,
      )
      jax.effects_barrier()
    return out, len(steps), len(traces)

  return run


def test_the_loop_ends_when_all_rows_have_ended(counted):
  out, steps, _ = counted(params_of(0), 0)
  longest = int(out.mask.sum(-1).max())
  assert 1 < longest < 40 and steps == longest


def test_policy_and_reference_share_one_compilation(counted):
  (first, _, _), (second, _, _), (_, _, traces) = (
      counted(params_of(seed), seed, t, p)
      for seed, t, p in ((0, 1.0, 1.0), (1, 1.0, 1.0), (0, 0.0, 0.9))
  )
  assert traces == 1
  assert (first.tokens != second.tokens).any()


def test_first_tokens_come_with_the_frequencies_of_the_softmax():
  from scipy import stats

  prompts = prompts_of(3)
  out = run(one(params_of(0)), prompts, num_samples=4000, temperature=1.5,
            stop_ids=(), length=1)
  logps = np.asarray(first_logps(params_of(0), prompts), np.float64)[0]
  probs = np.exp(logps / 1.5)
  counts = np.bincount(out.tokens[0].ravel(), minlength=31)
  expected = probs / probs.sum() * 4000
  assert expected.min() > 5
  assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_top_p_never_draws_outside_the_nucleus():
  prompts = prompts_of(3)
  out = run(one(params_of(0)), prompts, num_samples=4000, top_p=0.7,
            stop_ids=(), length=1)
  logps = np.asarray(first_logps(params_of(0), prompts), np.float64)[0]
  probs = np.exp(logps)
  order = np.argsort(-probs)
  size = np.searchsorted(np.cumsum(probs[order]), 0.7) + 1
  assert 1 < size < 31
  assert set(out.tokens[0].ravel()) == set(order[:size])


def test_a_sample_does_not_depend_on_batch_mates_or_padding():
  with jax.enable_x64(True):
    params, prompts = params_of(0, "float64"), prompts_of(4)
    together = run(one(params), prompts, dtype="float64")
    for r in range(3):
      tokens, lengths, ids = (x[r : r + 1] for x in prompts)
      wider = np.concatenate([tokens, np.full((1, 5), 3, np.int32)], 1)
      alone = run(one(params), (wider, lengths, ids), dtype="float64")
      np.testing.assert_array_equal(alone.tokens[0], together.tokens[r])
      np.testing.assert_array_equal(alone.mask[0], together.mask[r])
  assert (together.tokens[:, 0] != together.tokens[:, 1]).any(-1).all()


def test_a_mixture_is_the_weighted_sum_of_log_probabilities():
  prompts = prompts_of(0)
  first, second = params_of(0), params_of(1)
  weigh = lambda a, b: ((first, np.float32(a)), (second, np.float32(b)))
  out = run(weigh(0.25, 0.75), prompts)
  logps = [first_logps(p, prompts) for p in (first, second)]
  mixed = jax.nn.log_softmax(0.25 * logps[0] + 0.75 * logps[1])
  pick = lambda x: np.take_along_axis(np.asarray(x), out.tokens[..., 0], 1)
  np.testing.assert_allclose(
      out.behaviour_logps[..., 0], pick(mixed), atol=1e-5
  )
  np.testing.assert_allclose(
      out.behaviour_raw_logps[..., 0], pick(logps[0]), atol=1e-5
  )
  # All weight on one model, at every step, is that model.
  alone, mostly = run(one(second), prompts), run(weigh(0.0, 1.0), prompts)
  np.testing.assert_array_equal(alone.tokens, mostly.tokens)
  assert (alone.tokens != out.tokens).any()


def test_rows_beyond_the_tokenizer_are_never_drawn(counted):
  free = run(one(params_of(0)), prompts_of(2))
  out, _, _ = counted(params_of(0), 0)
  assert free.tokens.max() >= 20 > out.tokens.max()


def test_greedy_ids_are_those_of_transformers():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  torch.set_num_threads(1)
  theirs = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
          vocab_size=31, hidden_size=24, intermediate_size=40,
          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
          head_dim=6, max_position_embeddings=64, initializer_range=0.4,
          rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=False,
      )
  ).to(torch.float64).eval()
  tokens, lengths, ids = prompts_of(5, lengths=(4, 7, 3, 6))
  padded = np.zeros_like(tokens)  # transformers pads generation on the left
  for row, new, length in zip(tokens, padded, lengths):
    new[8 - length :] = row[:length]
  attention = np.arange(8)[None] >= 8 - lengths[:, None]
  stops = (28, 11)
  want = theirs.generate(
      torch.tensor(padded), attention_mask=torch.tensor(attention).long(),
      do_sample=False, max_new_tokens=40, eos_token_id=list(stops),
      pad_token_id=PAD,
  ).numpy()[:, 8:]
  with jax.enable_x64(True):
    out = run(
        one(from_torch(theirs.state_dict(), "float64")), (tokens, lengths, ids),
        temperature=0.0, stop_ids=stops, length=40, dtype="float64",
    )
  got = out.tokens[:, 0]
  np.testing.assert_array_equal(got[:, : want.shape[1]], want)
  assert (got[:, want.shape[1] :] == PAD).all()
  counts = out.mask.sum((1, 2))
  assert counts.max() >= 32 and counts.min() < 32


def from_torch(state, dtype):
  """The weights of a torch Llama as our tree."""
  take = lambda name: jnp.asarray(state[name].numpy(), dtype)

  def stack(name, kind):
    layers = [take(f"model.layers.{i}.{name}.weight") for i in range(2)]
    return {kind: jnp.stack([w.T if kind == "kernel" else w for w in layers])}

  projections = lambda part, names: {
      n: stack(f"{part}.{n}", "kernel") for n in names
  }
  return {
      "embed": {"embedding": take("model.embed_tokens.weight")},
      "layers": {
          "attention": projections(
              "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")
          ),
          "mlp": projections("mlp", ("gate_proj", "up_proj", "down_proj")),
          "attention_norm": stack("input_layernorm", "scale"),
          "mlp_norm": stack("post_attention_layernorm", "scale"),
      },
      "final_norm": {"scale": take("model.norm.weight")},
      "lm_head": {"kernel": take("lm_head.weight").T},
  }
