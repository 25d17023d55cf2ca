"""Rewards are found by name or path, and wrong replies never become 0."""

import collections
import http.server
import json
import threading
import time

import numpy as np
import pytest

from mcpo_jax import errors, patience
from mcpo_jax.rewards import answers, functions, judge, remote


def length_reward(prompts, completions, **columns):
  return [float(len(c)) for c in completions]


NOT_A_FUNCTION = 3


def test_an_import_path_names_the_reward_itself():
  reward = functions.load_reward(
      f"{__name__}:length_reward", patterns_path=None
  )
  scores = functions.score(reward, ["a", "b"], ["xyz", ""])
  np.testing.assert_array_equal(scores, [3.0, 0.0])


def test_a_known_name_is_made_by_its_factory(tmp_path):
  path = tmp_path / "rules.json"
  path.write_text(json.dumps({
      "levels": {}, "names": [], "nears": [], "numeric": {},
      "patterns": {"food": {"fish": ["fish"]}},
  }))
  reward = functions.load_reward("slot_coverage", patterns_path=str(path))
  assert functions.score(reward, ["food[fish]"], ["Fish!"]) == [1.0]


@pytest.mark.parametrize("name", [
    "slot_coverag", "", "no_such_module:f", "json:no_such_function", ":f",
    f"{__name__}:NOT_A_FUNCTION", "json:", "..x:f",
])
def test_an_unknown_reward_is_a_config_error(name):
  with pytest.raises(errors.ConfigError) as e:
    functions.load_reward(name)
  assert e.value.slug == "reward.name" and "slot_coverage" in e.value.want


def contents(prompts, completions, **columns):
  """As TRL's examples read conversations."""
  return [float(len(c[0]["content"])) if isinstance(p, list) else -1.0
          for p, c in zip(prompts, completions)]


def test_completions_of_conversations_are_messages_for_ones_own_function():
  reward = functions.load_reward(f"{__name__}:contents")
  chat = [{"role": "user", "content": "hi"}]
  np.testing.assert_array_equal(
      functions.score(reward, [chat, "hi"], ["abc", "d"]), [3.0, -1.0])


def without_columns(prompts, completions):
  return [0.0] * len(completions)


def test_a_reward_of_ones_own_takes_what_columns_there_are():
  with pytest.raises(errors.ConfigError) as e:
    functions.load_reward(f"{__name__}:without_columns")
  assert e.value.slug == "reward.name" and "**columns" in str(e.value)


@pytest.mark.parametrize("reply", [
    [1, 0.5, True], (1, 0.5, 1.0), np.array([1, 0.5, 1], np.float32),
    [np.float32(1), np.array(0.5), np.int64(1)],
])
def test_numbers_of_any_kind_are_taken(reply):
  scores = functions.score(lambda **_: reply, ["p"] * 3, ["c"] * 3)
  np.testing.assert_array_equal(scores, [1.0, 0.5, 1.0])


@pytest.mark.parametrize("row, reply, slug", [
    ("R1", None, "reward.none"),
    ("R1", [1.0, None, 0.0], "reward.none"),
    ("R2", [1.0, 2.0], "reward.length"),
    ("R2", [1.0, 2.0, 3.0, 4.0], "reward.length"),
    ("R2", [], "reward.length"),
    ("R2", np.float32(1.0), "reward.length"),
    ("R3", [1.0, float("nan"), 0.0], "reward.non_finite"),
    ("R3", [1.0, 0.0, float("-inf")], "reward.non_finite"),
    ("R3", np.array([1.0, np.nan, 0.0]), "reward.non_finite"),
    ("type", ["1", "0", "1"], "reward.type"),
    ("type", "110", "reward.type"),
    ("type", [[1.0], [2.0], [3.0]], "reward.type"),
    ("type", 1.0, "reward.type"),
])
def test_wrong_replies_are_refused_by_their_slug(row, reply, slug):
  with pytest.raises(errors.ServiceError) as e:
    functions.score(lambda **_: reply, ["secret"] * 3, ["c"] * 3)
  assert e.value.slug == slug and "secret" not in str(e.value)


