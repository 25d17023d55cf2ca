"""Losses on pairs against float64 oracles, by hand, and by their identities."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import objectives_batches as batches
import objectives_pair_cases as pair_cases
import pytest
from objectives_pair_cases import Case, each, pair_batch

from mcpo_jax.objectives import levels, pairwise, transport
from mcpo_jax.types import Features

BETA = 0.3


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _logistic(x, e=0.0):
  """(value, slope) of the smoothed logistic loss."""
  value = -(1 - e) * np.log(_sigmoid(x)) - e * np.log(_sigmoid(-x))
  return value, -(1 - e) * _sigmoid(-x) + e * _sigmoid(x)


def _of_margin(margin_loss):
  """Oracle of a loss of x = beta h: margin_loss gives (value, slope in x)."""
  @each
  def oracle(row, *, beta, **settings):
    x = beta * (row.ratios[0] - row.ratios[1])
    value, slope = margin_loss(x, row, **settings)
    return value, beta * slope, -beta * slope

  return oracle


@_of_margin
def _dpo(x, row, *, label_smoothing=0.0):
  return _logistic(x, label_smoothing)


@_of_margin
def _robust_dpo(x, row, *, label_smoothing):
  e = label_smoothing
  value = -(1 - e) * np.log(_sigmoid(x)) + e * np.log(_sigmoid(-x))
  slope = -(1 - e) * _sigmoid(-x) - e * _sigmoid(x)
  return value / (1 - 2 * e), slope / (1 - 2 * e)


@_of_margin
def _hinge(x, row):
  return (1 - x, -1.0) if x < 1 else (0.0, 0.0)


def _rso(rows, *, form, beta):
  return {"sigmoid": _dpo, "hinge": _hinge}[form](rows, beta=beta)


@_of_margin
def _exo_pair(x, row, *, label_smoothing):
  q, e = _sigmoid(x), label_smoothing
  value = q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)
  return value, q * (1 - q) * (x - np.log((1 - e) / e))


@_of_margin
def _reward_rpo(x, row, *, reward_scale, form):
  gap = reward_scale * (row.scores[0] - row.scores[1])
  a, b = _sigmoid(gap), _sigmoid(x)
  if form == "squared":
    return (x - gap) ** 2, 2 * (x - gap)
  if form == "backward":
    value = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
    return value, b - a
  value = b * np.log(b / a) + (1 - b) * np.log((1 - b) / (1 - a))
  return value, b * (1 - b) * (x - gap)


@_of_margin
def _r_dpo(x, row, *, length_weight):
  return _logistic(x + length_weight * (row.lengths[0] - row.lengths[1]))


@each
def _ipo(row, *, beta, length_average):
  n = row.lengths if length_average else np.ones(2)
  gap = row.ratios[0] / n[0] - row.ratios[1] / n[1] - 1 / (2 * beta)
  return gap**2, 2 * gap / n[0], -2 * gap / n[1]


@each
def _sigmoid_norm(row, *, beta):
  n = row.lengths
  value, slope = _logistic(beta * (row.ratios[0] / n[0] - row.ratios[1] / n[1]))
  return value, beta * slope / n[0], -beta * slope / n[1]


@each
def _f_dpo(row, *, beta, divergence, alpha):
  u = np.exp(row.ratios)
  slope_of_f, derivative = {
      "reverse_kl": (np.log(u) + 1, np.ones(2)),
      "forward_kl": (-1 / u, 1 / u),
      "js": (np.log(2 * u / (1 + u)), 1 / (1 + u)),
      "alpha": (-(u**-alpha) / alpha, u**-alpha),
  }[divergence]
  value, slope = _logistic(beta * (slope_of_f[0] - slope_of_f[1]))
  return value, beta * slope * derivative[0], -beta * slope * derivative[1]


@each
def _mirror_po(row, *, beta, potential, q):
  pi, ref = np.exp(row.logps), np.exp(row.ref)
  inside = np.logical_and(pi > 1e-8, pi < 1 - 1e-8)
  if potential == "log":
    g, derivative = np.log(pi) - np.log(ref), np.ones(2)
  else:
    pi, ref = np.clip([pi, ref], 1e-8, 1 - 1e-8)
    g = q / (q - 1) * (pi ** (q - 1) - ref ** (q - 1))
    derivative = np.where(inside, q * pi ** (q - 1), 0.0)
  value, slope = _logistic(beta * (g[0] - g[1]))
  return value, beta * slope * derivative[0], -beta * slope * derivative[1]


@each
def _nca_pair(row, *, beta):
  r = beta * row.ratios
  value = -np.log(_sigmoid(r[0])) - 0.5 * np.log(_sigmoid(-r)).sum()
  slope = 0.5 * _sigmoid(r[0]) - _sigmoid(-r[0])
  return value, beta * slope, beta * 0.5 * _sigmoid(r[1])


def _bell(x):
  return _sigmoid(x) * _sigmoid(-x)


@each
def _apo_zero(row, *, beta):
  r = beta * row.ratios
  value = 1 - _sigmoid(r[0]) + _sigmoid(r[1])
  return value, -beta * _bell(r[0]), beta * _bell(r[1])


@each
def _apo_down(row, *, beta):
  r = beta * row.ratios
  value = _sigmoid(r[0]) + 1 - _sigmoid(r[0] - r[1])
  away = beta * _bell(r[0] - r[1])
  return value, beta * _bell(r[0]) - away, away


@each
def _rpo(row, *, beta, sft_weight, length_average):
  n = row.lengths[0] if length_average else 1
  value, slope = _logistic(beta * (row.ratios[0] - row.ratios[1]))
  value -= sft_weight * row.logps[0] / n
  return value, beta * slope - sft_weight / n, -beta * slope


@each
def _dpop(row, *, beta, penalty):
  d = row.ratios
  x = beta * (d[0] - d[1] - penalty * max(0.0, -d[0]))
  value, slope = _logistic(x)
  steep = 1 + penalty if d[0] < 0 else 1
  return value, beta * slope * steep, -beta * slope


@each
def _cal_dpo(row, *, beta):
  d, target = row.ratios, 1 / (2 * beta)
  value, slope = _logistic(d[0] - d[1])
  value += (d[0] - target) ** 2 + (d[1] + target) ** 2
  return value, slope + 2 * (d[0] - target), -slope + 2 * (d[1] + target)


def _aot(rows, *, beta, label_smoothing):
  gaps = [row.logps[0] - row.logps[1] for row in rows]
  sorted_ref = sorted(row.ref[0] - row.ref[1] for row in rows)
  out = []
  for gap in gaps:
    rank = sum(other < gap for other in gaps)
    value, slope = _logistic(beta * (gap - sorted_ref[rank]), label_smoothing)
    out.append((value, beta * slope, -beta * slope))
  return out


def _aot_unpaired(rows, *, beta, label_smoothing):
  chosen = [beta * row.ratios[0] for row in rows]
  rejected = [beta * row.ratios[1] for row in rows]
  out = np.zeros((len(rows), 3))
  for b, r in enumerate(chosen):
    rank = sum(other < r for other in chosen)
    other = sorted(range(len(rows)), key=lambda i: rejected[i])[rank]
    value, slope = _logistic(r - rejected[other], label_smoothing)
    out[b, 0], out[b, 1], out[other, 2] = value, beta * slope, -beta * slope
  return out.tolist()


def _f_dpo_case(divergence, alpha=0.5, beta=BETA):
  return Case(
      pairwise.f_dpo_loss, _f_dpo, beta=beta, divergence=divergence,
      alpha=alpha, shift_free=divergence == "reverse_kl",
  )


def _mirror_case(potential, q=0.5, beta=BETA):
  return Case(
      pairwise.mirror_po_loss, _mirror_po, beta=beta, potential=potential, q=q,
      shift_free=potential == "log",
  )


def _reward_rpo_case(form):
  return Case(
      pairwise.reward_rpo_loss, _reward_rpo, beta=BETA, reward_scale=0.7,
      form=form,
  )


CASES = {
    "dpo": Case(pairwise.dpo_loss, _dpo, beta=BETA),
    "cdpo": Case(pairwise.dpo_loss, _dpo, beta=BETA, label_smoothing=0.2),
    "robust_dpo": Case(
        pairwise.robust_dpo_loss, _robust_dpo, beta=BETA, label_smoothing=0.2
    ),
    "ipo": Case(pairwise.ipo_loss, _ipo, beta=BETA, length_average=False),
    "ipo_mean": Case(
        pairwise.ipo_loss, _ipo, beta=BETA, length_average=True,
        shift_free=False,
    ),
    "hinge": Case(pairwise.hinge_loss, _hinge, beta=BETA),
    "rso": Case(pairwise.rso_loss, _rso, beta=BETA, form="sigmoid"),
    "rso_hinge": Case(pairwise.rso_loss, _rso, beta=BETA, form="hinge"),
    "exo_pair": Case(
        pairwise.exo_pair_loss, _exo_pair, beta=BETA, label_smoothing=1e-3
    ),
    "reward_rpo": _reward_rpo_case("backward"),
    "reward_rpo_forward": _reward_rpo_case("forward"),
    "reward_rpo_squared": _reward_rpo_case("squared"),
    "r_dpo": Case(pairwise.r_dpo_loss, _r_dpo, beta=BETA, length_weight=0.4),
    "sigmoid_norm": Case(
        pairwise.sigmoid_norm_loss, _sigmoid_norm, beta=5.0, shift_free=False
    ),
    "f_dpo_reverse": _f_dpo_case("reverse_kl"),
    "f_dpo_forward": _f_dpo_case("forward_kl"),
    "f_dpo_js": _f_dpo_case("js"),
    "f_dpo_alpha": _f_dpo_case("alpha"),
    "mirror_log": _mirror_case("log"),
    "mirror_tsallis": _mirror_case("tsallis"),
    "nca_pair": Case(
        levels.nca_pair_loss, _nca_pair, beta=BETA, shift_free=False
    ),
    "apo_zero": Case(
        levels.apo_zero_loss, _apo_zero, beta=BETA, shift_free=False
    ),
    "apo_down": Case(
        levels.apo_down_loss, _apo_down, beta=BETA, shift_free=False
    ),
    "rpo": Case(
        levels.rpo_loss, _rpo, beta=BETA, sft_weight=0.5, length_average=False,
        shift_free=False,
    ),
    "rpo_mean": Case(
        levels.rpo_loss, _rpo, beta=BETA, sft_weight=0.5, length_average=True,
        shift_free=False,
    ),
    "dpop": Case(
        levels.dpop_loss, _dpop, beta=BETA, penalty=3.0, shift_free=False
    ),
    "cal_dpo": Case(
        levels.cal_dpo_loss, _cal_dpo, beta=BETA, shift_free=False
    ),
    "aot": Case(transport.aot_loss, _aot, beta=BETA, label_smoothing=0.1),
    "aot_unpaired": Case(
        transport.aot_unpaired_loss, _aot_unpaired, beta=BETA,
        label_smoothing=0.1, shift_free=False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(x64, name):
  pair_cases.check_oracle(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_rows_without_a_negative_are_zero_without_gradient(name):
  pair_cases.check_rows_without_a_negative(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_extremes_are_finite_in_value_and_gradient(name):
  pair_cases.check_extremes(CASES[name])


@pytest.mark.parametrize("name", CASES)
@batches.MANY
@hypothesis.given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_invariances(name, seed, shift):
  with jax.enable_x64(True):
    pair_cases.check_invariances(CASES[name], seed, shift)


# d_0 = log 3 and d_1 = -log 3: at beta = 1 the rewards have sigmoids 3/4 and
# 1/4, and h = log 9 has sigmoid 9/10. Lengths 4 and 2.
LOG3 = np.log(3.0)
BY_HAND = {
    "dpo": (pairwise.dpo_loss, {"beta": 1.0}, -np.log(0.9)),
    "robust_dpo": (
        pairwise.robust_dpo_loss, {"beta": 1.0, "label_smoothing": 0.1},
        (-0.9 * np.log(0.9) + 0.1 * np.log(0.1)) / 0.8,
    ),
    "ipo_mean": (  # log 3 / 4 + log 3 / 2 - 1
        pairwise.ipo_loss, {"beta": 0.5, "length_average": True},
        (0.75 * LOG3 - 1.0) ** 2,
    ),
    "hinge": (pairwise.hinge_loss, {"beta": 0.25}, 1.0 - LOG3 / 2),
    "rso": (pairwise.rso_loss, {"beta": 0.5, "form": "sigmoid"}, np.log(4 / 3)),
    "exo_pair": (  # coins of 9/10 and 3/4
        pairwise.exo_pair_loss, {"beta": 1.0, "label_smoothing": 0.25},
        0.9 * np.log(0.9 / 0.75) + 0.1 * np.log(0.1 / 0.25),
    ),
    "reward_rpo": (  # scores 2 and 1, scale log 3: a coin of 3/4
        pairwise.reward_rpo_loss,
        {"beta": 1.0, "reward_scale": LOG3, "form": "backward"},
        0.75 * np.log(0.75 / 0.9) + 0.25 * np.log(0.25 / 0.1),
    ),
    "reward_rpo_squared": (
        pairwise.reward_rpo_loss,
        {"beta": 1.0, "reward_scale": 2.0, "form": "squared"},
        (2 * LOG3 - 2.0) ** 2,
    ),
    "r_dpo": (  # log 9 - (log 3 / 2) * (4 - 2) = log 3
        pairwise.r_dpo_loss, {"beta": 1.0, "length_weight": -LOG3 / 2},
        np.log(4 / 3),
    ),
    "sigmoid_norm": (  # 4/3 * (log 3 / 4 + log 3 / 2) = log 3
        pairwise.sigmoid_norm_loss, {"beta": 4 / 3}, np.log(4 / 3),
    ),
    "f_dpo_forward": (  # -1/3 + 3
        pairwise.f_dpo_loss,
        {"beta": 1.0, "divergence": "forward_kl", "alpha": 0.5},
        np.log(1 + np.exp(-8 / 3)),
    ),
    "f_dpo_js": (  # log(2 * 3/4) - log(2 * 1/4) = log 3
        pairwise.f_dpo_loss, {"beta": 1.0, "divergence": "js", "alpha": 0.5},
        np.log(4 / 3),
    ),
    "f_dpo_alpha": (  # -2 / sqrt 3 + 2 sqrt 3 = 4 / sqrt 3
        pairwise.f_dpo_loss, {"beta": 1.0, "divergence": "alpha", "alpha": 0.5},
        np.log(1 + np.exp(-4 / np.sqrt(3))),
    ),
    "nca_pair": (
        levels.nca_pair_loss, {"beta": 1.0},
        -np.log(0.75) - 0.5 * np.log(0.25) - 0.5 * np.log(0.75),
    ),
    "apo_zero": (levels.apo_zero_loss, {"beta": 1.0}, 1 - 0.75 + 0.25),
    "apo_down": (levels.apo_down_loss, {"beta": 1.0}, 0.75 + 1 - 0.9),
    "rpo": (  # logps_0 = -8 over 4 tokens
        levels.rpo_loss,
        {"beta": 1.0, "sft_weight": 3.0, "length_average": True},
        -np.log(0.9) + 3.0 * 8.0 / 4,
    ),
    "cal_dpo": (
        levels.cal_dpo_loss, {"beta": 0.5},
        -np.log(0.9) + 2 * (LOG3 - 1.0) ** 2,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(x64, name):
  loss_fn, settings, want = BY_HAND[name]
  logps, sets = pair_batch(
      (-8.0, -5.0), (-8.0 - LOG3, -5.0 + LOG3), scores=(2.0, 1.0)
  )
  losses, _, _ = loss_fn(Features(logps), sets, None, **settings)
  assert losses[0] == pytest.approx(want, abs=1e-12)


def test_dpop_by_hand(x64):
  # d = -log 3, -log 27: h = log 9, of which the penalty takes one log 3
  case = Case(levels.dpop_loss, _dpop, beta=1.0, penalty=1.0)
  losses, _, _ = case.run(*pair_batch((-LOG3, -3 * LOG3), (0.0, 0.0)))
  assert losses[0] == pytest.approx(np.log(4 / 3), abs=1e-12)


def test_mirror_po_by_hand(x64):
  # At q = 1/2 g(x) = -1 / sqrt x: -2 + 3 for the chosen, -4 + 3 for the other
  logps, sets = pair_batch(-np.log([4.0, 16.0]), -np.log([9.0, 9.0]))
  losses, _, aux = _mirror_case("tsallis", beta=LOG3 / 2).run(logps, sets)
  assert losses[0] == pytest.approx(np.log(4 / 3), abs=1e-12)
  assert aux["rewards/margins"][0] == pytest.approx(LOG3)


def test_aot_by_hand(x64):
  # gaps of the policy 3, 1 and of the reference 5, -1: 3 meets 5, 1 meets -1
  logps, sets = batches.take_rows(*pair_batch((0.0, 0.0), (0.0, 0.0)), [0, 0])
  logps[:] = [[-1.0, -4.0], [-2.0, -3.0]]
  sets.anchors["ref"][:] = [[-4.0, -3.0], [-1.0, -6.0]]
  case = Case(transport.aot_loss, _aot, beta=LOG3 / 2, label_smoothing=0.0)
  np.testing.assert_allclose(
      case.run(logps, sets)[0], [np.log(4.0), np.log(4 / 3)], atol=1e-12
  )
  # d_0 = 3, -1 and d_1 = -1, 3: both ranks meet their own kind
  case = Case(
      transport.aot_unpaired_loss, _aot_unpaired, beta=LOG3 / 2,
      label_smoothing=0.0,
  )
  losses, grad, _ = case.run(logps, sets)
  np.testing.assert_allclose(losses, np.log(2.0), atol=1e-12)
  np.testing.assert_allclose(
      grad, LOG3 / 4 * np.array([[-1.0, 1.0], [-1.0, 1.0]]), atol=1e-12
  )


EQUAL = {
    "robust_dpo_without_noise": (
        CASES["dpo"],
        Case(pairwise.robust_dpo_loss, None, beta=BETA, label_smoothing=0.0),
    ),
    "rso_sigmoid": (CASES["dpo"], CASES["rso"]),
    "rso_hinge": (CASES["hinge"], CASES["rso_hinge"]),
    "f_dpo_reverse_kl": (CASES["dpo"], CASES["f_dpo_reverse"]),
    "f_dpo_alpha_of_1": (CASES["f_dpo_forward"], _f_dpo_case("alpha", 1.0)),
    "mirror_log": (CASES["dpo"], CASES["mirror_log"]),
    "r_dpo_of_0": (
        CASES["dpo"],
        Case(pairwise.r_dpo_loss, None, beta=BETA, length_weight=0.0),
    ),
    "rpo_of_0": (
        CASES["dpo"],
        Case(
            levels.rpo_loss, None, beta=BETA, sft_weight=0.0,
            length_average=True,
        ),
    ),
    "dpop_of_0": (
        CASES["dpo"], Case(levels.dpop_loss, None, beta=BETA, penalty=0.0),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_special_cases_are_other_losses(x64, name):
  one, other = EQUAL[name]
  logps, sets = pair_cases.random_batch(4)
  a, grad_a, _ = one.run(logps, sets)
  b, grad_b, _ = other.run(logps, sets)
  np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-12)
  np.testing.assert_allclose(grad_a, grad_b, atol=1e-12, rtol=1e-12)


def test_limits_of_divergences_and_potentials_are_dpo(x64):
  logps, sets = pair_cases.random_batch(4)
  want, want_grad, _ = CASES["dpo"].run(logps, sets)
  for case in (_f_dpo_case("alpha", 1e-7), _mirror_case("tsallis", 1 - 1e-7)):
    losses, grad, _ = case.run(logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-5)
    np.testing.assert_allclose(grad, want_grad, atol=1e-5)


def test_normalised_by_lengths_of_one_is_dpo(x64):
  logps, sets = pair_cases.random_batch(4)
  sets = sets._replace(lengths=np.minimum(sets.lengths, 1))
  case = Case(pairwise.sigmoid_norm_loss, None, beta=BETA)
  np.testing.assert_allclose(
      case.run(logps, sets)[0], CASES["dpo"].run(logps, sets)[0], atol=1e-12
  )
  np.testing.assert_allclose(
      CASES["ipo_mean"].run(logps, sets)[0], CASES["ipo"].run(logps, sets)[0],
      atol=1e-12,
  )


def test_exo_is_forward_reward_rpo_on_the_odds_of_the_label(x64):
  logps, sets = pair_cases.random_batch(4)
  e = CASES["exo_pair"].settings["label_smoothing"]
  sets.scores[:, :2] = 1.0, 0.0
  case = Case(
      pairwise.reward_rpo_loss, None, beta=BETA, form="forward",
      reward_scale=np.log((1 - e) / e),
  )
  np.testing.assert_allclose(
      case.run(logps, sets)[0], CASES["exo_pair"].run(logps, sets)[0],
      atol=1e-12,
  )


def test_reward_rpo_is_zero_where_the_margin_is_the_gap(x64):
  logps, sets = pair_cases.random_batch(4)
  logps[0, :2], sets.anchors["ref"][0, :2] = (-5.0, -7.0), (-6.0, -4.0)
  sets.scores[0, :2] = 12.0 / 7.0, 0.0  # 0.3 * 4 = 0.7 * 12 / 7
  for name in ("reward_rpo", "reward_rpo_forward", "reward_rpo_squared"):
    losses, grad, _ = CASES[name].run(logps, sets)
    np.testing.assert_allclose(losses[0], 0.0, atol=1e-12)
    np.testing.assert_allclose(grad[0], 0.0, atol=1e-6)


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_reward_rpo_skips_pairs_without_scores(score):
  logps, sets = pair_cases.random_batch(4)
  sets.scores[0, 1] = sets.scores[1, 0] = score
  sets.scores[2, 2] = score  # not of the pair
  for name in ("reward_rpo", "reward_rpo_forward", "reward_rpo_squared"):
    losses, grad, aux = CASES[name].run(logps, sets)
    assert not losses[:2].any() and not grad[:2].any()
    assert not any(value[:2].any() for value in aux.values())
    assert losses[2] > 0.0 and np.isfinite(losses).all()


def test_one_pair_alone_makes_optimal_transport_dpo(x64):
  logps, sets = pair_cases.random_batch(4)
  sets.role[1:, 1] = 0
  want, want_grad, _ = Case(
      pairwise.dpo_loss, None, beta=BETA, label_smoothing=0.1
  ).run(logps, sets)
  for name in ("aot", "aot_unpaired"):
    losses, grad, _ = CASES[name].run(logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-12)
    np.testing.assert_allclose(grad, want_grad, atol=1e-12)


def test_optimal_transport_sorts_each_sample_apart(x64):
  logps, sets = pair_cases.random_batch(4)
  base = CASES["aot"].run(logps, sets)[0]
  ref = sets.anchors["ref"].copy()
  ref[[0, 1, 2, 4]] = ref[[4, 2, 0, 1]]
  moved = sets._replace(anchors={"ref": ref})
  np.testing.assert_allclose(CASES["aot"].run(logps, moved)[0], base)


def test_mirror_po_does_not_move_what_is_too_unlikely(x64):
  logps, sets = pair_batch((-30.0, -3.0), (-31.0, -4.0))
  _, grad, _ = CASES["mirror_tsallis"].run(logps, sets)
  assert grad[0, 0] == 0.0 and grad[0, 1] > 0.0
  # It counts as 1e-8, where g is -1e4: -1 against the reference's -9999.
  logps, sets = pair_batch((-30.0, -3.0), (-2 * np.log(9999.0), -3.0))
  losses, _, _ = _mirror_case("tsallis", beta=LOG3).run(logps, sets)
  assert losses[0] == pytest.approx(np.log(4.0), abs=1e-8)
