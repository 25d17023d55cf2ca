"""Losses of several rounds: a float64 oracle, identities, ugly inputs."""


import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import pairwise, rounds
from mcpo_jax.types import Features

BETA = 0.3


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


# Oracles of one row: (lp, ref, prev, scores), two each -> (loss, gradient).


def _sppo(lp, ref, prev, scores, *, beta, form):
  if form == "hard":
    loss = (lp[0] - prev[0] - 1 / (2 * beta)) ** 2
    loss += (lp[1] - prev[1] + 1 / (2 * beta)) ** 2
    return loss, (
        2 * (lp[0] - prev[0] - 1 / (2 * beta)),
        2 * (lp[1] - prev[1] + 1 / (2 * beta)),
    )
  errors = [lp[i] - prev[i] - (scores[i] - 0.5) / beta for i in (0, 1)]
  return 0.5 * (errors[0] ** 2 + errors[1] ** 2), errors


def _inpo(lp, ref, prev, scores, *, beta, ratio):
  h = lp[0] - lp[1] - ratio * (ref[0] - ref[1])
  h -= (1 - ratio) * (prev[0] - prev[1])
  error = h - 1 / (2 * beta)
  return error**2, (2 * error, -2 * error)


def _dno(lp, ref, prev, scores, *, beta):
  h = beta * ((lp[0] - prev[0]) - (lp[1] - prev[1]))
  label = _sigmoid(scores[0] - scores[1])
  loss = -label * np.log(_sigmoid(h)) - (1 - label) * np.log(_sigmoid(-h))
  slope = beta * (_sigmoid(h) - label)
  return loss, (slope, -slope)


def _spin(lp, ref, prev, scores, *, beta):
  h = beta * ((lp[0] - prev[0]) - (lp[1] - prev[1]))
  slope = -beta * _sigmoid(-h)
  return np.log(1 + np.exp(-h)), (slope, -slope)


CASES = {
    "sppo_hard": (rounds.sppo_loss, _sppo, {"beta": BETA, "form": "hard"}),
    "sppo_win_rate": (
        rounds.sppo_loss, _sppo, {"beta": BETA, "form": "win_rate"},
    ),
    "inpo": (rounds.inpo_loss, _inpo, {"beta": BETA, "ratio": 1 / 3}),
    "dno": (rounds.dno_loss, _dno, {"beta": BETA}),
    "spin": (rounds.spin_loss, _spin, {"beta": BETA}),
}
SCORED = ["sppo_win_rate", "dno"]


def _oracle(name, logps, sets):
  """Rows one by one: (losses [B], gradients [B, J])."""
  _, row_loss, settings = CASES[name]
  losses, grads = np.zeros(len(logps)), np.zeros_like(logps)
  ref, prev = sets.anchors["ref"], sets.anchors["prev"]
  for b in range(len(logps)):
    if not sets.candidate_mask[b, :2].all() or sets.role[b, 1] != -1:
      continue
    if name in SCORED and np.isnan(sets.scores[b, :2]).any():
      continue
    losses[b], grads[b, :2] = row_loss(
        logps[b], ref[b], prev[b], sets.scores[b].astype(float), **settings
    )
  return losses, grads


def _batch(seed):
  """Two anchors that differ; scores in (0, 1), the chosen's above slot 1's."""
  logps, sets = batches.random_batch(seed)
  prev = sets.anchors["ref"] + np.random.default_rng(seed).normal(
      size=logps.shape
  )
  scores = _sigmoid(np.sort(sets.scores, axis=1)[:, ::-1]).astype(np.float32)
  return logps, sets._replace(
      anchors=sets.anchors | {"prev": prev}, scores=scores
  )


def _run(name, logps, batch, **settings):
  """(losses, gradient, aux); `settings` replace those of the case."""
  loss_fn, _, usual = CASES[name]
  run = batches.jitted(loss_fn, **(usual | settings))
  return jax.tree.map(np.asarray, run(logps, batch))