def test_a_reward_that_raises_is_named_without_the_text():
  def broken(prompts, completions):
    raise KeyError(prompts[0])

  with pytest.raises(errors.ServiceError) as e:
    functions.score(broken, ["secret"], ["c"])
  assert e.value.slug == "reward.failed" and "broken" in e.value.where
  assert "KeyError" in str(e.value) and "secret" not in str(e.value)


def test_f11_a_function_of_ones_own_is_asked_four_times_and_no_more(impatient):
  replies = iter([None, [1.0], [1.0, float("nan")], [3.0, 4.0]])
  reward = functions.persistent(lambda **_: next(replies))
  assert functions.score(reward, ["p"] * 2, ["c"] * 2).tolist() == [3.0, 4.0]
  calls = []
  broken = functions.persistent(lambda **_: calls.append(0) or 1 / 0)
  with pytest.raises(errors.ServiceError) as e:
    functions.score(broken, ["secret"], ["c"])
  assert e.value.slug == "reward.failed" and len(calls) == 4
  assert "ZeroDivisionError" in str(e.value) and "secret" not in str(e.value)


def test_columns_reach_the_reward():
  reward = lambda prompts, completions, target: [
      float(c == t) for c, t in zip(completions, target)
  ]
  scores = functions.score(reward, ["", ""], ["a", "b"], target=["a", "c"])
  np.testing.assert_array_equal(scores, [1.0, 0.0])


# Sums, penalties, thoughts.


def test_a_sum_weighs_its_members_and_takes_penalties_off():
  first = lambda prompts, completions, **columns: [
      float(len(c)) for c in completions]
  second = lambda prompts, completions, bonus, **columns: bonus
  reward = functions.combine(
      [(first, 2.0), (second, -0.5)], missing_eos_penalty=3.0,
      length_penalty=0.25)
  scores = functions.score(
      reward, ["p"] * 3, ["a", "bcd", ""], bonus=[4, 2, 0],
      finish_reasons=["stop", "length", "stop"], lengths=[2, 8, 1])
  # 2 * 1 - 2 - 0.5; 2 * 3 - 1 - 3 - 2; 0 - 0 - 0.25
  np.testing.assert_allclose(scores, [-0.5, 0.0, -0.25])
  record = functions.score(reward, ["p"], ["bcd"], bonus=[2])
  assert record == [5.0]  # a record's completion was not sampled


def test_a_wrong_reply_of_one_member_is_not_hidden_by_the_sum():
  fine = lambda prompts, completions, **columns: [1.0] * len(completions)
  nan = lambda prompts, completions, **columns: [float("nan")] * len(prompts)
  with pytest.raises(errors.ServiceError) as e:
    functions.score(functions.combine([(fine, 1.0), (nan, 1e-9)]), ["p"], ["c"])
  assert e.value.slug == "reward.non_finite"


@pytest.mark.parametrize("text, opened, answer, thinking", [
    ("<think>two\nplus</think>\n\n4", False, "4", "two\nplus"),
    ("two plus</think> 4", True, "4", "two plus"),
    ("<think>two plus", False, "", "two plus"),  # cut off: no answer
    ("two plus 4", True, "", "two plus 4"),
    (" plain 4", False, " plain 4", ""),
    ("<think>a</think>b<think>c</think> d", False, "d", "abc"),
])
def test_the_answer_is_what_follows_the_thought(text, opened, answer, thinking):
  part = lambda which: functions.visible_part(text, which, opened=opened)
  assert part("answer") == answer
  assert part("thinking") == thinking
  assert part("both") == text


# Rules on any text.


