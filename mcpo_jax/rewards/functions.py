"""Rewards by name or import path, and the check of what they reply.

A reward is `fn(prompts, completions, **columns) -> list[float]`, one number
per completion, higher is better; `columns` are the further columns of the
records, lists of the same length.
"""

import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mcpo_jax import errors, registry

Reward = Callable[..., Sequence[float]]


def load_reward(name: str, **arguments: Any) -> Reward:
  """Finds a reward.

  Args:
    name: one of `registry.REWARDS`, whose factory is called with `arguments`;
      or "module:function", which names the reward itself.
    **arguments: what the factory takes, for example `patterns_path`; None
      stands for not given.

  Returns:
    The reward.

  Raises:
    ConfigError: the name is unknown, nothing can be imported from it, or the
      arguments are not those of the factory.
  """
  arguments = {k: v for k, v in arguments.items() if v is not None}
  place = registry.REWARDS.get(name, name)
  module, _, attribute = place.partition(":")
  try:
    if not (module and attribute):
      raise ImportError("not of the form module:function")
    function = getattr(importlib.import_module(module), attribute)
    if not callable(function):
      raise ImportError(f"a {type(function).__name__} cannot be called")
  except (ImportError, AttributeError, TypeError, ValueError) as e:
    raise errors.ConfigError(
        "reward.name",
        f"cannot load the reward: {e}",
        where="reward.name",
        got=name,
        want=f"{', '.join(registry.REWARDS)} or module:function",
    ) from e
  if name in registry.REWARDS:
    return function(**arguments)
  if arguments:
    raise errors.ConfigError(
        "config.unused",
        "a reward given by its import path takes no settings",
        where=", ".join(f"reward.{key}" for key in arguments),
    )
  return function


def score(
    reward: Reward, prompts: Sequence, completions: Sequence, **columns: Any
) -> np.ndarray:
  """Calls a reward and checks its reply; nothing wrong ever becomes a number.

  Args:
    reward: fn(prompts, completions, **columns) -> R numbers.
    prompts: R strings or lists of messages.
    completions: R strings or lists of messages.
    **columns: lists of length R.

  Returns:
    [R] float64, finite.

  Raises:
    ServiceError: `reward.failed` if the reward raised; `reward.none`,
      `reward.length`, `reward.type` or `reward.non_finite` if the reply or one
      of its entries is not a finite number per completion.
  """
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
  return np.array([_number(v, f"{place}, entry {i}")
                   for i, v in enumerate(reply)], np.float64)


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
