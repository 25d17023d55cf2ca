"""Losses on lists against a float64 oracle, their identities, ugly inputs."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import listwise, pairwise, softmax
from mcpo_jax.types import MISMATCHED_ID, Features

BETA = 0.3


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _share(x, count):
  """count * exp(x), normalised."""
  terms = count * np.exp(x - x.max())
  return terms / terms.sum()


def _exo(s, score, count, *, reward_temperature):
  q, p = _share(s, count), _share(score / reward_temperature, count)
  loss = (q * (np.log(q) - np.log(p))).sum()
  return loss, q * (np.log(q) - np.log(p) - loss)


def _infonca(s, score, count, *, reward_temperature):
  p = _share(score / reward_temperature, count)
  log_z = np.log((count * np.exp(s)).sum())
  return -(p * (s - log_z)).sum(), _share(s, count) - p


def _nca(s, score, count, *, reward_temperature):
  p, share = _share(score / reward_temperature, count), count / count.sum()
  loss = -(p * np.log(_sigmoid(s)) + share * np.log(_sigmoid(-s))).sum()
  return loss, share * _sigmoid(s) - p * _sigmoid(-s)


def _plackett_luce(s, score, count):
  loss, slope = 0.0, np.zeros_like(s)
  for i in range(len(s)):
    below = [j for j in range(len(s)) if score[j] < score[i]]
    z = np.exp(s[i]) + sum(count[j] * np.exp(s[j]) for j in below)
    loss += count[i] * (np.log(z) - s[i])
    slope[i] += count[i] * (np.exp(s[i]) / z - 1.0)
    for j in below:
      slope[j] += count[i] * count[j] * np.exp(s[j]) / z
  return loss, slope


def _pairs(pair_weight):
  """Sum of weight(i, j, ...) * -log sigmoid(s_i - s_j) over R_i > R_j."""
  def run(s, score, count):
    loss, slope, total = 0.0, np.zeros_like(s), 0.0
    for i in range(len(s)):
      for j in range(len(s)):
        if score[i] > score[j]:
          w = pair_weight(i, j, s, score, count)
          loss -= w * np.log(_sigmoid(s[i] - s[j]))
          slope[i] -= w * _sigmoid(s[j] - s[i])
          slope[j] += w * _sigmoid(s[j] - s[i])
          total += w
    return loss, slope, total

  return run


def _all_pairs(s, score, count):
  run = _pairs(lambda i, j, s, score, count: count[i] * count[j])
  loss, slope, total = run(s, score, count)
  return loss / total, slope / total


def _lipo(s, score, count):
  rank = np.empty(len(s))
  rank[np.argsort(-s)] = np.arange(1, len(s) + 1)

  def weight(i, j, s, score, count):
    gain = abs(2.0 ** score[i] - 2.0 ** score[j])
    return gain * abs(1 / np.log(1 + rank[i]) - 1 / np.log(1 + rank[j]))

  return _pairs(weight)(s, score, count)[:2]


def _mse(s, score, count):
  return (count * (score - s) ** 2).sum(), 2 * count * (s - score)


def _cross_entropy(s, score, count):
  target = np.clip(score, 0.0, 1.0)
  loss = -target * np.log(_sigmoid(s)) - (1 - target) * np.log(_sigmoid(-s))
  return (count * loss).sum(), count * (_sigmoid(s) - target)


TEMPERATURE = {"reward_temperature": 0.7}
# name -> (loss, oracle on the rewards of a list, settings beside beta)
CASES = {
    "exo_reward": (listwise.exo_reward_loss, _exo, TEMPERATURE),
    "infonca": (listwise.infonca_loss, _infonca, TEMPERATURE),
    "nca": (listwise.nca_loss, _nca, TEMPERATURE),
    "plackett_luce": (listwise.plackett_luce_loss, _plackett_luce, {}),
    "lipo": (listwise.lipo_loss, _lipo, {}),
    "all_pairs": (listwise.all_pairs_loss, _all_pairs, {}),
    "pointwise_mse": (listwise.pointwise_loss, _mse, {"form": "mse"}),
    "pointwise_sigmoid": (
        listwise.pointwise_loss, _cross_entropy, {"form": "sigmoid"},
    ),
    "best_vs_rest": (listwise.best_vs_rest_loss, None, {}),
    "rrhf": (
        listwise.rrhf_loss, None, {"sft_weight": 0.6, "length_power": 0.8},
    ),
}
LISTS = [name for name in CASES if name != "best_vs_rest"]
CONTRAST = [name for name in LISTS if "pointwise" not in name]
# What a constant added to all logps of a prompt must not change.
SHIFT_FREE = [
    "exo_reward", "infonca", "plackett_luce", "lipo", "all_pairs",
    "best_vs_rest",
]


def _oracle(name, logps, sets):
  """Loops over rows: losses [B] and their gradients [B, J]."""
  _, on_list, settings = CASES[name]
  settings = {key: x for key, x in settings.items() if key != "form"}
  losses, grads = np.zeros(len(logps)), np.zeros_like(logps)
  for b in range(len(logps)):
    known = [
        j
        for j in range(logps.shape[1])
        if sets.candidate_mask[b, 0] and sets.candidate_mask[b, j]
        and sets.candidate_id[b, j] != MISMATCHED_ID
    ]
    listed = [j for j in known if not np.isnan(sets.scores[b, j])]
    score = sets.scores[b].astype(np.float64)
    count = sets.multiplicity[b].astype(np.float64)
    s = BETA * (logps[b] - sets.anchors["ref"][b])
    if name == "best_vs_rest":
      rest = [j for j in known if sets.role[b, j] == -1]
      total = sum(count[j] for j in rest)
      for j in rest:
        w = count[j] / total
        losses[b] -= w * np.log(_sigmoid(s[0] - s[j]))
        grads[b, j] = w * BETA * _sigmoid(s[j] - s[0])
        grads[b, 0] -= grads[b, j]
      continue
    if not listed or "pointwise" not in name and len(set(score[listed])) < 2:
      continue
    if name == "rrhf":
      size = sets.lengths[b] ** settings["length_power"]
      for i in listed:
        for j in listed:
          gap = logps[b, j] / size[j] - logps[b, i] / size[i]
          if score[i] > score[j] and gap > 0:
            losses[b] += count[i] * count[j] * gap
            grads[b, j] += count[i] * count[j] / size[j]
            grads[b, i] -= count[i] * count[j] / size[i]
      share = settings["sft_weight"] / sets.lengths[b, 0]
      losses[b] -= share * logps[b, 0]
      grads[b, 0] -= share
    else:
      losses[b], slope = on_list(
          s[listed], score[listed], count[listed], **settings
      )
      grads[b, listed] = BETA * slope
  return losses, grads


def _batch(seed, num_slots=5):
  """Two candidates level, one of unknown score, one of another prompt."""
  logps, sets = batches.random_batch(seed, num_slots=num_slots)
  scores, ids = sets.scores.copy(), sets.candidate_id.copy()
  role = sets.role.copy()
  scores[0, 2] = scores[0, 1]
  scores[3, 1] = np.nan
  ids[:, -1], role[:, -1] = MISMATCHED_ID, 0
  return logps, sets._replace(scores=scores, candidate_id=ids, role=role)


def _single(logps, sets, *, valid):
  """Multiplicity 1 and only the first slots valid."""
  mask = sets.candidate_mask.copy()
  mask[:, valid:] = False
  return logps, sets._replace(
      candidate_mask=mask, multiplicity=np.ones_like(sets.multiplicity)
  )


@functools.cache
def _jitted(name):
  loss_fn, _, settings = CASES[name]
  if name != "rrhf":
    settings = settings | {"beta": BETA}

  @jax.jit
  def run(logps, ref, batch):
    def total(logps, ref):
      losses, aux, state = loss_fn(
          Features(logps), batch._replace(anchors={"ref": ref}), "state",
          **settings,
      )
      assert state == "state"
      # The statistics add nothing to the gradient.
      statistics = sum(jnp.sum(x) for x in aux.values())
      return jnp.sum(losses) + statistics, (losses, aux)

    (_, (losses, aux)), grads = jax.value_and_grad(
        total, (0, 1), has_aux=True
    )(logps, ref)
    return losses, grads, aux

  return run


def _run(name, logps, batch):
  losses, (grad, through_ref), aux = jax.tree.map(
      np.asarray,
      _jitted(name)(logps, batch.anchors["ref"], batch._replace(anchors={})),
  )
  np.testing.assert_array_equal(through_ref, 0.0)
  return losses, grad, aux


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_oracle(x64, name):
  for seed in range(3):
    logps, sets = _batch(seed)
    losses, grad, aux = _run(name, logps, sets)
    want, want_grad = _oracle(name, logps, sets)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert np.abs(want_grad[:4]).max(axis=1).min() > 1e-3
    assert not grad[:, -1].any()
    assert all(np.isfinite(x).all() and x.shape == (5,) for x in aux.values())


def _hand(s, scores, *, lengths=1):
  """Four candidates with these rewards s, in row 0 of five slots."""
  logps, sets = _single(*_batch(0), valid=4)
  sets.anchors["ref"][0] = -1.0
  logps[0, :4] = -1.0 + np.array(s) / BETA
  sets.scores[0, :4] = scores
  sets.lengths[0, :4] = lengths
  return logps, sets


def test_plackett_luce_by_hand(x64):
  # exp(s) = 3, 4, 2, 1 in the order of the ranking:
  # 3/10 * 4/7 * 2/3 * 1/1 = 4/35
  logps, sets = _hand(np.log([3.0, 4.0, 2.0, 1.0]), [4.0, 3.0, 2.0, 1.0])
  losses, grad, _ = _run("plackett_luce", logps, sets)
  assert losses[0] == pytest.approx(np.log(35 / 4), abs=1e-12)
  # 3/10 - 1; 4/10 + 4/7 - 1; 2/10 + 2/7 + 2/3 - 1; 1/10 + 1/7 + 1/3
  want = BETA * np.array([-147, -6, 32, 121, 0]) / 210
  np.testing.assert_allclose(grad[0], want, atol=1e-12)


def test_softmax_losses_by_hand(x64):
  # softmax(s) = 1/2, 1/4, 1/8, 1/8; softmax(R / 0.7) = 1/4 each but for the
  # two in front: 3/8, 1/8, 1/4, 1/4
  logps, sets = _hand(
      np.log([4.0, 2.0, 1.0, 1.0]), 0.7 * np.log([3.0, 1.0, 2.0, 2.0])
  )
  # 3/8 ln 2 + 1/8 ln 4 + 2/4 ln 8 = (3 + 2 + 12) / 8 ln 2
  losses, grad, _ = _run("infonca", logps, sets)
  assert losses[0] == pytest.approx(17 / 8 * np.log(2), abs=1e-7)
  np.testing.assert_allclose(
      grad[0], BETA * np.array([1, 1, -1, -1, 0]) / 8, atol=1e-7
  )
  # 1/2 ln(4/3) + 1/4 ln 2 + 2/8 ln(1/2) = 1/2 ln(4/3)
  losses, _, _ = _run("exo_reward", logps, sets)
  assert losses[0] == pytest.approx(np.log(4 / 3) / 2, abs=1e-7)
  # sigmoid(s) = 4/5, 2/3, 1/2, 1/2
  losses, _, _ = _run("nca", logps, sets)
  good = 3 / 8 * np.log(5 / 4) + np.log(3 / 2) / 8 + np.log(2) / 2
  bad = (np.log(5) + np.log(3) + 2 * np.log(2)) / 4
  assert losses[0] == pytest.approx(good + bad, abs=1e-7)


def test_losses_on_pairs_by_hand(x64):
  # Rewards 0, ln 3, -1, -1 against scores 2, 1, 0, 0 and ids 0, 1, 2, 3.
  logps, sets = _hand([0.0, np.log(3.0), -1.0, -1.0], [2.0, 1.0, 0.0, 0.0])
  ls = lambda x: np.log(_sigmoid(x))
  first, second, third = ls(-np.log(3.0)), ls(1.0), ls(np.log(3.0) + 1.0)
  assert first == pytest.approx(-np.log(4.0))
  losses, _, _ = _run("all_pairs", logps, sets)
  want = -(first + 2 * second + 2 * third) / 5
  assert losses[0] == pytest.approx(want, abs=1e-12)
  losses, _, _ = _run("best_vs_rest", logps, sets)
  assert losses[0] == pytest.approx(-(first + 2 * second) / 3, abs=1e-12)
  # Ranks 2, 1, 3, 4; gains 3, 1, 0, 0; discounts ln 3, ln 2, ln 4, ln 5.
  losses, _, _ = _run("lipo", logps, sets)
  a, b, c, d = 1 / np.log([3.0, 2.0, 4.0, 5.0])
  want = -(
      2 * (b - a) * first + 3 * (a - c) * second + 3 * (a - d) * second
      + (b - c) * third + (b - d) * third
  )
  assert losses[0] == pytest.approx(want, abs=1e-12)


def test_pointwise_and_rrhf_by_hand(x64):
  logps, sets = _hand([0.0, 1.0, -1.0, 2.0], [1.0, 0.0, 0.5, 1.0])
  # 1 + 1 + 2.25 + 1
  assert _run("pointwise_mse", logps, sets)[0][0] == pytest.approx(5.25)
  ls = lambda x: np.log(_sigmoid(x))
  want = -ls(0.0) - ls(-1.0) - (ls(-1.0) + ls(1.0)) / 2 - ls(2.0)
  losses, _, _ = _run("pointwise_sigmoid", logps, sets)
  assert losses[0] == pytest.approx(want, abs=1e-12)
  # Two in the wrong order, by 1 and by 2 nats: logps -4, -3, -2, -6.
  logps, sets = _hand([0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 3.0, 2.0])
  logps[0, :4] = -4.0, -3.0, -2.0, -6.0
  losses, grad, _ = _run("rrhf", logps, sets)
  assert losses[0] == pytest.approx(1.0 + 2.0 + 0.6 * 4.0)
  np.testing.assert_allclose(grad[0], [-2.6, 1.0, 1.0, 0.0, 0.0], atol=1e-12)


def test_plackett_luce_on_distinct_scores_is_the_likelihood_of_the_ranking(x64):
  logps, sets = _single(*_batch(3), valid=4)
  sets.scores[0, :4] = 0.3, 2.0, -1.0, 0.9
  losses, _, _ = _run("plackett_luce", logps, sets)
  s = BETA * (logps - sets.anchors["ref"])[0, [1, 3, 0, 2]]
  want = sum(np.log(np.exp(s[k:]).sum()) - s[k] for k in range(4))
  assert losses[0] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", ["plackett_luce", "all_pairs", "best_vs_rest"])
def test_two_candidates_are_dpo(x64, name):
  logps, sets = _single(*_batch(4), valid=2)
  sets.scores[:, 0], sets.scores[:, 1] = 1.0, 0.0
  losses, grad, _ = _run(name, logps, sets)
  def total(logps):
    losses, _, _ = pairwise.dpo_loss(Features(logps), sets, None, beta=BETA)
    return jnp.sum(losses), losses

  want_grad, want = jax.grad(total, has_aux=True)(logps)
  np.testing.assert_allclose(losses, want, atol=1e-12)
  np.testing.assert_allclose(grad, want_grad, atol=1e-12)


def test_one_best_and_the_others_level_is_rnce(x64):
  logps, sets = _batch(5)
  sets = sets._replace(role=np.where(sets.role == 1, 1, -1).astype(np.int8))
  mask, scores = sets.candidate_mask.copy(), np.zeros_like(sets.scores)
  mask[:, -1] = False
  sets.multiplicity[:, 0], scores[:, 0] = 1, 1.0
  sets = sets._replace(candidate_mask=mask, scores=scores)
  rnce = lambda logps: softmax.rnce_loss(
      Features(logps), sets, None, beta=BETA
  )[0]
  grad = jax.grad(lambda logps: jnp.sum(rnce(logps)))(logps)
  got, got_grad, _ = _run("plackett_luce", logps, sets)
  np.testing.assert_allclose(got, rnce(logps), atol=1e-12)
  np.testing.assert_allclose(got_grad, grad, atol=1e-12)
  hard, _, _ = listwise.infonca_loss(
      Features(logps), sets, None, beta=BETA, reward_temperature=1e-3
  )
  np.testing.assert_allclose(hard, rnce(logps), atol=1e-12)


def test_nca_on_two_candidates_with_a_sure_label_is_its_pairwise_form(x64):
  logps, sets = _single(*_batch(6), valid=2)
  sets.scores[:, 0], sets.scores[:, 1] = 1.0, 0.0
  losses, _, _ = listwise.nca_loss(
      Features(logps), sets, None, beta=BETA, reward_temperature=1e-3
  )
  s = BETA * (logps - sets.anchors["ref"])[:4]
  ls = lambda x: np.log(_sigmoid(x))
  want = -ls(s[:, 0]) - ls(-s[:, 0]) / 2 - ls(-s[:, 1]) / 2
  np.testing.assert_allclose(losses[:4], want, atol=1e-12)


def test_losses_are_least_where_the_rewards_are_the_scores(x64):
  logps, sets = _batch(7)
  sets = sets._replace(scores=sets.scores.astype(np.float64))
  known = np.nan_to_num(sets.scores)
  level = sets.anchors["ref"] + known / BETA
  for name, values in {
      "exo_reward": sets.anchors["ref"] + known / BETA / 0.7 + 5.0,
      "pointwise_mse": level,
  }.items():
    losses, grad, _ = _run(name, values, sets)
    np.testing.assert_allclose(losses, 0.0, atol=1e-12)
    np.testing.assert_allclose(grad, 0.0, atol=1e-12)


def test_at_the_reference_lipo_has_an_order_and_a_gradient(x64):
  logps, sets = _batch(8)
  losses, grad, _ = _run(
      "lipo", logps, sets._replace(anchors={"ref": logps})
  )
  assert (losses[:4] > 0).all() and np.abs(grad[:4]).max(axis=1).min() > 1e-3
  slots = [0, 3, 1, 2, 4]
  moved, moved_sets = batches.take_slots(logps, sets, slots)
  got, got_grad, _ = _run(
      "lipo", moved, moved_sets._replace(anchors={"ref": moved})
  )
  np.testing.assert_allclose(got, losses, atol=1e-12)
  np.testing.assert_allclose(got_grad, grad[:, slots], atol=1e-12)


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), shift=st.floats(-200, 200),
    order=st.permutations([1, 2, 3, 4]), name=st.sampled_from(list(CASES)),
)
def test_invariances(seed, shift, order, name):
  with jax.enable_x64(True):
    logps, sets = _batch(seed)
    base, base_grad, base_aux = _run(name, logps, sets)
    rows, slots = [3, 0, 4, 2, 1], [0, *order]
    got, grad, _ = _run(name, *batches.take_rows(logps, sets, rows))
    np.testing.assert_allclose(got, base[rows], atol=1e-12)
    np.testing.assert_allclose(grad, base_grad[rows], atol=1e-12)
    got, grad, aux = _run(name, *batches.take_slots(logps, sets, slots))
    np.testing.assert_allclose(got, base, atol=1e-12)
    np.testing.assert_allclose(grad, base_grad[:, slots], atol=1e-12)
    for key in aux:
      np.testing.assert_allclose(aux[key], base_aux[key], atol=1e-12)
    anchors = {"ref": sets.anchors["ref"] + shift}
    moved = [(logps + shift, sets._replace(anchors=anchors))]
    if name in SHIFT_FREE:
      moved += [(logps + shift, sets)]
    if name != "rrhf":
      for values, batch in moved:
        got, grad, _ = _run(name, values, batch)
        np.testing.assert_allclose(got, base, atol=1e-12, rtol=1e-12)
        np.testing.assert_allclose(grad, base_grad, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "lipo"])
def test_a_merged_duplicate_counts_as_often_as_it_was_sampled(x64, name):
  logps, sets = _batch(9)
  sets = sets._replace(multiplicity=np.ones_like(sets.multiplicity))
  logps, sets = batches.take_slots(logps, sets, [0, 1, 2, 1, 4])
  role = sets.role.copy()
  role[1, 2] = -1
  sets = sets._replace(role=role)
  apart, apart_grad, _ = _run(name, logps, sets)
  mask, count = sets.candidate_mask.copy(), sets.multiplicity.copy()
  mask[:, 3] = False
  count[:, 1] += sets.candidate_mask[:, 3]
  merged, grad, _ = _run(
      name, logps, sets._replace(candidate_mask=mask, multiplicity=count)
  )
  np.testing.assert_allclose(merged, apart, atol=1e-12)
  np.testing.assert_allclose(
      grad[:, 1], apart_grad[:, 1] + apart_grad[:, 3], atol=1e-12
  )


@pytest.mark.parametrize("name", CASES)
def test_extremes_are_finite_in_value_and_gradient(name):
  logps, sets = _batch(10)
  sets = sets._replace(lengths=np.minimum(sets.lengths, 1))
  sets.scores[1, :4] = 1e4, -1e4, 0.0, 1.0
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[:2, 0], signs[0, 1:], signs[1, 1:] = (1.0, -1.0), -1.0, 1.0
  for size in (1e4, 1e5):
    for values in (signs * size, -np.full(logps.shape, size)):
      losses, grad, aux = _run(
          name, np.where(sets.candidate_mask, values, np.nan), sets
      )
      assert np.isfinite(losses).all() and np.isfinite(grad).all()
      assert all(np.isfinite(x).all() for x in aux.values())
      assert losses.dtype == grad.dtype == np.float32


@pytest.mark.parametrize("name", CASES)
def test_rows_without_contrast_are_zero_without_gradient(name):
  logps, sets = _batch(11)
  scores, mask = sets.scores.copy(), sets.candidate_mask.copy()
  role = sets.role.copy()
  scores[0], role[0, 1:] = 2.0, 0  # all level
  mask[1, 1:4] = False  # nothing but the chosen one and another prompt's
  mask[2, 0] = False  # no chosen one
  scores[3] = 1.0, 2.0, 0.0, 3.0, 9.0
  sets = sets._replace(scores=scores, role=role, candidate_mask=mask)
  losses, grad, aux = _run(name, logps, sets)
  for row in (2, 4) if "pointwise" in name else (0, 1, 2, 4):
    assert losses[row] == 0.0 and not grad[row].any()
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[3] != 0.0 and grad[3].any()


@pytest.mark.parametrize("name", LISTS)
def test_no_known_score_is_no_list(name):
  logps, sets = _batch(12)
  sets = sets._replace(scores=np.full_like(sets.scores, np.nan))
  losses, grad, aux = _run(name, logps, sets)
  assert not losses.any() and not grad.any()
  if name in CONTRAST:
    assert not any(value.any() for value in aux.values())
