"""Errors a user can meet: one base class, a stable slug, an exit code."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
  """The known names most like `name`, as a hint, or an empty string."""
  found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
  like = lambda other: difflib.SequenceMatcher(None, other, name).ratio()
  found = [repr(other) for other in found if like(other) == like(found[0])]
  return f"did you mean {' or '.join(found)}?" if found else ""


class McpoError(Exception):
  """A refusal that names its place.

  Attributes:
    slug: stable name such as "data.field_missing"; tests and scripts match it.
    where: file and row, dotted config key, tensor name.
    got, want: what stood there and what was expected, or None.
    hint: what to do next.
  """

  exit_code = 1

  def __init__(
      self,
      slug: str,
      message: str,
      *,
      where: str = "",
      got: Any = None,
      want: Any = None,
      hint: str = "",
  ):
    self.slug, self.message, self.where = slug, message, where
    self.got, self.want, self.hint = got, want, hint
    super().__init__(message)

  def __str__(self) -> str:
    text = f"error[{self.slug}]: {self.message}"
    if self.got is not None:
      text += f", got {self.got!r}"
    if self.want is not None:
      text += f", want {self.want}"
    if self.where:
      text += f" ({self.where})"
    if self.hint:
      text += f" — {self.hint}"
    return text


class ConfigError(McpoError):
  exit_code = 2


class DataError(McpoError):
  exit_code = 3


class ModelDirError(McpoError):
  exit_code = 4


class CheckpointError(McpoError):
  exit_code = 5


class ResourceError(McpoError):
  exit_code = 6


class ServiceError(McpoError):
  exit_code = 7


class NonFiniteError(McpoError):
  exit_code = 8


class Preempted(McpoError):
  """Told to stop, everything saved: the same line again goes on."""

  exit_code = 75


class ErrorGroup(McpoError):
  """Several refusals found in one pass; the first 20 are shown."""

  def __init__(self, errors: list[McpoError]):
    self.errors = errors
    self.exit_code = errors[0].exit_code
    super().__init__(
        errors[0].slug, errors[0].message, where=errors[0].where
    )

  def __str__(self) -> str:
    lines = [str(e) for e in self.errors[:20]]
    if len(self.errors) > 20:
      lines.append(f"... and {len(self.errors) - 20} more")
    return "\n".join(lines)
