"""The Bradley-Terry loss against a float64 oracle, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import pairwise
from mcpo_jax.objectives.bradley_terry import bradley_terry_loss
from mcpo_jax.types import Features


@jax.jit
def run(logps, sets):
  """(losses [B], gradient [B, J], aux)."""
  def total(logps):
    losses, aux, state = bradley_terry_loss(Features(logps), sets, "state")
    assert state == "state"
    return jnp.sum(losses) + sum(map(jnp.sum, aux.values())), (losses, aux)

  grad, (losses, aux) = jax.grad(total, has_aux=True)(logps)
  return losses, grad, aux


def oracle(logps, sets):
  """One pair at a time."""
  losses, grad = np.zeros(len(logps)), np.zeros(logps.shape)
  for b, row in enumerate(logps):
    negatives = [j for j in range(1, len(row)) if sets.role[b, j] == -1 and
                 sets.candidate_mask[b, [0, j]].all()]
    whole = sum(sets.multiplicity[b, j] for j in negatives)
    for j in negatives:
      share = sets.multiplicity[b, j] / whole
      p = 1 / (1 + np.exp(row[j] - row[0]))
      losses[b] -= share * np.log(p)
      grad[b, 0] -= share * (1 - p)
      grad[b, j] += share * (1 - p)
  return losses, grad


def test_value_and_gradient_equal_the_oracle(x64):
  for seed in range(3):
    logps, sets = batches.random_batch(seed)
    losses, grad, aux = run(logps, sets)
    want, want_grad = oracle(logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-12)
    np.testing.assert_allclose(grad, want_grad, atol=1e-12)
    assert want[:4].all() and want[-1] == 0.0
    np.testing.assert_allclose(
        aux["rewards/chosen"][:4], logps[:4, 0], atol=1e-12)
    assert not any(name.startswith("logps") for name in aux)


def test_equal_scores_are_a_coin_and_a_sure_win_costs_nothing(x64):
  logps, sets = batches.random_batch(0)
  losses, grad, _ = run(np.where(sets.candidate_mask, 7.0, np.nan), sets)
  np.testing.assert_allclose(losses[:-1], np.log(2), atol=1e-12)
  np.testing.assert_allclose(grad[:-1, 0], -0.5, atol=1e-12)
  wins = np.where(np.arange(4) == 0, 60.0, np.zeros_like(logps))
  np.testing.assert_allclose(run(wins, sets)[0], 0.0, atol=1e-12)


def test_of_one_negative_it_is_dpo_without_a_reference(x64):
  pair = batches.take_slots(*batches.random_batch(4), [0, 1])
  logps, sets = batches.take_rows(*pair, [0, 1, 2, 3])
  sets.anchors["ref"][:] = 0.0
  want, _, _ = pairwise.dpo_loss(Features(logps), sets, (), beta=1.0)
  np.testing.assert_allclose(run(logps, sets)[0], want, atol=1e-12)


def test_a_shift_of_all_scores_of_a_set_changes_nothing(x64):
  logps, sets = batches.random_batch(2)
  losses, grad, _ = run(logps, sets)
  moved, moved_grad, _ = run(logps + 3.0 * np.arange(5)[:, None], sets)
  np.testing.assert_allclose(moved, losses, atol=1e-12)
  np.testing.assert_allclose(moved_grad, grad, atol=1e-12)


def test_rows_without_a_negative_are_zero_without_gradient():
  logps, sets = batches.random_batch(3)
  sets.role[0, 1:] = 0
  sets.candidate_mask[1, 1:] = False
  sets.candidate_mask[2, 0] = False
  logps[1, 1:], logps[2, 0] = np.nan, np.nan
  losses, grad, aux = run(logps, sets)
  for row in (0, 1, 2, 4):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[3] > 0.0


@pytest.mark.parametrize("size", [50.0, 1e4, 1e5])
def test_extremes_are_finite_in_value_and_gradient(size):
  logps, sets = batches.random_batch(8)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  values = np.where(sets.candidate_mask, signs * size, np.nan)
  for x in jax.tree.leaves(run(values, sets)):
    assert np.isfinite(x).all()
