"""Writes K-wise data with wrong labels: what compare_noise_e2e.py trains on.

  python benchmarks/label_noise.py --share=0.2 \
      --data=../shared/data/kwise/e2e_slots.train.jsonl.gz \
      --out=runs/noise/20.jsonl

In that share of the prompts, drawn by the seed, a candidate drawn from those
below the best gets the best score, and the best get its: the preferred
candidate is a wrong one. A larger share has the wrong labels of a smaller one
and more.
"""

import argparse
import gzip
import json
import pathlib
import random
from typing import Any


def with_noise(
    rows: list[dict[str, Any]], share: float, seed: int
) -> list[dict[str, Any]]:
  """The rows; in a share of them the best and a worse one change places."""
  out = []
  for row in rows:
    rng = random.Random(f"{seed}/{row['prompt_id']}")
    wrong, scores = rng.random() < share, list(row["scores"])
    best = max(scores)
    below = [i for i, score in enumerate(scores) if score < best]
    if wrong and below:
      place = rng.choice(below)
      scores = [scores[place] if s == best else s for s in scores]
      scores[place] = best
    out.append(row | {"scores": scores})
  return out


def main() -> None:
  """Reads --data, writes --out."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--share", type=float, required=True)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  with gzip.open(args.data, "rt", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  args.out.parent.mkdir(parents=True, exist_ok=True)
  with open(args.out, "w", encoding="utf-8") as file:
    for row in with_noise(rows, args.share, args.seed):
      file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
