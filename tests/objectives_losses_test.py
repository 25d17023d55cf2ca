"""Every loss against a float64 oracle, its identities and its ugly inputs."""


import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import pairwise, reference_free, softmax, supervised
from mcpo_jax.types import Features

BETA = 0.3


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _oracle(row_loss):
  """Loops over rows; row_loss gets one row, without its masked slots' values.

  It returns (loss, gradient [J] with respect to the logps).
  """
  def run(logps, sets, **settings):
    losses, grads = np.zeros(len(logps)), np.zeros_like(logps)
    for b in range(len(logps)):
      if not sets.candidate_mask[b, 0]:
        continue
      negatives = [
          j
          for j in range(1, logps.shape[1])
          if sets.candidate_mask[b, j] and sets.role[b, j] == -1
      ]
      losses[b], grads[b] = row_loss(
          logps[b], sets.anchors["ref"][b], sets.lengths[b],
          sets.multiplicity[b], negatives, **settings,
      )
    return losses, grads

  return run


@_oracle
def _rnce(logps, ref, lengths, count, negatives, *, beta):
  grad, total = np.zeros_like(logps), 1.0
  for i in negatives:
    grad[i] = count[i] * np.exp(beta * (logps[i] - ref[i] - logps[0] + ref[0]))
    total += grad[i]
  grad *= beta / total
  grad[0] = -grad.sum()
  return np.log(total), grad


@_oracle
def _cd(logps, ref, lengths, count, negatives, *, beta, include_preferred, p_0):
  grad, loss = np.zeros_like(logps), 0.0
  factor = 1.0 if include_preferred else 1.0 - p_0
  for i in negatives:
    share = factor * beta / (len(logps) - 1)
    loss += share * (logps[i] - ref[i] - logps[0] + ref[0])
    grad[i] += share
    grad[0] -= share
  return loss, grad


def _pair(loss_and_slope):
  """(d_0, d_1, lengths) -> (loss, dloss/dd_0, dloss/dd_1), if slot 1 is one."""
  @_oracle
  def run(logps, ref, lengths, count, negatives, **settings):
    grad = np.zeros_like(logps)
    if 1 not in negatives:
      return 0.0, grad
    loss, grad[0], grad[1] = loss_and_slope(logps, ref, lengths, **settings)
    return loss, grad

  return run


@_pair
def _dpo(logps, ref, lengths, *, beta, label_smoothing=0.0):
  h = beta * (logps[0] - ref[0] - logps[1] + ref[1])
  e = label_smoothing
  loss = -(1 - e) * np.log(_sigmoid(h)) - e * np.log(_sigmoid(-h))
  slope = beta * (-(1 - e) * _sigmoid(-h) + e * _sigmoid(h))
  return loss, slope, -slope


@_pair
def _ipo(logps, ref, lengths, *, beta, length_average):
  n_0, n_1 = (lengths[0], lengths[1]) if length_average else (1, 1)
  gap = (logps[0] - ref[0]) / n_0 - (logps[1] - ref[1]) / n_1
  gap -= 1 / (2 * beta)
  return gap**2, 2 * gap / n_0, -2 * gap / n_1


@_pair
def _simpo(logps, ref, lengths, *, beta, gamma_beta_ratio):
  h = beta * (logps[0] / lengths[0] - logps[1] / lengths[1] - gamma_beta_ratio)
  slope = -beta * _sigmoid(-h)
  return -np.log(_sigmoid(h)), slope / lengths[0], -slope / lengths[1]


@_oracle
def _sft(logps, ref, lengths, count, negatives):
  return -logps[0], np.eye(len(logps))[0] * -1.0


CASES = {
    "rnce": (softmax.rnce_loss, _rnce, {"beta": BETA}),
    "cd": (
        softmax.cd_loss, _cd, {"beta": BETA, "include_preferred": True},
    ),
    "cd_out": (
        softmax.cd_loss, _cd, {"beta": BETA, "include_preferred": False},
    ),
    "dpo": (pairwise.dpo_loss, _dpo, {"beta": BETA}),
    "cdpo": (
        pairwise.dpo_loss, _dpo, {"beta": BETA, "label_smoothing": 0.2},
    ),
    "ipo": (
        pairwise.ipo_loss, _ipo, {"beta": BETA, "length_average": False},
    ),
    "ipo_mean": (
        pairwise.ipo_loss, _ipo, {"beta": BETA, "length_average": True},
    ),
    "simpo": (
        reference_free.simpo_loss, _simpo,
        {"beta": 2.0, "gamma_beta_ratio": 0.4},
    ),
    "sft": (supervised.sft_loss, _sft, {}),
}
CONTRAST = [name for name in CASES if name != "sft"]
# What a constant added to all logps of a prompt must not change.
SHIFT_FREE = ["rnce", "cd", "cd_out", "dpo", "cdpo", "ipo"]
P_0 = 0.3


