"""Likelihood diagnostics: by hand, and on a tiny model in plain NumPy."""

import functools
import types

import jax
import jax.numpy as jnp
import models_streams
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax.evaluation import likelihood, samples
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.generation.service import GenerationService
from mcpo_jax.models import decoder, scoring
from mcpo_jax.stages import evaluate, preference, references, sampling
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import update

NAN = np.nan

# --- by hand ------------------------------------------------------------------

# Set 0 has two pairs, set 1 one with the preferred in slot 1, set 2 none.
ROLE = np.array([[1, -1, -1], [-1, 1, 0], [1, 0, 0]], np.int8)
LENGTHS = np.array([[2, 4, 1], [5, 2, 3], [7, 0, 0]])


def test_displacement_of_vectors_by_hand():
  # Set 0: S+ = (2, 4), means (1, 2); negatives (4, 0) / 4 = (1, 0) and (1, 2).
  # <h+, h-> - |h+|^2 = 1 - 5 and 5 - 5.
  # Set 1: S+ = (6, 0), mean (3, 0); negative (10, 5) / 5 = (2, 1): 6 - 9.
  products = np.array([[20, 8, 10], [60, 36, NAN], [1, NAN, NAN]])
  got = likelihood.displacement(products, LENGTHS, ROLE)
  np.testing.assert_allclose(
      got, [[NAN, -4, 0], [-3, NAN, NAN], [NAN, NAN, NAN]], atol=1e-12)


def test_length_correlation_by_hand():
  # Margins 1, 3, -1 (mean 1) beside lengths -2, 1, -3 (mean -4/3): products
  # 0 + 2 * 7/3 + (-2) * (-5/3) = 8, squares 8 and (4 + 49 + 25) / 9 = 78/9.
  rewards = np.array([[4.0, 3, 1], [6.0, 5, NAN], [9.0, NAN, NAN]])
  got = likelihood.length_correlation(rewards, LENGTHS, ROLE)
  assert got == pytest.approx(8 / np.sqrt(8 * 78 / 9), rel=1e-12)
  for scale in (2.0, -2.0):  # its sign, and nothing of its size
    other = likelihood.length_correlation(scale * rewards, LENGTHS, ROLE)
    assert other == pytest.approx(np.sign(scale) * got, rel=1e-12)
  same = np.ones_like(LENGTHS)
  assert np.isnan(likelihood.length_correlation(rewards, same, ROLE))
  assert np.isnan(likelihood.length_correlation(same, LENGTHS, ROLE))


def metrics(role=ROLE):
  return likelihood.likelihood_metrics(
      logps=np.array([[-6.0, -8, -3], [-9.0, -4, NAN], [-1.0, NAN, NAN]]),
      start_logps=np.array([[-4.0, -4, -2], [-4.0, -5, NAN], [-9, NAN, NAN]]),
      rewards=np.array([[4.0, 3, 1], [6.0, 5, NAN], [9.0, NAN, NAN]]),
      role=role, lengths=LENGTHS,
      products=np.array([[20, 8, 10], [60, 36, NAN], [1, NAN, NAN]]),
      topk_mass=np.array([1.5, 1.9, 7.0]),
      topk_entropy=np.array([1.0, 3.0, 0.5]))


def test_worked_values():
  got = metrics()
  # Drifts: chosen -2 and 1, negatives (-4, -1) and -5.
  assert got["likelihood/chosen_drift"] == pytest.approx((-2 + 1) / 2)
  assert got["likelihood/rejected_drift"] == pytest.approx((-2.5 - 5) / 2)
  assert got["likelihood/chosen_drift_per_token"] == pytest.approx(
      (-2 / 2 + 1 / 2) / 2)
  assert got["likelihood/rejected_drift_per_token"] == pytest.approx(
      ((-4 / 4 - 1 / 1) / 2 - 5 / 5) / 2)
  assert got["likelihood/displacement"] == pytest.approx((-4 + 0 - 3) / 3)
  assert got["likelihood/length_correlation"] == pytest.approx(
      8 / np.sqrt(8 * 78 / 9))
  # The two preferred completions have 2 tokens each.
  assert got["likelihood/topk_mass"] == pytest.approx((1.5 + 1.9) / 4)
  assert got["likelihood/topk_entropy"] == pytest.approx((1 + 3) / 4)
  assert len(got) == 8


