"""Slot coverage: how many slots of a meaning representation a text tells.

A prompt such as `name[Blue Spice], eatType[pub], area[riverside]` is a meaning
representation: slots with values. The rule finds the values a text mentions by
regular expressions from a pattern file and scores the text by the share of
slots it tells right; telling a slot that was not asked for costs as much as
leaving one out.

A pattern file is JSON with these keys:

  patterns  slot -> value -> regexes; any match means the text tells the value
  names     places that can stand in the slot `name`
  nears     places that can stand in the slot `near`
  levels    slot -> value in the prompt -> value in `patterns`
  numeric   slot -> regex; where a text tells several values of the slot, those
            told by a match that contains this regex count alone
"""

import json
import pathlib
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from mcpo_jax import errors

Text = str | list[dict[str, Any]]

EMBEDDED = "embedded:"
_PACKAGE_DATA = pathlib.Path(__file__).parents[1] / "data"
_KEYS = ("levels", "names", "nears", "numeric", "patterns")


def make_slot_coverage(patterns_path: str) -> Callable[..., list[float]]:
  """Makes the reward `fn(prompts, completions, **columns) -> scores`.

  Args:
    patterns_path: a pattern file, or "embedded:NAME" for the one that ships
      with the package as `data/NAME_patterns.json`.

  Returns:
    A function of R prompts and R completions, each a string or a list of
    messages, that returns R floats in [0, 1], higher is better. The meaning
    representation is read from a prompt's last user message. A prompt without
    slots, or with one the pattern file does not know, raises ServiceError
    `reward.prompt`.

  Raises:
    ConfigError: the pattern file is missing or is not of this form.
  """
  extract, read_slots = _load(patterns_path)

  def slot_coverage(prompts, completions, **columns):
    del columns
    scores = []
    for i, (prompt, completion) in enumerate(
        zip(prompts, completions, strict=True)
    ):
      wanted = read_slots(_text(prompt, "user"))
      if not wanted:
        raise errors.ServiceError(
            "reward.prompt",
            "the prompt is no list of slots that the pattern file knows",
            where=f"prompt {i} of the request",
            want="slot[value], slot[value], ...",
        )
      scores.append(_score(wanted, extract(_text(completion, "assistant"))))
    return scores

  return slot_coverage


def make_extract(patterns_path: str) -> Callable[[str], dict[str, list[str]]]:
  """Makes the function text -> slot -> sorted values that the text tells."""
  return _load(patterns_path)[0]


def _load(patterns_path):
  """Reads and compiles a pattern file: (extract, read_slots)."""
  path = pathlib.Path(patterns_path)
  if patterns_path.startswith(EMBEDDED):
    name = patterns_path.removeprefix(EMBEDDED)
    path = _PACKAGE_DATA / f"{name}_patterns.json"
  try:
    rules = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in _KEYS if key not in rules]
    if missing:
      raise ValueError(f"keys missing: {', '.join(missing)}")
    patterns = {
        slot: {
            value: [re.compile(regex) for regex in regexes]
            for value, regexes in values.items()
        }
        for slot, values in rules["patterns"].items()
    }
    numeric = {s: re.compile(regex) for s, regex in rules["numeric"].items()}
    places = _compile_places(rules["names"], rules["nears"])
    levels = {slot: dict(rules["levels"].get(slot, {})) for slot in patterns}
    slots = sorted({*patterns, "name", "near"}, key=len, reverse=True)
    known = re.compile(rf"\b({'|'.join(map(re.escape, slots))})\[([^\]]*)\]")
  except (OSError, ValueError, AttributeError, TypeError, re.error) as e:
    raise errors.ConfigError(
        "reward.patterns",
        f"cannot read the slot patterns: {e}",
        where=f"reward.patterns_path={patterns_path}",
        want=f"a JSON object with {', '.join(_KEYS)}",
    ) from e
  return (
      lambda text: _extract(text, places, patterns, numeric),
      lambda prompt: _read_slots(prompt, known, levels),
  )


def _compile_places(names, nears):
  """[(slot, place, regex)], the longest place first."""
  places = [("name", p) for p in names] + [("near", p) for p in nears]
  places.sort(key=lambda place: -len(place[1]))
  compiled = []
  for slot, place in places:
    words = _normalise(place).removeprefix("the ").split(" ")
    body = "[ -]?".join(re.escape(word) for word in words)
    compiled.append(
        (slot, place, re.compile(rf"\b(?:the )?{body}(?:'s|s)?\b"))
    )
  return compiled


def _normalise(text):
  text = unicodedata.normalize("NFKD", text.replace("’", "'"))
  text = "".join(c for c in text if not unicodedata.combining(c))
  return re.sub(r"\s+", " ", text.lower())


def _extract(text, places, patterns, numeric):
  """slot -> sorted values; slots that the text does not tell are left out."""
  text = _normalise(text)
  found = {}
  for slot, place, regex in places:
    text, count = regex.subn(" X ", text)
    if count:
      found.setdefault(slot, set()).add(place)
  for slot, values in patterns.items():
    matches = {
        value: [m.group() for regex in regexes for m in regex.finditer(text)]
        for value, regexes in values.items()
    }
    told = {value for value, hits in matches.items() if hits}
    if slot == "familyFriendly" and "no" in told:
      told = {"no"}
    if slot in numeric and len(told) > 1:
      exact = {
          value
          for value in told
          if any(numeric[slot].search(hit) for hit in matches[value])
      }
      told = exact or told
    if told:
      found[slot] = told
  return {slot: sorted(told) for slot, told in found.items()}


def _read_slots(prompt, known, levels):
  """slot -> value asked for, levels applied; empty if a slot is unknown."""
  found = known.findall(prompt)
  if len(found) != prompt.count("["):
    return {}
  return {
      slot: levels.get(slot, {}).get(value.strip(), value.strip())
      for slot, value in found
  }


def _score(wanted, found):
  """right / (slots of the prompt + slots told without being asked for)."""
  asked_places = {wanted[s] for s in ("name", "near") if s in wanted}
  right = extra = 0
  for slot in wanted.keys() | found.keys():
    told = set(found.get(slot, ()))
    if slot in ("name", "near"):
      told -= asked_places - {wanted.get(slot)}
    if slot == "eatType" and wanted.get(slot) != "restaurant":
      told -= {"restaurant"}
    if slot in wanted:
      right += told == {wanted[slot]}
    else:
      extra += bool(told)
  return right / (len(wanted) + extra)


def _text(item: Text, role: str) -> str:
  """A string as it is; of messages, the last one of this role."""
  if isinstance(item, str):
    return item
  contents = [m["content"] for m in item if m.get("role") == role]
  return contents[-1] if contents else ""
