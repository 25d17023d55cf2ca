"""Ragged random batches for the tests of objectives and kernels."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax.types import Features, SetBatch

# Of an invariance; a case takes some milliseconds.
MANY = hypothesis.settings(deadline=None, database=None, max_examples=200)


def random_batch(seed, *, num_sets=5, num_slots=4, scale=2.0):
  """(logps [B, J], SetBatch): masked slots hold NaN, the last row is no set.

  Row 0 is full; row 1 has a slot of role 0; row 2 is cut short.
  """
  rng = np.random.default_rng(seed)
  shape = (num_sets, num_slots)
  role = np.full(shape, -1, np.int8)
  role[:, 0] = 1
  role[1, 2] = 0
  ids = np.arange(num_slots, dtype=np.uint32)
  mask = np.ones(shape, bool)
  mask[2, 2:] = False
  mask[-1] = False
  hide = lambda x: np.where(mask, x, np.nan)
  logps = hide(rng.normal(-6.0, scale, shape))
  sets = SetBatch(
      role=role,
      candidate_mask=mask,
      candidate_id=np.tile(ids, (num_sets, 1)),
      multiplicity=rng.integers(1, 4, shape).astype(np.int32),
      scores=rng.normal(size=shape).astype(np.float32),
      lengths=np.where(mask, rng.integers(2, 9, shape), 0).astype(np.int32),
      anchors={"ref": hide(rng.normal(-6.0, scale, shape))},
      example_id=rng.integers(0, 2**32, (num_sets, 2), dtype=np.uint32),
      visit=rng.integers(0, 3, num_sets).astype(np.int32),
      row=rng.permutation(num_sets).astype(np.int32),
  )
  return logps, sets


def take_slots(logps, sets, slots):
  """The same sets with other slots, or slots in another order."""
  return logps[:, slots], sets._replace(
      anchors={name: x[:, slots] for name, x in sets.anchors.items()},
      **{
          name: getattr(sets, name)[:, slots]
          for name in (
              "role", "candidate_mask", "candidate_id", "multiplicity",
              "scores", "lengths",
          )
      },
  )


def take_rows(logps, sets, rows):
  """The same sets in another order, or fewer of them."""
  return logps[rows], SetBatch(*[
      {name: x[rows] for name, x in field.items()}
      if isinstance(field, dict) else field[rows]
      for field in sets
  ])


@functools.cache
def jitted(loss_fn, **settings):
  """(logps, batch) -> (losses, gradient of their sum, aux); the state stays."""

  @jax.jit
  def run(logps, batch):
    def total(logps):
      losses, aux, state = loss_fn(Features(logps), batch, "state", **settings)
      assert state == "state"
      return jnp.sum(losses), (losses, aux)

    (_, (losses, aux)), grad = jax.value_and_grad(total, has_aux=True)(logps)
    return losses, grad, aux

  return run
