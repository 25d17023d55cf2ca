"""KTO and BCO against a float64 oracle, their identities, ugly inputs."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import unpaired
from mcpo_jax.types import MISMATCHED_ID, Features

BETA = 0.3
SETTINGS = {
    "kto": {"desirable_weight": 0.8, "undesirable_weight": 1.3},
    "bco": {"moving_rate": 0.25},
}
LOSSES = {"kto": unpaired.kto_loss, "bco": unpaired.bco_loss}
FIRST = {"delta": np.float64(0.2)}


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _judge(sets, b):
  """(slot, good) of each judged completion of row b."""
  if not sets.candidate_mask[b, 0]:
    return []
  own = [
      j
      for j in range(sets.role.shape[1])
      if sets.candidate_mask[b, j]
      and sets.candidate_id[b, j] != MISMATCHED_ID
  ]
  if own == [0]:
    return [(0, not sets.scores[b, 0] <= 0)]
  return [(j, j == 0) for j in own if j == 0 or sets.role[b, j] == -1]


def _oracle(name, logps, sets, delta=FIRST["delta"]):
  """Loops over rows: losses [B], gradients [B, J], the baseline."""
  r = BETA * (logps - sets.anchors["ref"])
  judged = [_judge(sets, b) for b in range(len(r))]
  if name == "kto":
    other = [
        r[b, j]
        for b in range(r.shape[0])
        for j in range(r.shape[1])
        if sets.candidate_mask[b, 0] and sets.candidate_mask[b, j]
        and sets.candidate_id[b, j] == MISMATCHED_ID
    ]
    baseline = max(0.0, sum(other) / len(other)) if other else 0.0
  else:
    all_of_them = [r[b, j] for b, row in enumerate(judged) for j, _ in row]
    baseline = 0.75 * delta + 0.25 * sum(all_of_them) / len(all_of_them)
  losses, grads = np.zeros(len(r)), np.zeros_like(r)
  for b, row in enumerate(judged):
    for j, good in row:
      side = 1.0 if good else -1.0
      p = _sigmoid(side * (r[b, j] - baseline))
      if name == "kto":
        weight = 0.8 if good else 1.3
        loss, slope = weight * (1.0 - p), -weight * p * (1.0 - p)
      else:
        loss, slope = -np.log(p), -(1.0 - p)
      losses[b] += loss / len(row)
      grads[b, j] = BETA * side * slope / len(row)
  return losses, grads, baseline


def _batch(seed):
  """Rows 0 and 1 of several; 2 of one good, 3 of one bad; 4 lacks slot 0."""
  logps, sets = batches.random_batch(seed, num_slots=5)
  mask, role = sets.candidate_mask.copy(), sets.role.copy()
  ids, scores = sets.candidate_id.copy(), sets.scores.copy()
  mask[2:4, 1:] = False
  mask[:, 4] = True, False, True, True, True
  ids[:, 4], role[:, 4] = MISMATCHED_ID, 0
  scores[2:4, 0] = 1.0, 0.0
  rng = np.random.default_rng(seed)
  ref = rng.normal(-6.0, 2.0, logps.shape)
  logps = np.where(mask, rng.normal(-6.0, 2.0, logps.shape), np.nan)
  # The policy has moved towards the mismatched: z is above 0.
  logps[:, 4] = np.where(mask[:, 4], ref[:, 4] + 1.0 + rng.random(5), np.nan)
  return logps, sets._replace(
      candidate_mask=mask, role=role, candidate_id=ids, scores=scores,
      anchors={"ref": np.where(mask, ref, np.nan)},
  )


@functools.cache
def _jitted(name):
  @jax.jit
  def run(logps, ref, state, batch):
    def total(logps, ref):
      losses, aux, new = LOSSES[name](
          Features(logps), batch._replace(anchors={"ref": ref}), state,
          beta=BETA, **SETTINGS[name],
      )
      # Neither the statistics nor the state add anything to the gradient.
      constant = sum(jnp.sum(x) for x in jax.tree.leaves((aux, new)))
      return jnp.sum(losses) + constant, (losses, aux, new)

    (_, (losses, aux, new)), grads = jax.value_and_grad(
        total, (0, 1), has_aux=True
    )(logps, ref)
    return losses, grads, aux, new

  return run


def _run(name, logps, batch, state=FIRST):
  """Losses, gradient, statistics, state."""
  losses, (grad, through_ref), aux, new = jax.tree.map(
      np.asarray,
      _jitted(name)(
          logps, batch.anchors["ref"], state, batch._replace(anchors={})
      ),
  )
  np.testing.assert_array_equal(through_ref, 0.0)
  if name == "kto":
    assert new["delta"] == state["delta"].astype(new["delta"].dtype)
  return losses, grad, aux, new


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_oracle(x64, name):
  for seed in range(4):
    logps, sets = _batch(seed)
    losses, grad, aux, new = _run(name, logps, sets)
    want, want_grad, baseline = _oracle(name, logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert np.abs(want_grad[:4]).max(axis=1).min() > 1e-4
    np.testing.assert_allclose(
        aux["rewards/baseline"], baseline * np.array([1, 1, 1, 1, 0]),
        atol=1e-12,
    )
    if name == "bco":
      assert new["delta"] == pytest.approx(baseline, abs=1e-12)
    assert all(np.isfinite(x).all() and x.shape == (5,) for x in aux.values())


def _pairs(rewards, mismatched=None):
  """A batch of two pairs with these rewards."""
  logps, sets = _batch(0)
  mask = np.zeros_like(sets.candidate_mask)
  mask[:2, :2] = True
  mask[:2, 4] = mismatched is not None
  role = np.where(np.arange(5) == 0, 1, -1) * np.ones_like(sets.role)
  role[:, 4] = 0
  ref = np.full(logps.shape, -2.0)
  logps = ref.copy()
  logps[:2, :2] += np.array(rewards) / BETA
  if mismatched is not None:
    logps[:2, 4] += np.array(mismatched) / BETA
  return logps, sets._replace(
      candidate_mask=mask, role=role, anchors={"ref": ref}
  )


def test_kto_by_hand(x64):
  # z = max(0, (ln 4 + 0) / 2) = ln 2 in units of the reward
  logps, sets = _pairs(
      np.log([[4.0, 2.0], [2.0, 8.0]]), mismatched=np.log([4.0, 1.0])
  )
  losses, grad, aux, _ = _run("kto", logps, sets)
  # sigmoid of ln(4/2), ln(2/2), ln(8/2): 2/3, 1/2, 4/5
  assert losses[0] == pytest.approx((0.8 / 3 + 1.3 / 2) / 2, abs=1e-12)
  assert losses[1] == pytest.approx((0.8 / 2 + 1.3 * 4 / 5) / 2, abs=1e-12)
  assert aux["rewards/baseline"][0] == pytest.approx(np.log(2.0))
  # derivatives of the sigmoid: 2/9, 1/4
  np.testing.assert_allclose(
      grad[0, :2], BETA * np.array([-0.8 * 2 / 9, 1.3 / 4]) / 2, atol=1e-12
  )
  assert not grad[:, 4].any()


def test_kto_divergence_below_zero_is_zero_and_half_of_apo_zero(x64):
  rewards = np.array([[1.0, -0.5], [0.2, 0.7]])
  for mismatched in (None, [-3.0, 1.0]):
    logps, sets = _pairs(rewards, mismatched)
    losses, _, _ = unpaired.kto_loss(
        Features(logps), sets, None, beta=BETA,
        desirable_weight=1.0, undesirable_weight=1.0,
    )
    apo = 1 - _sigmoid(rewards[:, 0]) + _sigmoid(rewards[:, 1])
    np.testing.assert_allclose(losses[:2], apo / 2, atol=1e-12)


def test_bco_by_hand_over_two_visits(x64):
  logps, sets = _pairs([[2.0, -1.0], [1.0, 0.0]])
  state = unpaired.bco_state(7)
  assert state["delta"].shape == () and state["delta"].dtype == np.float32
  state = {"delta": np.float64(state["delta"])}
  # The mean reward is 1/2: delta = 1/8.
  losses, _, _, state = _run("bco", logps, sets, state)
  assert state["delta"] == pytest.approx(1 / 8)
  want = np.log1p(np.exp(-15 / 8)) + np.log1p(np.exp(-9 / 8))
  assert losses[0] == pytest.approx(want / 2, abs=1e-12)
  # 3/4 * 1/8 + 1/4 * 3/2
  logps, sets = _pairs([[2.0, 1.0], [2.0, 1.0]])
  losses, grad, _, state = _run("bco", logps, sets, state)
  assert state["delta"] == pytest.approx(15 / 32)
  want = np.log1p(np.exp(-49 / 32)) + np.log1p(np.exp(17 / 32))
  assert losses[0] == pytest.approx(want / 2, abs=1e-12)
  slopes = [-_sigmoid(-49 / 32), _sigmoid(17 / 32)]
  np.testing.assert_allclose(grad[0, :2], BETA * np.array(slopes) / 2)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_bco_moving_rate_at_its_ends(x64, rate):
  logps, sets = _pairs([[2.0, -1.0], [1.0, 0.0]])
  losses, _, state = unpaired.bco_loss(
      Features(logps), sets, FIRST, beta=BETA, moving_rate=rate
  )
  delta = 0.5 if rate else 0.2
  assert state["delta"] == pytest.approx(delta)
  want = np.log1p(np.exp(delta - 2)) + np.log1p(np.exp(-1 - delta))
  assert losses[0] == pytest.approx(want / 2, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_is_the_mean_of_two_sets_of_one(x64, name):
  rewards = np.array([1.0, -0.5])
  logps, sets = _pairs([rewards, rewards])
  pair, _, aux, _ = _run(name, logps, sets)
  logps[:2, 0] = -2.0 + rewards / BETA
  mask, scores = sets.candidate_mask.copy(), sets.scores.copy()
  mask[:, 1:] = False
  scores[:2, 0] = 1.0, 0.0
  apart, _, _, _ = _run(
      name, logps, sets._replace(candidate_mask=mask, scores=scores)
  )
  assert apart[:2].mean() == pytest.approx(pair[0], abs=1e-12)
  assert aux["rewards/margins"][0] == pytest.approx(1.5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_completion_is_bad_only_by_a_known_score(x64, name):
  logps, sets = _batch(1)
  sides = []
  for score in (1.0, 0.0, -2.0, np.nan):
    scores = sets.scores.copy()
    scores[2, 0] = score
    _, grad, _, _ = _run(name, logps, sets._replace(scores=scores))
    sides.append(np.sign(grad[2, 0]))
  assert sides == [-1.0, 1.0, 1.0, -1.0]
  # Beside others the role says it, whatever the score.
  scores = sets.scores.copy()
  scores[0] = -1.0, -2.0, -3.0, -4.0, 0.0
  _, grad, _, _ = _run(name, logps, sets._replace(scores=scores))
  np.testing.assert_array_equal(np.sign(grad[0]), [-1.0, 1.0, 1.0, 1.0, 0.0])


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), shift=st.floats(-200, 200),
    order=st.permutations([1, 2, 3, 4]), name=st.sampled_from(list(LOSSES)),
)
def test_invariances(seed, shift, order, name):
  with jax.enable_x64(True):
    logps, sets = _batch(seed)
    base, base_grad, base_aux, base_state = _run(name, logps, sets)
    rows, slots = [3, 0, 4, 2, 1], [0, *order]
    got, grad, _, state = _run(name, *batches.take_rows(logps, sets, rows))
    np.testing.assert_allclose(got, base[rows], atol=1e-12)
    np.testing.assert_allclose(grad, base_grad[rows], atol=1e-12)
    np.testing.assert_allclose(
        state["delta"], base_state["delta"], atol=1e-12
    )
    got, grad, aux, _ = _run(name, *batches.take_slots(logps, sets, slots))
    np.testing.assert_allclose(got, base, atol=1e-12)
    np.testing.assert_allclose(grad, base_grad[:, slots], atol=1e-12)
    for key in aux:
      np.testing.assert_allclose(aux[key], base_aux[key], atol=1e-12)
    got, grad, _, _ = _run(name, logps + shift, sets._replace(
        anchors={"ref": sets.anchors["ref"] + shift}
    ))
    np.testing.assert_allclose(got, base, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(grad, base_grad, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite_in_value_and_gradient(name):
  logps, sets = _batch(2)
  sets = sets._replace(lengths=np.minimum(sets.lengths, 1))
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[:2, 0], signs[0, 1:], signs[1, 1:] = (1.0, -1.0), -1.0, 1.0
  for size in (1e4, 1e5):
    for values in (signs * size, -np.full(logps.shape, size)):
      values = np.where(sets.candidate_mask, values, np.nan)
      losses, grad, aux, state = _run(
          name, values, sets, {"delta": np.float32(0.2)}
      )
      assert np.isfinite(losses).all() and np.isfinite(grad).all()
      assert all(np.isfinite(x).all() for x in aux.values())
      assert np.isfinite(state["delta"])
      assert losses.dtype == grad.dtype == state["delta"].dtype == np.float32


@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_judge_nothing_are_zero_and_move_nothing(name):
  logps, sets = _batch(3)
  mask = sets.candidate_mask.copy()
  mask[:, 0] = False
  losses, grad, aux, state = _run(
      name, logps, sets._replace(candidate_mask=mask)
  )
  assert not losses.any() and not grad.any()
  assert not any(value.any() for value in aux.values())
  assert state["delta"] == np.float32(FIRST["delta"])


@pytest.mark.parametrize("name", LOSSES)
def test_torch_autograd_agrees(x64, name):
  torch = pytest.importorskip("torch")
  logps, sets = _batch(4)
  _, _, baseline = _oracle(name, logps, sets)
  x = torch.tensor(np.nan_to_num(logps), requires_grad=True)
  shifted = BETA * (x - torch.tensor(np.nan_to_num(sets.anchors["ref"])))
  shifted = shifted - baseline
  rows = [_judge(sets, b) for b in range(len(logps))]
  want = torch.zeros((), dtype=torch.float64)
  for b, row in enumerate(rows):
    for j, good in row:
      if name == "kto":
        term = 0.8 - 0.8 * torch.sigmoid(shifted[b, j])
        if not good:
          term = 1.3 - 1.3 * torch.sigmoid(-shifted[b, j])
      else:
        side = 1.0 if good else -1.0
        term = -torch.nn.functional.logsigmoid(side * shifted[b, j])
      want = want + term / len(row)
  want.backward()
  losses, grad, _, _ = _run(name, logps, sets)
  assert losses.sum() == pytest.approx(want.item(), abs=1e-10)
  np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-9)
