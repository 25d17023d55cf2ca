"""Sets of candidates from plain arrays, to try losses and kernels on."""

import numpy as np

from mcpo_jax.types import Array, SetBatch


def make_sets(
    scores: Array,
    *,
    anchors: dict[str, Array] | None = None,
    candidate_mask: Array | None = None,
    lengths: Array | None = None,
) -> SetBatch:
  """A batch of sets, what losses and kernels take; slot 0 is preferred.

  As for records, a negative is a candidate scored strictly below the preferred
  one, or every other one where the preferred has no score.

      >>> sets = make_sets([[1.0, 0.2, 1.0], [0.9, 0.8, 0.1]])
      >>> sets.role.tolist()  # a tie is no negative
      [[1, -1, 0], [1, -1, -1]]

  Args:
    scores: [B, K] external scores, higher is better; NaN: unknown.
    anchors: name -> [B, K] log-probs in nats, such as those of "ref".
    candidate_mask: [B, K] bool, False: there is no candidate. Default: all.
    lengths: [B, K] scored tokens. Default: 1 each.

  Returns:
    SetBatch of NumPy arrays.
  """
  scores = np.asarray(scores, np.float32)
  num_sets, num_slots = scores.shape
  mask = np.broadcast_to(
      True if candidate_mask is None else candidate_mask, scores.shape)
  below = scores < scores[:, :1]
  role = np.where(below | np.isnan(scores[:, :1]), -1, 0).astype(np.int8)
  role[:, 0] = 1
  ids = np.arange(num_sets, dtype=np.uint32)
  return SetBatch(
      role=np.where(mask, role, 0).astype(np.int8),
      candidate_mask=mask,
      candidate_id=np.broadcast_to(
          np.arange(num_slots, dtype=np.uint32), scores.shape),
      multiplicity=np.ones(scores.shape, np.int32),
      scores=scores,
      lengths=np.where(
          mask, 1 if lengths is None else lengths, 0).astype(np.int32),
      anchors={name: np.asarray(x) for name, x in (anchors or {}).items()},
      example_id=np.stack([ids, np.zeros_like(ids)], axis=1),
      visit=np.zeros(num_sets, np.int32),
      row=np.arange(num_sets, dtype=np.int32),
  )
