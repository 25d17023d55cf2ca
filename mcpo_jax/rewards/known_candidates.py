"""New texts scored by scored texts that they are like.

A file of scored completions, such as the data of an offline run, says what some
answers to its prompts are worth. These rules read off it what an answer that
nobody has scored is worth, so that samples can be compared where there is no
other rule and no one to ask. They are no label by a person: they see shared
words, not meaning.

Likeness is the F1 of words as SQuAD's evaluation has it: twice the words that
two texts share over the words that both have, repeated words as often as they
come; without case, accents, punctuation and articles. It is in [0, 1], and 0
where one of the texts has no words.

References:
  Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, section 6.1.
"""

import collections
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mcpo_jax import errors
from mcpo_jax.data import readers, records
from mcpo_jax.rewards.functions import Reward

_ARTICLES = {"a", "an", "the"}


class Known(NamedTuple):
  """A completion whose score is known."""

  words: collections.Counter
  score: float


def make_nearest_candidate(path: str) -> Reward:
  """`nearest_candidate` with the completions of a file.

  Args:
    path: of records with `scores`, as data.path.

  Raises:
    DataError: from reading the file; data.field_missing, a record has no
      scores.
  """
  return _reward(path, nearest_candidate)


def make_candidate_margin(path: str) -> Reward:
  """`candidate_margin` with the completions of a file; as
  `make_nearest_candidate`."""
  return _reward(path, candidate_margin)


def nearest_candidate(
    words: collections.Counter, known: Sequence[Known]
) -> float:
  """The score of the known completion that a text is most like.

  A text that shares half of the words or fewer with all of them has the lowest
  score. Of several that it is equally like, the lowest counts.
  """
  best, score = max((likeness(words, k.words), -k.score) for k in known)
  return -score if best > 0.5 else min(k.score for k in known)


def candidate_margin(
    words: collections.Counter, known: Sequence[Known]
) -> float:
  """Likeness to the closest good completion minus that to the closest bad one,
  as TruthfulQA's metrics of generated answers have it.

  Good and bad are those that score above and below the middle between the
  lowest and the highest score; those in the middle are neither. In [-1, 1]. A
  text without words has 0, and so has one that is like none.

  References:
    Lin et al. 2021, https://arxiv.org/abs/2109.07958, section 3.2.
  """
  scores = [k.score for k in known]
  middle = (min(scores) + max(scores)) / 2
  closest = lambda group: max(
      (likeness(words, k.words) for k in group), default=0.0)
  return closest(k for k in known if k.score > middle) - closest(
      k for k in known if k.score < middle)


def words_of(text: str) -> collections.Counter:
  """Word -> times, without case, accents, punctuation and articles; articles
  stay in a text of nothing else."""
  text = unicodedata.normalize("NFKD", text).casefold()
  kept = "".join(
      c for c in text if c.isspace() or not unicodedata.combining(c)
      and unicodedata.category(c)[0] not in "PSC").split()
  return collections.Counter([w for w in kept if w not in _ARTICLES] or kept)


def likeness(a: collections.Counter, b: collections.Counter) -> float:
  """F1 of words."""
  shared = (a & b).total()
  return 2 * shared / (a.total() + b.total()) if shared else 0.0


def _reward(
    path: str, rule: Callable[[collections.Counter, Sequence[Known]], float]
) -> Reward:
  """The rule, for completions of prompts that the file has."""
  known = _read(path)

  def reward(prompts, completions, **columns):
    del columns
    scores = []
    for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
      mine = known.get(readers.hash_id(prompt))
      if mine is None:
        raise errors.ServiceError(
            "reward.prompt", "no scored completions of the prompt are known",
            where=f"prompt {i} of the request",
            want=f"a prompt of reward.path={path}")
      scores.append(rule(words_of(text), mine))
    return scores

  reward.__name__ = rule.__name__
  return reward


def _read(path: str) -> dict[str, list[Known]]:
  """Hash of a prompt -> its completions."""
  known = collections.defaultdict(list)
  for record in records.read_records(path):
    if record.scores is None:
      raise errors.DataError(
          "data.field_missing", "a known completion needs a score",
          where=f"{record.where}, scores", want="one number per completion")
    known[readers.hash_id(record.prompt)] += [
        Known(words_of(_text(completion)), score)
        for completion, score in zip(record.completions, record.scores)]
  return dict(known)


def _text(completion: str | list[dict[str, Any]]) -> str:
  """A string as it is; of messages, their contents."""
  if isinstance(completion, str):
    return completion
  return "\n".join(m.get("content") or "" for m in completion)
