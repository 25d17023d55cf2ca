"""Terms and features of candidates against full logits, computed plainly."""

import dataclasses
import functools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import models_streams
import numpy as np
import pytest

from mcpo_jax import registry
from mcpo_jax.models import decoder, scoring
from mcpo_jax.models.config import ModelConfig
from mcpo_jax.objectives import token_level
from mcpo_jax.types import SetBatch, Streams

POLICY = ModelConfig(
    family="llama",
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    final_softcap=5.0,
)
REFERENCE = dataclasses.replace(
    POLICY, hidden_size=12, num_layers=3, final_softcap=None, tied_head=True
)
LENGTH, SLOTS, CHUNK, CONFIDENCE = 33, 3, 12, 0.7
SETS = models_streams.random_sets(
    np.random.default_rng(0), 29, [5, 8], [[3, 7, 1], [4, 9]]
)
PREFIX = np.array([[2, 3, 5], [4, 1, 0]])
UNSCORED = {(0, 1): [1, 3]}  # tokens of set 0, candidate 1
PAIRS = [(b, k) for b in range(2) for k in range(len(SETS[b][1]))]


def make_params(dtype=np.float64):
  """(policy, reference, masks), the masks' kernels neither dead nor alike."""
  rng = np.random.default_rng(3)
  shape = (REFERENCE.num_layers, 2)
  masks = {
      "kernel": rng.normal(size=(*shape, REFERENCE.hidden_size)),
      "bias": rng.normal(0.5, 0.5, shape),
      "mixer": rng.normal(0.5, 0.5, shape),
  }
  return (
      models_streams.random_params(POLICY, dtype),
      models_streams.random_params(REFERENCE, dtype),
      jax.tree.map(lambda x: x.astype(dtype), masks),
  )


def make_streams(sets=SETS):
  streams = models_streams.pack(sets, LENGTH)
  for (b, k), tokens in UNSCORED.items():
    here = np.flatnonzero(streams.candidate_slot[b] == k)
    streams.completion_mask[b, here[tokens]] = False
  return streams


def make_sets(prefix=PREFIX):
  shape = prefix.shape
  return SetBatch(
      role=np.zeros(shape, np.int8),
      candidate_mask=np.ones(shape, bool),
      candidate_id=np.zeros(shape, np.uint32),
      multiplicity=np.ones(shape, np.int32),
      scores=np.zeros(shape, np.float32),
      lengths=np.zeros(shape, np.int32),
      anchors={"prefix_length": prefix},
      example_id=np.zeros((shape[0], 2), np.uint32),
      visit=np.zeros(shape[0], np.int32),
      row=np.zeros(shape[0], np.int32),
  )


def features(policy, reference, masks, streams, sets, dtype=jnp.float64):
  return scoring.sequence_features(
      policy,
      POLICY,
      streams,
      sets,
      terms=tuple(scoring.TERMS),
      reference=reference,
      reference_config=REFERENCE,
      confidence=CONFIDENCE,
      objective_params=masks,
      compute_dtype=dtype,
      head_chunk=CHUNK,
  )


@functools.cache
def scorer(dtype):
  return jax.jit(functools.partial(features, dtype=dtype))


@functools.cache
def gradient():
  """Of sum_name weight_name * sum(term): with respect to all weights."""
  def total(policy, reference, masks, weight, streams, sets):
    out = features(policy, reference, masks, streams, sets)
    return sum(
        weight[name] * jnp.sum(out.terms[name] * sets.lengths)
        for name in scoring.TERMS
    )

  return jax.jit(jax.value_and_grad(total, (0, 1, 2)))


# --- the oracle: one text at a time, full logits, NumPy -----------------------


@functools.cache
def plain(name):
  """(hidden [T, D], logits [T, V], residual streams [L, T, D]) of a text."""
  config = {"policy": POLICY, "reference": REFERENCE}[name]

  @jax.jit
  def run(params, streams):
    hidden, layers = decoder.probed_states(
        params, config, streams, lambda x, weights: x, None,
        compute_dtype=jnp.float64,
    )
    logits = decoder.head_logits(params, config, hidden)
    return hidden[0], logits[0], layers[:, 0]

  return run


def read(name, params, b, k):
  """What stands before each scored token of a candidate, and these tokens."""
  prompt, completion = SETS[b][0], SETS[b][1][k]
  streams = models_streams.pack([(prompt, [completion])], LENGTH)
  scored = [
      i for i in range(len(completion)) if i not in UNSCORED.get((b, k), [])
  ]
  at = len(prompt) - 1 + np.array(scored)
  hidden, logits, layers = map(np.asarray, plain(name)(params, streams))
  return hidden[at], logits[at], layers[:, at], completion[scored]


def log_softmax(logits):
  top = logits.max()
  return logits - top - np.log(np.exp(logits - top).sum())