def _run(name, logps, batch):
  loss_fn, _, settings = CASES[name]
  anchors = batch.anchors | {"preferred_weight": np.full(logps.shape, P_0)}
  run = batches.jitted(loss_fn, **settings)
  return jax.tree.map(
      np.asarray, run(logps, batch._replace(anchors=anchors)))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(x64, name):
  _, oracle, settings = CASES[name]
  if "cd" in name and "dpo" not in name:
    settings = settings | {"p_0": P_0}
  for seed in range(3):
    logps, sets = batches.random_batch(seed)
    losses, grad, aux = _run(name, logps, sets)
    want, want_grad = oracle(logps, sets, **settings)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert np.abs(want_grad[:3]).max() > 0.01
    assert all(np.isfinite(x).all() and x.shape == (5,) for x in aux.values())


def test_dpo_by_hand(x64):
  # margins beta * ((-5 + 6) - (-7 + 4)) = 0.3 * 4 = 1.2
  logps, sets = batches.random_batch(0)
  logps[0, :2] = -5.0, -7.0
  sets.anchors["ref"][0, :2] = -6.0, -4.0
  losses, grad, aux = _run("dpo", logps, sets)
  assert losses[0] == pytest.approx(0.2632825, abs=1e-7)
  assert grad[0, 0] == pytest.approx(-0.3 * 0.2314752, abs=1e-7)
  for key, want in {
      "rewards/chosen": 0.3, "rewards/rejected": -0.9, "rewards/margins": 1.2,
      "rewards/accuracies": 1.0, "logps/chosen": -5.0, "logps/rejected": -7.0,
      "candidates/negatives": 1.0,
  }.items():
    assert aux[key][0] == pytest.approx(want), key


def test_rnce_by_hand(x64):
  # rewards 0, log 2 (twice), log 3, log 4: 1 + 2 * 2 + 3 + 4 = 12
  logps, sets = batches.random_batch(0)
  sets.anchors["ref"][0] = -1.0
  logps[0] = -1.0 + np.log([1.0, 2.0, 3.0, 4.0]) / BETA
  sets.multiplicity[0] = 9, 2, 1, 1
  losses, grad, aux = _run("rnce", logps, sets)
  assert losses[0] == pytest.approx(np.log(12.0), abs=1e-12)
  np.testing.assert_allclose(
      grad[0], BETA * np.array([-11, 4, 3, 4]) / 12, atol=1e-12
  )
  assert aux["rewards/rejected"][0] == pytest.approx(np.log(24.0) / 3)
  assert aux["rewards/accuracies"][0] == 0.0


def test_ipo_is_zero_where_the_gap_is_its_target(x64):
  logps, sets = batches.random_batch(0)
  sets.anchors["ref"][0] = -9.0
  sets.lengths[0, :2] = 4, 2
  logps[0, :2] = -9.0 + 1 / (2 * BETA), -9.0
  assert _run("ipo", logps, sets)[0][0] == pytest.approx(0.0, abs=1e-20)
  logps[0, :2] = -9.0 + 4 * (1 / (2 * BETA) + 0.5), -9.0 + 2 * 0.5
  assert _run("ipo_mean", logps, sets)[0][0] == pytest.approx(0.0, abs=1e-20)


def test_rnce_with_one_negative_is_dpo(x64):
  logps, sets = batches.random_batch(3)
  sets = sets._replace(multiplicity=np.ones_like(sets.multiplicity))
  logps, sets = batches.take_slots(logps, sets, [0, 1])
  a, grad_a, aux_a = _run("rnce", logps, sets)
  b, grad_b, aux_b = _run("dpo", logps, sets)
  np.testing.assert_allclose(a, b, atol=1e-12)
  np.testing.assert_allclose(grad_a, grad_b, atol=1e-12)
  for key in aux_a:
    np.testing.assert_allclose(aux_a[key], aux_b[key], atol=1e-12)


