"""Rewards that are rules on the text of any task: final answers, length."""

import re

from mcpo_jax import errors
from mcpo_jax.rewards.functions import Reward

# A sign only where no word or number stands before it; commas in threes.
_NUMBER = re.compile(
    r"(?<![\w.])([-+\u2212]?)(?:\\?\$\s*)?"
    r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?"
    r"|(?<![\w.])([-+\u2212]?)(\.\d+)|(\d+)(\.\d+)?")


def final_answer(text: str) -> str | None:
  """The answer that a worked solution ends in, normalised.

  Of what follows the last "####", else of the last \\boxed{...}, else of the
  whole text: the first number in the former two, the last in the latter. A
  number has no thousands separators, currency sign or trailing zeros
  ("1,200.50" and "$1200.5" are the same). An answer without a number is its
  text, case-folded with single blanks.

  Returns:
    None if there is nothing.
  """
  if "####" in text:
    found = text.rpartition("####")[2].strip().split("\n")[0]
    return _first(found)
  if "\\boxed{" in text:
    return _first(_braced(text.rpartition("\\boxed{")[2]))
  numbers = list(_NUMBER.finditer(text))
  return _number(numbers[-1]) if numbers else None


def _first(text: str) -> str | None:
  """The first number of a text, or the text itself."""
  number = None if "\\frac" in text else _NUMBER.search(text)
  return _number(number) if number else (
      " ".join(text.casefold().split()).rstrip(".") or None)


def _number(match: re.Match) -> str:
  """Digits as they are written in one way, whatever their number."""
  a, whole, part, b, bare, plain, rest = match.groups()
  digits = (whole or plain or "0").replace(",", "").lstrip("0") or "0"
  tail = (part or bare or rest or "").rstrip("0").rstrip(".")
  zero = digits == "0" and not tail
  return ("-" if (a or b or "") in ("-", "\u2212") and not zero else "") + (
      digits + tail)


def _braced(text: str) -> str:
  """Up to the brace that closes the one before the text."""
  depth = 1
  for i, letter in enumerate(text):
    depth += {"{": 1, "}": -1}.get(letter, 0)
    if not depth:
      return text[:i]
  return text


def make_exact_match() -> Reward:
  """1 where the final answer is that of the record's column `answer`, else 0.

  The column holds an answer or a solution that ends in one, as GSM8K's does.
  """

  def exact_match(prompts, completions, answer=None, **columns):
    if answer is None:
      raise errors.DataError(
          "data.field_missing", "exact_match compares with a column of the "
          "records", where="answer", want="the right answer of every prompt")
    wanted = []
    for text in answer:
      worked = "####" in str(text) or "\\boxed{" in str(text)
      right = final_answer(text) if worked else _first(str(text))
      if right is None:
        raise errors.DataError(
            "data.empty", "a record has no answer", where="answer", got=text)
      wanted.append(right)
    return [float(final_answer(c) == right)
            for c, right in zip(completions, wanted)]

  return exact_match


def make_length() -> Reward:
  """The number of tokens; with a negative weight, brevity."""

  def length(prompts, completions, lengths=None, **columns):
    if lengths is None:
      raise errors.ServiceError(
          "reward.failed", "only sampled completions have a length in tokens",
          where="reward length")
    return [float(n) for n in lengths]

  return length
