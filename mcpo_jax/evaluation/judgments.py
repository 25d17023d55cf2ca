"""What the judges of benchmarks said, as win rates and scores.

A judgment counts only for answers that are ours: of the same generator, the
same questions, and where the file repeats the answer the same text. Win rates
are from 0 to 1.

  AlpacaEval   annotations.json; an outcome is preference - 1, a preference of 0
               a tie, as in its older files. Without one (null): skipped.
  Arena-Hard   model_judgment/JUDGE/MODEL.jsonl; two games a question, A is the
               baseline in the first. A win by ">>" counts as three games. A
               question with a game without a score: skipped.
  MT-Bench     JUDGE_single.jsonl: scores from 1 to 10, -1 is none: skipped; or
               JUDGE_pair.jsonl: both games must agree, else a tie; a game that
               is an "error": skipped.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcpo_jax import errors
from mcpo_jax.evaluation import benchmarks, statistics, win_rates

_ARENA_WEIGHT = 3
_LABELS = {"A>>B": (1.0, _ARENA_WEIGHT), "A>B": (1.0, 1), "A=B": (0.5, 1),
           "B=A": (0.5, 1), "A<B": (0.0, 1), "B>A": (0.0, 1),
           "A<<B": (0.0, _ARENA_WEIGHT), "B>>A": (0.0, _ARENA_WEIGHT),
           "B<A": (1.0, 1), "B<<A": (1.0, _ARENA_WEIGHT)}


class Verdict(NamedTuple):
  """Of one answer, or one turn of it."""

  key: str | int  # of the question
  value: float  # an outcome in [0, 1], or a score
  weight: float
  lengths: tuple[int, int] | None  # characters of answer, baseline's answer
  judge: str
  baseline: str = ""  # the other answer's generator, where the file says it


def read(
    name: str,
    path: str,
    generators: Sequence[str],
    answers: Mapping[str, Mapping[str | int, tuple[str, ...]]],
) -> tuple[str, dict[str, list[Verdict]], dict[str, int]]:
  """The verdicts about some models.

  Args:
    name: of the benchmark.
    path: of the judge's file, or a pattern.
    generators: of the models.
    answers: generator -> question -> turns, as they were exported.

  Returns:
    "win_rate" or "score", what values are; generator -> verdicts; and
    generator -> how many judgments were skipped.

  Raises:
    DataError: what `benchmarks.read_rows` finds; data.field_missing,
      data.field_type; benchmark.judgment, a verdict is none that the tool
      gives; benchmark.foreign, nothing in the file is about these models;
      benchmark.mismatch, it is about other answers than the exported ones.
  """
  rows = benchmarks.read_rows(path)
  if not rows:
    raise errors.DataError("data.too_small", "there is no judgment",
                           where=path)
  kind, one = "win_rate", {
      "alpaca_eval": _alpaca_eval, "mt_bench": _mt_bench_pair}.get(
          name, _arena_hard)
  if name == "mt_bench" and "model_1" not in rows[0][1]:
    kind, one = "score", _mt_bench_single
  verdicts = defaultdict(list)
  skipped, seen, others = dict.fromkeys(generators, 0), set(), set()
  for where, row in rows:
    for generator, verdict, said, mark in one(row, where):
      if generator not in answers:
        others.add(generator)
        continue
      mine = answers[generator]
      key = verdict.key
      if key not in mine or said is not None and said != mine[key]:
        raise errors.DataError(
            "benchmark.mismatch", "a judgment of other answers than the "
            "exported ones" if key in mine else
            "a judgment of a question that was not answered", where=where,
            got=str(key)[:80], hint=f"judge the answers of {generator} anew")
      if (generator, key, mark) in seen:
        raise errors.DataError(
            "benchmark.mismatch", "an answer is judged twice", where=where,
            got=str(key)[:80], hint="name one judge's files only")
      seen.add((generator, key, mark))
      if np.isnan(verdict.value):
        skipped[generator] += 1
      else:
        verdicts[generator].append(verdict)
  if not seen:
    raise errors.DataError(
        "benchmark.foreign", "no judgment is about these models", where=path,
        got=", ".join(sorted(map(str, others)))[:200],
        want=" | ".join(generators))
  return kind, dict(verdicts), skipped


def summarize(
    kind: str, verdicts: Sequence[Verdict], categories: Mapping[Any, str],
    *, seed: int,
) -> dict[str, Any]:
  """The numbers of one model, with Intervals over questions.

  Args:
    kind: "win_rate" or "score".
    verdicts: of its answers.
    categories: of the questions.
    seed: of the bootstrap.

  Returns:
    `win_rate`, `tie_rate`, `lc_win_rate` (where lengths are known), `score`,
    None where the judge says no such thing; `by_category`, `judge`,
    `num_questions`.
  """
  by_question = defaultdict(list)
  for verdict in verdicts:
    by_question[verdict.key].append(verdict)
  weights = np.array([sum(v.weight for v in of) for of in by_question.values()])
  means = np.array([
      sum(v.weight * v.value for v in of) for of in by_question.values()
  ]) / weights if len(weights) else np.zeros(0)
  mean = statistics.mean_interval(means, weights, seed=seed)
  out = dict.fromkeys(("win_rate", "tie_rate", "lc_win_rate", "score"))
  out[kind] = mean
  if kind == "win_rate":
    values, counts = np.array([(v.value, v.weight) for v in verdicts]).reshape(
        -1, 2).T
    out["tie_rate"] = float(
        counts[values == 0.5].sum() / counts.sum()) if counts.size else None
    if verdicts and all(v.lengths for v in verdicts):
      gaps = np.array([[np.mean([v.lengths[0] - v.lengths[1] for v in of])]
                       for of in by_question.values()])
      out["lc_win_rate"] = win_rates.length_controlled(
          means[:, None], gaps, seed=seed)
  named = np.array([categories[key] for key in by_question])
  out["by_category"] = {
      str(category): float(np.average(
          means[named == category], weights=weights[named == category]))
      for category in np.unique(named)}
  return out | {
      "judge": ", ".join(sorted({v.judge for v in verdicts})),
      "num_questions": len(by_question)}


def with_baseline(
    verdicts: Sequence[Verdict],
    answers: Mapping[str | int, tuple[str, ...]],
    baselines: Mapping[str, Mapping[str | int, tuple[str, ...]]],
) -> list[Verdict]:
  """The verdicts with the lengths of both answers, of files that hold neither.

  Args:
    verdicts: of one model.
    answers: its own, question -> turns.
    baselines: generator -> question -> turns. A judge may compare with one
      model in one category and with another in the next.

  Raises:
    DataError: benchmark.mismatch, the baseline has no answer to a question.
  """
  size = lambda turns: sum(map(len, turns))
  out = []
  for verdict in verdicts:
    name = verdict.baseline or next(iter(baselines))
    if verdict.key not in baselines.get(name, {}):
      raise errors.DataError(
          "benchmark.mismatch", "the baseline has no answer to a question",
          where="benchmark.baseline_path", got=f"{name}, {verdict.key}"[:80],
          want=f"a file of {name}'s answers")
    out.append(verdict._replace(lengths=(
        size(answers[verdict.key]), size(baselines[name][verdict.key]))))
  return out


# row, where -> (generator, Verdict, turns that the file repeats or None, what
# else is judged of the same question) of each model that a row is about.


def _alpaca_eval(row, where):
  benchmarks.check_fields(row, {
      "instruction": str, "output_1": str, "output_2": str,
      "generator_2": str}, where)
  if "preference" not in row:
    raise errors.DataError("data.field_missing", "not an annotation",
                           where=f"{where}, preference")
  value = row["preference"]
  if value is None:
    outcome = np.nan
  elif isinstance(value, bool) or not isinstance(value, int | float) or not (
      value == 0 or 1 <= value <= 2):
    raise errors.DataError(
        "benchmark.judgment", "not a preference", where=f"{where}, preference",
        got=str(value), want="1 to 2, or null")
  else:
    outcome = 0.5 if value == 0 else value - 1.0
  verdict = Verdict(
      row["instruction"], outcome, 1.0,
      (len(row["output_2"]), len(row["output_1"])),
      str(row.get("annotator", "")))
  yield row["generator_2"], verdict, (row["output_2"],), ""


def _arena_hard(row, where):
  benchmarks.check_fields(
      row, {"uid": str, "model": str, "games": list}, where)
  scores = [game.get("score") if isinstance(game, dict) else None
            for game in row["games"]]
  value, weight = np.nan, 1.0
  if len(scores) == 2 and None not in scores:
    for score in scores:
      if score not in _LABELS:
        raise errors.DataError(
            "benchmark.judgment", "not a verdict", where=f"{where}, games",
            got=str(score)[:20], want=" | ".join(_LABELS))
    (first, a), (second, b) = (_LABELS[score] for score in scores)
    weight = float(a + b)
    value = (a * (1.0 - first) + b * second) / weight
  yield row["model"], Verdict(
      row["uid"], value, weight, None, str(row.get("judge", "")),
      str(row.get("baseline", ""))), None, ""


def _mt_bench_single(row, where):
  benchmarks.check_fields(row, {
      "question_id": int, "model": str, "score": (int, float), "turn": int},
      where)
  value = float(row["score"])
  if not (value == -1 or 1 <= value <= 10):
    raise errors.DataError(
        "benchmark.judgment", "not a rating", where=f"{where}, score",
        got=str(row["score"]), want="1 to 10, or -1 for none")
  judge = row.get("judge")
  yield row["model"], Verdict(
      row["question_id"], np.nan if value == -1 else value, 1.0, None,
      str(judge[0] if isinstance(judge, list) and judge else judge or "")
  ), None, row["turn"]


def _mt_bench_pair(row, where):
  benchmarks.check_fields(row, {
      "question_id": int, "model_1": str, "model_2": str, "g1_winner": str,
      "g2_winner": str, "turn": int}, where)
  games = row["g1_winner"], row["g2_winner"]
  for game in games:
    if game not in ("model_1", "model_2", "tie", "error"):
      raise errors.DataError(
          "benchmark.judgment", "not a winner", where=where, got=game[:20],
          want="model_1 | model_2 | tie | error")
  first = {("model_1", "model_1"): 1.0, ("model_2", "model_2"): 0.0}.get(
      games, 0.5)
  if "error" in games:
    first = np.nan
  judge = row.get("judge")
  judge = str(judge[0] if isinstance(judge, list) and judge else judge or "")
  for generator, value, other in (
      (row["model_1"], first, row["model_2"]),
      (row["model_2"], 1.0 - first, row["model_1"])):
    yield generator, Verdict(
        row["question_id"], value, 1.0, None, judge, other), None, (
            row["turn"], other)
