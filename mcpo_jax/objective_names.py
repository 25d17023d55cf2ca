"""What `objective.name` may be, and what stands behind it.

  dpo               one of the registry
  my_file:my_loss   a function of the user's own, see `user_code`
  dpo,sft*0.1       a mixture: the sum of its members, of weight 1 unless given
  sft->dpo          a blend: from the first to the second over training

The members of a mixture or blend see the same slots. A setting goes to every
member that takes it; not set, each member keeps its own default. A member that
the step would divide by tokens (sft) is divided by the number of tokens of its
own completion instead: a mixture is a mean over sets.

This module imports no JAX; `bind` and `first_state` load the functions.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from mcpo_jax import errors, registry, user_code


class Member(NamedTuple):
  """One function of an objective, with what concerns it alone."""

  weight: float
  name: str
  entry: registry.Objective
  settings: dict[str, Any]


def find_objective(name: str) -> registry.Objective:
  """The needs and settings behind a name.

  Of a mixture or blend: the settings, anchors and terms of all members;
  contrast if all need it; the slots of the strictest. Where the members'
  defaults of a setting differ, its default is None.

  Args:
    name: `objective.name`.

  Raises:
    ConfigError: config.range, unknown; config.function, a user's function that
      cannot be used; config.conflict, members that do not go together.
  """
  if "->" in name:
    parts = name.split("->")
    if len(parts) != 2:
      raise _refusal("a blend goes from one objective to one other", name)
    place, progress = "mcpo_jax.objectives.mixture:blended_loss", True
  elif "," in name or "*" in name:
    parts = name.split(",")
    if len(parts) < 2:
      raise _refusal("a mixture has several members", name)
    place, progress = "mcpo_jax.objectives.mixture:mixture_loss", False
  else:
    return _find_one(name)
  members = tuple(map(_parse_member, parts))
  names = [member for _, member in members]
  if len(set(names)) < len(names):
    raise _refusal("an objective stands twice in it", name)
  entries = [_find_one(member) for member in names]
  return _merge(name, entries)._replace(
      place=place, progress=progress, members=members)


def members(name: str, settings: dict[str, Any]) -> tuple[Member, ...]:
  """The functions behind a name, each with its own settings filled in.

  Args:
    name: `objective.name`.
    settings: of the whole; None where not set.

  Returns:
    One Member of weight 1 for a plain name.
  """
  whole = find_objective(name)
  found = []
  for weight, member in whole.members or ((1.0, name),):
    entry = _find_one(member)
    found.append(Member(weight, member, entry, {
        key: setting.default if settings.get(key) is None else settings[key]
        for key, setting in entry.settings.items()}))
  return tuple(found)


def bind(
    name: str, settings: dict[str, Any], **draws: Any
) -> Callable[..., Any]:
  """Loads an objective and gives it its settings.

  Args:
    name: `objective.name`.
    settings: see `members`.
    **draws: how negatives are drawn (`include_preferred`, `corrected`), for
      the functions that ask.

  Returns:
    loss(features, batch, state) -> (losses [B], aux, state); it also takes
    `progress` if the entry says so.
  """
  whole = find_objective(name)
  losses = []
  for member in members(name, settings):
    loss = user_code.load(member.entry.place)
    takes = inspect.signature(loss).parameters
    loss = functools.partial(loss, **{
        key: value for key, value in (member.settings | draws).items()
        if key in takes})
    if whole.members and member.entry.reduce == "tokens":
      per_token = user_code.load("mcpo_jax.objectives.mixture:per_token")
      loss = per_token(loss)
    losses.append((member.weight, loss))
  if not whole.members:
    return losses[0][1]
  return functools.partial(user_code.load(whole.place), members=tuple(losses))


def first_state(name: str, num_examples: int) -> Any:
  """The state an objective begins with; of members, the tuple of theirs."""
  whole = find_objective(name)
  states = tuple(
      user_code.load(member.entry.state)(num_examples)
      if member.entry.state else ()
      for member in members(name, {}))
  return states if whole.members else states[0]


def source_hashes(name: str) -> dict[str, str]:
  """Member's name -> SHA-256 of its file, for functions of the user's own."""
  names = [member.name for member in members(name, {})]
  return {
      member: user_code.find(
          member, where="objective.name").sha256
      for member in names if ":" in member}


def allowed_strategies(entry: registry.Objective) -> tuple[str, ...]:
  """The kernel strategies that an objective works with."""
  if entry.strategies is not None:
    return entry.strategies
  barred = ("none", "pool", *(("all",) if entry.pairwise else ()))
  return tuple(s for s in registry.STRATEGIES if s not in barred)


def _find_one(name):
  """The entry of a plain name or of a function of the user's own."""
  if ":" in name:
    return user_code.read_objective(name)
  if name not in registry.OBJECTIVES:
    raise errors.ConfigError(
        "config.range", "unknown objective", where="objective.name", got=name,
        want=" | ".join(registry.OBJECTIVES) + " | my_file:my_loss",
        hint=errors.nearest(name, registry.OBJECTIVES))
  return registry.OBJECTIVES[name]


