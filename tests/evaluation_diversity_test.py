"""Signs of cheap gains, against numbers worked by hand."""

import math

import numpy as np
import pytest

from mcpo_jax.evaluation import diversity


def test_ngrams_are_runs_of_words():
  assert diversity.ngrams(" a b\n a", 2) == [("a", "b"), ("b", "a")]
  assert diversity.ngrams("a b", 3) == []


@pytest.mark.parametrize("n, value", [
    (1, 3 / 6),  # a b a b | a c: a, b, c of 6
    (2, 3 / 4),  # ab ba ab | ac: ab, ba, ac of 4
    (3, 2 / 2),  # aba bab
])
def test_distinct_counts_over_all_texts(n, value):
  assert diversity.distinct(["a b a b", "a c", ""], n) == value


def test_nothing_said_is_no_share():
  assert math.isnan(diversity.distinct(["", "a"], 2))


@pytest.mark.parametrize("text, value", [
    ("", 0.0), ("a b", 0.0), ("a b c d", 0.0),
    ("a a a a a", 2 / 3),  # aaa three times
    ("x a b x a b", 1 / 4),  # xab abx bxa xab
])
def test_repetition_is_within_a_text(text, value):
  assert diversity.repetition(text) == pytest.approx(value, abs=1e-12)


def test_metrics_are_over_all_samples_of_all_prompts():
  got = diversity.text_metrics([["a b a b", "a c"], [" ", "a a a a a"]])
  assert got == {
      "distinct_1": 3 / 11, "distinct_2": 4 / 8, "distinct_3": 3 / 5,
      "repetition": pytest.approx((2 / 3) / 4), "empty_rate": 1 / 4}


def test_perplexity_is_per_token_of_all_tokens():
  mask = np.array([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 0]]], bool)
  logps = np.where(mask, np.log(0.5), np.nan)
  logps[1] = np.where(mask[1], np.log(0.25), -99.0)
  got = diversity.perplexity(logps, mask, seed=0)
  # Four tokens of 1/2 and four of 1/4: two bits, one bit.
  assert got.mean == pytest.approx(2**1.5)
  assert got.ci95_low == pytest.approx(2.0)  # one prompt drawn twice
  assert got.ci95_high == pytest.approx(4.0)
  one = diversity.perplexity(logps[:1], mask[:1], seed=0)
  assert one.mean == pytest.approx(2.0) and math.isnan(one.ci95_low)


def test_long_samples_count_by_their_tokens():
  mask = np.ones((2, 1, 4), bool)
  mask[0, 0, 1:] = False
  logps = np.zeros((2, 1, 4))
  logps[0] = -5.0
  got = diversity.perplexity(logps, mask, seed=0)
  assert got.mean == pytest.approx(math.exp(1.0))  # 5 nats over 5 tokens
