"""The audit counts what the data's own README says, and what is odd."""

import json

import pytest

from mcpo_jax.data import audit, tokenizer

# file -> prompts, completions, candidates min and max, median words, rows whose
# scores are all equal
KWISE = {
    "e2e_slots": (955, 7640, 8, 8, 24, 0),
    "truthfulqa": (641, 14073, 8, 42, 8, 0),
    "gsm8k_solutions": (1107, 5524, 4, 5, 45, 126),
    "protoqa": (691, 5832, 6, 11, 1, 0),
    "oasst_ranked": (160, 476, 2, 9, 87, 0),
    "pandalm": (91, 387, 3, 5, 24, 4),
    "llmbar_pairs": (341, 682, 2, 2, 41, 0),
    "hh_harmless_pairs": (774, 1548, 2, 2, 20, 0),
}
LAYOUTS = {"nectar_layout": (6, 32), "ultrafeedback_layout": (6, 24),
           "hh_rlhf_raw": (20, 40)}


def source(path):
  return [(str(path), "auto", 1.0, None)]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.mark.parametrize("name", KWISE)
def test_counts_of_the_scored_sets(shared, name):
  report, text = audit.audit(
      source(shared / "data/kwise" / f"{name}.train.jsonl.gz"))
  rows, completions, low, high, words, flat = KWISE[name]
  found = report["train"]
  assert found["rows"] == found["rows_in"] == rows
  assert found["completions"] == completions
  assert (found["candidates"]["min"], found["candidates"]["max"]) == (low, high)
  assert abs(found["words"]["median"] - words) <= 0.5  # the README rounds
  assert found["rows_without_contrast"] == flat
  assert 0 <= found["scores"]["min"] <= found["scores"]["max"] <= 1
  assert found["duplicate_completions"] == 0  # "distinct"
  assert not found["bad_rows"]
  assert f"{completions}" in text and "rows without contrast" in text


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_of_the_layouts(shared, name):
  report, _ = audit.audit(
      source(shared / "data/input_formats" / f"{name}.jsonl"))
  found = report["train"]
  assert (found["rows"], found["completions"]) == LAYOUTS[name]
  assert found["label_contradictions"] == 0


def test_origins_and_ties_of_a_real_set(shared):
  report, _ = audit.audit(
      source(shared / "data/kwise/e2e_slots.train.jsonl.gz"))
  assert set(report["train"]["origins"]) == {
      "own_reference", "same_place_hard", "other_place_random"}
  assert sum(report["train"]["origins"].values()) == 7640


def test_overlap_between_train_and_eval(tmp_path):
  pair = {"chosen": "x", "rejected": "y"}
  train = write(tmp_path / "t.jsonl", [
      pair | {"prompt": p} for p in ("One, two?", "three", "three", "four")])
  other = write(tmp_path / "e.jsonl", [
      pair | {"prompt": p} for p in ("three", " one two ", "five")])
  report, text = audit.audit(source(train), source(other))
  assert report["overlap"] == {"exact": 1, "normalised": 2}
  assert report["train"]["duplicate_prompts"] == 1
  assert report["train"]["duplicate_rows"] == 1
  assert report["eval"]["rows"] == 3
  assert "overlap" in text


def test_the_known_slip_of_ultrafeedback_is_counted(shared, tmp_path):
  path = shared / "data/input_formats/ultrafeedback_layout.jsonl"
  rows = [json.loads(line) for line in path.read_text().split("\n") if line]
  rows[0]["completions"][2]["overall_score"] = 10
  rows[0]["completions"][0]["overall_score"] = 5
  report, _ = audit.audit(source(write(tmp_path / "x.jsonl", rows)))
  assert report["train"]["label_contradictions"] == 1


def test_bad_rows_are_counted_with_their_places(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"x\n'
                  '{"prompt": "a", "chosen": "b"}\n')
  report, _ = audit.audit(source(path))
  found = report["train"]
  assert found["bad_rows"] == {"data.json": 1, "data.field_missing": 1}
  assert "x.jsonl:4, rejected" in found["bad_places"][1]
  assert (found["rows_in"], found["rows"], found["blank_lines"]) == (3, 1, 1)


def test_a_tokenizer_adds_lengths_and_ends(tmp_path):
  tokenizer.train_tokenizer(
      ["aa bb"], vocab_size=300, out_dir=tmp_path / "tok")
  tok = tokenizer.load_tokenizer(tmp_path / "tok")
  path = write(tmp_path / "x.jsonl", [
      {"prompt": "a <|eos|>", "chosen": "b " * 30, "rejected": "c"}])
  report, _ = audit.audit(
      source(path), tokenizer=tok, max_completion_length=10)
  found = report["train"]
  assert found["special_token_text"] == 1
  assert found["completions_cut"] == 1 and found["completions_with_end"] == 1
  assert found["completion_tokens"]["min"] == 2
  assert found["prompt_tokens"]["min"] > 3
