"""Ranking accuracy and margins worked by hand."""

import numpy as np
import pytest

from mcpo_jax.evaluation import preferences

NAN = np.nan
ROLE = np.array([[1, -1, -1, 0], [-1, 1, -1, -1], [1, 0, 0, 0]], np.int8)
REF = np.zeros((3, 4))
# Set 0: 2 above 1, below 3. Set 1: 5 above 4, equal to 5, below 6. Set 2: alone
LOGPS = np.array([[2.0, 1, 3, 99], [4.0, 5, 5, 6], [1.0, NAN, NAN, NAN]])
SCORES = np.array([[0.9, 0.5, 0.2, 0.9], [0.1, 0.8, 0.2, 0.3], [1, 1, 1, 1]])


def metrics(logps=LOGPS, ref=REF, role=ROLE, beta=0.5):
  return preferences.preference_metrics(
      beta * (logps - ref), logps, role, seed=0)


def ranks(logps=LOGPS, role=ROLE, scores=SCORES):
  return [(one["accuracy"].mean, one["margin"].mean, one["num_sets"])
          for one in preferences.by_rank(0.5 * logps, role, scores, seed=0)]


def test_worked_values():
  got = metrics()
  assert got["num_pairs"] == 5 and got["num_sets"] == 2
  assert got["rewards/accuracies"] == pytest.approx((1 + 1 + 0.5) / 5)
  # margins: 0.5 * (2 - 2), 0.5 * (5 - 5)
  assert got["rewards/margins"] == pytest.approx(0.0)
  assert got["rewards/chosen"] == pytest.approx(0.5 * 3.5)
  assert got["rewards/rejected"] == pytest.approx(0.5 * 3.5)
  assert got["logps/chosen"] == pytest.approx(3.5)
  # best negatives: 1 of set 0 (right), 6 of set 1 (wrong); then 3 (wrong)
  # and 5 (equal); then 4 (right).
  assert ranks() == [(0.5, 0.0, 2), (0.25, -0.25, 2), (1.0, 0.5, 1)]
  assert (
      got["rewards/accuracies_ci95_low"]
      <= got["rewards/accuracies"]
      <= got["rewards/accuracies_ci95_high"]
  )


def test_a_policy_equal_to_its_reference_is_at_chance():
  got = metrics(logps=LOGPS, ref=LOGPS)
  assert got["rewards/accuracies"] == 0.5 and got["rewards/margins"] == 0.0


def test_what_stands_in_unused_slots_is_never_read():
  ugly = np.where(ROLE == 0, NAN, LOGPS)
  assert metrics(logps=ugly) == metrics()
  assert ranks(logps=ugly) == ranks()


def test_the_order_of_slots_does_not_matter():
  order = [2, 0, 3, 1]
  got = metrics(LOGPS[:, order], REF[:, order], ROLE[:, order])
  assert ranks(LOGPS[:, order], ROLE[:, order], SCORES[:, order]) == ranks()
  want = metrics()
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-12)


def test_a_constant_per_prompt_changes_neither_accuracy_nor_margin():
  got = metrics(logps=LOGPS + np.array([[5.0], [-7.0], [1.0]]))
  for name in ("rewards/accuracies", "rewards/margins"):
    assert got[name] == pytest.approx(metrics()[name])


def test_sets_with_an_unknown_score_have_no_ranks():
  assert ranks(scores=np.full_like(SCORES, NAN)) == []
  scores = SCORES.copy()
  scores[0, 1] = NAN
  assert ranks(scores=scores) == [(0.0, -0.5, 1), (0.5, 0.0, 1), (1.0, 0.5, 1)]


def test_no_set_with_contrast_gives_nan_and_no_pair():
  got = metrics(role=np.zeros_like(ROLE))
  assert got["num_pairs"] == 0 and np.isnan(got["rewards/accuracies"])
