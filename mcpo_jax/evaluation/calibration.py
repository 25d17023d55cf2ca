"""Does the implicit reward agree with external scores, and as surely as it
says?

Under Bradley and Terry's model the implicit rewards of two candidates say how
likely the one is preferred to the other; scores say which of them is. N sets,
K candidate slots. All arrays live on the host.
"""

from typing import Any

import numpy as np

from mcpo_jax.evaluation import statistics


def calibration(
    rewards: np.ndarray,
    scores: np.ndarray,
    mask: np.ndarray,
    *,
    seed: int,
    num_bins: int = 10,
) -> dict[str, Any]:
  """Reliability curve, calibration error and rank correlation.

  A pair is any two candidates of a set whose scores differ. Its confidence is
  sigmoid(|difference of rewards|), from 1/2 to 1; it is right if the better
  scored one has the larger reward, half right if the rewards are equal. So a
  policy equal to its reference is calibrated, and knows nothing.

  Args:
    rewards: [N, K] implicit rewards; what stands outside the mask is not read.
    scores: [N, K] external scores, higher is better, NaN where unknown.
    mask: [N, K] bool, True on candidates.
    seed: of the bootstrap interval, which draws sets.
    num_bins: of equal width, over confidences from 1/2 to 1.

  Returns:
    `bins`: of each that has pairs "low", "high", mean "confidence",
      "accuracy", "num_pairs".
    `ece`: mean over pairs of |accuracy - confidence| of their bin; NaN without
      a pair.
    `rank_correlation`: Interval of Spearman's correlation of rewards and scores
      within a set, mean over sets in which both differ.
    `num_pairs`, `num_sets` (with a pair).

  References:
    Guo et al. 2017, https://arxiv.org/abs/1706.04599 (ECE)
  """
  scores = np.asarray(scores, np.float64)
  known = np.asarray(mask, bool) & np.isfinite(scores)
  rewards = np.where(known, np.asarray(rewards, np.float64), 0.0)
  scores = np.where(known, scores, 0.0)
  both = known[:, :, None] & known[:, None, :]
  pairs = both & (scores[:, :, None] > scores[:, None, :])
  num_sets = int(pairs.any(axis=(1, 2)).sum())
  gap = (rewards[:, :, None] - rewards[:, None, :])[pairs]
  confidence = 0.5 * (1.0 + np.tanh(0.5 * np.abs(gap)))
  right = (gap > 0) + 0.5 * (gap == 0)
  correlations = _correlation(
      _ranks(rewards, both), _ranks(scores, both), known)
  edges = np.linspace(0.5, 1.0, num_bins + 1)
  place = np.clip(
      np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
  bins, error = [], 0.0
  for b in np.unique(place):
    at = place == b
    bins.append({
        "low": float(edges[b]), "high": float(edges[b + 1]),
        "confidence": float(confidence[at].mean()),
        "accuracy": float(right[at].mean()), "num_pairs": int(at.sum())})
    error += at.mean() * abs(right[at].mean() - confidence[at].mean())
  return {
      "bins": bins,
      "ece": float(error) if len(gap) else float("nan"),
      "rank_correlation": statistics.mean_interval(
          correlations[np.isfinite(correlations)], seed=seed),
      "num_pairs": len(gap),
      "num_sets": num_sets,
  }


def _ranks(values, both):
  """[N, K] how many of its set a value exceeds, and half of those it equals."""
  ours, theirs = values[:, :, None], values[:, None, :]
  return np.sum(both * ((ours > theirs) + 0.5 * (ours == theirs)), axis=2)


def _correlation(a, b, mask):
  """[N] Pearson's correlation over the mask; NaN where one is constant."""
  count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
  a, b = (np.where(mask, x - np.where(mask, x, 0).sum(
      axis=1, keepdims=True) / count, 0.0) for x in (a, b))
  size = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
  return (a * b).sum(axis=1) / np.where(size > 0, size, np.nan)
