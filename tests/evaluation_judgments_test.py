"""What judges said, against values worked by hand and real records."""

import json

import numpy as np
import pytest

from mcpo_jax import errors
from mcpo_jax.evaluation import judgments, win_rates

SAID = {"m": {f"q{i}": ("x" * (4 + i),) for i in range(5)}}


def write(path, rows):
  text = json.dumps(rows) if path.suffix == ".json" else "".join(
      json.dumps(row) + "\n" for row in rows)
  path.write_text(text)
  return str(path)


def annotation(i, preference, generator="m", output=None):
  return {"instruction": f"q{i}", "output_1": "y" * (9 - 2 * i),
          "generator_1": "base", "output_2": output or "x" * (4 + i),
          "generator_2": generator, "annotator": "judge",
          "preference": preference, "dataset": "d"}


def numbers(name, path, said=SAID, generator="m", categories=None):
  kind, verdicts, skipped = judgments.read(name, path, list(said), said)
  return judgments.summarize(
      kind, verdicts[generator], categories or dict.fromkeys(
          said[generator], "all"), seed=0) | {"skipped": skipped[generator]}


def test_alpaca_eval_by_hand(tmp_path):
  preferences = [2.0, 1.0, 1.75, 0, None]  # 0 was a tie once
  path = write(tmp_path / "annotations.json", [
      annotation(i, p) for i, p in enumerate(preferences)])
  got = numbers("alpaca_eval", path,
                categories={f"q{i}": "ab"[i % 2] for i in range(5)})
  assert got["win_rate"].mean == (1 + 0 + 0.75 + 0.5) / 4
  assert got["tie_rate"] == 1 / 4 and got["skipped"] == 1
  assert got["num_questions"] == 4 and got["judge"] == "judge"
  assert got["by_category"] == {"a": 1.75 / 2, "b": 0.25}
  gaps = np.array([[4 + i - (9 - 2 * i)] for i in range(4)])
  want = win_rates.compare(
      np.array([[1.0], [0.0], [0.75], [0.5]]), gaps, seed=0)
  assert got["lc_win_rate"] == want["lc_win_rate"]
  assert got["score"] is None


def test_the_real_annotation(shared):
  path = shared / "data/eval_formats/alpaca_eval/annotations.json"
  [row] = json.loads(path.read_text())
  said = {row["generator_2"]: {row["instruction"]: (row["output_2"],)}}
  got = numbers("alpaca_eval", str(path), said, row["generator_2"])
  assert got["win_rate"].mean == pytest.approx(0.0001376547)
  assert got["judge"] == "weighted_alpaca_eval_gpt4_turbo"
  assert got["num_questions"] == 1


def games(i, first, second, model="m"):
  return {"uid": f"q{i}", "category": "c", "judge": "gpt", "model": model,
          "baseline": "base", "games": [
              {"score": first, "judgment": "", "prompt": []},
              {"score": second, "judgment": "", "prompt": []}]}


def test_arena_hard_by_hand(tmp_path):
  # A is the baseline in the first game, the model in the second.
  path = write(tmp_path / "m.jsonl", [
      games(0, "B>>A", "A>B"),   # 3 + 1 games won
      games(1, "A>B", "A=B"),    # lost, tied
      games(2, "A>>B", "B>A"),   # 3 + 1 lost
      games(3, None, "A>B"), {**games(4, "A>B", "A>B"), "games": [None]},
      games(0, "A>B", "B>A", model="other")])
  got = numbers("arena_hard_v2.0", path)
  assert got["win_rate"].mean == pytest.approx((4 + 0.5) / (4 + 2 + 4))
  assert got["skipped"] == 2 and got["num_questions"] == 3
  assert got["lc_win_rate"] is None  # judgments do not hold the texts
  kind, verdicts, _ = judgments.read("arena_hard_v2.0", path, ["m"], SAID)
  base = {f"q{i}": ("z" * i,) for i in range(5)}
  longer = judgments.with_baseline(
      verdicts["m"], SAID["m"], {"other": {}, "base": base})
  assert [v.lengths for v in longer] == [(4, 0), (5, 1), (6, 2)]
  both = judgments.summarize(
      kind, longer, dict.fromkeys(base, "c"), seed=0)
  assert both["win_rate"] == got["win_rate"]
  # All are longer by 4, so nothing is said of length: of questions, not games.
  assert both["lc_win_rate"].mean == pytest.approx(
      np.mean([1.0, 0.25, 0.0]), abs=1e-3)
  for others in ({"base": {}}, {"another": base}):
    with pytest.raises(errors.DataError) as e:
      judgments.with_baseline(verdicts["m"], SAID["m"], others)
    assert e.value.slug == "benchmark.mismatch"


