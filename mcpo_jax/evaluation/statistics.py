"""Means over prompts with a 95 % interval, by the bootstrap.

The unit that is drawn again is the prompt: samples of one prompt are averaged
before they come here.
"""

from typing import NamedTuple

import numpy as np

_CHUNK = 2**22  # indices drawn at a time, to bound memory


class Interval(NamedTuple):
  """A mean and where it lies; the bounds are NaN below two prompts."""

  mean: float
  ci95_low: float
  ci95_high: float


def mean_interval(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    seed: int,
    num_resamples: int = 10_000,
) -> Interval:
  """Weighted mean over prompts with its percentile bootstrap interval.

  Args:
    values: [N] one number per prompt, finite.
    weights: [N] >= 0, for example the number of pairs behind each value; None
      weighs all alike.
    seed: of the bootstrap; equal seeds give equal intervals.
    num_resamples: bootstrap samples.

  Returns:
    The mean sum(w v) / sum(w) and the 2.5 % and 97.5 % points of its
    bootstrap law. Everything is NaN without a prompt of positive weight.

  Raises:
    ValueError: the shapes differ or a value is not finite.
  """
  values = np.asarray(values, np.float64)
  weights = (
      np.ones_like(values)
      if weights is None
      else np.asarray(weights, np.float64)
  )
  if values.ndim != 1 or values.shape != weights.shape:
    raise ValueError(
        f"values and weights must be [N], got {values.shape}, {weights.shape}"
    )
  values, weights = values[weights > 0], weights[weights > 0]
  if not np.isfinite(values).all():
    raise ValueError("a value is not finite")
  size = len(values)
  if size == 0:
    return Interval(np.nan, np.nan, np.nan)
  mean = float(np.average(values, weights=weights))
  if size == 1:
    return Interval(mean, np.nan, np.nan)
  rng = np.random.default_rng(seed)
  means = []
  step = max(1, _CHUNK // size)
  for start in range(0, num_resamples, step):
    rows = min(step, num_resamples - start)
    drawn = rng.integers(0, size, (rows, size))
    total = weights[drawn].sum(1)
    means.append((weights * values)[drawn].sum(1) / total)
  low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
  return Interval(mean, float(low), float(high))


def paired_difference(
    before: np.ndarray,
    after: np.ndarray,
    *,
    seed: int,
    num_resamples: int = 10_000,
) -> Interval:
  """Mean of after - before over the same prompts, with its interval.

  Args:
    before: [N] one number per prompt.
    after: [N] the same prompts in the same order.
    seed: of the bootstrap.
    num_resamples: bootstrap samples.

  Returns:
    The mean difference and its 95 % interval; prompts are drawn again as
    pairs, so what makes a prompt easy for both cancels.

  Raises:
    ValueError: the shapes differ or a value is not finite.
  """
  before, after = np.asarray(before), np.asarray(after)
  if before.shape != after.shape:
    raise ValueError(f"not paired: {before.shape} and {after.shape}")
  return mean_interval(after - before, seed=seed, num_resamples=num_resamples)
