"""A judge of pairs as a reward: how often a completion wins its prompt."""

import importlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from mcpo_jax import errors
from mcpo_jax.rewards import remote
from mcpo_jax.rewards.functions import Reward, persistent, score

# (prompts, first, second, **columns) -> probability that the first is better
Judge = Callable[..., Sequence[float]]


def make_judge(judge: str, timeout_s: float, patience_s: float) -> Reward:
  """Win rates in [0, 1] against the other completions of the same prompt.

  Every pair is asked in both orders, against a judge that prefers a place:
  P(i beats j) = (judge(i, j) + 1 - judge(j, i)) / 2. Equal texts are a tie and
  are not asked for. A completion without others has 1/2.

  Args:
    judge: "module:function", fn(prompts, first, second, **columns) -> the
      probability that the first is better, 1/2 for a tie; or a URL that is
      posted {"ids", "prompts", "first", "second", "columns"} and replies
      {"ids", "scores"}.
    timeout_s, patience_s: of a URL, see `remote.ask`.

  Raises:
    ConfigError: reward.judge, nothing can be imported from it.
  """
  far = "://" in judge
  ask = _remote_judge(judge, timeout_s, patience_s) if far else _import(judge)

  def compare(prompts, completions, **columns):
    return ask(prompts=prompts, first=completions, **columns)

  if not far:
    compare = persistent(compare)

  def win_rate(prompts, completions, **columns):
    count = len(completions)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
      groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    pairs = [(i, j) for members in groups.values() for i in members
             for j in members if completions[i] != completions[j]]
    wins, games = np.full(count, 0.0), np.zeros(count)
    for members in groups.values():  # equal texts tie
      for i in members:
        ties = sum(completions[i] == completions[j] for j in members) - 1
        wins[i], games[i] = 0.5 * ties, len(members) - 1
    if pairs:
      take = lambda values, side: [values[pair[side]] for pair in pairs]
      first_wins = score(
          compare, take(prompts, 0), take(completions, 0),
          second=take(completions, 1),
          **{name: take(values, 0) for name, values in columns.items()})
      if ((first_wins < 0) | (first_wins > 1)).any():
        raise errors.ServiceError(
            "reward.type", "a judge replies probabilities", where=judge,
            got=float(first_wins[(first_wins < 0) | (first_wins > 1)][0]),
            want="0 to 1")
      for (i, j), p in zip(pairs, first_wins):
        wins[i] += p / 2
        wins[j] += (1 - p) / 2
    return np.where(games > 0, wins / np.maximum(games, 1), 0.5)

  return win_rate


def _import(name: str) -> Judge:
  module, _, attribute = name.partition(":")
  try:
    function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
      raise ImportError(f"a {type(function).__name__} cannot be called")
  except (ImportError, AttributeError, ValueError) as e:
    raise errors.ConfigError(
        "reward.judge", f"cannot load the judge: {e}", where="reward.judge",
        got=name, want="module:function, or a URL") from e
  return function


def _remote_judge(url: str, timeout_s: float, patience_s: float) -> Judge:

  def ask(prompts, first, second, **columns):
    return remote.ask(
        url, {"prompts": list(prompts), "first": list(first),
              "second": list(second), "columns": columns},
        len(first), timeout_s=timeout_s, patience_s=patience_s)

  return ask
