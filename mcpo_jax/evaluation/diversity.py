"""Signs that a score was gained cheaply: fewer words, loops, strange text.

Words are what white space separates, as they are written.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mcpo_jax.evaluation import statistics

REPEATED_N = 3


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
  """The n-grams of a text's words, in their order; none if it is shorter."""
  words = text.split()
  return list(zip(*(words[i:] for i in range(n))))


def distinct(texts: Iterable[str], n: int) -> float:
  """Different n-grams over n-grams, of all texts together (distinct-n).

  It falls with the number of texts and with their length, so only sets of the
  same size are compared. NaN where there is no n-gram.

  References:
    Li et al. 2016, https://arxiv.org/abs/1510.03055
  """
  grams = [gram for text in texts for gram in ngrams(text, n)]
  return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(text: str) -> float:
  """Share of a text's trigrams that stood in it before; 0 without trigrams.

  References:
    Welleck et al. 2020, https://arxiv.org/abs/1908.04319 (seq-rep-n)
  """
  grams = ngrams(text, REPEATED_N)
  return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def text_metrics(texts: Sequence[Sequence[str]]) -> dict[str, float]:
  """What the texts of N samples of each of R prompts are like.

  Returns:
    `distinct_1`, `distinct_2`, `distinct_3` over all samples; `repetition`,
    its mean over samples; `empty_rate`, the share of samples without a word.
  """
  flat = [text for row in texts for text in row]
  return {f"distinct_{n}": distinct(flat, n) for n in (1, 2, 3)} | {
      "repetition": float(np.mean([repetition(text) for text in flat])),
      "empty_rate": float(np.mean([not text.strip() for text in flat]))}


def perplexity(
    token_logps: np.ndarray, mask: np.ndarray, *, seed: int
) -> statistics.Interval:
  """exp(-mean log-prob of a token), over all tokens of all samples.

  Args:
    token_logps: [R, N, C] nats, of the model that judges.
    mask: [R, N, C] bool, True on tokens of the N samples of R prompts; every
      prompt has one.
    seed: of the bootstrap interval, which draws prompts.
  """
  tokens = mask.sum(axis=(1, 2))
  sums = np.where(mask, token_logps, 0.0).sum(axis=(1, 2), dtype=np.float64)
  mean = statistics.mean_interval(-sums / tokens, tokens, seed=seed)
  return statistics.Interval(*map(float, np.exp(mean)))