@pytest.mark.parametrize("text, answer", [
    ("so 3 + 4 = 7\n#### 1,234.50", "1234.5"),
    ("#### 3\nno\n#### -7.0\nmore 9", "-7"),
    ("#### 18 dollars", "18"), ("\\boxed{\\$18}", "18"), ("#### **18**", "18"),
    ("\\boxed{18\\text{ eggs}}", "18"), ("5-7", "7"), ("x in 1,2,3", "3"),
    ("it is \u22125", "-5"), ("#### 1e999999", "1"), ("007.50", "7.5"),
    ("1,234,567 and 12,34", "34"), ("a -3", "-3"), ("a - 3", "3"),
    ("it is \\boxed{\\frac{1}{2}} or so 3", "\\frac{1}{2}"),
    ("first 12 then $1,000.", "1000"),
    ("a discount of 25%.", "25"),
    ("0.50 or .5", "0.5"), ("-0", "0"), ("1e5 is not 100", "100"),
    ("no number", None), ("", None), ("#### Yes  it IS", "yes it is"),
])
def test_the_final_answer_of_a_solution(text, answer):
  assert answers.final_answer(text) == answer


def test_exact_match_compares_with_the_records_column():
  reward = functions.load_reward("exact_match")
  got = functions.score(
      reward, ["q"] * 4, ["is 7", "is 7.0 now", "70", ""],
      answer=["7", "seven times one\n#### 7", "#### 7", "7"])
  np.testing.assert_array_equal(got, [1, 1, 0, 0])
  for column in ({}, {"answer": [" "] * 1}):
    with pytest.raises(errors.DataError):
      functions.score(reward, ["q"], ["7"], **column)


def test_exact_match_knows_real_answers(shared):
  import gzip

  path = shared / "data" / "verifiable" / "gsm8k.dev.jsonl.gz"
  rows = [json.loads(line) for line in gzip.open(path, "rt")]
  reward = functions.load_reward("exact_match")
  column = [row["answer"] for row in rows]
  finals = [str(text).rpartition("####")[2].strip() for text in column]
  said = [f"Thus the answer is {x}." for x in finals]
  right = functions.score(reward, ["q"] * len(rows), said, answer=column)
  assert right.mean() == 1.0 and len(rows) > 100
  wrong = [f"Thus the answer is {x}1." for x in finals]
  assert functions.score(
      reward, ["q"] * len(rows), wrong, answer=column).mean() == 0.0


def test_length_is_in_tokens_of_samples():
  reward = functions.load_reward("length")
  assert functions.score(reward, ["p"], ["c d e"], lengths=[5]) == [5.0]
  with pytest.raises(errors.ServiceError):
    functions.score(reward, ["p"], ["c d e"])


# Judges.


def longer(prompts, first, second, **columns):
  """Prefers the longer one, and whatever comes first by 0.2."""
  return [min(1.0, (len(a) > len(b)) + 0.2) for a, b in zip(first, second)]


def test_win_rates_are_asked_in_both_orders():
  reward = functions.load_reward(
      "judge", judge=f"{__name__}:longer", timeout_s=1.0,
      patience_s=1.0)
  got = functions.score(
      reward, ["p", "q", "p", "p", "r", "p"], ["aaa", "x", "a", "aa", "y", "a"])
  # Of a pair the longer one wins 1 in the first place and 1 - 0.2 in the
  # second: 0.9. Equal texts tie.
  want = [0.9, 0.5, (0.1 + 0.1 + 0.5) / 3, (0.1 + 0.9 + 0.9) / 3, 0.5,
          (0.1 + 0.1 + 0.5) / 3]
  np.testing.assert_allclose(got, want)


def test_a_judge_replies_probabilities():
  reward = judge.make_judge("json:dumps", 1.0, 1.0)
  with pytest.raises(errors.ServiceError):
    functions.score(reward, ["p", "p"], ["a", "b"])
  with pytest.raises(errors.ConfigError) as e:
    judge.make_judge("json:no_such", 1.0, 1.0)
  assert e.value.slug == "reward.judge"


