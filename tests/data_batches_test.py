"""The order of examples: a function of (seed, epoch, position) alone."""

import numpy as np
import pytest

from mcpo_jax import errors
from mcpo_jax.data import batches


def walk(steps, **kwargs):
  pairs = [batches.example_indices(s, **kwargs) for s in steps]
  return (np.concatenate([p[0] for p in pairs]),
          np.concatenate([p[1] for p in pairs]))


def test_every_epoch_visits_every_example_once():
  indices, visits = walk(range(35), batch_size=4, num_examples=10, seed=3)
  for epoch in range(14):
    assert sorted(indices[visits == epoch]) == list(range(10))
  assert (np.diff(visits) >= 0).all()


def test_a_batch_may_straddle_epochs_and_be_larger_than_the_data():
  indices, visits = batches.example_indices(
      1, batch_size=7, num_examples=3, seed=0)
  assert visits.tolist() == [2, 2, 3, 3, 3, 4, 4]
  assert indices.dtype == np.int64 and visits.dtype == np.int32
  assert set(indices) <= {0, 1, 2}


def test_resuming_at_a_step_gives_what_an_unbroken_run_saw():
  kwargs = {"batch_size": 6, "num_examples": 11, "seed": 5}
  whole = walk(range(9), **kwargs)[0]
  batches._permutation.cache_clear()
  np.testing.assert_array_equal(walk(range(4, 9), **kwargs)[0], whole[24:])


def test_seeds_and_epochs_differ():
  kwargs = {"batch_size": 50, "num_examples": 50}
  orders = [tuple(batches.example_indices(step, seed=seed, **kwargs)[0])
            for step in (0, 1) for seed in (0, 1, -1)]
  assert len(set(orders)) == 6


def test_the_plan_counts_batches_and_remainder():
  assert batches.plan(11, batch_size=4) == {
      "examples": 11, "batches_per_epoch": 2, "remainder": 3}
  with pytest.raises(errors.DataError) as e:
    batches.plan(3, batch_size=4)
  assert e.value.slug == "data.too_small"
