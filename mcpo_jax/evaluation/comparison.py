"""Rows of a comparison: means over seeds, tests against a reference row.

The unit is the seed: rows share it, so what a start or an order of the data
does to all of them cancels in the difference of two rows. The t laws here are
exact finite sums, for whole degrees of freedom.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax.evaluation import statistics


class Estimate(NamedTuple):
  """A mean over seeds; what needs two of them is NaN below two."""

  mean: float
  half_width: float  # of the 95 % t interval
  p: float  # two-sided, of a mean of 0 (t test)
  num: int  # seeds


def t_within(t: float, df: int) -> float:
  """P(|T| <= t) of Student's law with `df` degrees of freedom, t >= 0.

  References:
    Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
  """
  angle = math.atan2(t, math.sqrt(df))
  odd = df % 2
  term = math.cos(angle) if odd else 1.0
  total = term if df > 1 else 0.0
  for k in range(2 + odd, df - 1, 2):
    term *= (k - 1) / k * math.cos(angle) ** 2
    total += term
  total *= math.sin(angle)
  return 2.0 / math.pi * (angle + total) if odd else total


def t_quantile(df: int, within: float = 0.95) -> float:
  """The t with P(|T| <= t) = `within`, by bisection."""
  low, high = 0.0, 1.0
  while t_within(high, df) < within:
    high *= 2.0
  for _ in range(100):
    middle = (low + high) / 2.0
    low, high = (
        (middle, high) if t_within(middle, df) < within else (low, middle)
    )
  return high


def estimate(values: Sequence[float]) -> Estimate:
  """Mean over seeds of finite numbers, with its t interval and t test.

  A paired comparison of two rows is the estimate of their differences.
  """
  num = len(values)
  if num == 0:
    return Estimate(math.nan, math.nan, math.nan, 0)
  mean = float(np.mean(values))
  if num == 1:
    return Estimate(mean, math.nan, math.nan, 1)
  error = float(np.std(values, ddof=1)) / math.sqrt(num)
  if error == 0.0:  # seeds that agree to the last bit
    return Estimate(mean, 0.0, float(mean == 0.0), num)
  p = 1.0 - t_within(abs(mean) / error, num - 1)
  return Estimate(mean, t_quantile(num - 1) * error, p, num)


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusted so that the chance of any false finding keeps its level.

  A p that is NaN stands for a test that could not be made: it stays NaN and
  does not count.

  References:
    Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
  """
  adjusted = list(p_values)
  made = [i for i, p in enumerate(p_values) if not math.isnan(p)]
  largest = 0.0
  for rank, i in enumerate(sorted(made, key=lambda i: p_values[i])):
    largest = max(largest, min(1.0, (len(made) - rank) * p_values[i]))
    adjusted[i] = largest
  return adjusted


def over_prompts(
    ours: Mapping[int, Mapping[Any, float]],
    reference: Mapping[int, Mapping[Any, float]],
) -> statistics.Interval:
  """Mean difference of two rows over prompts, with its bootstrap interval.

  Args:
    ours: seed -> prompt -> its score.
    reference: the same of the row to compare with. Seeds and prompts that only
      one of the two has are left out.

  Returns:
    Of the differences, averaged over seeds first. It says how far the result
    holds for other prompts of the kind, with the seeds as they are.
  """
  seeds = sorted(ours.keys() & reference.keys())
  tables = [side[seed] for side in (ours, reference) for seed in seeds]
  prompts = sorted(set.intersection(*(set(t) for t in tables)), key=str) if (
      tables) else []
  values = [np.mean([ours[s][p] - reference[s][p] for s in seeds])
            for p in prompts]
  return statistics.mean_interval(np.array(values), seed=0)