# A scorer over HTTP: a real server, wrong in every way.


class Scorer(http.server.BaseHTTPRequestHandler):
  """Replies as the mode in the path says; scores are lengths."""

  seen = collections.Counter()

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    key, mode = self.headers["Idempotency-Key"], self.path.strip("/")
    self.seen[mode] += 1
    if mode == "busy" and self.seen[mode] < 3:
      self.seen["keys", key] += 1
      return self.send_error(503)
    if mode == "slow":
      time.sleep(0.4)
    if mode == "refuses":
      return self.send_error(400)
    scores = [float(len(c)) for c in body["completions"]]
    ids = body["ids"]
    if mode == "shuffled":
      scores, ids = scores[::-1], ids[::-1]
    changes = {
        "short": {"scores": scores[1:]}, "nameless": {"ids": None},
        "others": {"ids": [i + 1 for i in ids]},
        "twice": {"ids": [0] * len(ids)},
        "nan": {"scores": [float("nan")] * len(ids)},
        "null": {"scores": [None] * len(ids)},
    }.get(mode, {})
    reply = json.dumps({"ids": ids, "scores": scores} | changes).encode()
    if mode == "html":
      reply = b"<html>"
    self.send_response(200)
    self.end_headers()
    self.wfile.write(reply)

  def log_message(self, *words):
    pass


@pytest.fixture(scope="module")
def server():
  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
  threading.Thread(target=made.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{made.server_port}"
  made.shutdown()


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(patience, "_FIRST_PAUSE", 0.01)


@pytest.mark.parametrize("mode", ["right", "shuffled", "busy"])
def test_r5_a_remote_scorer_is_asked_until_it_answers_in_any_order(
    server, impatient, mode):
  reward = functions.load_reward(
      "remote", url=f"{server}/{mode}", timeout_s=5.0, patience_s=20.0,
      path=None)
  got = functions.score(reward, ["p", "q"], ["abc", "d"], extra=[1, 2])
  np.testing.assert_array_equal(got, [3.0, 1.0])
  if mode == "busy":  # one request, asked three times with one key
    assert Scorer.seen["busy"] == 3
    assert [n for k, n in Scorer.seen.items() if k[0] == "keys"] == [2]


@pytest.mark.parametrize("row, mode, slug", [
    ("R1", "null", "reward.none"), ("R2", "short", "reward.length"),
    ("R3", "nan", "reward.non_finite"), ("R4", "slow", "reward.unreachable"),
    ("R5", "nameless", "reward.order"), ("R5", "others", "reward.order"),
    ("R5", "twice", "reward.order"),
    ("status", "refuses", "reward.failed"), ("JSON", "html", "reward.failed"),
])
def test_a_wrong_answer_never_becomes_a_score(
    server, impatient, row, mode, slug):
  Scorer.seen[mode] = 0
  reward = remote.make_remote(
      f"{server}/{mode}", timeout_s=0.2 if mode == "slow" else 5.0,
      patience_s=1.0)
  with pytest.raises(errors.ServiceError) as e:
    functions.score(reward, ["p", "q"], ["abc", "d"])
  assert e.value.slug == slug and e.value.exit_code == 7
  if mode == "refuses":
    assert Scorer.seen[mode] == 1
  elif mode == "slow":  # as long as patience lasts
    assert 2 <= Scorer.seen[mode] <= 5
  else:
    assert Scorer.seen[mode] == functions.ATTEMPTS


def test_nobody_there_is_said_after_the_last_attempt(impatient):
  reward = remote.make_remote(
      "http://127.0.0.1:9/", timeout_s=0.2, patience_s=0.5)
  with pytest.raises(errors.ServiceError) as e:
    functions.score(reward, ["p"], ["c"])
  assert e.value.slug == "reward.unreachable"
