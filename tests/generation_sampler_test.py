"""What is sampled, against the full forward pass and transformers."""

import collections
import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import models_parity_test
import numpy as np
import pytest

from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.generation.service import GenerationService
from mcpo_jax.models import decoder, hf, scoring
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.types import GenerationResult, Streams

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


def prompts_of(seed, lengths=(3, 7, 5)):
  """tokens [R, P] with noise on the padding, lengths [R], prompt_ids [R, 2]."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 31, (len(lengths), 8)).astype(np.int32)
  ids = rng.integers(0, 2**32, (len(lengths), 2), dtype=np.uint32)
  return tokens, np.array(lengths, np.int32), ids


def run(
    models, prompts, *, config=CONFIG, num_samples=2, seed=0, stop_ids=STOPS,
    length=LENGTH, dtype="float32", vocab_size=None, num_slots=4, **sampling,
):
  """A service of few slots, so that they are refilled."""
  tokens, lengths, ids = prompts
  service = GenerationService(
      config, models, 0, max_completion_length=length, stop_ids=stop_ids,
      pad_id=PAD, compute_dtype=dtype, vocab_size=vocab_size,
      num_slots=num_slots,
  )
  return service.generate(
      [row[:n] for row, n in zip(tokens, lengths)], prompt_ids=ids,
      num_samples=num_samples, sampling=Sampling(**sampling), seed=seed,
  )


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
  none = np.zeros((len(prompts[1]), 1, LENGTH), np.int32)
  empty = GenerationResult(none, none > 0, None, none, none, [], 0)
  _, logits = scorer("float32")(params, streams_of(prompts, empty))
  last = np.take_along_axis(logits, prompts[1][:, None, None] - 1, axis=1)
  return np.asarray(jax.nn.log_softmax(np.asarray(last, np.float32)[:, 0]))


def test_greedy_is_the_argmax_of_the_full_forward():
  params, prompts = params_of(0), prompts_of(0)
  out = run(params, prompts, temperature=0.0)
  streams = streams_of(prompts, out)
  _, logits = scorer("float32")(params, streams)
  best = np.argmax(logits, -1)
  predicted = np.take_along_axis(best, streams.source, 1)
  mask = streams.completion_mask
  assert mask.sum() > LENGTH
  np.testing.assert_array_equal(streams.tokens[mask], predicted[mask])
  assert (out.behaviour_logps == 0).all()
  again = run(params, prompts, temperature=0.0, seed=9)
  np.testing.assert_array_equal(out.tokens, again.tokens)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5),
                                          ("float64", 1e-11)])
def test_logps_are_those_of_the_scorer(dtype, bound):
  with jax.enable_x64(dtype == "float64"):
    params, prompts = params_of(0, dtype), prompts_of(1)
    plain = run(params, prompts, dtype=dtype)
    other = run(
        params, prompts, temperature=0.6, top_p=0.8, dtype=dtype
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


def test_in_bfloat16_few_tokens_are_another_ones_by_a_tenth():
  """Sampler over scorer, of the probability of each token drawn."""
  ratios = []
  for seed in range(3):
    params, prompts = params_of(seed, "bfloat16"), prompts_of(seed)
    out = run(params, prompts, dtype="bfloat16", seed=seed)
    streams = streams_of(prompts, out)
    want = np.asarray(scorer("bfloat16")(params, streams)[0], np.float32)
    got = out.behaviour_raw_logps[:, 0][out.mask[:, 0]]
    ratios.append(np.exp(got - want[streams.completion_mask]))
  ratios = np.concatenate(ratios)
  assert len(ratios) > 50 and (ratios != 1).any()
  assert ((ratios < 0.9) | (ratios > 1.1)).mean() <= 0.01


def test_nothing_but_pad_after_a_stop_token():
  found = set()
  for seed in range(4):
    out = run(params_of(0), prompts_of(seed), seed=seed)
    is_stop = np.isin(out.tokens, STOPS) & out.mask
    ended = np.cumsum(is_stop, -1) - is_stop > 0  # strictly after the first
    assert (~out.mask == ended).all()
    assert (out.tokens[ended] == PAD).all()
    assert (out.behaviour_logps[ended] == 0).all()
    assert (out.behaviour_raw_logps[ended] == 0).all()
    assert (out.behaviour_raw_logps[out.mask] < 0).all()
    found.update(out.mask.sum(-1).ravel().tolist())
  assert LENGTH in found and len(found) > 3


def test_whole_sequences_come_with_the_probabilities_of_the_full_forward():
  """Every sequence of 5 tokens up to a stop token or 3 tokens."""
  from scipy import stats

  config = dataclasses.replace(CONFIG, vocab_size=5, initializer_range=0.3)
  params = jax.jit(lambda k: decoder.init_params(k, config))(jax.random.key(3))
  prompt = np.array([[3, 1, 4, 0, 0, 0, 0, 0]], np.int32)
  prompts = prompt, np.array([3]), np.array([[7, 8]], np.uint32)
  count = 12_000
  out = run(params, prompts, config=config, num_samples=count, stop_ids=(2,),
            length=3, num_slots=64)
  each = out.mask[0].sum(-1)
  got = collections.Counter(
      tuple(ids[:n]) for ids, n in zip(out.tokens[0].tolist(), each)
  )
  go_on = [t for t in range(5) if t != 2]
  sequences = [
      (*first, last)
      for number in range(3) for first in itertools.product(
          go_on, repeat=number)
      for last in (range(5) if number == 2 else [2])
  ]
  tokens = np.zeros((len(sequences), 1, 3), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, ids in enumerate(sequences):
    tokens[i, 0, : len(ids)], mask[i, 0, : len(ids)] = ids, True
  every = GenerationResult(tokens, mask, None, None, None, [], 0)
  streams = streams_of(
      (np.repeat(prompt, len(sequences), 0), [3] * len(sequences), None), every
  )
  logps = jax.jit(scoring.token_logps, static_argnums=1)(
      params, config, streams
  )
  probs = np.exp(np.where(streams.completion_mask, logps, 0.0).sum(-1))
  np.testing.assert_allclose(probs.sum(), 1.0, atol=1e-5)
  assert set(got) <= set(sequences)
  counts = np.array([got[ids] for ids in sequences])
  often = probs * count > 5
  pool = lambda x: np.append(x[often], x[~often].sum())
  expected = pool(probs.astype(np.float64))
  expected *= count / expected.sum()
  assert often.sum() > 30
  assert stats.chisquare(pool(counts), expected).pvalue > 1e-3


def test_truncated_laws_draw_what_they_leave_and_nothing_else():
  """Samples of three laws share every step of one engine."""
  engine = engine_lib.Engine(
      CONFIG, ((params_of(0), 1.0),), 0, max_new_tokens=LENGTH,
      stop_ids=STOPS, num_slots=48,
  )
  prompts = prompts_of(3)
  laws = (
      Sampling(top_p=0.7), Sampling(top_k=4, temperature=1.5),
      Sampling(min_p=0.2),
  )
  count = 600
  for i, how in enumerate(laws):
    engine.submit(engine_lib.Request(
        i, prompts[0][0, :3], prompts[2][0], np.arange(count),
        how._replace(max_new_tokens=1), 0,
    ))
  drawn = {0: [], 1: [], 2: []}
  while not engine.idle:
    for new in engine.step(8):
      drawn[new.request_id].append((new.tokens[0], new.behaviour_logps[0]))
  probs = np.exp(first_logps(params_of(0), prompts)[0].astype(np.float64))
  order = np.argsort(-probs)
  nucleus = np.searchsorted(np.cumsum(probs[order]), 0.7) + 1
  tempered = probs ** (1 / 1.5)
  for i, (kept, weights) in enumerate((
      (order[:nucleus], probs), (order[:4], tempered),
      (np.nonzero(probs >= 0.2 * probs.max())[0], probs),
  )):
    assert 1 < len(kept) < 31 and len(drawn[i]) == count
    tokens, logps = map(np.array, zip(*drawn[i]))
    assert set(tokens) == set(kept)
    want = np.log(weights / weights[kept].sum())
    np.testing.assert_allclose(logps, want[tokens], atol=1e-4)


def test_what_is_penalised_is_the_prompt_and_the_completion_so_far():
  prompts = prompts_of(6)
  out = run(params_of(0), prompts, repetition_penalty=1.8, temperature=0.7)
  streams = streams_of(prompts, out)
  _, logits = scorer("float32")(params_of(0), streams)
  for row, ids in enumerate(streams.tokens):
    got = out.behaviour_logps[row, 0][out.mask[row, 0]]
    for place, found in zip(np.nonzero(streams.completion_mask[row])[0], got):
      x = np.array(logits[row, place - 1], np.float64)
      seen = np.unique(ids[:place])
      x[seen] = np.where(x[seen] > 0, x[seen] / 1.8, x[seen] * 1.8)
      x /= 0.7
      want = x[ids[place]] - np.log(np.exp(x).sum())
      np.testing.assert_allclose(found, want, atol=5e-5)


def test_no_stop_token_before_min_new_tokens():
  prompts, seen = prompts_of(7), []
  for least in (0, 4):
    out = run(params_of(0), prompts, num_samples=8, min_new_tokens=least)
    stopped = np.array(out.finish_reason) == "stop"
    seen.append(out.mask.sum(-1)[stopped])
    assert not np.isin(out.tokens[..., : least and least - 1], STOPS).any()
  assert seen[0].min() < 5 == seen[1].min()


def test_a_mixture_is_the_weighted_sum_of_log_probabilities():
  prompts = prompts_of(0)
  first, second = params_of(0), params_of(1)
  weigh = lambda a, b: ((first, a), (second, b))
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
  alone, mostly = run(second, prompts), run(weigh(0.0, 1.0), prompts)
  np.testing.assert_array_equal(alone.tokens, mostly.tokens)
  assert (alone.tokens != out.tokens).any()
  # Beyond the second, away from the first.
  far = run(weigh(-0.5, 1.5), prompts)
  mixed = jax.nn.log_softmax(-0.5 * logps[0] + 1.5 * logps[1])
  pick = lambda x: np.take_along_axis(np.asarray(x), far.tokens[..., 0], 1)
  np.testing.assert_allclose(
      far.behaviour_logps[..., 0], pick(mixed), atol=1e-4
  )


def test_rows_beyond_the_tokenizer_are_never_drawn():
  free = run(params_of(0), prompts_of(2), seed=2)
  prompts = prompts_of(2)
  out = run(
      params_of(0), (prompts[0] % 20, *prompts[1:]), seed=2, vocab_size=20
  )
  assert free.tokens.max() >= 20 > out.tokens.max()
  # The raw policy has them all the same.
  least = np.exp(out.behaviour_logps - out.behaviour_raw_logps)[out.mask]
  assert (least > 1).all()


@pytest.mark.parametrize("name", models_parity_test.FAMILIES)
def test_greedy_ids_are_those_of_transformers(name, tmp_path):
  """64 tokens of prompts that they pad on the left, with two stop tokens."""
  torch = models_parity_test.torch
  with mock.patch.dict(
      models_parity_test.SIZES, max_position_embeddings=128
  ):
    theirs = models_parity_test.make_reference(name, tmp_path)
  lengths, stops = np.array([4, 9, 3, 6]), (28, 11)
  rng = np.random.default_rng(4)
  tokens = rng.integers(0, 61, (4, 9)).astype(np.int32)
  padded = np.zeros_like(tokens)
  for row, new, length in zip(tokens, padded, lengths):
    new[9 - length :] = row[:length]
  attention = np.arange(9)[None] >= 9 - lengths[:, None]
  with models_parity_test.true_float64(theirs):
    want = theirs.generate(
        torch.tensor(padded), attention_mask=torch.tensor(attention).long(),
        do_sample=False, max_new_tokens=64, eos_token_id=list(stops),
        pad_token_id=PAD,
    ).numpy()[:, 9:]
  with jax.enable_x64(True):
    config = hf.load_config(tmp_path)
    out = run(
        hf.load_params(tmp_path, config, dtype=jnp.float64),
        (tokens, lengths, np.zeros((4, 2), np.uint32)), config=config,
        num_samples=1, temperature=0.0, stop_ids=stops, length=64,
        dtype="float64", num_slots=2,
    )
  got = out.tokens[:, 0]
  np.testing.assert_array_equal(got[:, : want.shape[1]], want)
  assert (got[:, want.shape[1] :] == PAD).all()
  assert out.mask.sum((1, 2)).max() > 20
