"""Reference-free losses: a float64 oracle, identities, ugly inputs."""


import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import pairwise, reference_free, supervised
from mcpo_jax.types import Features


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


# Oracles: (lp_0, lp_1, n_0, n_1) -> (loss, dloss/dlp_0, dloss/dlp_1).


def _simpo(lp_0, lp_1, n_0, n_1, *, beta, gamma_beta_ratio):
  h = beta * lp_0 / n_0 - beta * lp_1 / n_1 - beta * gamma_beta_ratio
  slope = -beta * _sigmoid(-h)
  return np.log(1 + np.exp(-h)), slope / n_0, -slope / n_1


def _alphapo(lp_0, lp_1, n_0, n_1, *, beta, alpha, gamma_beta_ratio):
  p_0, p_1 = np.exp(lp_0 / n_0), np.exp(lp_1 / n_1)
  r_0, r_1 = (1 - p_0**-alpha) / alpha, (1 - p_1**-alpha) / alpha
  h = beta * (r_0 - r_1) - beta * gamma_beta_ratio
  slope = -beta * _sigmoid(-h)
  return (
      np.log(1 + np.exp(-h)),
      slope * p_0**-alpha / n_0,
      -slope * p_1**-alpha / n_1,
  )


def _slic_hf(lp_0, lp_1, n_0, n_1, *, margin, sft_weight):
  gap = margin - lp_0 + lp_1
  active = 1.0 if gap > 0 else 0.0
  return active * gap - sft_weight * lp_0, -active - sft_weight, active


def _cpo(lp_0, lp_1, n_0, n_1, *, beta, sft_weight):
  h = beta * (lp_0 - lp_1)
  slope = -beta * _sigmoid(-h)
  return np.log(1 + np.exp(-h)) - sft_weight * lp_0, slope - sft_weight, -slope


def _orpo(lp_0, lp_1, n_0, n_1, *, odds_weight):
  p_0, p_1 = np.exp(lp_0 / n_0), np.exp(lp_1 / n_1)
  h = np.log(p_0 / (1 - p_0)) - np.log(p_1 / (1 - p_1))
  slope = -odds_weight * _sigmoid(-h)
  return (
      -lp_0 / n_0 + odds_weight * np.log(1 + np.exp(-h)),
      (-1 + slope / (1 - p_0)) / n_0,
      -slope / (1 - p_1) / n_1,
  )


def _asft(lp_0, lp_1, n_0, n_1, *, beta, odds_weight):
  p_0, p_1 = np.exp(lp_0 / n_0), np.exp(lp_1 / n_1)
  o_0, o_1 = np.log(p_0 / (1 - p_0)), np.log(p_1 / (1 - p_1))
  terms = np.log(_sigmoid(beta * o_0)) + np.log(_sigmoid(-beta * o_1))
  slope = odds_weight * beta
  return (
      -lp_0 / n_0 - odds_weight * terms,
      (-1 - slope * _sigmoid(-beta * o_0) / (1 - p_0)) / n_0,
      slope * _sigmoid(beta * o_1) / (1 - p_1) / n_1,
  )


CASES = {
    "simpo": (
        reference_free.simpo_loss, _simpo,
        {"beta": 2.0, "gamma_beta_ratio": 0.4},
    ),
    "alphapo": (
        reference_free.alphapo_loss, _alphapo,
        {"beta": 2.5, "alpha": 0.25, "gamma_beta_ratio": 0.04},
    ),
    "alphapo_below_zero": (
        reference_free.alphapo_loss, _alphapo,
        {"beta": 2.5, "alpha": -2.0, "gamma_beta_ratio": 0.04},
    ),
    "slic_hf": (
        reference_free.slic_hf_loss, _slic_hf,
        {"margin": 1.0, "sft_weight": 0.1},
    ),
    "cpo": (
        reference_free.cpo_loss, _cpo, {"beta": 0.3, "sft_weight": 0.7},
    ),
    "orpo": (reference_free.orpo_loss, _orpo, {"odds_weight": 0.3}),
    "asft": (
        reference_free.asft_loss, _asft, {"beta": 1.0, "odds_weight": 0.3},
    ),
    "asft_tempered": (
        reference_free.asft_loss, _asft, {"beta": 0.2, "odds_weight": 2.0},
    ),
}


