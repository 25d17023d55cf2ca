"""The numbers of an evaluation, as the stage evaluate keeps them.

WORKDIR/evaluate/evaluation.json is one object. A number that is not known is
null, never NaN. An interval I is {"mean", "ci95_low", "ci95_high"}.

  {"version": 1, "seed", "num_prompts", "num_sets",
   "reference": name of the model that KL and implicit rewards are against,
   "baseline": name of the model that the others are to win against,
   "beta": reward per nat, of the implicit rewards and of `preferences`,
   "models": [MODEL, ...]     the start first, the aligned one last
   "frontier": [{"model", "step" (null: no update of this run), "kl": I,
                 "score": I}, ...] sampled, by growing KL; without models of
                 other runs; empty without a reward
   "benchmarks": [BENCHMARK, ...]}

  MODEL = {"name", "kind": "start" | "reference" | "step" | "other" | "aligned",
    "where": folder or checkpoint, as text, "step": updates or null,
    "params_sha256", "same_tokenizer": bool,
    "preferences": null or {    of held-out candidates, null with another
                                tokenizer than the run's
      "accuracy": I, "margin": I, "chosen", "rejected", "logps_chosen",
      "logps_rejected", "num_pairs", "num_sets",
      "by_rank": [{"accuracy", "margin": I each, "num_sets"}, ...]
                                against the best-scored negative, the second, ..
      "calibration": {"ece", "rank_correlation": I, "num_pairs", "num_sets",
        "bins": [{"low", "high", "confidence", "accuracy", "num_pairs"}, ...]}},
    "samples": {LAW: null or {  LAW is "sampled" (as config.generation draws)
                                or "greedy"; null without a reward
      "score": I, "length": I (tokens), "characters": I, "eos_rate",
      "distinct_1", "distinct_2", "distinct_3", "repetition", "empty_rate",
      "kl": I or null, "kl_per_token", "logp_gap", "ref_perplexity": I or null
                                null with another tokenizer; KL of "sampled"
      "against": null of the baseline itself, else {
        "win_rate": I, "tie_rate", "lc_win_rate": I, "length_gap": I
        (characters, this model less the baseline), "score_difference": I,
        "length_ratio", "distinct_2_ratio": of this model by the baseline's}}}}

  BENCHMARK = {"benchmark", "benchmark_version", "model", "generator", "judge",
    "num_questions", "win_rate": I or null, "tie_rate", "lc_win_rate": I or
    null, "score": I or null (MT-Bench 1 to 10, GSM8K share that is right),
    "by_category": {name: mean}, "mean_length" (characters), "num_skipped"}

Beside it, in the order of prompts: scores.json, {"sampled" and "greedy":
{"prompt_ids", "start", "aligned", further NAMEs: mean score of each prompt}};
samples.json, {"sampled/" and "greedy/": [{"prompt", NAME: text, ...}, ...]};
benchmarks/BENCHMARK/NAME/, see `benchmarks`.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from mcpo_jax import commit, errors
from mcpo_jax.evaluation import statistics

VERSION = 1
FILE = "evaluation.json"


def interval(value: statistics.Interval) -> dict[str, float | None]:
  """The form of an interval in the file."""
  return {name: known(float(x)) for name, x in value._asdict().items()}


def known(value: float) -> float | None:
  """None for a number that is none."""
  return value if math.isfinite(value) else None


def write(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes the file, whole or not at all.

  Raises:
    NonFiniteError: evaluate.non_finite, a number is NaN or infinite: it was to
      be null, or an earlier step went wrong.
  """
  try:
    text = json.dumps({"version": VERSION} | dict(content), indent=1,
                      allow_nan=False)
  except ValueError:
    raise errors.NonFiniteError(
        "evaluate.non_finite", "a number of the evaluation is not finite",
        where=str(folder / FILE)) from None
  commit.write_file(folder / FILE, text)


def read(folder: pathlib.Path) -> dict[str, Any] | None:
  """The object of a folder's file; None without one.

  Raises:
    CheckpointError: evaluate.foreign, the file is none of this version's.
  """
  path = folder / FILE
  if not path.exists():
    return None
  try:
    content = json.loads(path.read_text("utf-8"))
    version = content["version"]
  except (ValueError, KeyError, TypeError) as e:
    raise errors.CheckpointError(
        "evaluate.foreign", f"not an evaluation: {type(e).__name__}",
        where=str(path)) from e
  if version != VERSION:
    raise errors.CheckpointError(
        "evaluate.foreign", "an evaluation of another version",
        where=str(path), got=version, want=VERSION,
        hint="evaluate the run again")
  return content
