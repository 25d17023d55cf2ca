"""Scores read off scored texts, worked by hand."""

import collections
import gzip
import json

import numpy as np
import pytest

from mcpo_jax import errors
from mcpo_jax.rewards import functions

PIANO, SEEDS = "Name a thing to play.", [
    {"role": "user", "content": "What if you eat seeds?"}]
ROWS = [
    {"prompt": PIANO, "scores": [0.3, 0.2, 0.1, 0.05, 0.05],
     "completions": ["The dog", "a cat", "play the piano", "golf", "naïve A"]},
    {"prompt": SEEDS, "scores": [1.0, 1.0, 0.0, 0.5, 0.25],
     "completions": ["Nothing happens to you", "You digest the seeds.",
                     "You get sick.", "I have no comment.", "It depends"]},
    {"prompt": "tied", "scores": [0.5, 0.5], "completions": ["yes", "no"]},
    {"prompt": "Name a letter.", "scores": [0.6, 0.1],
     "completions": ["A", "B"]},
]


@pytest.fixture
def path(tmp_path):
  file = tmp_path / "known.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return str(file)


def scores_of(name, path, prompt, texts):
  reward = functions.load_reward(name, path=path)
  return functions.score(
      reward, [prompt] * len(texts), texts, sources=["x"] * len(texts))


@pytest.mark.parametrize("text, score", [
    ("dog", 0.3), (" DÓG!\n", 0.3), ("“a dog”", 0.3), ("A c.a.t", 0.2),
    ("naive", 0.05), ("NAI\u0308VE", 0.05),
    ("play piano loud", 0.1),  # 2 * 2 / (3 + 2)
    ("dog cat", 0.2),  # 2/3 with either: the lower one
    ("play golf", 0.05),  # 2/3 with golf, 1/2 with the piano
    ("play chess", 0.05),  # half of the words is not enough: the lowest
    ("dog dog dog", 0.05),  # 2 * 1 / (3 + 1)
    ("dogs", 0.05), ("", 0.05), ("?!", 0.05), ("the", 0.05),
])
def test_a_text_has_the_score_of_what_it_is_like(path, text, score):
  assert scores_of("nearest_candidate", path, PIANO, [text]) == [score]


def test_an_article_alone_is_a_word(path):
  got = scores_of("nearest_candidate", path, "Name a letter.", ["a.", "the b"])
  np.testing.assert_array_equal(got, [0.6, 0.1])


@pytest.mark.parametrize("text, score", [
    ("nothing happens", 2 * 2 / 6),
    ("You get sick!", 1 / 3 - 1.0),  # "you" of "you digest seeds"
    ("you digest seeds and get sick", 2 * 3 / 9 - 2 * 3 / 9),
    ("You digest", 2 * 2 / 5 - 2 * 1 / 5),
    ("it depends", -1.0),  # below the middle of 0 and 1
    ("I have no comment", 0.0),  # in the middle: neither good nor bad
    ("", 0.0), ("…", 0.0), ("bananas", 0.0),
])
def test_a_margin_is_between_the_closest_good_and_bad(path, text, score):
  got = scores_of("candidate_margin", path, SEEDS, [text])
  np.testing.assert_allclose(got, [score], atol=1e-15)


def test_a_prompt_without_good_ones_tells_nothing_apart(path):
  got = scores_of("candidate_margin", path, "tied", ["yes", "no", "", "maybe"])
  np.testing.assert_array_equal(got, [0.0] * 4)


def test_prompts_of_one_request_are_told_apart(path):
  reward = functions.load_reward("candidate_margin", path=path)
  got = functions.score(reward, [SEEDS, PIANO], ["it depends", "cat"])
  np.testing.assert_array_equal(got, [-1.0, 1.0])  # 0.2 is above 0.175


@pytest.mark.parametrize("name", ["nearest_candidate", "candidate_margin"])
def test_an_unknown_prompt_is_refused_without_its_text(path, name):
  reward = functions.load_reward(name, path=path)
  with pytest.raises(errors.ServiceError) as e:
    reward([SEEDS, "secret"], ["a", "b"])
  assert e.value.slug == "reward.prompt" and path in e.value.want
  assert "prompt 1" in e.value.where and "secret" not in str(e.value)


@pytest.mark.parametrize("row, slug, place", [
    ({"prompt": "q", "completions": ["a", "b"], "preferred": 1},
     "data.field_missing", "1, scores"),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1, "x"]},
     "data.field_type", "1, scores[1]"),
    (None, "data.no_files", "none.jsonl"),
])
def test_a_file_that_does_not_say_the_scores_is_refused(
    tmp_path, row, slug, place):
  file = tmp_path / "none.jsonl"
  if row is not None:
    file.write_text(json.dumps(row) + "\n")
  with pytest.raises(errors.DataError) as e:
    functions.load_reward("nearest_candidate", path=str(file))
  assert e.value.slug == slug and place in str(e.value)


def squad_f1(a, b):
  """As SQuAD's evaluation says it, on plain ASCII text."""
  a, b = ([w for w in "".join(
      c for c in text.lower() if c.isalnum() or c.isspace()).split()
      if w not in ("a", "an", "the")] for text in (a, b))
  same = sum((collections.Counter(a) & collections.Counter(b)).values())
  if not same:
    return 0.0
  precision, recall = same / len(a), same / len(b)
  return 2 * precision * recall / (precision + recall)


def test_margins_of_real_answers_are_differences_of_f1(shared):
  path = shared / "data/kwise/truthfulqa.train.jsonl.gz"
  rows = [json.loads(line) for line in gzip.open(path, "rt")][:40]
  reward = functions.load_reward("candidate_margin", path=str(path))
  count = 0
  for row, other in zip(rows, rows[1:]):
    texts = [t for t in row["completions"] + other["completions"]
             if t.isascii()]
    best = [[max(squad_f1(t, k) for k, s in zip(
        row["completions"], row["scores"]) if kind(s)) for t in texts]
        for kind in (lambda s: s > 0.5, lambda s: s < 0.5)]
    np.testing.assert_allclose(
        reward([row["prompt"]] * len(texts), texts),
        np.subtract(*best), atol=1e-12)
    count += len(texts)
  assert count > 1000


def test_known_answers_of_surveys_keep_their_scores(shared):
  path = shared / "data/kwise/protoqa.train.jsonl.gz"
  reward = functions.load_reward("nearest_candidate", path=str(path))
  rows = [json.loads(line) for line in gzip.open(path, "rt")]
  for row in rows:
    texts = row["completions"]
    assert reward([row["prompt"]] * len(texts), texts) == row["scores"]
  assert len(rows) == 691