def _oracle(name, logps, sets):
  """Rows one by one: (losses [B], gradients [B, J])."""
  _, row_loss, settings = CASES[name]
  losses, grads = np.zeros(len(logps)), np.zeros_like(logps)
  for b in range(len(logps)):
    if sets.candidate_mask[b, :2].all() and sets.role[b, 1] == -1:
      losses[b], grads[b, 0], grads[b, 1] = row_loss(
          *logps[b, :2], *sets.lengths[b, :2], **settings
      )
  return losses, grads


def _batch(seed):
  """Log-probabilities, below 0; no anchor."""
  logps, sets = batches.random_batch(seed)
  return -np.abs(logps) - 0.1, sets._replace(anchors={})


def _run(name, logps, batch, **settings):
  """(losses, gradient, aux); `settings` replace those of the case."""
  loss_fn, _, usual = CASES[name]
  run = batches.jitted(loss_fn, **(usual | settings))
  return jax.tree.map(np.asarray, run(logps, batch))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(x64, name):
  for seed in range(3):
    logps, sets = _batch(seed)
    losses, grad, aux = _run(name, logps, sets)
    want, want_grad = _oracle(name, logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert (want_grad[:4, 0] < -1e-3).all() and (want_grad >= 0)[:, 1:].all()
    assert all(np.isfinite(x).all() and x.shape == (5,) for x in aux.values())


@pytest.mark.parametrize(
    "name, want, settings, rewards",
    [
        # beta (-8/4 + 9/3) - beta / 2 = 1
        ("simpo", np.log(1 + np.exp(-1)), {"gamma_beta_ratio": 0.5}, (-4, -6)),
        # alpha 1: r = 1 - 1/p = 1 - e^2 and 1 - e^3, times beta
        (
            "alphapo",
            np.log1p(np.exp(0.5 * (np.e**2 - np.e**3))),
            {"beta": 0.5, "alpha": 1.0, "gamma_beta_ratio": 0.0},
            (0.5 - 0.5 * np.e**2, 0.5 - 0.5 * np.e**3),
        ),
        # 1 - (-8 + 9) = 0 and 0.1 * 8; with margin 3: 2 more
        ("slic_hf", 0.8, {}, (-8, -9)),
        ("slic_hf", 2.8, {"margin": 3.0}, (-8, -9)),
        # 0.3 (-8 + 9) = 0.3 and 0.7 * 8 = 5.6
        ("cpo", np.log(1 + np.exp(-0.3)) + 5.6, {}, (-2.4, -2.7)),
    ],
)
def test_by_hand(x64, name, want, settings, rewards):
  logps, sets = _batch(0)
  logps[0, :2] = -8.0, -9.0
  sets.lengths[0, :2] = 4, 3
  losses, _, aux = _run(name, logps, sets, **settings)
  assert losses[0] == pytest.approx(want, abs=1e-12)
  assert aux["rewards/chosen"][0] == pytest.approx(rewards[0])
  assert aux["rewards/rejected"][0] == pytest.approx(rewards[1])
  assert aux["rewards/margins"][0] == pytest.approx(rewards[0] - rewards[1])
  assert aux["logps/chosen"][0] == -8.0 and aux["logps/rejected"][0] == -9.0


def test_odds_by_hand(x64):
  # p 1/2 and 1/4: odds 1 and 1/3, their ratio 3, sigmoid(log 3) = 3/4
  logps, sets = _batch(0)
  sets.lengths[0, :2] = 4, 3
  logps[0, :2] = 4 * np.log(1 / 2), 3 * np.log(1 / 4)
  losses, _, aux = _run("orpo", logps, sets)
  assert losses[0] == pytest.approx(np.log(2) + 0.3 * np.log(4 / 3), abs=1e-12)
  assert aux["rewards/chosen"][0] == pytest.approx(0.0, abs=1e-12)
  assert aux["rewards/rejected"][0] == pytest.approx(-np.log(3))
  # sigmoid of the log-odds is p: 1/2 and 1 - 1/4
  losses, _, _ = _run("asft", logps, sets)
  want = np.log(2) + 0.3 * (np.log(2) + np.log(4 / 3))
  assert losses[0] == pytest.approx(want, abs=1e-12)


def test_alphapo_at_zero_is_simpo(x64):
  logps, sets = _batch(1)
  want, want_grad, want_aux = _run("simpo", logps, sets)
  for alpha, tolerance in ((0.0, 1e-14), (1e-8, 1e-6), (-1e-8, 1e-6)):
    losses, grad, aux = _run(
        "alphapo", logps, sets, beta=2.0, alpha=alpha, gamma_beta_ratio=0.4
    )
    np.testing.assert_allclose(losses, want, atol=tolerance)
    np.testing.assert_allclose(grad, want_grad, atol=tolerance)
    for key in aux:
      np.testing.assert_allclose(aux[key], want_aux[key], atol=tolerance)


def test_without_the_target_cpo_is_dpo_against_a_uniform_reference(x64):
  logps, sets = _batch(2)
  uniform = sets._replace(anchors={"ref": np.full(logps.shape, -7.0)})
  want, _, _ = pairwise.dpo_loss(Features(logps), uniform, None, beta=0.3)
  losses, _, _ = _run("cpo", logps, sets, sft_weight=0.0)
  np.testing.assert_allclose(losses, want, atol=1e-12)
  # ... and SimPO on completions of one token.
  ones = sets._replace(lengths=np.ones_like(sets.lengths))
  simpo, _, _ = _run("simpo", logps, ones, beta=0.3, gamma_beta_ratio=0.0)
  np.testing.assert_allclose(simpo, losses, atol=1e-12)


def test_without_the_target_slic_is_the_hinge_on_log_probabilities(x64):
  logps, sets = _batch(2)
  uniform = sets._replace(anchors={"ref": np.full(logps.shape, -7.0)})
  want, _, _ = pairwise.hinge_loss(Features(logps), uniform, None, beta=1.0)
  losses, _, _ = _run("slic_hf", logps, sets, sft_weight=0.0)
  np.testing.assert_allclose(losses, want, atol=1e-12)


def test_the_target_adds_the_supervised_loss(x64):
  logps, sets = batches.take_rows(*_batch(3), [0, 1, 2, 3])
  target, _, _ = supervised.sft_loss(Features(logps), sets, None)
  for name, weight in (("cpo", 0.7), ("slic_hf", 0.1)):
    losses, _, _ = _run(name, logps, sets)
    without, _, _ = _run(name, logps, sets, sft_weight=0.0)
    np.testing.assert_allclose(losses, without + weight * target, atol=1e-12)
  mean = target / sets.lengths[:, 0]
  for name in ("orpo", "asft"):
    losses, _, _ = _run(name, logps, sets, odds_weight=0.0)
    np.testing.assert_allclose(losses, mean, atol=1e-12)


def test_asft_is_a_bound_on_orpo_and_has_a_form_without_odds(x64):
  logps, sets = batches.take_rows(*_batch(4), [0, 1, 2, 3])
  losses, _, _ = _run("asft", logps, sets)
  orpo, _, _ = _run("orpo", logps, sets)
  assert (orpo <= losses).all()
  a_0, a_1 = (logps / np.maximum(sets.lengths, 1))[:, :2].T
  want = -1.3 * a_0 - 0.3 * np.log(1 - np.exp(a_1))
  np.testing.assert_allclose(losses, want, atol=1e-12)


@pytest.mark.parametrize("name", ["orpo", "asft"])
def test_odds_near_certainty_and_impossibility(name):
  # Certain chosen, certain rejected, both; then all but impossible ones.
  logps, sets = batches.take_rows(*_batch(5), [0] * 8)
  logps[:, :2] = [
      (0, -1), (-1, 0), (0, 0), (-1e-30, -1), (-1e-6, -1e-6), (-1e30, -1),
      (-1, -1e30), (-1e30, -1e30),
  ]
  losses, grad, aux = _run(name, logps, sets)
  assert np.isfinite(losses).all() and np.isfinite(grad).all()
  assert all(np.isfinite(x).all() for x in aux.values())
  assert losses.dtype == grad.dtype == np.float32
  assert losses[0] < losses[1] < losses[5]


def test_log_odds_keep_their_digits(x64):
  logps, sets = batches.take_rows(*_batch(5), [0] * 3)
  sets.lengths[:, :2] = 1
  logps[:, 0] = -1e-12, -1e-6, -800.0
  logps[:, 1] = np.log(0.5)
  _, _, aux = _run("orpo", logps, sets)
  np.testing.assert_allclose(
      aux["rewards/chosen"],
      [12 * np.log(10) - 5e-13, 6 * np.log(10) - 5e-7, -800.0], rtol=1e-12,
  )


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), rows=st.permutations(range(5)),
    name=st.sampled_from(list(CASES)),
)
def test_order_of_rows_and_further_slots_do_not_matter(seed, rows, name):
  with jax.enable_x64(True):
    logps, sets = _batch(seed)
    base, base_grad, base_aux = _run(name, logps, sets)
    moved, moved_sets = batches.take_rows(logps, sets, rows)
    moved[:, 2:] = moved[:, 1:3] - 1.0
    got, grad, aux = _run(name, moved, moved_sets)
    np.testing.assert_allclose(got, base[rows], atol=1e-12)
    np.testing.assert_allclose(grad, base_grad[rows], atol=1e-12)
    np.testing.assert_array_equal(grad[:, 2:], 0.0)
    for key in aux:
      np.testing.assert_allclose(aux[key], base_aux[key][rows], atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_extremes_are_finite_in_value_and_gradient(name):
  logps, sets = _batch(8)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[:2, :2] = (1.0, -1.0), (-1.0, 1.0)
  for lengths in (sets.lengths, np.minimum(sets.lengths, 1)):
    batch = sets._replace(lengths=lengths)
    for values in (signs * 1e4, signs * 1e5, -np.abs(signs) * 1e5, 0 * signs):
      values = np.where(sets.candidate_mask, values, np.nan)
      losses, grad, aux = _run(name, values, batch)
      assert np.isfinite(losses).all() and np.isfinite(grad).all()
      assert all(np.isfinite(x).all() for x in aux.values())
      assert losses.dtype == grad.dtype == np.float32
  nothing = batch._replace(candidate_mask=np.zeros_like(batch.candidate_mask))
  losses, grad, aux = _run(name, np.full_like(logps, np.nan), nothing)
  assert not losses.any() and not grad.any()
  assert not any(x.any() for x in aux.values())


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_pair_are_zero_without_gradient(name):
  logps, sets = _batch(10)
  role, mask = sets.role.copy(), sets.candidate_mask.copy()
  role[0, 1] = 0  # tied with the preferred one
  mask[1, 1] = False  # nothing to reject in slot 1
  mask[2, 0] = False  # no preferred one
  sets = sets._replace(role=role, candidate_mask=mask)
  losses, grad, aux = _run(name, np.where(mask, logps, np.nan), sets)
  for row in (0, 1, 2, 4):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[3] != 0.0 and grad[3].any()


def test_no_gradient_reaches_the_statistics():
  logps, sets = batches.take_rows(*_batch(11), [0, 1])
  for loss_fn, _, settings in CASES.values():
    def through_aux(logps, loss_fn=loss_fn, settings=settings):
      _, aux, _ = loss_fn(Features(logps), sets, None, **settings)
      return sum(jnp.sum(x) for x in aux.values())

    np.testing.assert_array_equal(jax.grad(through_aux)(logps), 0.0)