@pytest.mark.filterwarnings("error")
def test_without_a_pair_every_number_is_nan():
  for role in (np.zeros_like(ROLE), np.minimum(ROLE, 0), np.maximum(ROLE, 0)):
    assert np.isnan(list(metrics(role).values())).all()


def test_kl_by_hand():
  # Two prompts with two samples each, of up to two tokens.
  mask = np.array([[[1, 1], [1, 0]], [[1, 0], [1, 1]]], bool)
  start = np.where(mask, -1.0, NAN)
  gaps = np.array([[[0.5, 0.25], [-0.25, NAN]], [[1.0, NAN], [0.5, 1.5]]])
  got = likelihood.kl_metrics(
      start + gaps, start, start + gaps + [0.125, -0.25], mask, seed=0)
  # Prompt 0: (0.75 - 0.25) / 2; prompt 1: (1 + 2) / 2.
  assert got["kl"] == pytest.approx(((0.25 + 1.5) / 2, 0.25, 1.5))
  assert got["kl_per_token"] == pytest.approx(3.5 / 6)
  # Four first tokens off by 1/8, two second ones by 1/4.
  assert got["logp_gap"] == pytest.approx((4 / 8 + 2 / 4) / 6)


# --- a tiny model -------------------------------------------------------------


@functools.cache
def plain(config, dtype):
  """(hidden [T, D], logits [T, V]) of one text."""
  @jax.jit
  def run(params, streams):
    hidden = decoder.hidden_states(
        params, config, streams, compute_dtype=dtype)
    return hidden[0], decoder.head_logits(params, config, hidden)[0]

  return run


def read(model, params, prompt, completion):
  """Hidden states and log-softmax before each token of a completion."""
  streams = models_streams.pack([(prompt, [completion])], 32)
  hidden, logits = map(np.asarray, plain(
      model.config, model.compute_dtype)(params, streams))
  at = np.arange(len(completion)) + len(prompt) - 1
  top = logits[at].max(axis=-1, keepdims=True)
  law = logits[at] - top
  return hidden[at], law - np.log(np.exp(law).sum(axis=-1, keepdims=True))


def random_draws(objective):
  return cases.stage(objective, strategy="random", score=None,
                     temperature=None, batch_size=4)


def test_numbers_are_those_of_full_hidden_states_however_packed(x64):
  model = cases.make_model(dtype=jnp.float64)
  stage, params = random_draws("dpo"), cases.init(model)
  functions = stage_lib.make_functions(stage, model)
  rng = np.random.default_rng(4)
  sets = [cases.candidate_set(rng, i + 1, 3 + i % 3) for i in range(4)]
  held = [cases.host_batch(some, 5) for some in (sets[:2], sets[2:])]
  got, other = (
      update.score_held_out(
          stage, packing, functions, functions.init(params), held,
          stage_lib.Reference(lambda batch: np.zeros(batch.meta.role.shape)))
      for packing in (model, model._replace(num_streams=1, stream_length=32)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-10, atol=1e-10), got, other)

  rows = [pair for batch in held for pair in zip(batch.sets, batch.order)]
  scores = []
  for n, (one, order) in enumerate(rows):
    seen = [read(model, params, one.prompt, one.completions[k])
            for k in order]
    hidden, log_probs = zip(*seen)
    means = [h.mean(axis=0) for h in hidden]
    scores += [means[0] @ m - means[0] @ means[0] for m in means[1:]]
    logps = [p[np.arange(len(p)), one.completions[k]].sum()
             for p, k in zip(log_probs, order)]
    np.testing.assert_allclose(got.logps[n, :len(order)], logps, atol=1e-10)
    top = np.sort(log_probs[0], axis=-1)[:, -scoring.TOP_K:]
    np.testing.assert_allclose(
        got.topk_mass[n], np.exp(top).sum(), atol=1e-10)
    np.testing.assert_allclose(
        got.topk_entropy[n], -(np.exp(top) * top).sum(), atol=1e-10)
  displacement = likelihood.displacement(got.products, got.lengths, got.role)
  np.testing.assert_allclose(
      displacement[~np.isnan(displacement)], scores, atol=1e-10)
  assert np.ptp(scores) > 0.1


class Tokenizer:
  """As much of one as the sampler needs."""

  hf, stop_ids, pad_id, vocab_size = None, (0,), 0, cases.VOCAB

  def decode(self, ids, skip_special_tokens):
    return " ".join(map(str, ids))


