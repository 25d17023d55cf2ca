"""Student's law, paired tests over seeds, Holm's correction."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcpo_jax.evaluation import comparison

VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 8, 13, 30])
def test_the_law_is_the_integral_of_its_density(df):
  for t in (0.0, 0.3, 1.0, 2.5, 9.0):
    x, step = np.linspace(0.0, t, 20_001, retstep=True)
    density = (1 + x**2 / df) ** (-(df + 1) / 2) * math.exp(
        math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    ) / math.sqrt(df * math.pi)
    inside = 2 * step * (density.sum() - (density[0] + density[-1]) / 2)
    assert comparison.t_within(t, df) == pytest.approx(inside, abs=1e-6)


def test_the_law_is_that_of_another_library():
  stats = pytest.importorskip("scipy.stats")
  for df in range(1, 25):
    for t in (0.1, 1.7, 6.0, 40.0):
      assert comparison.t_within(t, df) == pytest.approx(
          1 - 2 * stats.t.sf(t, df), abs=1e-13)
    assert comparison.t_quantile(df) == pytest.approx(
        stats.t.ppf(0.975, df), rel=1e-9)


@pytest.mark.parametrize("df, t", [(1, 12.706205), (2, 4.302653),
                                   (4, 2.776445), (9, 2.262157)])
def test_the_quantile_is_that_of_printed_tables(df, t):
  assert comparison.t_quantile(df) == pytest.approx(t, rel=1e-6)


def test_estimate_by_hand():
  # mean 2, variance (1 + 0 + 1) / 2 = 1, error 1 / sqrt 3, t = 2 sqrt 3 with
  # 2 degrees of freedom: P(|T| <= t) = t / sqrt(2 + t^2) = sqrt(12 / 14).
  got = comparison.estimate([1.0, 2.0, 3.0])
  assert got.mean == 2.0 and got.num == 3
  assert got.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
  assert got.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)


def test_estimate_of_too_few_seeds_has_no_interval():
  none, one = comparison.estimate([]), comparison.estimate([0.5])
  assert none.num == 0 and math.isnan(none.mean)
  assert one.mean == 0.5 and math.isnan(one.half_width) and math.isnan(one.p)


def test_estimate_of_seeds_that_agree():
  assert comparison.estimate([0.0, 0.0]) == (0.0, 0.0, 1.0, 2)
  assert comparison.estimate([0.5, 0.5, 0.5]) == (0.5, 0.0, 0.0, 3)


@given(VALUES, st.randoms())
def test_estimate_does_not_depend_on_the_order_of_seeds(values, random):
  shuffled = list(values)
  random.shuffle(shuffled)
  np.testing.assert_allclose(
      comparison.estimate(shuffled), comparison.estimate(values), atol=1e-9)


@given(VALUES)
def test_zero_lies_in_the_interval_unless_p_is_below_5_percent(values):
  got = comparison.estimate(values)
  if abs(got.p - 0.05) > 1e-6 and got.half_width:
    assert (abs(got.mean) > got.half_width) == (got.p < 0.05)


def test_the_test_finds_nothing_in_noise_at_its_level():
  rng = np.random.default_rng(0)
  p = np.array([comparison.estimate(x).p for x in rng.normal(size=(2000, 4))])
  # Uniform: 100 below 0.05 are expected, with a standard deviation of 9.7.
  assert abs((p < 0.05).sum() - 100) < 4 * 9.7


def test_holm_by_hand():
  # Ascending 0.01, 0.02, 0.03 times 3, 2, 1 = 0.03, 0.04, 0.03; never falling.
  assert comparison.holm([0.02, 0.01, 0.03]) == [
      pytest.approx(0.04), pytest.approx(0.03), pytest.approx(0.04)]
  assert comparison.holm([0.6, 0.5]) == [1.0, 1.0]
  assert comparison.holm([]) == []


def test_a_test_that_was_not_made_does_not_count_for_holm():
  got = comparison.holm([math.nan, 0.01, 0.04])
  assert math.isnan(got[0])
  assert got[1:] == [pytest.approx(0.02), pytest.approx(0.04)]


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p_values):
  got = comparison.holm(p_values)
  for p, adjusted in zip(p_values, got):
    assert p <= adjusted <= min(1.0, len(p_values) * p) + 1e-12
  order = np.argsort(p_values, kind="stable")
  assert (np.diff(np.array(got)[order]) >= 0).all()


def test_over_prompts_averages_seeds_before_it_draws_prompts():
  ours = {0: {"a": 1.0, "b": 0.5, "c": 0.7}, 1: {"a": 0.6, "b": 0.9},
          2: {"a": 9.0}}
  reference = {0: {"a": 0.0, "b": 0.5}, 1: {"b": 0.1, "a": 0.6}}
  # Prompt a: (1 + 0) / 2, b: (0 + 0.8) / 2; c and seed 2 have no partner.
  got = comparison.over_prompts(ours, reference)
  assert got.mean == pytest.approx(0.45)
  assert (got.ci95_low, got.ci95_high) == (
      pytest.approx(0.4), pytest.approx(0.5))


def test_over_prompts_without_a_common_seed_is_nan():
  got = comparison.over_prompts({0: {"a": 1.0}}, {1: {"a": 1.0}})
  assert math.isnan(got.mean)
