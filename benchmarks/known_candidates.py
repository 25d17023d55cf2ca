"""How far a score read off scored answers agrees with people, and what one
answer to everything scores.

  python benchmarks/known_candidates.py \
      ../shared/data/kwise/{truthfulqa,protoqa}.train.jsonl.gz

Every completion is scored by `candidate_margin` from the other ones of its
prompt, as if a model had said it. Printed, means over prompts with a 95 %
bootstrap interval: Spearman's correlation with the scores; the share of pairs
of a good and a bad completion that are ordered right, half for equal ones; and
the same of minus the number of words. Then by either rule, of the 100 most
frequent completions, the three that score most when said to every prompt.
"""

import collections
import sys

import numpy as np
from scipy import stats

from mcpo_jax.data import records
from mcpo_jax.evaluation import statistics
from mcpo_jax.rewards import known_candidates


def agreement(values: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
  """Rank correlation, and the share of pairs across the middle score."""
  middle = (scores.min() + scores.max()) / 2
  gap = values[scores > middle][:, None] - values[scores < middle]
  return (float(stats.spearmanr(values, scores).statistic),
          float(np.mean((gap > 0) + 0.5 * (gap == 0))))


def constants(path: str, make) -> list[tuple[float, str]]:
  """(mean score, completion) of the three best."""
  rows, reward = list(records.read_records(path)), make(path)
  frequent = collections.Counter(t for row in rows for t in row.completions)
  prompts = [row.prompt for row in rows]
  return sorted(
      ((float(np.mean(reward(prompts, [text] * len(rows)))), text)
       for text, _ in frequent.most_common(100)), reverse=True)[:3]


def main() -> None:
  """Prints what it finds for every file."""
  for path in sys.argv[1:]:
    rows = []
    for record in records.read_records(path):
      known = [known_candidates.Known(known_candidates.words_of(text), score)
               for text, score in zip(record.completions, record.scores)]
      margins = np.array([known_candidates.candidate_margin(
          one.words, known[:i] + known[i + 1:])
          for i, one in enumerate(known)])
      scores = np.array(record.scores)
      brevity = -np.array([one.words.total() for one in known])
      if len(set(margins)) > 1 and len(set(scores)) > 1:
        rows.append(agreement(margins, scores) + agreement(brevity, scores))
    for name, column in zip(
        ("rank correlation", "pairs in order", "rank correlation of brevity",
         "pairs in order by brevity"), np.transpose(rows)):
      mean = statistics.mean_interval(column[np.isfinite(column)], seed=0)
      print(f"{path}, {name}: {mean.mean:.3f} "
            f"[{mean.ci95_low:.3f}, {mean.ci95_high:.3f}], {len(rows)} prompts")
    for make in (known_candidates.make_candidate_margin,
                 known_candidates.make_nearest_candidate):
      print(f"{path}, {make.__name__}, said to all:", "; ".join(
          f"{text!r} {score:.4f}" for score, text in constants(path, make)))


if __name__ == "__main__":
  main()
