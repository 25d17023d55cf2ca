"""The embedded task: scores are the rule's, splits are apart, data fixed."""

import hashlib
import json

import numpy as np
import pytest

from mcpo_jax.data import quickstart
from mcpo_jax.rewards import slot_coverage


@pytest.fixture(scope="module")
def splits():
  return {split: list(quickstart.records(split)) for split in quickstart.SPLITS}


@pytest.fixture(scope="module")
def rule():
  return slot_coverage.make_slot_coverage(str(quickstart.PATTERNS_PATH))


def _mr(record):
  return record.prompt[-1]["content"]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_scores_are_what_the_rule_says(splits, rule, split):
  for record in splits[split][::3]:  # a third of them, for speed
    again = rule([record.prompt] * len(record.completions), record.completions)
    np.testing.assert_allclose(again, record.scores, atol=1e-12, rtol=0)


def test_a_score_worked_by_hand(rule):
  mr = "type[inn], name[Red Maple], price[cheap], pets[no]"
  texts = {
      "Red Maple is a cheap inn. It does not allow pets.": 4 / 4,
      "Red Maple is a cheap inn where pets are welcome.": 3 / 4,
      "Red Maple is a cheap inn with a pool. It bans animals.": 4 / 5,
      "Linden is a pricey hotel by the harbour.": 0 / 5,
  }
  assert rule([mr] * len(texts), list(texts)) == list(texts.values())


def test_every_phrase_tells_its_value_alone():
  extract = slot_coverage.make_extract(str(quickstart.PATTERNS_PATH))
  for table in (quickstart.ADJECTIVES, quickstart.AFTER_NOUN, quickstart.VERBS):
    for (slot, value), phrases in table.items():
      for phrase in phrases:
        told = extract(f"It {phrase.format('the Salt Market')}.")
        assert told == {slot: [value or "Salt Market"]}, phrase
  for value, nouns in quickstart.NOUNS.items():
    for noun in nouns:
      assert extract(f"A {noun}.") == ({"type": [value]} if value else {})


def test_no_meaning_of_eval_occurs_in_train_or_sft(splits):
  trained = {_mr(r) for split in ("train", "sft") for r in splits[split]}
  held_out = {_mr(r) for r in splits["eval"]}
  assert len(held_out) == len(splits["eval"]) == quickstart.NUM_EVAL
  assert not trained & held_out
  ids = {r.prompt_id for split in ("train", "sft") for r in splits[split]}
  assert not ids & {r.prompt_id for r in splits["eval"]}


def test_candidates_are_distinct_and_graded(splits):
  records = splits["train"]
  assert len(records) == quickstart.NUM_TRAIN
  for record in records:
    assert len(set(record.completions)) == quickstart.NUM_CANDIDATES
    assert len(set(record.scores)) >= 3
    assert max(record.scores) < 1 or "perfect" in record.sources
    best = record.scores.index(max(record.scores))
    assert record.sources[best] in ("perfect", "missing", "wrong")
  share = np.mean([max(r.scores) == 1 for r in records])
  assert abs(share - quickstart.PERFECT_SHARE) < 0.05
  # The place in the row does not tell the quality.
  places = [r.scores.index(max(r.scores)) for r in records]
  assert len(set(places)) >= 7


def test_references_are_decent_but_not_perfect(splits, rule):
  rows = splits["sft"][::4]
  scores = rule([r.prompt for r in rows], [r.completions[0] for r in rows])
  assert 0.85 < np.mean(scores) < 0.9
  assert 0.45 < np.mean(np.equal(scores, 1)) < 0.55
  same_prompt = {r.prompt_id for r in splits["train"]}
  assert {r.prompt_id for r in splits["sft"]} == same_prompt


def test_texts_are_varied(splits):
  rows = splits["sft"]
  assert len({r.completions[0] for r in rows}) > 0.97 * len(rows)


def test_the_data_never_change():
  """A change of this hash changes every published number of the quickstart."""
  digest = hashlib.sha256()
  for split in quickstart.SPLITS:
    for r in quickstart.records(split):
      row = [r.prompt, r.completions, r.scores, r.preferred, r.prompt_id]
      digest.update(json.dumps(row).encode())
  assert digest.hexdigest() == GOLDEN


def test_an_unknown_split_is_refused():
  with pytest.raises(KeyError):
    next(quickstart.records("test"))


GOLDEN = "7aabab447b1589ff83c464f241cfa0d7001d940ed3b81260071d13ff7ae7cf27"
