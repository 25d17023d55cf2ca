"""Rewards by name or import path, their sum, and the check of what they reply.

A reward is `fn(prompts, completions, **columns) -> list[float]`, one number
per completion, higher is better. Prompts are strings or lists of messages,
completions strings; a function of the user's own gets the completion of a list
of messages as one message, as TRL's reward functions do. `columns` are the
further columns of the records, lists of the same length; beside them come
`finish_reasons` ("stop" or "length") and `lengths` in tokens, where they are
known.
"""

import functools
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mcpo_jax import errors, hosts, registry
from mcpo_jax.patience import Patience

Reward = Callable[..., Sequence[float]]

ATTEMPTS = 4  # to get a right reply


def load_reward(name: str, **arguments: Any) -> Reward:
  """Finds a reward.

  Args:
    name: one of `registry.REWARDS`, whose factory is called with those of the
      `arguments` that it takes; or "module:function", which names the reward
      itself.
    **arguments: settings of all rewards; None stands for not given.

  Returns:
    The reward.

  Raises:
    ConfigError: the name is unknown, nothing can be imported from it, or it
      takes no further columns.
  """
  entry = registry.REWARDS.get(name)
  place = name if entry is None else entry.place
  module, _, attribute = place.partition(":")
  try:
    if not (module and attribute):
      raise ImportError("not of the form module:function")
    function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
      raise ImportError(f"a {type(function).__name__} cannot be called")
    if entry is None and not any(
        p.kind is p.VAR_KEYWORD
        for p in inspect.signature(function).parameters.values()):
      raise TypeError("a reward takes **columns")
  except (ImportError, AttributeError, TypeError, ValueError) as e:
    raise errors.ConfigError(
        "reward.name",
        f"cannot load the reward: {e}",
        where="reward.name",
        got=name,
        want=f"{', '.join(registry.REWARDS)} or module:function",
    ) from e
  if entry is None:
    return persistent(_as_messages(function))
  return function(**{
      key: arguments[key]
      for key in (*entry.needs, *entry.takes)
      if arguments.get(key) is not None
  })


def _as_messages(function: Reward) -> Reward:
  """The function, told completions in the form of their prompts."""

  @functools.wraps(function)
  def reward(prompts, completions, **columns):
    told = [[{"role": "assistant", "content": c}] if isinstance(p, list) else c
            for p, c in zip(prompts, completions)]
    return function(prompts=prompts, completions=told, **columns)

  return reward


def persistent(reward: Reward) -> Reward:
  """The reward, asked up to ATTEMPTS times while it raises or replies wrongly:
  behind a function of one's own may stand anything."""

  @functools.wraps(reward)
  def again(prompts, completions, **columns):
    patience = Patience(math.inf)
    for attempt in range(ATTEMPTS):
      try:
        return _reply(reward, prompts, completions, columns)
      except errors.ServiceError as e:
        if attempt == ATTEMPTS - 1:
          raise
        patience.wait(e.where, e.message)

  return again


def score(
    reward: Reward, prompts: Sequence, completions: Sequence, **columns: Any
) -> np.ndarray:
  """Calls a reward and checks its reply; nothing wrong ever becomes a number.

  Of several processes the first one calls it and tells the others.

  Args:
    reward: fn(prompts, completions, **columns) -> R numbers.
    prompts: R strings or lists of messages.
    completions: R strings.
    **columns: lists of length R.

  Returns:
    [R] float64, finite.

  Raises:
    ServiceError: `reward.failed` if the reward raised; `reward.none`,
      `reward.length`, `reward.type` or `reward.non_finite` if the reply or one
      of its entries is not a finite number per completion.
  """
  return np.array(hosts.from_first("scores", lambda: _reply(
      reward, prompts, completions, columns)), np.float64)


def _reply(reward, prompts, completions, columns) -> list[float]:
  """The numbers that a reward replies; see `score`."""
  place = f"reward {getattr(reward, '__name__', type(reward).__name__)}"
  try:
    reply = reward(prompts=prompts, completions=completions, **columns)
  except errors.McpoError:
    raise
  except Exception as e:
    raise errors.ServiceError(
        "reward.failed", f"the reward raised {type(e).__name__}", where=place
    ) from e
  if reply is None:
    raise errors.ServiceError(
        "reward.none", "the reward replied None", where=place
    )
  try:
    reply = reply.tolist() if hasattr(reply, "tolist") else list(reply)
  except TypeError as e:
    raise errors.ServiceError(
        "reward.type",
        "the reply is no list",
        where=place,
        got=type(reply).__name__,
    ) from e
  if not isinstance(reply, list) or len(reply) != len(completions):
    raise errors.ServiceError(
        "reward.length",
        "the reply has another length than the request",
        where=place,
        got=len(reply) if isinstance(reply, list) else "one number",
        want=len(completions),
    )
  return [_number(v, f"{place}, entry {i}") for i, v in enumerate(reply)]


def combine(
    members: Sequence[tuple[Reward, float]],
    *,
    missing_eos_penalty: float = 0.0,
    length_penalty: float = 0.0,
    thinking: str = "answer",
    opens_thinking: bool = False,
) -> Reward:
  """The weighted sum of rewards, with penalties.

  Args:
    members: (reward, weight), at least one.
    missing_eos_penalty: taken from a completion that was cut off at its
      longest length.
    length_penalty: taken for every token. Both need completions that were
      sampled; others have no penalty.
    thinking, opens_thinking: see `visible_part`.

  Returns:
    A reward. Every member's reply is checked by `score`.
  """

  def reward(
      prompts, completions, finish_reasons=None, lengths=None, **columns
  ):
    texts = [visible_part(c, thinking, opened=opens_thinking)
             for c in completions]
    sampled = {
        name: values for name, values in
        (("finish_reasons", finish_reasons), ("lengths", lengths))
        if values is not None}
    total = sum(
        weight * score(fn, prompts, texts, **columns, **sampled)
        for fn, weight in members)
    if finish_reasons is not None:
      total -= missing_eos_penalty * (np.array(finish_reasons) == "length")
    if lengths is not None:
      total -= length_penalty * np.array(lengths)
    return total

  reward.__name__ = "+".join(
      getattr(fn, "__name__", type(fn).__name__) for fn, _ in members)
  return reward


def visible_part(text: str, thinking: str, *, opened: bool = False) -> str:
  """What a reward sees of a reasoning model's completion.

  Args:
    text: of the completion, with its marks <think> and </think>.
    thinking: "answer" is what follows the last thought, "thinking" the thought
      without its marks, "both" the whole text.
    opened: the prompt ended in <think> already.

  Returns:
    The part, stripped unless it is the whole text. A thought that was not
    ended leaves no answer: the empty text.
  """
  if thinking == "both":
    return text
  begun = opened or "<think>" in text
  if not begun:
    return text if thinking == "answer" else ""
  thought, mark, answer = text.rpartition("</think>")
  if not mark:
    thought, answer = text, ""
  if thinking == "answer":
    return answer.strip()
  return thought.replace("<think>", "").replace("</think>", "").strip()


def _number(value, place):
  """One entry as a float, or the ServiceError that says what it is."""
  if value is None:
    raise errors.ServiceError("reward.none", "a score is None", where=place)
  if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
    value = value.item()  # a NumPy, JAX or torch scalar
  if not isinstance(value, numbers.Real):
    raise errors.ServiceError(
        "reward.type",
        "a score is no number",
        where=place,
        got=type(value).__name__,
    )
  if not math.isfinite(value):
    raise errors.ServiceError(
        "reward.non_finite", "a score is not finite", where=place, got=value
    )
  return float(value)
