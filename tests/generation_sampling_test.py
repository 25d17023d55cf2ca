"""The law that is drawn from, and the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mcpo_jax.generation import sampling

LOGITS = jnp.array([[1.0, 3.0, -2.0, 2.5], [0.0, 0.0, 4.0, -jnp.inf]])

row_keys = jax.jit(sampling.row_keys)
draw = jax.jit(sampling.draw)


@jax.jit
def compiled_law(logits, rows, seen):
  return jax.nn.log_softmax(sampling.law(logits, rows, lambda: seen))


def keys(seed, rows, sample_index=0):
  ids = np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2)
  index = np.full(rows, sample_index, np.int32)
  return row_keys(np.full(rows, seed, np.uint32), ids, index)


def rows_of(count, *, seed=0, sample_index=0, position=0, **changes):
  """Rows that are drawn alike, but for what is given as an array."""
  fields = dict(
      temperature=np.float32(1), top_k=np.int32(0), top_p=np.float32(1),
      min_p=np.float32(0), repetition_penalty=np.float32(1),
      stop_ids=np.full(2, -1, np.int32), may_stop=np.bool_(True),
      positions=np.int32(position),
  )
  each = lambda x: np.broadcast_to(x, (count, *np.shape(x)[1:]))
  fields = {
      name: np.asarray(changes.get(name, x), x.dtype)
      for name, x in fields.items()
  }
  stop_ids = np.broadcast_to(fields.pop("stop_ids"), (count, 2))
  return sampling.Rows(
      keys=keys(seed, count, sample_index), stop_ids=stop_ids,
      **{name: each(x) for name, x in fields.items()},
  )


def law(logits, seen=None, **changes):
  logits = jnp.asarray(logits)
  seen = np.zeros(logits.shape, bool) if seen is None else seen
  return np.asarray(compiled_law(logits, rows_of(len(logits), **changes), seen))


def test_temperature_divides_the_logits():
  want = jax.nn.log_softmax(LOGITS / 0.7, axis=-1)
  np.testing.assert_allclose(law(LOGITS, temperature=0.7), want, rtol=1e-5)


def test_zero_temperature_takes_the_first_best():
  logits = np.full((2, 300), -1.0, np.float32)
  logits[0, [7, 150, 299]], logits[1, [130, 131]] = 3.0, 9.0
  tokens, logps = draw(logits, rows_of(2, temperature=0.0))
  np.testing.assert_array_equal(tokens, [7, 130])
  np.testing.assert_array_equal(logps, [0.0, 0.0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e4])
def test_extreme_temperatures_stay_normalised(temperature):
  got = law(LOGITS * 1e4, temperature=temperature)
  np.testing.assert_allclose(np.exp(got).sum(-1), 1.0, rtol=1e-5)
  assert not np.isnan(got).any()


@pytest.mark.parametrize("top_p, kept", [
    (1e-44, [0]), (0.3, [0]), (0.4, [0]), (0.41, [0, 2]), (0.7, [0, 2]),
    (0.71, [0, 2, 1]), (0.95, [0, 2, 1, 3]), (1.0, [0, 1, 2, 3]),
])
def test_nucleus_is_the_smallest_head_with_the_mass(top_p, kept):
  probs = np.array([[0.4, 0.2, 0.3, 0.1]], np.float32)
  # A hair more than float32 rounding keeps the edges where they are.
  probs[0, 0] += 1e-6
  got = np.exp(law(np.log(probs), top_p=top_p))[0]
  want = np.zeros(4)
  want[kept] = probs[0, kept] / probs[0, kept].sum()
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("changes, kept", [
    (dict(top_p=0.5), 3), (dict(top_k=2), 2), (dict(top_k=5), 5),
    (dict(top_k=4, top_p=0.5), 2), (dict(top_k=99), 6),
])
def test_of_equal_tokens_the_smaller_id_enters_first(changes, kept):
  logits = np.array([[0.0, -1e9, 0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
  for sign in (1, -1):  # the order of floats turns round below zero
    got = law(logits + np.float32(sign), **changes)
    np.testing.assert_array_equal(
        np.nonzero(np.exp(got[0]))[0], np.delete(np.arange(7), 1)[:kept]
    )


def test_top_p_one_leaves_the_tail_in():
  logits = jnp.zeros((1, 50_000)).at[0, 7].set(30.0)
  assert np.isfinite(law(logits)).all()


def test_the_law_is_that_of_transformers():
  """Every row asks for something else, all in one call."""
  torch = pytest.importorskip("torch")
  process = pytest.importorskip("transformers.generation.logits_process")
  rng = np.random.default_rng(0)
  logits = (3 * rng.normal(size=(8, 200))).astype(np.float32)
  prompt = rng.integers(0, 200, (8, 30))
  asked = dict(
      temperature=[1, 0.6, 1.7, 1, 1, 1, 0.8, 1],
      top_k=[0, 0, 9, 1, 0, 30, 40, 0],
      min_p=[0, 0.1, 0, 0, 0.02, 0, 0.01, 0],
      top_p=[1, 0.9, 1, 1, 0.8, 0.5, 0.95, 0.3],
      repetition_penalty=[1, 1, 1.5, 1, 0.7, 1, 1.2, 1],
      may_stop=[True, False, True, False, True, True, False, True],
  )
  seen = np.zeros(logits.shape, bool)
  seen[np.arange(8)[:, None], prompt] = True
  stops = [3, 5]
  got = law(
      logits, seen, stop_ids=np.array(stops),
      **{name: np.array(values) for name, values in asked.items()},
  )
  for i in range(8):
    one = {name: values[i] for name, values in asked.items()}
    ids = torch.tensor(prompt[i : i + 1])
    scores = torch.tensor(logits[i : i + 1])
    chain = [process.RepetitionPenaltyLogitsProcessor(
        float(one["repetition_penalty"]))]
    if not one["may_stop"]:
      chain.append(process.MinLengthLogitsProcessor(99, stops))
    chain.append(process.TemperatureLogitsWarper(float(one["temperature"])))
    if one["top_k"]:
      chain.append(process.TopKLogitsWarper(one["top_k"]))
    if one["min_p"]:
      chain.append(process.MinPLogitsWarper(one["min_p"]))
    if one["top_p"] < 1:
      chain.append(process.TopPLogitsWarper(one["top_p"]))
    for change in chain:
      scores = change(ids, scores)
    want = torch.log_softmax(scores, -1).numpy()[0]
    np.testing.assert_array_equal(np.isinf(got[i]), np.isinf(want))
    np.testing.assert_allclose(got[i], want, atol=2e-5)


def test_frequencies_match_the_law():
  """Tokens of three blocks; the law of one row has a gap of a whole block."""
  rng = np.random.default_rng(0)
  logits = np.full((2, 300), -np.inf, np.float32)
  logits[0, rng.choice(300, 20, replace=False)] = rng.normal(size=20)
  logits[1, [0, 1, 290, 299]] = [0.0, 1.0, 2.0, -0.5]
  count = 20_000
  for one in logits:
    tokens, logps = draw(np.tile(one, (count, 1)), rows_of(count, position=3))
    counts = np.bincount(tokens, minlength=300)
    probs = np.exp(np.asarray(jax.nn.log_softmax(one), np.float64))
    np.testing.assert_allclose(logps, np.log(probs[tokens]), atol=1e-5)
    some = probs > 0
    assert (counts[~some] == 0).all()
    assert stats.chisquare(
        counts[some], probs[some] / probs[some].sum() * count
    ).pvalue > 1e-3


def test_a_token_without_weight_is_never_drawn():
  # The float32 cumulative sum of such a law ends below 1.
  size = 20_000
  logits = np.where(np.arange(size) < size - 100, np.float32(0), -np.inf)
  tokens, _ = draw(np.tile(logits, (100, 1)), rows_of(100, seed=1))
  assert tokens.max() < size - 100


def test_a_draw_depends_on_its_own_address_alone():
  count, logits = 5, np.zeros((5, 1000), np.float32)
  rows = rows_of(count, position=2)
  together, _ = draw(logits, rows)
  alone, _ = draw(logits[:1], jax.tree.map(lambda x: x[3:4], rows))
  assert together[3] == alone[0]
  for changes in (dict(seed=1), dict(position=3), dict(sample_index=1)):
    other, _ = draw(logits, rows_of(count, **dict(position=2) | changes))
    assert (other != together).sum() >= 4
  assert len(set(together.tolist())) == count


def test_both_words_of_the_prompt_id_count():
  ids = np.array([[1, 2], [2, 1], [1, 3]], np.uint32)
  none = np.zeros(3, np.uint32)
  rows = rows_of(3)._replace(keys=row_keys(none, ids, none))
  drawn, _ = draw(np.zeros((3, 1000), np.float32), rows)
  assert len(set(drawn.tolist())) == 3