def mask_of(masks, layers, i):
  """Mask i at one token, from its [L, D] residual streams."""
  mixed = 0.0
  for layer, x in enumerate(layers):
    x = (x - x.mean()) / np.sqrt(x.var() + REFERENCE.rms_norm_eps)
    h = masks["kernel"][layer, i] @ x + masks["bias"][layer, i]
    mixed += masks["mixer"][layer, i] * max(h, 0.0)
  return max(mixed, 0.0)


def oracle(policy, reference, masks, prefix=PREFIX):
  """{name: [B, K]}."""
  names = ("logps", *scoring.TERMS)
  out = {name: np.zeros(prefix.shape) for name in names}
  for b, k in PAIRS:
    _, logits, _, tokens = read("policy", policy, b, k)
    _, ref_logits, layers, _ = read("reference", reference, b, k)
    for i, token in enumerate(tokens):
      log_pi, log_ref = log_softmax(logits[i]), log_softmax(ref_logits[i])
      ref, gaps = np.exp(log_ref), log_ref - log_pi
      m_u, m_d = (mask_of(masks, layers[:, i], j) for j in (0, -1))
      top = np.sort(log_pi)[-scoring.TOP_K:]
      inside = i < prefix[b, k]
      for name, value in {
          "logps": log_pi[token],
          "collision": np.log(np.sum(np.exp(log_pi) ** 2)),
          "kl": np.sum(ref * gaps),
          "risk": np.sum(
              (ref * gaps)[gaps > np.quantile(gaps, 1 - CONFIDENCE)]
          ),
          "prefix": inside * log_pi[token],
          "ref_prefix": inside * log_ref[token],
          "masked_ratio": m_u * (log_pi[token] - log_ref[token]),
          "masked_kl": m_d * np.sum(ref * gaps),
          "mask_size": m_u + m_d,
          "topk_mass": np.exp(top).sum(),
          "topk_entropy": -np.sum(np.exp(top) * top),
      }.items():
        out[name][b, k] += value
  return out


# --- values -------------------------------------------------------------------


def test_every_term_equals_that_of_full_logits(x64):
  params = make_params()
  got = scorer(jnp.float64)(*params, make_streams(), make_sets())
  want = oracle(*params)
  np.testing.assert_allclose(got.logps, want.pop("logps"), atol=1e-10)
  assert set(got.terms) == set(want)
  for name, values in want.items():
    assert np.abs(values).max() > 0.1, name
    assert got.terms[name].dtype == np.float64
    np.testing.assert_allclose(
        got.terms[name], values, atol=1e-10, err_msg=name
    )


def test_other_streams_and_slots_have_the_same_terms(x64):
  params = make_params()
  want = scorer(jnp.float64)(*params, make_streams(), make_sets())
  # Slots in another order; the two sets in two chunks, which add up.
  order = [2, 0, 1]
  turned = [(p, [cs[k] for k in order if k < len(cs)]) for p, cs in SETS]
  streams = models_streams.pack(turned, LENGTH)
  slots = [np.array(order), np.array([0, 1])]
  for b, slot in enumerate(slots):
    here = streams.candidate_slot[b] >= 0
    streams.candidate_slot[b, here] = slot[streams.candidate_slot[b, here]]
  where = np.flatnonzero(streams.candidate_slot[0] == 1)
  streams.completion_mask[0, where[UNSCORED[0, 1]]] = False
  empty = models_streams.pack([([], [])], LENGTH)
  parts = []
  for row in (slice(0, 1), slice(1, 2)):
    chunk = Streams(*(
        np.concatenate([x[row], y])
        for x, y in zip(streams, empty, strict=True)
    ))
    parts.append(scorer(jnp.float64)(*params, chunk, make_sets()))
  jax.tree.map(
      lambda a, b, c: np.testing.assert_allclose(a + b, c, atol=1e-12),
      *parts, want,
  )


def test_in_bfloat16_terms_are_float32_and_near(x64):
  policy, reference, masks = make_params(np.float32)
  args = (policy, reference, masks, make_streams(), make_sets())
  exact = scorer(jnp.float64)(*make_params(), *args[3:])
  got = scorer(jnp.bfloat16)(*args)
  for name, values in (exact.terms | {"logps": exact.logps}).items():
    other = got.logps if name == "logps" else got.terms[name]
    assert other.dtype == np.float32
    np.testing.assert_allclose(other, values, rtol=0.1, atol=0.3)


def test_hidden_sums_are_those_of_the_predicting_tokens(x64):
  policy = make_params()[0]

  def total(policy):
    sums = scoring.hidden_sums(
        policy, POLICY, make_streams(), make_sets(), compute_dtype=jnp.float64
    )
    return jnp.sum(sums), sums

  grad, got = jax.jit(jax.grad(total, has_aux=True))(policy)
  want = np.zeros((2, SLOTS, POLICY.hidden_size))
  for b, k in PAIRS:
    want[b, k] = read("policy", policy, b, k)[0].sum(axis=0)
  np.testing.assert_allclose(got, want, atol=1e-10)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad))


# --- gradients ----------------------------------------------------------------


