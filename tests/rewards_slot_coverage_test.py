"""Slot coverage against the checked cases and the scored training set."""

import gzip
import json

import pytest

from mcpo_jax import errors
from mcpo_jax.rewards import slot_coverage

# A second, tiny rule with the same traits: places, levels, numeric, families.
RULES = {
    "levels": {"price": {"under 5": "low"}},
    "patterns": {
        "eatType": {"pub": [r"\bpub\b"], "restaurant": [r"\brestaurant\b"]},
        "price": {"low": [r"\bcheap\b", r"under 5"], "high": [r"\bdear\b"]},
        "familyFriendly": {"no": [r"\bno kids\b"], "yes": [r"\bkids\b"]},
    },
    "numeric": {"price": r"\d"},
    "names": ["The Mill", "Mill House"],
    "nears": ["Café Bleu"],
}


@pytest.fixture
def rules_path(tmp_path):
  path = tmp_path / "rules.json"
  path.write_text(json.dumps(RULES), encoding="utf-8")
  return str(path)


@pytest.fixture
def e2e_path(shared):
  return str(shared / "data/verifiable/e2e_slot_patterns.json")


def read_lines(path):
  opened = gzip.open if path.suffix == ".gz" else open
  with opened(path, "rt", encoding="utf-8", newline="\n") as f:
    return [json.loads(line) for line in f]


def test_all_checked_cases_are_reproduced(shared, e2e_path):
  extract = slot_coverage.make_extract(e2e_path)
  reward = slot_coverage.make_slot_coverage(e2e_path)
  cases = read_lines(shared / "data/verifiable/e2e_slot_examples.jsonl")
  assert len(cases) == 96
  for case in cases:
    assert extract(case["text"]) == case["extracted"]
    (score,) = reward([case["mr"]], [case["text"]])
    assert round(score, 4) == case["score"]


def test_scores_of_the_training_set_are_reproduced(shared, e2e_path):
  reward = slot_coverage.make_slot_coverage(e2e_path)
  rows = read_lines(shared / "data/kwise/e2e_slots.train.jsonl.gz")
  wrong = total = 0
  for row in rows:
    texts = row["completions"]
    scores = reward([row["prompt"]] * len(texts), texts)
    wrong += sum(round(s, 4) != t for s, t in zip(scores, row["scores"]))
    total += len(texts)
  assert (wrong, total) == (0, 7640)


@pytest.mark.parametrize(
    "prompt, text, score",
    [
        # All told; the longer place is found first, "the" and 's allowed.
        ("name[Mill House], near[Café Bleu]", "Mill-House by the cafe bleu’s",
         1.0),
        # A place of the other slot is left out, an unasked place is extra.
        ("near[Café Bleu]", "The Mill, near Café Bleu", 1 / 2),
        ("name[The Mill]", "Mill House", 0.0),
        # "restaurant" may come beside the asked type, not instead of it.
        ("eatType[pub]", "a pub and restaurant", 1.0),
        ("eatType[restaurant]", "a pub and restaurant", 0.0),
        ("name[The Mill]", "Mill is a restaurant", 1.0),
        ("name[The Mill]", "Mill is a pub", 1 / 2),
        # Levels; a match with a number outweighs one without.
        ("price[under 5]", "dear? no, under 5 pounds", 1.0),
        ("price[under 5]", "cheap and dear", 0.0),
        # "no kids" also matches "kids"; only "no" counts.
        ("familyFriendly[no]", "no kids", 1.0),
        ("familyFriendly[yes]", "no kids", 0.0),
        ("eatType[pub], name[The Mill]", "", 0.0),
    ],
)
def test_worked_cases(rules_path, prompt, text, score):
  reward = slot_coverage.make_slot_coverage(rules_path)
  assert reward([prompt], [text]) == [score]


def test_messages_give_the_last_user_turn_and_the_answer(rules_path):
  reward = slot_coverage.make_slot_coverage(rules_path)
  prompt = [
      {"role": "user", "content": "name[Mill House]"},
      {"role": "assistant", "content": "Mill House."},
      {"role": "user", "content": "Describe: eatType[pub]"},
  ]
  completion = [{"role": "assistant", "content": "A pub."}]
  assert reward([prompt, prompt], [completion, "A bar."], other=[1, 2]) == [
      1.0,
      0.0,
  ]


@pytest.mark.parametrize("prompt", ["Hello.", "name[The Mill], colour[red]"])
def test_a_prompt_it_cannot_read_is_refused_without_its_text(
    rules_path, prompt
):
  reward = slot_coverage.make_slot_coverage(rules_path)
  with pytest.raises(errors.ServiceError) as e:
    reward(["eatType[pub]", prompt], ["", ""])
  assert e.value.slug == "reward.prompt"
  assert "prompt 1" in e.value.where and prompt not in str(e.value)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"names": []}', json.dumps(RULES | {"nears": 3}),
                json.dumps(RULES | {"numeric": {"price": "("}})]
)
def test_a_wrong_pattern_file_is_a_config_error(tmp_path, content):
  path = tmp_path / "rules.json"
  path.write_text(content)
  with pytest.raises(errors.ConfigError) as e:
    slot_coverage.make_slot_coverage(str(path))
  assert e.value.slug == "reward.patterns" and str(path) in e.value.where


def test_embedded_patterns_are_looked_up_in_the_package(
    rules_path, tmp_path, monkeypatch
):
  (tmp_path / "tiny_patterns.json").write_text(json.dumps(RULES))
  monkeypatch.setattr(slot_coverage, "_PACKAGE_DATA", tmp_path)
  reward = slot_coverage.make_slot_coverage("embedded:tiny")
  assert reward(["eatType[pub]"], ["pub"]) == [1.0]
  with pytest.raises(errors.ConfigError):
    slot_coverage.make_slot_coverage("embedded:none_of_this_name")
