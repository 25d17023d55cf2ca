"""Intervals against closed forms and against their own promise."""

import numpy as np
import pytest

from mcpo_jax.evaluation import statistics


def test_interval_agrees_with_the_normal_one_on_many_values():
  values = np.random.default_rng(0).normal(2.0, 3.0, 2000)
  got = statistics.mean_interval(values, seed=1)
  half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
  assert got.mean == pytest.approx(values.mean(), rel=1e-12)
  np.testing.assert_allclose(
      got[1:], [values.mean() - half, values.mean() + half], atol=0.1 * half
  )


def test_interval_covers_the_mean_about_95_times_of_100():
  rng = np.random.default_rng(0)
  covered = 0
  for trial in range(200):
    got = statistics.mean_interval(
        rng.random(50) < 0.3, seed=trial, num_resamples=500
    )
    covered += got.ci95_low <= 0.3 <= got.ci95_high
  assert 178 <= covered <= 199


def test_weights_are_counts_of_what_stands_behind_a_value():
  got = statistics.mean_interval([1.0, 0.0, 9.0], [3, 1, 0], seed=0)
  assert got.mean == 0.75
  assert 0.0 <= got.ci95_low <= 0.75 <= got.ci95_high <= 1.0


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_matter(
    monkeypatch,
):
  values = np.arange(7.0) ** 2
  first = statistics.mean_interval(values, seed=3)
  assert first == statistics.mean_interval(values, seed=3)
  assert first != statistics.mean_interval(values, seed=4)
  monkeypatch.setattr(statistics, "_CHUNK", 1000)
  assert first == statistics.mean_interval(values, seed=3)


def test_pairing_removes_what_prompts_share():
  rng = np.random.default_rng(0)
  before = rng.normal(0.0, 10.0, 300)
  after = before + rng.normal(0.5, 0.1, 300)
  got = statistics.paired_difference(before, after, seed=0)
  assert got.mean == pytest.approx(0.5, abs=0.03)
  assert 0.45 < got.ci95_low < got.ci95_high < 0.55


def test_too_few_prompts_have_no_interval():
  one = statistics.mean_interval([0.4], seed=0)
  assert one.mean == 0.4 and np.isnan(one.ci95_low) and np.isnan(one.ci95_high)
  assert np.isnan(statistics.mean_interval([], seed=0)).all()


@pytest.mark.parametrize("values, weights", [
    ([[1.0, 2.0]], None), ([1.0, 2.0], [1.0]), ([1.0, np.nan], None),
])
def test_what_has_no_mean_is_refused(values, weights):
  with pytest.raises(ValueError):
    statistics.mean_interval(values, weights, seed=0)


def test_unpaired_arrays_are_refused():
  with pytest.raises(ValueError, match="not paired"):
    statistics.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], seed=0)