def test_gradients_are_those_of_finite_differences(x64):
  policy, reference, masks = make_params()
  rng = np.random.default_rng(5)
  sets = make_sets()._replace(lengths=rng.integers(1, 4, PREFIX.shape))
  streams, size = make_streams(), 1e-6
  direction = jax.tree.map(
      lambda x: rng.normal(size=x.shape), (policy, masks)
  )

  def at(step, weight):
    moved = jax.tree.map(
        lambda x, d: x + step * d, (policy, masks), direction
    )
    return gradient()(moved[0], reference, moved[1], weight, streams, sets)

  for name in scoring.TERMS:
    weight = {other: float(other == name) for other in scoring.TERMS}
    _, (of_policy, of_reference, of_masks) = at(0.0, weight)
    assert all((g == 0).all() for g in jax.tree.leaves(of_reference)), name
    slope = sum(
        np.sum(g * d)
        for g, d in zip(
            jax.tree.leaves((of_policy, of_masks)),
            jax.tree.leaves(direction),
            strict=True,
        )
    )
    if name in ("topk_mass", "topk_entropy", "ref_prefix"):
      assert slope == 0.0
      continue
    want = (at(size, weight)[0] - at(-size, weight)[0]) / (2 * size)
    assert abs(want) > 0.01
    assert slope == pytest.approx(float(want), rel=1e-5, abs=1e-5), name
    if name == "mask_size":  # masks read the reference alone
      assert all((g == 0).all() for g in jax.tree.leaves(of_policy))


# --- cost ---------------------------------------------------------------------


def shapes(function, *args):
  """Shapes of all arrays that a traced function makes, loops included."""
  found = set()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      found.update(v.aval.shape for v in equation.outvars)
      for inner in jex.jaxprs_in_params(equation.params):
        walk(inner)

  walk(jax.make_jaxpr(function)(*args).jaxpr)
  return found


def test_without_terms_the_program_is_that_of_the_logps():
  policy, _, _ = make_params(np.float32)
  streams, sets = make_streams(), make_sets()

  def before(policy):
    tokens = scoring.token_logps(policy, POLICY, streams)
    return scoring.sequence_logps(tokens, streams, num_sets=2, num_slots=SLOTS)

  after = lambda policy: scoring.sequence_features(
      policy, POLICY, streams, sets
  ).logps
  one, other = (str(jax.make_jaxpr(f)(policy)) for f in (before, after))
  assert one == other


def test_no_array_holds_all_logits_or_all_layers():
  streams, sets = make_streams(), make_sets()
  params = make_params(np.float32)
  run = functools.partial(features, dtype=jnp.float32)
  forward = shapes(run, *params, streams, sets)
  total = lambda *args: sum(map(jnp.sum, jax.tree.leaves(run(*args))))
  backward = shapes(jax.grad(total, (0, 2)), *params, streams, sets)
  of_tokens = [s for s in forward | backward if s[-1:] == (29,) and len(s) > 2]
  assert (2, CHUNK // 2, 29) in of_tokens
  assert max(np.prod(s[:-1]) for s in of_tokens) == CHUNK
  assert (REFERENCE.num_layers, 2, LENGTH, REFERENCE.hidden_size) not in forward


# --- SparsePO -----------------------------------------------------------------


@pytest.mark.parametrize("shared_mask", [True, False])
def test_first_masks_are_ones_and_leave_the_terms_as_they_are(x64, shared_mask):
  policy, reference, _ = make_params()
  ones = token_level.sparse_po_parameters(
      jax.random.key(0), REFERENCE, shared_mask=shared_mask
  )
  sets = make_sets(np.full_like(PREFIX, 99))
  got = scorer(jnp.float64)(policy, reference, ones, make_streams(), sets)
  term = got.terms
  ratio = got.logps - term["ref_prefix"]  # the prefix is everything
  np.testing.assert_allclose(term["masked_ratio"], ratio, atol=1e-12)
  np.testing.assert_allclose(term["masked_kl"], term["kl"], atol=1e-12)
  scored = np.array([[3, 5, 1], [4, 9, 0]])
  np.testing.assert_allclose(term["mask_size"], 2 * scored, atol=1e-12)


# --- names --------------------------------------------------------------------


def test_the_registry_names_terms_that_exist():
  for name, entry in registry.OBJECTIVES.items():
    assert set(entry.terms) <= set(scoring.TERMS), name
  assert registry.REFERENCE_TERMS == set(scoring.REFERENCE_TERMS)


@pytest.mark.parametrize(
    "terms, match",
    [
        (("entropy",), "unknown term 'entropy', one of"),
        (("kl",), "'kl' needs reference"),
        (("risk",), "'risk' needs reference"),
        (("mask_size",), "'mask_size' needs"),
    ],
)
def test_what_a_term_needs_is_checked_when_traced(terms, match):
  with pytest.raises(ValueError, match=match):
    scoring.sequence_features(
        make_params(np.float32)[0], POLICY, make_streams(), make_sets(),
        terms=terms,
    )
