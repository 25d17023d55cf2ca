"""Figures of benchmarks/estimators.py against all ordered pools in NumPy."""

import numpy as np
import pytest

from benchmarks import estimators

SIZE = 2


@pytest.fixture(autouse=True)
def _float64(x64):
  yield


def _weights(scores, include_preferred):
  """[1 + L] of one ordered pool, slot 0 the preferred."""
  heavy = np.exp(scores)
  heavy[0] *= include_preferred
  return heavy / heavy.sum()


def _by_hand(toy, weigh, *, spread_of):
  """Mean and spread over y0 from the data and every ordered pool."""
  ref, mean, square = np.exp(toy.log_ref), 0.0, 0.0
  for pool in np.ndindex(*(estimators.V,) * (1 + SIZE)):
    pool = list(pool)
    chance = toy.data[pool[0]] * ref[pool[1:]].prod()
    law, slopes = weigh(toy.rewards[pool]), toy.slopes[pool]
    mean = mean + chance * law @ slopes
    square += chance * (
        np.sum((law @ slopes)**2) if spread_of == "mean"
        else law @ np.sum(slopes**2, axis=1))
  right = toy.model @ toy.slopes
  length = np.linalg.norm(right)
  return (np.linalg.norm(mean - right) / length,
          np.sqrt(square - mean @ mean) / length)


def _largest(scores):
  return np.eye(1 + SIZE)[1 + np.argmax(scores[1:])]


@pytest.mark.parametrize("name, weigh, spread_of", [
    ("RNCE: y0 and candidates, weighted", lambda s: _weights(s, 1), "mean"),
    ("CD: one draw", lambda s: _weights(s, 1), "draw"),
    ("SNIS: candidates alone, weighted", lambda s: _weights(s, 0), "mean"),
    ("the same, tau 1/3", lambda s: _weights(3 * s, 0), "draw"),
    ("largest weight", _largest, "draw"),
])
def test_figures_are_those_of_all_ordered_pools(name, weigh, spread_of):
  toy = estimators.Toy(3)
  got = estimators.measure(toy, SIZE, estimators.ESTIMATORS[name])
  want = _by_hand(toy, weigh, spread_of=spread_of)
  np.testing.assert_allclose(got, want, rtol=1e-10)


def test_a_preferred_completion_of_the_models_own_law_leaves_no_bias():
  toy = estimators.Toy(4)
  for name in ("RNCE, y0 from the model", "CD, y0 from the model"):
    figures = estimators.measure(toy, SIZE, estimators.ESTIMATORS[name])
    assert figures.bias < 1e-12, name


def test_every_pool_has_its_counts_once():
  counts = estimators.all_counts(3)
  assert len(np.unique(counts, axis=0)) == len(counts) == 84  # C(9, 6)
  assert set(counts.sum(1)) == {3}
  law = np.log(np.arange(1.0, 8.0) / 28)
  assert estimators.pool_probs(counts, law).sum() == pytest.approx(1.0)
