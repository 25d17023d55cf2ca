"""Rewards are found by name or path, and wrong replies never become 0."""

import json

import numpy as np
import pytest

from mcpo_jax import errors
from mcpo_jax.rewards import functions


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


def test_settings_of_an_imported_reward_are_unused():
  with pytest.raises(errors.ConfigError) as e:
    functions.load_reward(f"{__name__}:length_reward", patterns_path="x")
  assert e.value.slug == "config.unused"


@pytest.mark.parametrize("reply", [
    [1, 0.5, True], (1, 0.5, 1.0), np.array([1, 0.5, 1], np.float32),
    [np.float32(1), np.array(0.5), np.int64(1)],
])
def test_numbers_of_any_kind_are_taken(reply):
  scores = functions.score(lambda **_: reply, ["p"] * 3, ["c"] * 3)
  np.testing.assert_array_equal(scores, [1.0, 0.5, 1.0])


@pytest.mark.parametrize("reply, slug", [
    (None, "reward.none"),
    ([1.0, None, 0.0], "reward.none"),
    ([1.0, 2.0], "reward.length"),
    ([1.0, 2.0, 3.0, 4.0], "reward.length"),
    ([], "reward.length"),
    (np.float32(1.0), "reward.length"),
    ([1.0, float("nan"), 0.0], "reward.non_finite"),
    ([1.0, 0.0, float("-inf")], "reward.non_finite"),
    (np.array([1.0, np.nan, 0.0]), "reward.non_finite"),
    (["1", "0", "1"], "reward.type"),
    ("110", "reward.type"),
    ([[1.0], [2.0], [3.0]], "reward.type"),
    (1.0, "reward.type"),
])
def test_wrong_replies_are_refused_by_their_slug(reply, slug):
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


def test_columns_reach_the_reward():
  reward = lambda prompts, completions, target: [
      float(c == t) for c, t in zip(completions, target)
  ]
  scores = functions.score(reward, ["", ""], ["a", "b"], target=["a", "c"])
  np.testing.assert_array_equal(scores, [1.0, 0.0])