class Data:
  """Held-out rows."""

  def __init__(self):
    rng = np.random.default_rng(2)
    self.sets = [cases.candidate_set(rng, i + 1, 3) for i in range(4)]

  def candidate_set(self, row):
    return self.sets[row]

  def columns(self, row):
    return {"prompt": f"prompt {row}"}


def make_run(folder, *, source):
  (folder / "preference").mkdir()
  tokenizer = Tokenizer()
  tokenizer.hf = tokenizer
  return types.SimpleNamespace(
      workdir=folder, tokenizer=tokenizer, mesh=None, config={
          "evaluation": {"num_prompts": None, "num_display": 1},
          "generation": {"max_new_tokens": 4},
          "model": {"adapter_path": None},
          "reference": {"source": source, "path": None}})


@pytest.mark.parametrize("objective, source", [
    ("simpo", None), ("dpo", "cached")])
def test_an_evaluation_tells_the_drift_from_the_start(
    tmp_path, objective, source):
  stage = random_draws(objective)
  if objective == "simpo":
    stage = stage._replace(
        objective_settings={"beta": 2.0, "gamma_beta_ratio": 0.5})
  model, data = cases.make_model(num_streams=2), Data()
  functions = stage_lib.make_functions(stage, model)
  first = cases.init(model)
  reference = stage_lib.NO_REFERENCE
  if source:
    reference = stage_lib.Reference(
        references.host_sequence_logps(model, first))
  run = make_run(tmp_path, source=source)
  make = lambda: preference.make_evaluate(
      run, stage, model, lambda: first, data, np.arange(4),
      {"seed": 0, "num_slots": 3, "preferred": "best", "top_k": None},
      reference)
  evaluate, state = make(), functions.init(first)
  before = evaluate(functions, state)
  for name in ("chosen", "rejected"):
    assert abs(before[f"eval/likelihood/{name}_drift"]) < 1e-4
    assert abs(before[f"eval/likelihood/{name}_drift_per_token"]) < 1e-5
  assert np.isnan(before["eval/likelihood/length_correlation"]) == bool(source)
  moved = state._replace(
      step=state.step + 1, params=jax.tree.map(lambda x: x * 1.1, state.params))
  after = evaluate(functions, moved)
  changed = after["eval/logps/chosen"] - before["eval/logps/chosen"]
  assert after["eval/likelihood/chosen_drift"] == pytest.approx(
      changed, rel=1e-3)
  assert abs(after["eval/likelihood/chosen_drift"]) > 1e-2
  assert abs(after["eval/likelihood/length_correlation"]) <= 1.0
  assert 0 < after["eval/likelihood/topk_mass"] < 1
  if not source:  # a run that resumes knows the same start
    assert make()(functions, moved) == after


def test_kl_on_samples_is_that_of_texts_scored_one_by_one():
  # Streams too short for a prompt with a sample are made longer.
  model = cases.make_model(num_streams=2, stream_length=8)
  data, params = Data(), cases.init(model)
  prompts = sampling.prompt_set(data, np.arange(3))
  service = GenerationService(
      model.config, params, 0, max_completion_length=6, stop_ids=(0,),
      pad_id=0, tokenizer=Tokenizer(), vocab_size=cases.VOCAB,
      num_slots=8)
  drawn = samples.sample_and_score(
      service, lambda prompts, completions, **_: [0.0] * len(completions),
      prompts, num_samples=2, sampling=Sampling(), seed=1)
  score = evaluate.make_scorer(model, prompts, drawn.mask.shape[-1])
  kl = lambda start: likelihood.kl_metrics(
      score(params, drawn), score(start, drawn), drawn.raw_logps, drawn.mask,
      seed=0)
  same = kl(params)
  assert same["kl"].mean == same["kl_per_token"] == 0.0
  assert 0 < same["logp_gap"] < 1e-5

  other = jax.tree.map(lambda x: x * 0.5, params)
  gaps = np.zeros(drawn.mask.shape[:2])
  for (r, n), _ in np.ndenumerate(gaps):
    ids = drawn.tokens[r, n][drawn.mask[r, n]]
    ours, theirs = (read(model, p, prompts.tokens[r], ids)[1]
                    for p in (params, other))
    gaps[r, n] = (ours - theirs)[np.arange(len(ids)), ids].sum()
  got = kl(other)
  assert got["kl"].mean == pytest.approx(gaps.mean(), rel=1e-4)
  assert got["kl_per_token"] == pytest.approx(
      gaps.sum() / drawn.mask.sum(), rel=1e-4)
  assert np.abs(gaps).max() > 0.1