def test_at_the_reference_losses_count_the_negatives(x64):
  logps, sets = batches.random_batch(4)
  sets = sets._replace(
      anchors={"ref": logps}, multiplicity=np.ones_like(sets.multiplicity)
  )
  losses, _, aux = _run("rnce", logps, sets)
  np.testing.assert_array_equal(aux["candidates/negatives"], [3, 2, 1, 3, 0])
  np.testing.assert_allclose(
      losses, np.log([4, 3, 2, 4, 1]), atol=1e-12
  )
  losses, _, _ = _run("dpo", logps, sets)
  np.testing.assert_allclose(losses[:4], np.log(2.0), atol=1e-12)


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), shift=st.floats(-200, 200),
    order=st.permutations([1, 2, 3]),
    name=st.sampled_from(list(CASES)),
)
def test_invariances(seed, shift, order, name):
  with jax.enable_x64(True):
    logps, sets = batches.random_batch(seed)
    base, base_grad, base_aux = _run(name, logps, sets)
    rows = [3, 0, 4, 2, 1]
    got, grad, aux = _run(name, *batches.take_rows(logps, sets, rows))
    np.testing.assert_allclose(got, base[rows], atol=1e-12)
    np.testing.assert_allclose(grad, base_grad[rows], atol=1e-12)
    if name in SHIFT_FREE:
      ref = sets.anchors["ref"] + shift
      for moved in (
          (logps + shift, sets),
          (logps, sets._replace(anchors={"ref": ref})),
      ):
        got, grad, _ = _run(name, *moved)
        np.testing.assert_allclose(got, base, atol=1e-12, rtol=1e-12)
        np.testing.assert_allclose(grad, base_grad, atol=1e-12)
    if name in ("rnce", "cd", "cd_out"):
      slots = [0, *order]
      got, grad, aux = _run(name, *batches.take_slots(logps, sets, slots))
      np.testing.assert_allclose(got, base, atol=1e-12)
      np.testing.assert_allclose(grad, base_grad[:, slots], atol=1e-12)
      for key in aux:
        np.testing.assert_allclose(aux[key], base_aux[key], atol=1e-12)


@pytest.mark.parametrize("name", ["rnce", "dpo", "simpo"])
def test_masked_copies_of_candidates_change_nothing(x64, name):
  logps, sets = batches.random_batch(5)
  base, base_grad, base_aux = _run(name, logps, sets)
  wide, wide_sets = batches.take_slots(logps, sets, [0, 1, 2, 3, 1, 0])
  mask = wide_sets.candidate_mask.copy()
  mask[:, 4:] = False
  got, grad, aux = _run(name, wide, wide_sets._replace(candidate_mask=mask))
  np.testing.assert_allclose(got, base, atol=1e-12)
  np.testing.assert_allclose(grad[:, :4], base_grad, atol=1e-12)
  np.testing.assert_array_equal(grad[:, 4:], 0.0)
  for key in aux:
    np.testing.assert_allclose(aux[key], base_aux[key], atol=1e-12)


def test_gradients_point_the_right_way(x64):
  logps, sets = batches.random_batch(6)
  for name in CONTRAST:
    _, grad, _ = _run(name, logps, sets)
    if "ipo" not in name and name != "cdpo":
      assert (grad[:4, 0] < 0).all() and (grad[:, 1:] >= 0).all(), name
    if name in SHIFT_FREE:
      np.testing.assert_allclose(grad.sum(1), 0.0, atol=1e-12)


def test_any_pair_is_at_most_the_whole_set(x64):
  logps, sets = batches.random_batch(7)
  whole, _, _ = _run("rnce", logps, sets)
  for slot in (1, 2, 3):
    pair, _, _ = _run("dpo", *batches.take_slots(logps, sets, [0, slot]))
    assert (pair <= whole + 1e-12).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1e4, 1e5])
def test_extremes_are_finite_in_value_and_gradient(name, size):
  logps, sets = batches.random_batch(8)
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[0] = 1.0, -1.0, -1.0, -1.0
  signs[1] = -1.0, 1.0, 1.0, 1.0
  for beta_logps in (signs * size, -np.full(logps.shape, size)):
    losses, grad, aux = _run(
        name, np.where(sets.candidate_mask, beta_logps, np.nan), sets
    )
    assert np.isfinite(losses).all() and np.isfinite(grad).all()
    assert all(np.isfinite(x).all() for x in aux.values())
    assert losses.dtype == grad.dtype == np.float32


