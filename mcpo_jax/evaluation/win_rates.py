"""How often a model's answer is better than a baseline's, also at one length.

R prompts with G comparisons each. An outcome is 1 where the model's answer is
the better one, 0 where the baseline's is, 1/2 for a tie; a judge may say what
lies between. Prompts are what the bootstrap draws again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax.evaluation import statistics

# Of a weak normal prior on both coefficients, as its inverse variance: without
# one, answers that always win would have no finite fit.
_PRECISION = 1e-4
_RESAMPLES = 1000
_CHUNK = 2**22  # comparisons fitted at a time, to bound memory


class Fit(NamedTuple):
  """logit P(win) = ability + slope * tanh(gap / spread)."""

  ability: float
  slope: float
  spread: float  # of the gaps, 0 where all are the same

  @property
  def win_rate(self) -> float:
    """Of answers as long as the baseline's: the gap is 0."""
    return float(_sigmoid(self.ability))


def sample_pairs(
    scores: np.ndarray,
    baseline_scores: np.ndarray,
    texts: Sequence[Sequence[str]],
    baseline_texts: Sequence[Sequence[str]],
) -> tuple[np.ndarray, np.ndarray]:
  """Every sample of a prompt against every one of the baseline's.

  Args:
    scores: [R, N] of the model.
    baseline_scores: [R, M] of the baseline, for the same prompts.
    texts: R lists of N.
    baseline_texts: R lists of M.

  Returns:
    outcomes [R, N * M], and gaps [R, N * M]: characters of the model's text
    less those of the baseline's.
  """
  ours, theirs = np.asarray(scores), np.asarray(baseline_scores)
  if len(ours) != len(theirs):
    raise ValueError(f"not paired: {len(ours)} and {len(theirs)} prompts")
  ours, theirs = ours[:, :, None], theirs[:, None, :]
  outcomes = (ours > theirs) + 0.5 * (ours == theirs)
  lengths, others = (
      np.array([[len(t) for t in row] for row in table], np.float64)
      for table in (texts, baseline_texts))
  gaps = lengths[:, :, None] - others[:, None, :]
  return outcomes.reshape(len(outcomes), -1), gaps.reshape(len(gaps), -1)


def compare(
    outcomes: np.ndarray, gaps: np.ndarray, *, seed: int
) -> dict[str, Any]:
  """Win rate, ties, length-controlled win rate and the gap in length.

  Args:
    outcomes: [R, G] in [0, 1].
    gaps: [R, G] model's length less baseline's, in one unit.
    seed: of the bootstrap intervals.

  Returns:
    `win_rate`, `lc_win_rate` and `length_gap`: Intervals over prompts;
    `tie_rate`, the share of outcomes of exactly 1/2.

  Raises:
    ValueError: the shapes differ, or an outcome is not in [0, 1].
  """
  outcomes, gaps = np.asarray(outcomes, np.float64), np.asarray(gaps)
  if outcomes.ndim != 2 or outcomes.shape != gaps.shape:
    raise ValueError(f"outcomes {outcomes.shape} and gaps {gaps.shape}")
  if not ((outcomes >= 0) & (outcomes <= 1)).all():
    raise ValueError("an outcome is not in [0, 1]")
  return {
      "win_rate": statistics.mean_interval(outcomes.mean(axis=1), seed=seed),
      "tie_rate": float(np.mean(outcomes == 0.5)) if len(outcomes) else np.nan,
      "lc_win_rate": length_controlled(outcomes, gaps, seed=seed),
      "length_gap": statistics.mean_interval(gaps.mean(axis=1), seed=seed),
  }


def fit_lengths(outcomes: np.ndarray, gaps: np.ndarray) -> Fit:
  """How outcomes depend on the gap in length, by maximum likelihood.

  logit P(win) = ability + slope * tanh(gap / spread), spread the sample
  standard deviation of the gaps. It is the regression of AlpacaEval 2 without
  its term for the difficulty of an instruction, which is estimated from the
  answers of many other models, and without its choice of a penalty: the
  log-likelihood of R prompts, each counted once, less 0.5e-4 times the sum of
  the squares of ability and slope.

  Args:
    outcomes: [R, G] in [0, 1].
    gaps: [R, G].

  References:
    Dubois et al. 2024, https://arxiv.org/abs/2404.04475
  """
  x, spread = _feature(gaps)
  ability, slope = _newton(
      x, outcomes, np.ones((1, len(outcomes))))[0]
  return Fit(float(ability), float(slope), spread)


def length_controlled(
    outcomes: np.ndarray, gaps: np.ndarray, *, seed: int
) -> statistics.Interval:
  """The win rate at equal lengths of `fit_lengths`, with its interval: the
  percentiles of fits to prompts that are drawn again."""
  count = len(outcomes)
  if not count:
    return statistics.Interval(np.nan, np.nan, np.nan)
  mean = fit_lengths(outcomes, gaps).win_rate
  if count == 1:
    return statistics.Interval(mean, np.nan, np.nan)
  x, _ = _feature(gaps)
  rng = np.random.default_rng(seed)
  rows = max(1, _CHUNK // x.size)
  abilities = []
  for start in range(0, _RESAMPLES, rows):
    drawn = rng.multinomial(
        count, np.full(count, 1.0 / count), min(rows, _RESAMPLES - start))
    abilities.append(_newton(x, outcomes, drawn)[:, 0])
  low, high = _sigmoid(np.quantile(np.concatenate(abilities), [0.025, 0.975]))
  return statistics.Interval(mean, float(low), float(high))


def _feature(gaps: np.ndarray) -> tuple[np.ndarray, float]:
  gaps = np.asarray(gaps, np.float64)
  spread = float(np.std(gaps, ddof=1)) if gaps.size > 1 else 0.0
  if spread == 0.0:  # the same gap everywhere tells nothing of length
    return np.zeros_like(gaps), 0.0
  return np.tanh(gaps / spread), spread


def _newton(
    x: np.ndarray, outcomes: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """[S, 2] ability and slope of S resamples, prompt r counted counts[s, r]
  times.

  Steps are cut to a length of 2: from afar a whole one may overshoot.
  """
  share = counts[:, :, None] / x.shape[1]
  theta = np.zeros((len(counts), 2))
  for _ in range(100):
    p = _sigmoid(theta[:, :1, None] + theta[:, 1:, None] * x)
    residual, weight = share * (outcomes - p), share * p * (1.0 - p)
    total = lambda values: values.sum(axis=(1, 2))
    gradient = np.stack([total(residual), total(residual * x)], -1)
    gradient -= _PRECISION * theta
    a, b, c = total(weight), total(weight * x), total(weight * x * x)
    a, c = a + _PRECISION, c + _PRECISION
    step = np.stack([c * gradient[:, 0] - b * gradient[:, 1],
                     a * gradient[:, 1] - b * gradient[:, 0]], -1)
    step /= (a * c - b * b)[:, None]
    length = np.linalg.norm(step, axis=1, keepdims=True)
    theta += step * np.minimum(1.0, 2.0 / np.maximum(length, 2.0))
    if length.max() < 1e-9:
      break
  return theta


def _sigmoid(x):
  return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x)))
