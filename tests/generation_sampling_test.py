"""The law that is drawn from, and the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mcpo_jax.generation import sampling

LOGITS = jnp.array([[1.0, 3.0, -2.0, 2.5], [0.0, 0.0, 4.0, -jnp.inf]])

compiled_law = jax.jit(sampling.behaviour_logps)
draw = jax.jit(sampling.draw)
row_keys = jax.jit(sampling.row_keys)


def law(logits, temperature=1.0, top_p=1.0):
  return compiled_law(
      logits, temperature=jnp.float32(temperature), top_p=jnp.float32(top_p)
  )


def keys(seed, rows, sample_index=None):
  ids = np.arange(2 * rows, dtype=np.uint32).reshape(rows, 2)
  index = np.zeros(rows, np.int32) if sample_index is None else sample_index
  return row_keys(jax.random.key(seed), ids, index)


def test_temperature_divides_the_logits():
  want = jax.nn.log_softmax(LOGITS / 0.7, axis=-1)
  np.testing.assert_allclose(law(LOGITS, 0.7), want, rtol=1e-5)


def test_zero_temperature_is_all_weight_on_the_first_best():
  logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
  want = [[-np.inf, 0.0, -np.inf], [0.0, -np.inf, -np.inf]]
  np.testing.assert_array_equal(law(logits, 0.0), want)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e4])
def test_extreme_temperatures_stay_normalised(temperature):
  got = law(LOGITS * 1e4, temperature)
  np.testing.assert_allclose(jnp.exp(got).sum(-1), 1.0, rtol=1e-5)
  assert not np.isnan(got).any()


@pytest.mark.parametrize("top_p, kept", [
    (0.3, [0]), (0.4, [0]), (0.41, [0, 2]), (0.7, [0, 2]), (0.71, [0, 2, 1]),
    (0.95, [0, 2, 1, 3]), (1.0, [0, 1, 2, 3]),
])
def test_nucleus_is_the_smallest_head_with_the_mass(top_p, kept):
  probs = np.array([[0.4, 0.2, 0.3, 0.1]])
  # A hair more than float32 rounding keeps the edges where they are.
  probs[0, 0] += 1e-6
  got = np.exp(law(jnp.log(probs.astype(np.float32)), 1.0, top_p))[0]
  want = np.zeros(4)
  want[kept] = probs[0, kept] / probs[0, kept].sum()
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_of_equal_tokens_the_smaller_id_enters_the_nucleus():
  got = np.exp(law(jnp.zeros((1, 4)), 1.0, 0.5))
  np.testing.assert_allclose(got, [[0.5, 0.5, 0.0, 0.0]], atol=1e-6)


def test_top_p_one_leaves_the_tail_in():
  logits = jnp.zeros((1, 50_000)).at[0, 7].set(30.0)
  assert np.isfinite(law(logits)).all()


def test_frequencies_match_the_law():
  rows, logits = 8_000, jnp.array([[0.0, 1.0, -1.0, 2.0, -jnp.inf, 0.5]])
  for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.8)):
    weights = law(logits, temperature, top_p)
    drawn = draw(
        keys(0, rows), jnp.repeat(weights, rows, 0), position=3
    )
    counts = np.bincount(drawn, minlength=6)
    probs = np.exp(np.asarray(weights[0], np.float64))
    assert (counts[probs == 0] == 0).all()
    some = probs > 0
    expected = probs[some] / probs[some].sum() * rows
    assert stats.chisquare(counts[some], expected).pvalue > 1e-3


def test_a_token_without_weight_is_never_drawn():
  # The float32 cumulative sum of such a law ends below 1.
  size = 20_000
  logits = jnp.where(jnp.arange(size)[None] < size - 100, 0.0, -jnp.inf)
  weights = jnp.repeat(law(logits), 100, 0)
  drawn = draw(keys(1, 100), weights, position=0)
  assert drawn.max() < size - 100


def test_a_draw_depends_on_its_own_address_alone():
  rows, vocab = 5, 1000
  weights = jnp.zeros((rows, vocab))
  together = draw(keys(0, rows), weights, position=2)
  alone = draw(keys(0, rows)[3:4], weights[:1], position=2)
  assert together[3] == alone[0]
  others = [
      draw(keys(1, rows), weights, position=2),
      draw(keys(0, rows), weights, position=3),
      draw(keys(0, rows, np.ones(5, np.int32)), weights, position=2),
  ]
  for other in others:
    assert (other != together).sum() >= 4
  assert len(set(together.tolist())) == rows


def test_both_words_of_the_prompt_id_count():
  weights = jnp.zeros((3, 1000))
  ids = np.array([[1, 2], [2, 1], [1, 3]], np.uint32)
  drawn = draw(
      row_keys(jax.random.key(0), ids, np.zeros(3, np.int32)),
      weights, position=0,
  )
  assert len(set(drawn.tolist())) == 3
