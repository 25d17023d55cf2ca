"""Random noise that depends on what it is for, not on when it is drawn.

Every draw of the project is argmax(log-weights + Gumbel noise at an address).
The address is (seed, purpose, chain, visit, example id, candidate id), so
batches, layouts, devices and restarts leave the draw as it was.
"""

import jax
import jax.numpy as jnp

from mcpo_jax.types import Array, SetBatch

# Purposes. A number is never given twice, nor changed: old runs resume.
DRAW_NEGATIVES = 1


def gumbel(
    key: Array, sets: SetBatch, *, purpose: int, chain: int | Array = 0
) -> jax.Array:
  """Standard Gumbel noise, one independent value per candidate.

  Args:
    key: typed key of the run's seed; the same at every step.
    sets: [B, K]; reads `visit`, `example_id` and `candidate_id` only. Equal
      addresses get equal noise, also on masked slots.
    purpose: one of the constants of this module.
    chain: number of an independent chain; may be traced.

  Returns:
    [B, K] float32, float64 where x64 is enabled.
  """
  key = jax.random.fold_in(jax.random.fold_in(key, purpose), chain)

  def one_candidate(key, candidate_id):
    # "high": the default stops near 16 in float32, and with it every
    # candidate of a weight below e^-16 would never be drawn.
    return jax.random.gumbel(
        jax.random.fold_in(key, candidate_id), mode="high"
    )

  def one_set(visit, example_id, candidate_ids):
    set_key = jax.random.fold_in(key, visit)
    set_key = jax.random.fold_in(set_key, example_id[0])
    set_key = jax.random.fold_in(set_key, example_id[1])
    return jax.vmap(one_candidate, (None, 0))(set_key, candidate_ids)

  return jax.vmap(one_set)(
      jnp.asarray(sets.visit),
      jnp.asarray(sets.example_id),
      jnp.asarray(sets.candidate_id),
  )