def _parse_member(text):
  """"dpo*0.5" -> (0.5, "dpo")."""
  name, star, weight = text.strip().rpartition("*")
  if not star:
    return 1.0, text.strip()
  try:
    weight = float(weight)
  except ValueError:
    weight = math.nan
  if not 0.0 < weight < math.inf:
    raise _refusal("not a weight", text)
  return weight, name.strip()


def _merge(name, entries):
  """What members need together: an entry without place and members."""
  # A loss on the preferred completion alone takes any slots.
  drawing = [e for e in entries if e.strategy != "none"] or entries[:1]
  allowed = [
      s for s in registry.STRATEGIES
      if all(s in allowed_strategies(e) for e in drawing)]
  if not allowed:
    raise _conflict("no kernel strategy suits every member", name)
  for key in ("replace", "include_preferred"):
    if len({getattr(e, key) for e in drawing}) > 1:
      raise _conflict(f"its members differ in {key}", name)
  if any(e.progress for e in entries):
    raise _conflict("a member would take `progress`", name)
  learned = [e.parameters for e in entries if e.parameters]
  if len(learned) > 1:
    raise _conflict("several members learn parameters", name)
  union = lambda key: tuple(dict.fromkeys(
      word for e in entries for word in getattr(e, key)))
  preferred = [e.strategy for e in drawing if e.strategy in allowed]
  return registry.Objective(
      place="",
      settings=_merge_settings(entries),
      anchors=union("anchors"),
      terms=union("terms"),
      contrast=all(e.contrast for e in entries),
      scores=any(e.scores for e in entries),
      strategy=(preferred or allowed)[0],
      strategies=tuple(allowed),
      pairwise=any(e.pairwise for e in entries),
      per_token=drawing[0].per_token,
      replace=drawing[0].replace,
      include_preferred=drawing[0].include_preferred,
      mismatched=any(e.mismatched for e in entries),
      separable=all(e.separable for e in entries),
      parameters="".join(learned),
  )


def _merge_settings(entries):
  """Name -> what every member that takes it can take.

  A setting of which no value suits them all cannot be set.
  """
  merged = {}
  for name in dict.fromkeys(key for e in entries for key in e.settings):
    first, *others = [e.settings[name] for e in entries if name in e.settings]
    for other in others:
      first = first and _narrow(first, other)
    if first:
      merged[name] = first
  return merged


def _narrow(one, other):
  """The setting whose values both settings take, or None if there is none."""
  if one._replace(default=None) == other._replace(default=None):
    return one if one == other else one._replace(default=None)
  if one.choices and other.choices:
    choices = tuple(c for c in one.choices if c in other.choices)
    return one._replace(default=None, choices=choices) if choices else None
  if one.low is None or other.low is None:  # a number and a word
    return None
  highs = [s for s in (one, other) if s.high is not None]
  low = max((one, other), key=lambda s: (s.low, s.open_low))
  high = min(highs, key=lambda s: (s.high, not s.open_high), default=one)
  if high.high is not None and low.low > high.high:
    return None
  return registry.Setting(
      None, low.low, high.high, low.open_low, high.open_high)


def _refusal(message, got):
  return errors.ConfigError(
      "config.range", message, where="objective.name", got=got,
      want="NAME | NAME*WEIGHT,NAME*WEIGHT | NAME->NAME, with weights > 0")


def _conflict(message, got):
  return errors.ConfigError(
      "config.conflict", message, where="objective.name", got=got)