def rating(question, turn, score, model="m"):
  return {"question_id": question, "model": model, "judge": ["gpt-4", "v1"],
          "judgment": "", "score": score, "turn": turn}


def test_mt_bench_scores_by_hand(tmp_path):
  said = {"m": {81: ("a", "b"), 82: ("c", "d")}}
  path = write(tmp_path / "single.jsonl", [
      rating(81, 1, 7), rating(81, 2, 4.5), rating(82, 1, 10),
      rating(82, 2, -1)])
  got = numbers("mt_bench", path, said)
  assert got["score"].mean == pytest.approx((7 + 4.5 + 10) / 3)
  assert got["skipped"] == 1 and got["win_rate"] is None
  assert got["judge"] == "gpt-4"


def test_the_real_ratings(shared):
  path = shared / "data/eval_formats/mt_bench/model_judgment_single.jsonl"
  said = {"granite-7b-lab": {98: ("", ""), 131: ("", "")}}
  got = numbers("mt_bench", str(path), said, "granite-7b-lab")
  assert got["score"].mean == 8.0 and got["skipped"] == 1


def pair(question, turn, first, second, one="m", two="base"):
  return {"question_id": question, "model_1": one, "model_2": two,
          "g1_winner": first, "g2_winner": second, "judge": ["g", "p"],
          "turn": turn}


def test_mt_bench_pairs_by_hand(tmp_path):
  said = {"m": {81: ("a", "b"), 82: ("c", "d"), 83: ("e", "f")}}
  path = write(tmp_path / "pair.jsonl", [
      pair(81, 1, "model_1", "model_1"), pair(81, 2, "model_1", "model_2"),
      pair(82, 1, "model_1", "model_1", one="base", two="m"),
      pair(82, 2, "tie", "tie"), pair(83, 1, "error", "model_1")])
  got = numbers("mt_bench", path, said)
  assert got["win_rate"].mean == (1 + 0.5 + 0 + 0.5) / 4
  assert got["tie_rate"] == 0.5 and got["skipped"] == 1
  assert got["score"] is None


@pytest.mark.parametrize("name, rows, slug", [
    ("alpaca_eval", [annotation(0, 2.0, generator="other")],
     "benchmark.foreign"),
    ("alpaca_eval", [annotation(0, 2.0, output="changed")],
     "benchmark.mismatch"),
    ("alpaca_eval", [annotation(7, 2.0)], "benchmark.mismatch"),
    ("alpaca_eval", [annotation(0, 2.0), annotation(0, 1.0)],
     "benchmark.mismatch"),
    ("alpaca_eval", [annotation(0, 2.5)], "benchmark.judgment"),
    ("alpaca_eval", [annotation(0, float("nan"))], "benchmark.judgment"),
    ("alpaca_eval", [annotation(0, "2")], "benchmark.judgment"),
    ("alpaca_eval", [annotation(0, True)], "benchmark.judgment"),
    ("alpaca_eval", [rating(81, 1, 7)], "data.field_missing"),
    ("alpaca_eval", [], "data.too_small"),
    ("arena_hard_v0.1", [games(0, "A>B", "C>A")], "benchmark.judgment"),
    ("arena_hard_v0.1", [games(9, "A>B", "A>B")], "benchmark.mismatch"),
    ("mt_bench", [rating(81, 1, 11)], "benchmark.judgment"),
    ("mt_bench", [rating(81, 1, float("nan"))], "benchmark.judgment"),
    ("mt_bench", [rating(81, 1, 5), rating(81, 1, 6)], "benchmark.mismatch"),
    ("mt_bench", [pair(81, 1, "m", "m")], "benchmark.judgment"),
])
def test_what_is_no_judgment_of_ours_is_refused(tmp_path, name, rows, slug):
  said = {"m": {81: ("a", "b")}} if name == "mt_bench" else SAID
  path = write(tmp_path / "judged.json", rows)
  with pytest.raises(errors.DataError) as e:
    judgments.read(name, path, ["m"], said)
  assert e.value.slug == slug
