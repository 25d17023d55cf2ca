"""Win rates, and what is left of them at equal lengths."""

import numpy as np
import pytest
from scipy import optimize

from mcpo_jax.evaluation import win_rates


def test_every_sample_meets_every_other_one():
  outcomes, gaps = win_rates.sample_pairs(
      np.array([[2.0, 1.0], [0.0, 5.0]]), np.array([[1.0, 3.0, 1.0]] * 2),
      [["ab", "abcd"], ["", "x"]], [["a", "abc", ""]] * 2)
  np.testing.assert_array_equal(
      outcomes, [[1, 0, 1, 0.5, 0, 0.5], [0, 0, 0, 1, 1, 1]])
  np.testing.assert_array_equal(
      gaps, [[1, -1, 2, 3, 1, 4], [-1, -3, 0, 0, -2, 1]])
  with pytest.raises(ValueError, match="not paired"):
    win_rates.sample_pairs(np.ones((2, 1)), np.ones((3, 1)), [], [])


def random_comparisons(seed, prompts=40, each=3, slope=1.5, ability=0.4):
  rng = np.random.default_rng(seed)
  gaps = rng.normal(20.0, 60.0, (prompts, each))
  p = 1 / (1 + np.exp(-ability - slope * np.tanh(gaps / gaps.std(ddof=1))))
  outcomes = (rng.random((prompts, each)) < p).astype(float)
  outcomes[::7, 0] = 0.5
  outcomes[1, -1] = 0.3  # a judge's probability
  return outcomes, gaps


def test_the_fit_is_that_of_a_general_optimiser():
  outcomes, gaps = random_comparisons(0)
  x = np.tanh(gaps / np.std(gaps.ravel(), ddof=1))

  def loss(theta):
    z = theta[0] + theta[1] * x
    each = np.logaddexp(0, z) - outcomes * z
    return each.mean(axis=1).sum() + 0.5e-4 * np.sum(theta**2)

  best = optimize.minimize(loss, np.zeros(2), method="BFGS",
                           options={"gtol": 1e-9})
  fit = win_rates.fit_lengths(outcomes, gaps)
  np.testing.assert_allclose((fit.ability, fit.slope), best.x, atol=1e-5)
  assert fit.win_rate == pytest.approx(1 / (1 + np.exp(-best.x[0])), abs=1e-6)
  assert fit.slope > 0.5  # length mattered


def test_without_a_gap_in_length_it_is_the_win_rate():
  outcomes, gaps = random_comparisons(1)
  for same in (np.zeros_like(gaps), np.full_like(gaps, 17.0)):
    got = win_rates.compare(outcomes, same, seed=0)
    assert got["lc_win_rate"].mean == pytest.approx(
        got["win_rate"].mean, abs=1e-4)


def test_the_other_side_wins_the_rest():
  outcomes, gaps = random_comparisons(2)
  ours = win_rates.compare(outcomes, gaps, seed=0)
  theirs = win_rates.compare(1 - outcomes, -gaps, seed=0)
  for name in ("win_rate", "lc_win_rate"):
    assert ours[name].mean + theirs[name].mean == pytest.approx(1.0, abs=1e-9)
  assert ours["tie_rate"] == theirs["tie_rate"] == pytest.approx(6 / 120)
  assert ours["length_gap"].mean == -theirs["length_gap"].mean


def test_who_wins_by_length_alone_wins_half_of_equal_lengths():
  gaps = np.array([[5.0], [9.0], [-5.0], [30.0], [-9.0], [7.0], [-7.0]])
  wins = (gaps > 0).astype(float)
  got = win_rates.compare(wins[:3], gaps[:3], seed=0)
  assert got["win_rate"].mean == pytest.approx(2 / 3)
  gaps, wins = np.delete(gaps, 3, axis=0), np.delete(wins, 3, axis=0)
  fit = win_rates.fit_lengths(wins, gaps)  # separable, and finite
  assert fit.win_rate == pytest.approx(0.5, abs=1e-9)
  assert 5 < fit.slope < 50


@pytest.mark.parametrize("value, low, high", [(1.0, 0.99, 1.0),
                                              (0.0, 0.0, 0.01),
                                              (0.5, 0.5, 0.5)])
def test_who_always_wins_has_a_finite_fit(value, low, high):
  _, gaps = random_comparisons(3)
  got = win_rates.compare(np.full_like(gaps, value), gaps, seed=0)
  for x in got["lc_win_rate"]:
    assert low - 1e-9 <= x <= high + 1e-9


def test_the_interval_holds_the_true_rate_about_as_often_as_it_says():
  inside = 0
  for seed in range(60):
    outcomes, gaps = random_comparisons(seed + 10, prompts=60, each=1)
    low, high = win_rates.length_controlled(outcomes, gaps, seed=seed)[1:]
    inside += low <= 1 / (1 + np.exp(-0.4)) <= high
  assert inside >= 52  # 57 of 60 on average


def test_one_prompt_has_no_interval_and_none_no_number():
  one = win_rates.compare(np.array([[1.0, 0.0]]), np.array([[3, 1]]), seed=0)
  assert one["win_rate"].mean == 0.5 and np.isnan(one["lc_win_rate"][1])
  none = win_rates.compare(np.zeros((0, 2)), np.zeros((0, 2)), seed=0)
  assert np.isnan(none["win_rate"].mean) and np.isnan(none["lc_win_rate"][0])


@pytest.mark.parametrize("outcomes, gaps", [
    ([[1.0], [0.0]], [[1.0]]), ([[1.5]], [[0.0]]), ([[np.nan]], [[0.0]]),
    ([1.0], [0.0])])
def test_what_is_no_outcome_is_refused(outcomes, gaps):
  with pytest.raises(ValueError):
    win_rates.compare(np.array(outcomes), np.array(gaps), seed=0)