def _assert_equal(got, want, tolerance=1e-12):
  """Losses, gradients and statistics of two runs."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(x64, name):
  for seed in range(3):
    logps, sets = _batch(seed)
    losses, grad, aux = _run(name, logps, sets)
    want, want_grad = _oracle(name, logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert (np.abs(want_grad[:4, :2]) > 1e-4).all()
    assert all(np.isfinite(x).all() and x.shape == (5,) for x in aux.values())


@pytest.mark.parametrize(
    "name, want, settings",
    [
        # beta 1/4: (2 - 2)^2 + (-1 + 2)^2
        ("sppo_hard", 1.0, {"beta": 0.25}),
        # targets (0.75 - 0.5) * 4 = 1 and (0.5 - 0.5) * 4 = 0
        ("sppo_win_rate", 0.5 * (1 + 1), {"beta": 0.25}),
        # d (-5 + 6.5) and (-8 + 5.5), so (4 - 2)^2
        ("inpo", 4.0, {"beta": 0.25, "ratio": 0.5}),
        # margin 1/4 (2 + 1) = 3/4, label sigmoid(1/4)
        (
            "dno",
            _sigmoid(0.25) * np.log1p(np.exp(-0.75))
            + _sigmoid(-0.25) * np.log1p(np.exp(0.75)),
            {"beta": 0.25},
        ),
        ("spin", np.log1p(np.exp(-0.75)), {"beta": 0.25}),
    ],
)
def test_by_hand(x64, name, want, settings):
  logps, sets = _batch(0)
  logps[0, :2] = -5.0, -8.0
  sets.anchors["prev"][0, :2] = -7.0, -7.0  # d 2 and -1
  sets.anchors["ref"][0, :2] = -6.0, -4.0
  sets.scores[0, :2] = 0.75, 0.5
  losses, _, aux = _run(name, logps, sets, **settings)
  assert losses[0] == pytest.approx(want, abs=1e-12)
  rewards = (0.375, -0.625) if name == "inpo" else (0.5, -0.25)
  assert aux["rewards/chosen"][0] == pytest.approx(rewards[0])
  assert aux["rewards/rejected"][0] == pytest.approx(rewards[1])
  assert aux["rewards/margins"][0] == pytest.approx(rewards[0] - rewards[1])
  assert aux["rewards/accuracies"][0] == 1.0


def test_in_the_first_round_they_are_losses_against_the_reference(x64):
  logps, sets = _batch(1)
  sets = sets._replace(anchors=sets.anchors | {"prev": sets.anchors["ref"]})
  dpo = batches.jitted(pairwise.dpo_loss, beta=BETA)(logps, sets)
  ipo = batches.jitted(pairwise.ipo_loss, beta=BETA, length_average=False)
  _assert_equal(_run("spin", logps, sets), dpo)
  _assert_equal(_run("inpo", logps, sets), ipo(logps, sets))


def test_inpo_goes_from_the_round_before_to_the_reference(x64):
  logps, sets = _batch(2)
  ipo = batches.jitted(pairwise.ipo_loss, beta=BETA, length_average=False)
  _assert_equal(_run("inpo", logps, sets, ratio=1.0), ipo(logps, sets))
  prev = sets._replace(anchors=sets.anchors | {"ref": sets.anchors["prev"]})
  _assert_equal(_run("inpo", logps, sets, ratio=0.0), ipo(logps, prev))


def test_dno_is_dpo_with_labels_as_soft_as_the_scores(x64):
  logps, sets = _batch(3)
  scores = np.zeros_like(sets.scores)
  scores[:, 0] = np.log(4.0)  # sigmoid: 4/5
  prev = {"ref": sets.anchors["prev"]}
  cdpo, _, _ = pairwise.dpo_loss(
      Features(logps), sets._replace(anchors=prev), None,
      beta=BETA, label_smoothing=0.2,
  )
  losses, _, _ = _run("dno", logps, sets._replace(scores=scores))
  np.testing.assert_allclose(losses, cdpo, atol=1e-7)  # scores are float32
  scores[:, 0] = 1e4
  sure = _run("dno", logps, sets._replace(scores=scores))
  _assert_equal(sure, _run("spin", logps, sets))


def test_sppo_of_a_sure_win_is_half_of_the_hard_form(x64):
  logps, sets = _batch(4)
  rates = np.zeros_like(sets.scores)
  rates[:, 0] = 1.0
  losses, grad, aux = _run("sppo_win_rate", logps, sets._replace(scores=rates))
  hard, hard_grad, hard_aux = _run("sppo_hard", logps, sets)
  _assert_equal((2 * losses, 2 * grad, aux), (hard, hard_grad, hard_aux))


def test_sppo_refuses_another_form():
  logps, sets = _batch(4)
  with pytest.raises(ValueError, match="soft.*hard"):
    rounds.sppo_loss(Features(logps), sets, None, beta=BETA, form="soft")


@pytest.mark.parametrize("name", CASES)
def test_a_pair_without_a_score_is_none_where_scores_matter(name):
  logps, sets = _batch(5)
  base, base_grad, base_aux = _run(name, logps, sets)
  scores = sets.scores.copy()
  scores[0, 0] = scores[1, 1] = scores[2, 2] = scores[3, 3] = np.nan
  losses, grad, aux = _run(name, logps, sets._replace(scores=scores))
  kept = [2, 3] if name in SCORED else [0, 1, 2, 3]
  for row in range(4):
    factor = 1.0 if row in kept else 0.0
    assert losses[row] == factor * base[row]
    np.testing.assert_array_equal(grad[row], factor * base_grad[row])
    for key in aux:
      assert aux[key][row] == factor * base_aux[key][row]


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), shift=st.floats(-200, 200),
    rows=st.permutations(range(5)), name=st.sampled_from(list(CASES)),
)
def test_invariances(seed, shift, rows, name):
  with jax.enable_x64(True):
    logps, sets = _batch(seed)
    base, base_grad, base_aux = _run(name, logps, sets)
    moved, moved_sets = batches.take_rows(logps, sets, rows)
    moved[:, 2:] = moved[:, 1:3] - 1.0  # further slots go unread
    got, grad, aux = _run(name, moved, moved_sets)
    _assert_equal(
        (got, grad, aux),
        jax.tree.map(lambda x: x[np.array(rows)], (base, base_grad, base_aux)),
    )
    anchors = {key: ref + shift for key, ref in sets.anchors.items()}
    shifted = sets._replace(anchors=anchors)
    got, grad, _ = _run(name, logps + shift, shifted)
    _assert_equal((got, grad), (base, base_grad), 1e-9)
    if "sppo" not in name:  # which has no margin, but two targets
      got, grad, _ = _run(name, logps + shift, sets)
      _assert_equal((got, grad), (base, base_grad), 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_extremes_are_finite_in_value_and_gradient(name):
  logps, sets = _batch(8)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[:2, :2] = (1.0, -1.0), (-1.0, 1.0)
  one_token = sets._replace(lengths=np.minimum(sets.lengths, 1))
  for batch in (sets, one_token):
    for values in (signs * 1e4, signs * 1e5, -np.abs(signs) * 1e5):
      values = np.where(sets.candidate_mask, values, np.nan)
      losses, grad, aux = _run(name, values, batch)
      assert np.isfinite(losses).all() and np.isfinite(grad).all()
      assert all(np.isfinite(x).all() for x in aux.values())
      assert losses.dtype == grad.dtype == np.float32
  nothing = sets._replace(
      candidate_mask=np.zeros_like(sets.candidate_mask),
      scores=np.full_like(sets.scores, np.nan),
  )
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
  hide = lambda x: np.where(mask, x, np.nan)
  sets = sets._replace(
      role=role, candidate_mask=mask, scores=hide(sets.scores),
      anchors={key: hide(ref) for key, ref in sets.anchors.items()},
  )
  losses, grad, aux = _run(name, hide(logps), sets)
  for row in (0, 1, 2, 4):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[3] != 0.0 and grad[3].any()


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_reaches_anchors_scores_or_statistics(name):
  loss_fn, _, settings = CASES[name]
  logps, sets = batches.take_rows(*_batch(11), [0, 1])

  @jax.jit
  def grads(logps, anchors, scores):
    def run(logps, anchors, scores):
      batch = sets._replace(anchors=anchors, scores=scores)
      losses, aux, _ = loss_fn(Features(logps), batch, None, **settings)
      return jnp.sum(losses), sum(jnp.sum(x) for x in aux.values())

    constants = jax.grad(lambda *x: run(*x)[0], (1, 2))(logps, anchors, scores)
    aux = jax.grad(lambda x: run(x, anchors, scores)[1])(logps)
    return constants, aux

  for grad in jax.tree.leaves(grads(logps, sets.anchors, sets.scores)):
    np.testing.assert_array_equal(grad, 0.0)
