"""The discovered losses against float64 oracles, by hand, by identities."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import objectives_batches as batches
import objectives_pair_cases as pair_cases
import pytest
from objectives_pair_cases import Case, pair_batch

from mcpo_jax.objectives import discovered, pairwise
from mcpo_jax.types import Features

BETA = 0.3
# Small enough that x / 0.05 of a batch of random pairs is of order 1.
SMALL = 0.02


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _log(x):
  """(value, slope) of the logistic loss."""
  return -np.log(_sigmoid(x)), -_sigmoid(-x)


def _hinge(x):
  return (1.0 - x, -1.0) if x < 1.0 else (0.0, 0.0)


def _of_margins(batch_loss):
  """Oracle of a loss of all x = beta h: values [N], slopes [N] of their sum."""
  @functools.wraps(batch_loss)
  def oracle(rows, *, beta, **settings):
    x = [beta * (row.ratios[0] - row.ratios[1]) for row in rows]
    values, slopes = batch_loss(x, rows, **settings)
    return [
        (value, beta * slope, -beta * slope)
        for value, slope in zip(values, slopes, strict=True)
    ]

  return oracle


def _each(margin_loss):
  """The same of a loss of one x: margin_loss gives (value, slope)."""
  @_of_margins
  def oracle(x, rows, **settings):
    pairs = zip(x, rows, strict=True)
    return np.transpose([margin_loss(*pair, **settings) for pair in pairs])

  return oracle


@_each
def _discopop(x, row, *, tau):
  m = _sigmoid(x / tau)
  (a, da), b = _log(x), np.exp(-x)
  return (1 - m) * a + m * b, (
      (1 - m) * da - m * b + m * (1 - m) / tau * (b - a)
  )


@_each
def _padll(x, row):
  value, slope = _log(x)
  decay = 0.9 * (1 - 0.5 * (x < 0))
  return decay * value, decay * slope


@_each
def _cell(x, row):
  value, slope = _log(x)
  return (value + np.exp(-x)) / 2, (slope - np.exp(-x)) / 2


@_each
def _pfl(x, row):
  if row.logps[0] > row.logps[1]:
    return np.array(_log(x)) / 2
  return np.array(_hinge(x)) * 2


def _spread(y):
  """(mean, unbiased variance, its slopes) by hand."""
  n, mean = len(y), sum(y) / len(y)
  variance = sum((value - mean) ** 2 for value in y) / (n - 1)
  return mean, variance, [2 * (value - mean) / (n - 1) for value in y]


@_of_margins
def _dbaql(x, rows):
  _, variance, slopes = _spread([value / 0.05 for value in x])
  c, out, through_c = _sigmoid(variance), [], 0.0
  for value in x:
    (a, da), b = _log(value / 0.9), np.exp(-0.9 * value)
    out.append((c * a + (1 - c) * b, c * da / 0.9 - (1 - c) * 0.9 * b))
    through_c += c * (1 - c) * (a - b)
  values, direct = zip(*out, strict=True)
  return values, np.array(direct) + through_c * np.array(slopes) / 0.05


def _with_quantile(x, y, k, slopes_of_k, weight):
  """Blend of logistic and hinge; weight(y - k) gives (value, slope)."""
  values, slopes, through_k = [], [], 0.0
  for one, scaled in zip(x, y, strict=True):
    w, dw = weight(scaled - k)
    (a, da), (b, db) = _log(one), _hinge(one)
    values.append(w * a + (1 - w) * b)
    slopes.append(w * da + (1 - w) * db + dw * (a - b) / 0.05)
    through_k -= dw * (a - b)
  return values, np.array(slopes) + through_k * np.array(slopes_of_k) / 0.05


@_of_margins
def _aql(x, rows):
  y = [value / 0.05 for value in x]
  s = _sigmoid(sum(y) / len(y))
  slopes_of_k = [0.01 * s * (1 - s) / len(y) for _ in y]

  def weight(gap):
    w = _sigmoid(-gap)
    return w, -w * (1 - w)

  return _with_quantile(x, y, 0.5 + 0.01 * (s - 0.5), slopes_of_k, weight)


@_of_margins
def _aqfl(x, rows):
  y, n = [value / 0.05 for value in x], len(x)
  mean, variance, slopes = _spread(y)
  root, s = np.sqrt(variance), _sigmoid(mean)
  wrong = sum(_sigmoid(-value) for value in y) / n
  k = root * wrong
  k += 0.05 * (s - k)
  slopes_of_k = [
      0.95 * slope / (2 * root) * wrong
      - 0.95 * root * _sigmoid(value) * _sigmoid(-value) / n
      + 0.05 * s * (1 - s) / n
      for value, slope in zip(y, slopes, strict=True)
  ]

  def weight(gap):
    w = _sigmoid(0.1 * abs(gap))
    return w, w * (1 - w) * 0.1 * np.sign(gap)

  return _with_quantile(x, y, k, slopes_of_k, weight)


CASES = {
    "discopop": Case(discovered.discopop_loss, _discopop, beta=BETA, tau=0.5),
    "dbaql": Case(discovered.dbaql_loss, _dbaql, beta=SMALL),
    "aql": Case(discovered.aql_loss, _aql, beta=SMALL),
    "aqfl": Case(discovered.aqfl_loss, _aqfl, beta=SMALL),
    "padll": Case(discovered.padll_loss, _padll, beta=BETA),
    "cell": Case(discovered.cell_loss, _cell, beta=BETA),
    "pfl": Case(discovered.pfl_loss, _pfl, beta=BETA),
}
DPO = Case(pairwise.dpo_loss, None, beta=BETA)
HINGE = Case(pairwise.hinge_loss, None, beta=BETA)


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


# One pair with x = beta h = log 3: logistic log(4/3), exponential 1/3. Alone in
# its batch its variance is 0.
LOG3 = np.log(3.0)
LOG43 = np.log(4 / 3)
BY_HAND = {
    "discopop": ({"tau": 1.0}, 0.25 * LOG43 + 0.75 / 3),
    "dbaql": ({}, (np.log(1 + 3 ** (-1 / 0.9)) + 3**-0.9) / 2),
    "padll": ({}, 0.9 * LOG43),
    "cell": ({}, (LOG43 + 1 / 3) / 2),
    "pfl": ({}, LOG43 / 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(x64, name):
  settings, want = BY_HAND[name]
  logps, sets = pair_batch((-5.0, -7.0), (-6.0, -4.0))  # h = 1 + 3
  losses, _, _ = CASES[name].loss_fn(
      Features(logps), sets, None, beta=LOG3 / 4, **settings
  )
  assert losses[0] == pytest.approx(want, abs=1e-12)


def test_the_wrong_way_round_by_hand(x64):
  # x = -log 3: logistic log 4, hinge 1 + log 3
  logps, sets = pair_batch((-7.0, -5.0), (-4.0, -6.0))
  for name, want in (
      ("padll", 0.45 * np.log(4.0)), ("pfl", 2.0 + 2.0 * LOG3),
  ):
    losses, _, _ = CASES[name].loss_fn(
        Features(logps), sets, None, beta=LOG3 / 4
    )
    assert losses[0] == pytest.approx(want, abs=1e-12)


def test_quantile_losses_by_hand(x64):
  # Alone at x = 0: logistic log 2, hinge 1.
  logps, sets = pair_batch((-5.0, -7.0), (-5.0, -7.0))
  for name, weight in (
      ("aql", _sigmoid(0.5)),  # the mean is 0, the quantile stays at 1/2
      ("aqfl", _sigmoid(0.1 * 0.05 * 0.5)),  # no spread: 0.05 sigmoid(0)
  ):
    losses, _, _ = CASES[name].loss_fn(Features(logps), sets, None, beta=BETA)
    want = weight * np.log(2.0) + (1 - weight)
    assert losses[0] == pytest.approx(want, abs=1e-12)


def test_discopop_is_cell_at_infinite_width_and_its_parts_at_none(x64):
  logps, sets = pair_cases.random_batch(4)
  wide = Case(discovered.discopop_loss, None, beta=BETA, tau=1e12)
  np.testing.assert_allclose(
      wide.run(logps, sets)[0], CASES["cell"].run(logps, sets)[0], atol=1e-9
  )
  narrow = Case(discovered.discopop_loss, None, beta=BETA, tau=1e-6)
  logistic, _, aux = DPO.run(logps, sets)
  x = aux["rewards/margins"]
  want = np.where(x > 0, np.exp(-x), logistic)
  np.testing.assert_allclose(
      narrow.run(logps, sets)[0][:3], want[:3], atol=1e-9
  )


def test_padll_and_pfl_are_multiples_of_their_parts(x64):
  logps, sets = pair_cases.random_batch(4)
  logistic, _, aux = DPO.run(logps, sets)
  hinge, _, _ = HINGE.run(logps, sets)
  np.testing.assert_allclose(
      CASES["padll"].run(logps, sets)[0],
      np.where(aux["rewards/margins"] < 0, 0.45, 0.9) * logistic, atol=1e-12,
  )
  right = aux["logps/chosen"] > aux["logps/rejected"]
  np.testing.assert_allclose(
      CASES["pfl"].run(logps, sets)[0],
      np.where(right, logistic / 2, 2 * hinge), atol=1e-12,
  )


@pytest.mark.parametrize("name", ["aql", "aqfl"])
def test_quantile_losses_lie_between_logistic_and_hinge(x64, name):
  logps, sets = pair_cases.random_batch(4)
  scaled = logps * SMALL / BETA
  ref = sets._replace(
      anchors={"ref": sets.anchors["ref"] * SMALL / BETA}
  )
  parts = [case.run(scaled, ref)[0] for case in (DPO, HINGE)]
  losses, _, _ = CASES[name].run(logps, sets)
  assert (losses >= np.minimum(*parts) - 1e-12).all()
  assert (losses <= np.maximum(*parts) + 1e-12).all()


def test_dbaql_of_a_spread_batch_is_dpo(x64):
  logps, sets = pair_cases.random_batch(4, scale=30.0)
  case = Case(discovered.dbaql_loss, None, beta=0.9 * BETA)
  losses, grad, _ = case.run(logps, sets)
  want, want_grad, _ = DPO.run(logps, sets)
  np.testing.assert_allclose(losses, want, atol=1e-9)
  np.testing.assert_allclose(grad, want_grad, atol=1e-9)


@pytest.mark.parametrize("name", ["dbaql", "aql", "aqfl"])
def test_pairs_alike_are_finite_and_the_batch_matters(x64, name):
  logps, sets = pair_cases.random_batch(4)
  logps[:, :2], sets.anchors["ref"][:, :2] = (-5.0, -7.0), (-6.0, -4.0)
  alike, grad, _ = CASES[name].run(logps, sets)
  assert np.isfinite(alike).all() and np.isfinite(grad).all()
  logps[4, 0] += 50.0
  other, _, _ = CASES[name].run(logps, sets)
  assert abs(other[0] - alike[0]) > 1e-6
  logps[4, 0] -= 50.0
  logps[3, 0] += 50.0  # no pair: no part of the statistics
  np.testing.assert_allclose(CASES[name].run(logps, sets)[0], alike)
