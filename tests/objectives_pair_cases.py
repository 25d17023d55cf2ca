"""What every loss on pairs is held against; the tests of a family share it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches

from mcpo_jax.types import Features

NO_PAIR = (3, 5)  # rows of `random_batch` here: tied with the chosen, no set


class Row(NamedTuple):
  """One valid pair; index 0 chosen, 1 rejected."""

  logps: np.ndarray
  ref: np.ndarray
  lengths: np.ndarray
  scores: np.ndarray

  @property
  def ratios(self):
    return self.logps - self.ref


class Case:
  """A loss with its settings and its oracle.

  The oracle maps all valid pairs to (loss, slope in logps_0, in logps_1) each.
  `shift_free`: one number added to both logps of a row changes nothing.
  """

  def __init__(self, loss_fn, oracle, *, shift_free=True, **settings):
    self.loss_fn, self.settings = loss_fn, settings
    self.oracle = lambda rows: oracle(rows, **settings)
    self.shift_free = shift_free
    self._run = jax.jit(self._value_and_gradients)

  def _value_and_gradients(self, logps, batch):
    def total(logps, ref):
      moved = batch._replace(anchors={"ref": ref})
      losses, aux, state = self.loss_fn(
          Features(logps), moved, "state", **self.settings
      )
      assert state == "state"
      # No gradient may come from the statistics: the sum takes them in.
      return jnp.sum(losses) + sum(map(jnp.sum, aux.values())), (losses, aux)

    grads, (losses, aux) = jax.grad(total, (0, 1), has_aux=True)(
        logps, batch.anchors["ref"]
    )
    return losses, grads, aux

  def run(self, logps, batch):
    """(losses, gradient in logps, aux); that in the reference is none."""
    out = self._run(logps, batch)
    losses, (grad, to_reference), aux = jax.tree.map(np.asarray, out)
    np.testing.assert_array_equal(to_reference, 0.0)
    return losses, grad, aux


def each(row_loss):
  """An oracle that sees one pair at a time: a loop over them."""
  def oracle(rows, **settings):
    return [row_loss(row, **settings) for row in rows]

  return oracle


def random_batch(seed, **more):
  logps, sets = batches.random_batch(seed, num_sets=6, **more)
  sets.role[NO_PAIR[0], 1] = 0
  sets.lengths[2, 1] = 1
  return logps, sets


def pair_batch(logps, ref, *, lengths=(4, 2), scores=(0.0, 0.0)):
  """One row with given numbers, [1, 2], for arithmetic by hand."""
  values, sets = batches.take_slots(*batches.random_batch(0), [0, 1])
  values, sets = batches.take_rows(values, sets, [0])
  values[0], sets.anchors["ref"][0] = logps, ref
  sets.lengths[0], sets.scores[0] = lengths, scores
  return values, sets


def run_oracle(case, logps, sets):
  """(losses [B], gradient [B, J])."""
  rows = {
      b: Row(
          logps[b, :2], sets.anchors["ref"][b, :2], sets.lengths[b, :2],
          sets.scores[b, :2].astype(float),
      )
      for b in range(len(logps))
      if sets.candidate_mask[b, :2].all() and sets.role[b, 1] == -1
  }
  losses, grad = np.zeros(len(logps)), np.zeros(logps.shape)
  for b, (loss, *slopes) in zip(
      rows, case.oracle(list(rows.values())), strict=True
  ):
    losses[b], grad[b, :2] = loss, slopes
  return losses, grad


def check_oracle(case, **more):
  for seed in range(3):
    logps, sets = random_batch(seed, **more)
    losses, grad, aux = case.run(logps, sets)
    want, want_grad = run_oracle(case, logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert np.abs(want_grad[:3]).max() > 1e-3
    for name, value in aux.items():
      assert value.shape == (6,) and np.isfinite(value).all(), name


def check_rows_without_a_negative(case):
  logps, sets = random_batch(10)
  sets.role[0, 1:] = 0
  sets.candidate_mask[1, 1:] = False
  sets.candidate_mask[2, 0] = False
  logps[1, 1], logps[2, 0] = np.nan, np.nan
  losses, grad, aux = case.run(logps, sets)
  for row in (0, 1, 2, *NO_PAIR):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[4] != 0.0 and grad[4].any()


def check_extremes(case):
  logps, sets = random_batch(8)
  sets = sets._replace(lengths=np.minimum(sets.lengths, 1))
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[0, :2], signs[1, :2] = (1.0, -1.0), (-1.0, 1.0)
  for size in (50.0, 1e4, 1e5):
    for values in (signs * size, np.full(logps.shape, -size)):
      values = np.where(sets.candidate_mask, values, np.nan)
      losses, grad, aux = case.run(values, sets)
      assert np.isfinite(losses).all() and np.isfinite(grad).all()
      assert all(np.isfinite(x).all() for x in aux.values())
      assert losses.dtype == grad.dtype == np.float32
  sets = sets._replace(candidate_mask=np.zeros_like(sets.candidate_mask))
  for out in jax.tree.leaves(case.run(logps, sets)):
    np.testing.assert_array_equal(out, 0.0)


def check_invariances(case, seed, shift, **more):
  logps, sets = random_batch(seed, **more)
  base, base_grad, _ = case.run(logps, sets)
  rows = [3, 0, 5, 4, 2, 1]
  losses, grad, _ = case.run(*batches.take_rows(logps, sets, rows))
  np.testing.assert_allclose(losses, base[rows], atol=1e-12, rtol=1e-12)
  np.testing.assert_allclose(grad, base_grad[rows], atol=1e-12, rtol=1e-12)
  # Slots after the pair go unread, valid or not.
  unread = np.where(np.arange(4)[None, :] < 2, logps, np.nan)
  losses, grad, _ = case.run(unread, sets)
  np.testing.assert_array_equal(losses, base)
  np.testing.assert_array_equal(grad, base_grad)
  if case.shift_free:
    by_row = shift * np.arange(1.0, 7.0)[:, None]
    losses, grad, _ = case.run(logps + by_row, sets)
    np.testing.assert_allclose(losses, base, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(grad, base_grad, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(grad.sum(1), 0.0, atol=1e-12)
