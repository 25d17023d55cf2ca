"""One value of a config, and texts that hold several.

Every check of this room returns its mistakes instead of raising them, so that
`resolve` can name all of them at once; the readers of texts raise.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from mcpo_jax import errors
from mcpo_jax.registry import Setting

# Models, columns and keys that have these names already.
_TAKEN = ("start", "sft", "aligned", "reference", "prompt", "prompt_ids",
          "difference", "num_prompts")


def check_value(
    key: str, value: Any, setting: Setting
) -> list[errors.McpoError]:
  """What is wrong with one value; bools count as words, not as numbers."""
  if value is None:
    return [] if setting.optional else [errors.ConfigError(
        setting.slug, "must be set", where=key, got="None")]
  if setting.choices is not None:
    if value not in setting.choices:
      return [errors.ConfigError(
          setting.slug, "not one of the known values", where=key, got=value,
          want=" | ".join(map(str, setting.choices)),
          hint=errors.nearest(str(value), map(str, setting.choices)))]
    return []
  if setting.low is None:
    return []
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return [errors.ConfigError("config.type", "not a number", where=key,
                               got=value, want="a number")]
  low, high = setting.low, setting.high
  bad = (not low <= value < math.inf  # as NaN is
         or (setting.open_low and value == low)
         or (setting.open_high and value == high)
         or (high is not None and value > high))
  if bad:
    left = f"{'>' if setting.open_low else '>='} {low:g}"
    right = "" if high is None else (
        f" and {'<' if setting.open_high else '<='} {high:g}")
    return [errors.ConfigError(
        setting.slug, "out of range", where=key, got=value,
        want=f"finite and {left}{right}")]
  return []


def parse_sources(text: str) -> list[tuple[str, float]]:
  """"a.jsonl*2,b.jsonl" -> [("a.jsonl", 2.0), ("b.jsonl", 1.0)].

  A star is a weight's if a number follows to the end, else a pattern's.

  Raises:
    ConfigError: config.range for a weight that is not finite and above 0, or
      an empty path.
  """
  out = []
  for entry in text.split(","):
    path, star, weight = entry.strip().rpartition("*")
    try:
      weight = float(weight) if star else 1.0
    except ValueError:
      star = ""
    if not star:
      path, weight = entry.strip(), 1.0
    if not path or not 0.0 < weight < math.inf:
      raise errors.ConfigError(
          "config.range", "not a source", got=entry,
          want="PATH or PATH*WEIGHT, with a finite weight > 0")
    out.append((path, weight))
  return out


def parse_models(entries: Iterable[str]) -> list[tuple[str, str]]:
  """("dpo=runs/dpo", "step:4", "step:*") -> names and places of models.

  Without a name a folder has its own, a checkpoint "step-4"; all of them have
  their steps' ("").

  Raises:
    ConfigError: config.range, no entry of this form, or a name that tables
      and files have for something else.
  """
  out = []
  for entry in entries:
    name, has_name, where = str(entry).partition("=")
    if not has_name:
      name, where = "", str(entry)
    step = re.fullmatch(r"step:(\d+|\*)", where)
    every = where == "step:*"
    if not name and not every:
      name = where.replace(":", "-") if step else re.split(
          r"[/\\]", where.rstrip("/"))[-1]
    if (every and name or not every and not re.fullmatch(r"[\w.+-]+", name)
        or name in _TAKEN or where.startswith("step:") and not step
        or not where):
      raise errors.ConfigError(
          "config.range", "not a model of an evaluation",
          where="evaluation.models", got=entry, want="NAME=WHERE; names have "
          "letters, digits and ._+-, and are not " + ", ".join(_TAKEN))
    out.append((name, where))
  return out


def parse_rewards(text: str) -> list[tuple[str, float]]:
  """"a*2,b" -> [("a", 2.0), ("b", 1.0)]; a weight may be negative.

  Raises:
    ConfigError: config.range, an empty name or a weight that is 0 or no number.
  """
  out = []
  for entry in text.split(","):
    name, star, weight = entry.strip().rpartition("*")
    try:
      weight = float(weight) if star else 1.0
    except ValueError:
      weight = 0.0
    name = name if star else entry.strip()
    if not name or not 0.0 < abs(weight) < math.inf:
      raise errors.ConfigError(
          "config.range", "not a reward", where="reward.name", got=entry,
          want="NAME or NAME*WEIGHT, with a finite weight that is not 0")
    out.append((name, weight))
  return out
