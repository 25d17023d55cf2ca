r"""How much of the scores single words tell: a yardstick for small models.

  python benchmarks/word_baseline.py \
      ../shared/data/kwise/{truthfulqa,protoqa}.train.jsonl.gz

A word's value is the mean of (score - mean score of its set) over the training
completions it stands in, shrunk as if it had stood in three more of value 0; a
completion's is the mean over its words. Beside it: minus the number of words.
Printed: Spearman's correlation with the scores within a set, mean over the 30 %
of the sets that are held out, of five random splits.
"""

import collections
import gzip
import json
import re
import sys

import numpy as np
from scipy import stats


def words_of(text: str) -> list[str]:
  """Lower-case words."""
  return re.findall(r"\w+", text.lower())


def correlation(rows, value) -> float:
  """Mean over the sets in which both differ."""
  found = []
  for row in rows:
    values = [value(text) for text in row["completions"]]
    if len(set(values)) > 1 and len(set(row["scores"])) > 1:
      found.append(stats.spearmanr(values, row["scores"]).statistic)
  return float(np.mean(found))


def word_value(rows):
  """A completion's value by the words of the rows."""
  total, count = collections.Counter(), collections.Counter()
  for row in rows:
    for text, score in zip(row["completions"], row["scores"]):
      for word in set(words_of(text)):
        total[word] += score - np.mean(row["scores"])
        count[word] += 1
  return lambda text: np.mean(
      [total[word] / (count[word] + 3) for word in words_of(text)] or [0.0])


def main() -> None:
  """Prints a line for every file."""
  for path in sys.argv[1:]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
      rows = [json.loads(line) for line in file]
    found = []
    for seed in range(5):
      order = np.random.default_rng(seed).permutation(len(rows))
      cut = int(0.3 * len(rows))
      test = [rows[i] for i in order[:cut]]
      value = word_value([rows[i] for i in order[cut:]])
      found.append((correlation(test, value),
                    correlation(test, lambda text: -len(words_of(text)))))
    mean, spread = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
    print(path, *(f"{name} {m:.3f} (standard deviation over splits {s:.3f})"
                  for name, m, s in zip(("words", "brevity"), mean, spread)))


if __name__ == "__main__":
  main()
