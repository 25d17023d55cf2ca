"""Rewards that are rules on the text of any task: final answers, length."""

import decimal
import re

from mcpo_jax import errors
from mcpo_jax.rewards.functions import Reward

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def final_answer(text: str) -> str | None:
  """The answer that a worked solution ends in, normalised.

  What follows the last "####", else the last \\boxed{...}, else the last
  number. A number has no thousands separators, currency or percent sign and no
  trailing zeros ("1,200.50" and "$1200.5" are the same); other text is
  case-folded with single blanks.

  Returns:
    None if there is nothing.
  """
  if "####" in text:
    found = text.rpartition("####")[2].strip().split("\n")[0]
  elif "\\boxed{" in text:
    found = _braced(text.rpartition("\\boxed{")[2])
  else:
    numbers = _NUMBER.findall(text)
    found = numbers[-1] if numbers else ""
  return _normal(found)


def _braced(text: str) -> str:
  """Up to the brace that closes the one before the text."""
  depth = 1
  for i, letter in enumerate(text):
    depth += {"{": 1, "}": -1}.get(letter, 0)
    if not depth:
      return text[:i]
  return text


def _normal(text: str) -> str | None:
  text = text.strip().rstrip(".").strip()
  plain = re.sub(r"[,$%\s]", "", text)
  try:
    number = decimal.Decimal(plain)
    if number.is_finite():
      return format(number.normalize() + 0, "f")
  except decimal.InvalidOperation:
    pass
  return " ".join(text.casefold().split()) or None


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
      right = final_answer(text) if "####" in str(text) or (
          "\\boxed{" in str(text)) else _normal(str(text))
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