def test_one_impossible_negative_adds_nothing(x64):
  logps, sets = batches.random_batch(9)
  sets = sets._replace(multiplicity=np.ones_like(sets.multiplicity))
  logps[0, 3] = -np.inf
  losses, grad, _ = _run("rnce", logps, sets)
  short, _, _ = _run("rnce", *batches.take_slots(logps, sets, [0, 1, 2]))
  assert losses[0] == pytest.approx(short[0], abs=1e-12)
  assert grad[0, 3] == 0.0 and np.isfinite(grad).all()


@pytest.mark.parametrize("name", CONTRAST)
def test_rows_without_a_negative_are_zero_without_gradient(name):
  logps, sets = batches.random_batch(10)
  role, mask = sets.role.copy(), sets.candidate_mask.copy()
  role[0, 1:] = 0  # all tied with the preferred one
  mask[1, 1:] = False  # nothing but the preferred one
  mask[2, 0] = False  # no preferred one
  sets = sets._replace(role=role, candidate_mask=mask)
  losses, grad, aux = _run(name, logps, sets)
  for row in (0, 1, 2, 4):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[3] != 0.0 and grad[3].any()


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_reaches_reference_or_statistics(name):
  loss_fn, _, settings = CASES[name]
  logps, sets = batches.random_batch(11)
  ref = np.nan_to_num(sets.anchors["ref"])
  weight = np.full(logps.shape, P_0)

  def through_anchors(ref, weight):
    batch = sets._replace(anchors={"ref": ref, "preferred_weight": weight})
    return jnp.sum(loss_fn(Features(logps), batch, None, **settings)[0])

  def through_aux(logps):
    batch = sets._replace(anchors={"ref": ref, "preferred_weight": weight})
    _, aux, _ = loss_fn(Features(logps), batch, None, **settings)
    return sum(jnp.sum(x) for x in aux.values())

  for grad in jax.grad(through_anchors, (0, 1))(ref, weight):
    np.testing.assert_array_equal(grad, 0.0)
  grad = jax.grad(through_aux)(np.nan_to_num(logps))
  np.testing.assert_array_equal(grad, 0.0)


def test_rnce_correction_concerns_slot_zero_too(x64):
  logps, sets = batches.random_batch(12)
  sets = sets._replace(multiplicity=np.ones_like(sets.multiplicity))
  rng = np.random.default_rng(0)
  mu, q = rng.normal(size=(2, *logps.shape))
  sets = sets._replace(
      anchors=sets.anchors | {"proposal_mu": mu, "proposal_q": q}
  )
  losses, _, _ = softmax.rnce_loss(
      Features(logps), sets, None, beta=BETA, corrected=True
  )
  logits = (BETA * (logps - sets.anchors["ref"]) + mu - q)[0]
  want = np.log(np.exp(logits).sum()) - logits[0]
  assert losses[0] == pytest.approx(want, abs=1e-12)


def test_shapes_are_checked_when_traced():
  logps, sets = batches.random_batch(13)
  with pytest.raises(AssertionError):
    softmax.rnce_loss(Features(logps[:, :3]), sets, None, beta=BETA)
  alone = batches.take_slots(logps, sets, [0])
  with pytest.raises(AssertionError):
    pairwise.dpo_loss(Features(alone[0]), alone[1], None, beta=BETA)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_torch_autograd_agrees(x64, loss_type):
  torch = pytest.importorskip("torch")
  logps, sets = batches.random_batch(14)
  logps, sets = batches.take_rows(logps, sets, [0, 1, 2, 3])
  x = torch.tensor(np.nan_to_num(logps), requires_grad=True)
  ratio = x - torch.tensor(np.nan_to_num(sets.anchors["ref"]))
  h = ratio[:, 0] - ratio[:, 1]
  want = {
      "sigmoid": lambda: -torch.nn.functional.logsigmoid(BETA * h),
      "ipo": lambda: (h - 1 / (2 * BETA)) ** 2,
  }[loss_type]()
  want.sum().backward()
  name = {"sigmoid": "dpo", "ipo": "ipo"}[loss_type]
  losses, grad, _ = _run(name, logps, sets)
  np.testing.assert_allclose(losses, want.detach().numpy(), atol=1e-10)
  np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-9)
