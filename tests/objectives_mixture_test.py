"""Mixtures and blends against sums worked out by hand and by their members."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import mixture, pairwise, softmax, supervised
from mcpo_jax.types import Features

BETA = 0.3
DPO = functools.partial(pairwise.dpo_loss, beta=BETA)
RNCE = functools.partial(softmax.rnce_loss, beta=BETA)
SFT = mixture.per_token(supervised.sft_loss)


def _counting(loss):
  """The loss, with a state that counts its calls and moves its value."""
  def run(features, batch, state):
    losses, aux, _ = loss(features, batch, ())
    return losses * state, aux, state + 1.0

  return run


LOSSES = {"dpo": DPO, "rnce": RNCE, "sft": SFT, "counting": _counting(RNCE)}


@functools.cache
def _jitted(names, blended):
  @jax.jit
  def run(logps, batch, state, weights, progress):
    members = tuple(zip(weights, (LOSSES[name] for name in names)))

    def total(logps):
      arguments = Features(logps), batch, state
      if blended:
        losses, aux, after = mixture.blended_loss(
            *arguments, members=members, progress=progress)
      else:
        losses, aux, after = mixture.mixture_loss(*arguments, members=members)
      return jnp.sum(losses), (losses, aux, after)

    (_, (losses, aux, after)), grad = jax.value_and_grad(
        total, has_aux=True)(logps)
    return losses, grad, aux, after

  return run


def _run(names, logps, sets, *, weights=(1.0, 1.0), progress=None, state=None):
  run = _jitted(names, progress is not None)
  state = ((),) * len(names) if state is None else state
  out = run(logps, sets, state, weights[:len(names)], progress or 0.0)
  return jax.tree.map(np.asarray, out)


def _oracle(logps, sets, dpo_weight, sft_weight):
  """w_1 DPO + w_2 NLL / length: (losses, gradient), a loop over rows."""
  losses, grads = np.zeros(len(logps)), np.zeros_like(logps)
  for b in range(len(logps)):
    if not sets.candidate_mask[b, 0]:
      continue
    losses[b] = -sft_weight * logps[b, 0] / sets.lengths[b, 0]
    grads[b, 0] = -sft_weight / sets.lengths[b, 0]
    if sets.candidate_mask[b, 1] and sets.role[b, 1] == -1:
      d = logps[b] - sets.anchors["ref"][b]
      wrong = 1.0 / (1.0 + np.exp(BETA * (d[0] - d[1])))
      losses[b] -= dpo_weight * np.log(1.0 - wrong)
      grads[b, :2] += dpo_weight * BETA * wrong * np.array([-1.0, 1.0])
  return losses, grads


def test_value_and_gradient_equal_the_oracle(x64):
  for seed in range(3):
    logps, sets = batches.random_batch(seed)
    losses, grad, _, _ = _run(("dpo", "sft"), logps, sets, weights=(0.7, 0.2))
    want, want_grad = _oracle(logps, sets, 0.7, 0.2)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9)
    losses, grad, _, _ = _run(
        ("sft", "dpo"), logps, sets, weights=(2.0, 0.5), progress=0.25)
    want, want_grad = _oracle(logps, sets, 0.25 * 0.5, 0.75 * 2.0)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9)


def test_a_mixture_by_hand(x64):
  # DPO: margin 0.3 * ((-5 + 6) - (-7 + 4)) = 1.2, loss 0.2632825;
  # NLL per token: 5 / 4 = 1.25.
  logps, sets = batches.random_batch(0)
  logps[0, :2] = -5.0, -7.0
  sets.anchors["ref"][0, :2] = -6.0, -4.0
  sets.lengths[0, 0] = 4
  losses, grad, _, _ = _run(("dpo", "sft"), logps, sets, weights=(2.0, 0.1))
  assert losses[0] == pytest.approx(2 * 0.2632825 + 0.1 * 1.25, abs=1e-6)
  assert grad[0, 0] == pytest.approx(-2 * 0.3 * 0.2314752 - 0.1 / 4, abs=1e-6)


def test_a_blend_begins_as_its_first_and_ends_as_its_second(x64):
  logps, sets = batches.random_batch(1)
  for progress, name in ((0.0, "sft"), (1.0, "dpo")):
    losses, grad, _, _ = _run(("sft", "dpo"), logps, sets, progress=progress)
    want, want_grad, _, _ = _run((name,), logps, sets)
    np.testing.assert_array_equal(losses, want)
    np.testing.assert_array_equal(grad, want_grad)


def test_halves_of_one_loss_are_the_loss(x64):
  logps, sets = batches.random_batch(2)
  want, want_grad, want_aux, _ = _run(("rnce",), logps, sets)
  losses, grad, aux, _ = _run(
      ("rnce", "rnce"), logps, sets, weights=(0.25, 0.75))
  np.testing.assert_allclose(losses, want, atol=1e-12)
  np.testing.assert_allclose(grad, want_grad, atol=1e-12)
  assert aux.keys() == want_aux.keys()


def test_every_member_has_its_own_state(x64):
  logps, sets = batches.random_batch(3)
  names = ("counting", "dpo", "counting")
  rnce, _, _, _ = _run(("rnce",), logps, sets)
  dpo, _, _, _ = _run(("dpo",), logps, sets)
  losses, _, _, state = _run(
      names, logps, sets, weights=(1.0, 1.0, 1.0), state=(2.0, (), 5.0))
  np.testing.assert_allclose(losses, 7.0 * rnce + dpo, atol=1e-12)
  assert state == (3.0, (), 6.0)


def test_statistics_are_of_the_first_that_compares(x64):
  logps, sets = batches.random_batch(4)
  sets.role[0, 1:] = 0  # the likelihood tells something here, pairs do not
  for names, first in ((("dpo", "rnce"), "dpo"), (("sft", "rnce"), "rnce")):
    _, _, aux, _ = _run(names, logps, sets)
    _, _, want, _ = _run((first,), logps, sets)
    assert aux.keys() == want.keys()
    for key in want:
      np.testing.assert_array_equal(aux[key], want[key])


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), a=st.floats(0.01, 10), b=st.floats(0.01, 10),
    rows=st.permutations(range(5)),
)
def test_a_mixture_is_linear_and_blind_to_order(seed, a, b, rows):
  with jax.enable_x64(True):
    logps, sets = batches.random_batch(seed)
    losses, grad, _, _ = _run(("dpo", "sft"), logps, sets, weights=(a, b))
    dpo, dpo_grad, _, _ = _run(("dpo",), logps, sets)
    sft, sft_grad, _, _ = _run(("sft",), logps, sets)
    np.testing.assert_allclose(losses, a * dpo + b * sft, atol=1e-10)
    np.testing.assert_allclose(grad, a * dpo_grad + b * sft_grad, atol=1e-10)
    rows = list(rows)
    got, got_grad, _, _ = _run(
        ("dpo", "sft"), *batches.take_rows(logps, sets, rows), weights=(a, b))
    np.testing.assert_allclose(got, losses[rows], atol=1e-12)
    np.testing.assert_allclose(got_grad, grad[rows], atol=1e-12)


@pytest.mark.parametrize("size", [1e4, 1e5])
def test_extremes_are_finite_in_value_and_gradient(size):
  logps, sets = batches.random_batch(5)
  for progress in (0.0, 0.5):
    for sign in (-1.0, 1.0):
      extreme = np.where(sets.candidate_mask, sign * size, np.nan)
      extreme[:, 1:] *= -1.0
      losses, grad, aux, _ = _run(
          ("sft", "dpo"), extreme, sets, progress=progress)
      assert np.isfinite(losses).all() and np.isfinite(grad).all()
      assert all(np.isfinite(x).all() for x in aux.values())


def test_without_a_negative_only_the_likelihood_is_left():
  logps, sets = batches.random_batch(6)
  role = sets.role.copy()
  role[0, 1:] = 0
  sets = sets._replace(role=role)
  losses, grad, _, _ = _run(("dpo", "sft"), logps, sets)
  assert losses[0] == pytest.approx(-logps[0, 0] / sets.lengths[0, 0])
  assert not grad[0, 1:].any() and losses[4] == 0.0
  losses, grad, aux, _ = _run(("dpo", "rnce"), logps, sets)
  for row in (0, 4):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(x[row] == 0.0 for x in aux.values())


def test_members_and_states_must_match():
  logps, sets = batches.random_batch(7)
  with pytest.raises(ValueError):
    mixture.mixture_loss(
        Features(logps), sets, (), members=((1.0, DPO), (1.0, RNCE)))
