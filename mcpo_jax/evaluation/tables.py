"""The numbers of an evaluation, as the stage evaluate keeps them.

WORKDIR/evaluate/evaluation.json is one object. A number that is not known is
null, never NaN. An interval I is {"mean", "ci95_low", "ci95_high"}.

  {"version": 1, "seed", "num_prompts", "num_sets" (both 0 and no models where
                                no data is held out),
   "settings": what decided about it, beside the run's own config
   "reference": name of the model that KL and implicit rewards are against,
   "baseline": name of the model that the others are to win against,
   "gain": {LAW: I, ...}      score of the aligned one less that of the start,
                              paired by prompt; null without a reward
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


_LAWS = {"sampled": "", "greedy": "greedy/"}  # what stands before flat keys


def plain(value: Any) -> Any:
  """Intervals in the form of the file, numbers that are none as None."""
  if isinstance(value, statistics.Interval):
    return interval(value)
  if isinstance(value, dict):
    return {key: plain(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [plain(x) for x in value]
  return known(value) if isinstance(value, float) else value


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
  """The numbers of an evaluation as flat keys of a summary.

  Those of a model end in its name: `score/NAME` with `score/NAME_ci95_low` and
  `_ci95_high`, `mean_length/NAME`, `win_rate/NAME`, .. of sampled texts, the
  same after `greedy/`; `preferences/accuracy/NAME`, with `/rank_1` for the
  best negative alone; `calibration/ece/NAME`. The aligned model's KL is
  `objective/kl`, that of others `objective/kl/NAME`.
  """
  out = {}

  def put(key, value):
    if value is None or not isinstance(value, dict):
      out[key] = value
    else:
      out[key] = value["mean"]
      for bound in ("ci95_low", "ci95_high"):
        out[f"{key}_{bound}"] = value[bound]

  for law, before in _LAWS.items():
    if content["gain"] is not None:
      put(f"{before}score/difference", content["gain"][law])
      out[f"{before}score/num_prompts"] = content["num_prompts"]
  for model in content["models"]:
    name = model["name"]
    _put_preferences(put, name, model["preferences"])
    for law, before in _LAWS.items():
      table = dict((model["samples"] or {}).get(law) or {})
      against, kl = table.pop("against", None), table.pop("kl", None)
      per_token, gap = table.pop("kl_per_token", None), table.pop(
          "logp_gap", None)
      suffix = "" if model["kind"] == "aligned" else f"/{name}"
      if kl is not None:
        put(f"{before}objective/kl{suffix}", kl)
        put(f"{before}objective/kl_per_token{suffix}", per_token)
        put(f"{before}generate/logp_gap{suffix}", gap)
      if table:
        out[f"{before}mean_length/{name}"] = table.pop("length")["mean"]
      for key, value in (table | (against or {})).items():
        put(f"{before}{key}/{name}", value)
  for one in content["benchmarks"]:
    for key in ("win_rate", "lc_win_rate", "score", "tie_rate"):
      if one[key] is not None:
        put(f"{one['benchmark']}/{key}/{one['model']}", one[key])
  return out


def _put_preferences(put, name, table) -> None:
  if table is None:
    return
  for key in ("accuracy", "margin"):
    put(f"preferences/{key}/{name}", table[key])
    for rank, one in enumerate(table["by_rank"], 1):
      put(f"preferences/{key}/{name}/rank_{rank}", one[key])
  for key in ("ece", "rank_correlation"):
    put(f"calibration/{key}/{name}", table["calibration"][key])
