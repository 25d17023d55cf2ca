"""Random noise that depends on what it is for, not on when it is drawn.

Every draw of the project is argmax(log-weights + Gumbel noise at an address).
The address is (seed, purpose, chain, visit, example id, candidate id), for
chains of several steps also the step, so batches, layouts, devices and restarts
leave the draw as it was.
"""

import jax
import jax.numpy as jnp

from mcpo_jax.types import Array, SetBatch

# Purposes. A number is never given twice, nor changed: old runs resume.
DRAW_NEGATIVES = 1
DRAW_PREFERRED = 2  # among the k best of a record
CHAIN_START = 3  # where a chain of `init` model starts
CHAIN_BLOCKS = 4  # in which order a chain meets the negatives
CHAIN_MOVE = 5
CHAIN_ACCEPT = 6


def gumbel(
    key: Array,
    sets: SetBatch,
    *,
    purpose: int,
    chain: int | Array = 0,
    step: int | Array | None = None,
) -> jax.Array:
  """Standard Gumbel noise, one independent value per candidate.

  Args:
    key: typed key of the run's seed; the same at every step.
    sets: [B, K]; reads `visit`, `example_id` and `candidate_id` only. Equal
      addresses get equal noise, also on masked slots.
    purpose: one of the constants of this module.
    chain: number of an independent chain; may be traced.
    step: of the chain; may be traced. None: a draw without steps.

  Returns:
    [B, K] float32, float64 where x64 is enabled.
  """

  def one_candidate(address):
    fold = lambda key, word: (jax.random.fold_in(key, word), None)
    candidate_key, _ = jax.lax.scan(fold, key, address)
    # "high": the default stops near 16 in float32, and with it every
    # candidate of a weight below e^-16 would never be drawn.
    return jax.random.gumbel(candidate_key, mode="high")

  words = (
      purpose,
      chain,
      sets.visit[:, None],
      sets.example_id[:, :1],
      sets.example_id[:, 1:],
      sets.candidate_id,
  )
  if step is not None:
    words += (step,)
  shape = sets.candidate_id.shape
  words = [
      jnp.broadcast_to(jnp.asarray(word).astype(jnp.uint32), shape).ravel()
      for word in words
  ]
  # A scan over one flat axis: two nested vmaps take 3 times as long to
  # compile, unrolled folds 10 times.
  return jax.vmap(one_candidate)(jnp.stack(words, axis=1)).reshape(shape)
