"""Which examples make batch number `step`: a function, not a stream.

Position p = step * batch_size + i lies in epoch p // num_examples; each epoch
is a permutation drawn from (seed, epoch) alone. So a run resumes anywhere in
no time, and the order does not depend on hosts or devices.
"""

import functools

import numpy as np

from mcpo_jax import errors


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  key = np.array([seed % 2**64, epoch], np.uint64)
  generator = np.random.Generator(np.random.Philox(key=key))
  return generator.permutation(num_examples)


def example_indices(
    step: int, *, batch_size: int, num_examples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """The examples of one batch.

  Args:
    step: number of the batch, from 0.
    batch_size: B, global.
    num_examples: how many there are to choose from.
    seed: of the order.

  Returns:
    indices: [B] int64, in 0 .. num_examples - 1.
    visits: [B] int32, how often each was seen before: the epoch number.
  """
  positions = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, places = np.divmod(positions, num_examples)
  indices = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = _permutation(seed, int(epoch), num_examples)[places[here]]
  return indices, epochs.astype(np.int32)


def plan(num_examples: int, *, batch_size: int) -> dict[str, int]:
  """How an epoch divides into batches; the remainder opens the next epoch.

  Raises:
    DataError: data.too_small if there are fewer examples than one batch.
  """
  if num_examples < batch_size:
    raise errors.DataError(
        "data.too_small", "fewer examples than one global batch",
        where="data.path", got=num_examples, want=f"at least {batch_size}",
        hint="lower batch_size or add data")
  batches, remainder = divmod(num_examples, batch_size)
  return {"examples": num_examples, "batches_per_epoch": batches,
          "remainder": remainder}
