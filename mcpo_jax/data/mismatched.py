"""Sets that carry another prompt's completion along, for estimates of KL.

KTO compares rewards with their mean over completions that were written for
other prompts. Partners are fixed by the seed, so the completion is one more
candidate of the set: scored, cached and packed like all others.
"""

import dataclasses

import numpy as np

from mcpo_jax import errors
from mcpo_jax.data import packing
from mcpo_jax.data import store as store_lib
from mcpo_jax.types import MISMATCHED_ID, CandidateSet


def partners(prompt_hashes: np.ndarray, seed: int) -> np.ndarray:
  """[N] for each row another one, of another prompt: the next in an order that
  the seed shuffles.

  Args:
    prompt_hashes: [N] uint64, equal where prompts are.
    seed: of the order.

  Raises:
    DataError: data.too_small, there is one prompt only.
  """
  count = len(prompt_hashes)
  if len(np.unique(prompt_hashes)) < 2:
    raise errors.DataError(
        "data.too_small", "mismatched completions need a second prompt",
        where="data.path", got=1, want="at least 2 prompts")
  order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)
  shuffled = prompt_hashes[order]
  step = np.ones(count, np.int64)
  while (same := shuffled == shuffled[
      (np.arange(count) + step) % count]).any():
    step += same
  partner = np.empty(count, np.int64)
  partner[order] = order[(np.arange(count) + step) % count]
  return partner


@dataclasses.dataclass(frozen=True)
class MismatchedStore(store_lib.Store):
  """A store whose sets have the best completion of another prompt as their
  last candidate, with the id `types.MISMATCHED_ID` and no score."""

  partner: np.ndarray = dataclasses.field(default=None)  # [N] rows

  def candidate_set(self, i: int) -> CandidateSet:
    """The i-th set with its partner's best completion."""
    one = super().candidate_set(i)
    other = super().candidate_set(int(self.partner[i]))
    way = "best" if np.isfinite(other.scores).any() or (
        other.preferred >= 0) else None
    best = packing.order_candidates(other, preferred=way)[0][0] if way else 0
    return one._replace(
        completions=[*one.completions, other.completions[best]],
        completion_masks=[*one.completion_masks, other.completion_masks[best]],
        candidate_ids=np.append(
            one.candidate_ids, MISMATCHED_ID),
        multiplicity=np.append(one.multiplicity, np.int32(1)),
        scores=np.append(one.scores, np.float32(np.nan)))

  @property
  def max_candidates(self) -> int:
    """Most candidates of any set, the mismatched one included."""
    return super().max_candidates + 1


def with_mismatched(data: store_lib.Store, seed: int) -> MismatchedStore:
  """The store with mismatched completions; its key says so."""
  return MismatchedStore(
      f"{data.key}-mismatched-{seed}", data.report, data.arrays,
      data.columns_file, partners(data.prompt_hashes, seed))
