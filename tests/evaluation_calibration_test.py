"""Calibration of implicit rewards, by hand and on its identities."""

import numpy as np
import pytest
from scipy import stats

from mcpo_jax.evaluation import calibration


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_worked_values():
  # Pairs: (0, 1) right by 1, (0, 2) wrong by 1/4, (1, 2) wrong by 5/4; the
  # fourth candidate's score is unknown, the fifth is no candidate.
  rewards = np.array([[1.0, 0.0, 1.25, 9.0, np.nan]])
  scores = np.array([[3.0, 2.0, 1.0, np.nan, 7.0]])
  mask = np.array([[True, True, True, True, False]])
  got = calibration.calibration(rewards, scores, mask, seed=0)
  assert [b["num_pairs"] for b in got["bins"]] == [1, 1, 1]
  assert [b["accuracy"] for b in got["bins"]] == [0.0, 1.0, 0.0]
  confidences = sigmoid(np.array([0.25, 1.0, 1.25]))
  np.testing.assert_allclose(
      [b["confidence"] for b in got["bins"]], confidences)
  assert got["ece"] == pytest.approx(
      (confidences[0] + 1 - confidences[1] + confidences[2]) / 3)
  assert got["rank_correlation"].mean == pytest.approx(-0.5)
  assert (got["num_pairs"], got["num_sets"]) == (3, 1)


def test_equal_rewards_are_calibrated_and_know_nothing():
  scores = np.random.default_rng(0).normal(size=(6, 4))
  got = calibration.calibration(
      np.full((6, 4), 2.0), scores, np.ones((6, 4), bool), seed=0)
  assert got["ece"] == 0.0 and got["num_pairs"] == 6 * 6
  assert [b["accuracy"] for b in got["bins"]] == [0.5]
  assert np.isnan(got["rank_correlation"].mean)


def test_scores_drawn_by_the_rewards_own_law_are_calibrated():
  rng = np.random.default_rng(1)
  rewards = rng.normal(size=(4000, 2)) * 1.5
  scores = np.zeros_like(rewards)
  scores[:, 0] = np.where(
      rng.random(4000) < sigmoid(rewards[:, 0] - rewards[:, 1]), 1.0, -1.0)
  mask = np.ones(rewards.shape, bool)
  got = calibration.calibration(rewards, scores, mask, seed=0)
  assert len(got["bins"]) == 10 and got["ece"] < 0.03
  too_sure = calibration.calibration(4 * rewards, scores, mask, seed=0)
  assert too_sure["ece"] > 0.1  # the same order, with other confidences
  assert too_sure["rank_correlation"] == got["rank_correlation"]


def test_a_constant_per_set_and_the_order_of_slots_change_nothing():
  rng = np.random.default_rng(2)
  rewards, scores = rng.normal(size=(2, 7, 5))
  mask = rng.random((7, 5)) < 0.8
  got = calibration.calibration(rewards, scores, mask, seed=0)
  order = rng.permutation(5)
  moved = calibration.calibration(
      (rewards + rng.normal(size=(7, 1)))[:, order], scores[:, order],
      mask[:, order], seed=0)
  assert moved["ece"] == pytest.approx(got["ece"])
  assert moved["rank_correlation"].mean == pytest.approx(
      got["rank_correlation"].mean)
  assert got["rank_correlation"].mean == pytest.approx(np.mean([
      stats.spearmanr(r[m], s[m])[0]
      for r, s, m in zip(rewards, scores, mask) if m.sum() > 1]))


def test_ties_of_scores_are_no_pairs():
  got = calibration.calibration(
      np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 5.0, 5.0]]),
      np.ones((1, 3), bool), seed=0)
  assert got["num_pairs"] == got["num_sets"] == 0 and np.isnan(got["ece"])


def test_certain_pairs_lie_in_the_last_bin():
  got = calibration.calibration(
      np.array([[900.0, 0.0]]), np.array([[1.0, 0.0]]), np.ones((1, 2), bool),
      seed=0)
  assert got["bins"][0]["high"] == 1.0 and got["ece"] == 0.0
