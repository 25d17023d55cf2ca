"""Noise depends on its address and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.kernels import address

KEY = jax.random.key(7)


def _noise(sets, key=KEY, purpose=address.DRAW_NEGATIVES, chain=0):
  return np.asarray(address.gumbel(key, sets, purpose=purpose, chain=chain))


def test_noise_is_a_fixed_number():
  # By hand from the definition, fold by fold: old runs resume on it.
  _, sets = batches.random_batch(0)
  key = KEY
  for data in (
      address.DRAW_NEGATIVES, 0, int(sets.visit[1]), sets.example_id[1, 0],
      sets.example_id[1, 1], sets.candidate_id[1, 2],
  ):
    key = jax.random.fold_in(key, data)
  want = jax.random.gumbel(key, mode="high")
  assert _noise(sets)[1, 2] == want


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s._replace(visit=s.visit + 1),
        lambda s: s._replace(candidate_id=s.candidate_id + 100),
        lambda s: s._replace(example_id=s.example_id ^ np.uint32([0, 1])),
        lambda s: s._replace(example_id=s.example_id ^ np.uint32([1, 0])),
        lambda s: s._replace(example_id=s.example_id[:, ::-1]),
    ],
)
def test_every_part_of_the_address_changes_all_noise(change):
  _, sets = batches.random_batch(1)
  assert np.all(_noise(sets) != _noise(change(sets)))


def test_key_purpose_and_chain_change_all_noise():
  _, sets = batches.random_batch(1)
  base = _noise(sets)
  assert np.all(base != _noise(sets, key=jax.random.key(8)))
  assert np.all(base != _noise(sets, purpose=address.DRAW_PREFERRED))
  assert np.all(base != _noise(sets, chain=1))
  # chain and purpose do not stand in for each other
  swapped = _noise(sets, purpose=3, chain=2)
  assert np.all(_noise(sets, purpose=2, chain=3) != swapped)


def test_every_step_of_a_chain_has_noise_of_its_own():
  _, sets = batches.random_batch(0)
  step = lambda j: np.asarray(
      address.gumbel(KEY, sets, purpose=address.CHAIN_MOVE, chain=2, step=j)
  )
  plain = _noise(sets, purpose=address.CHAIN_MOVE, chain=2)
  assert np.all(plain != step(0)) and np.all(step(0) != step(1))
  # The step is the last word: draws without steps keep their noise.
  key = KEY
  for data in (
      address.CHAIN_MOVE, 2, int(sets.visit[1]), sets.example_id[1, 0],
      sets.example_id[1, 1], sets.candidate_id[1, 2], 1,
  ):
    key = jax.random.fold_in(key, data)
  assert step(1)[1, 2] == jax.random.gumbel(key, mode="high")


def test_no_purpose_is_given_twice():
  numbers = [x for x in vars(address).values() if isinstance(x, int)]
  assert len(numbers) == len(set(numbers)) == 6


def test_noise_ignores_rows_slots_padding_and_metadata():
  logps, sets = batches.random_batch(2)
  base = _noise(sets)
  rows, slots = [3, 0, 4], [2, 0, 3, 1, 1, 1]
  _, moved = batches.take_rows(logps, sets, rows)
  _, moved = batches.take_slots(moved.scores, moved, slots)
  moved = moved._replace(
      role=moved.role * 0, scores=moved.scores + 1, lengths=moved.lengths * 2
  )
  np.testing.assert_array_equal(_noise(moved), base[rows][:, slots])


def test_noise_is_standard_gumbel_and_uncorrelated_between_chains():
  num_sets = 5000
  _, sets = batches.random_batch(3, num_sets=num_sets)
  sets = sets._replace(visit=np.arange(num_sets, dtype=np.int32))
  a, b = _noise(sets), _noise(sets, chain=1)
  np.testing.assert_allclose(a.mean(0), 0.57722, atol=0.08)
  np.testing.assert_allclose(a.var(0), np.pi**2 / 6, rtol=0.12)
  corr = np.corrcoef(np.concatenate([a, b], axis=1).T) - np.eye(8)
  assert np.abs(corr).max() < 0.07


def test_ids_use_all_of_uint32():
  _, sets = batches.random_batch(4)
  high = sets._replace(
      candidate_id=sets.candidate_id + np.uint32(2**32 - 10)
  )
  noise = _noise(high)
  assert np.all(np.isfinite(noise)) and np.all(noise != _noise(sets))


def test_noise_is_float64_under_x64_and_the_same_under_jit(x64):
  _, sets = batches.random_batch(5)
  noise = _noise(sets)
  assert noise.dtype == np.float64
  jitted = jax.jit(
      lambda s, c: address.gumbel(KEY, s, purpose=1, chain=c)
  )(sets, jnp.int32(0))
  np.testing.assert_array_equal(jitted, noise)
