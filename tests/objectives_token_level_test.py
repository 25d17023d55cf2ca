"""Losses on terms of the token laws: oracles, identities, ugly inputs."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.models.config import ModelConfig
from mcpo_jax.objectives import pairwise, token_level
from mcpo_jax.types import MISMATCHED_ID, Features

BETA, ALPHA, TAIL, PENALTY = 0.3, 0.7, 0.4, 0.05


def _inputs(seed, **options):
  """({"logps" and every term: [B, J]}, SetBatch), NaN on masked slots.

  Scores are whole numbers, so that some are equal.
  """
  logps, sets = batches.random_batch(seed, **options)
  rng = np.random.default_rng(seed + 1)
  hide = lambda x: np.where(sets.candidate_mask, x, np.nan)
  sized = lambda: hide(rng.gamma(2.0, 1.0, logps.shape))
  x = {
      "logps": logps,
      "collision": logps - hide(rng.normal(-1.0, 3.0, logps.shape)),
      "prefix": 0.6 * logps,
      "ref_prefix": 0.7 * sets.anchors["ref"],
      "kl": sized(),
      "risk": sized(),
      "masked_ratio": hide(rng.normal(size=logps.shape)),
      "masked_kl": sized(),
      "mask_size": sized(),
  }
  return x, sets._replace(scores=np.round(sets.scores))


# --- oracles: plain loops, float64, gradients by hand -------------------------


def _sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def _oracle(row_loss):
  """row_loss sees one row with a valid pair: (loss, {name: {slot: slope}})."""
  def run(x, sets, **settings):
    losses = np.zeros(len(x["logps"]))
    grads = {name: np.zeros_like(x["logps"]) for name in x}
    for b in range(len(losses)):
      pair = sets.candidate_mask[b, :2].all() and sets.role[b, 1] == -1
      if not pair:
        continue
      row = {name: values[b] for name, values in x.items()}
      losses[b], slopes = row_loss(
          row, sets.anchors["ref"][b], sets.lengths[b], **settings
      )
      for name, of_slot in slopes.items():
        for slot, slope in enumerate(of_slot):
          grads[name][b, slot] = slope
    return losses, grads

  return run


@_oracle
def _wpo(x, ref, lengths, *, beta):
  lp, log_w = x["logps"], 0.0
  for j in (0, 1):
    log_w += (lp[j] - x["collision"][j]) / lengths[j]
  w = min(1.0, np.exp(log_w))
  h = beta * (lp[0] - ref[0] - lp[1] + ref[1])
  slope = -w * beta * _sigmoid(-h)
  return -w * np.log(_sigmoid(h)), {"logps": (slope, -slope)}


@_oracle
def _ld_dpo(x, ref, lengths, *, beta, tail_weight):
  r = []
  for j in (0, 1):
    lp = x["prefix"][j] + tail_weight * (x["logps"][j] - x["prefix"][j])
    lr = x["ref_prefix"][j] + tail_weight * (ref[j] - x["ref_prefix"][j])
    r.append(beta * (lp - lr))
  slope = -beta * _sigmoid(r[1] - r[0])
  tail, head = tail_weight * slope, (1 - tail_weight) * slope
  return -np.log(_sigmoid(r[0] - r[1])), {
      "logps": (tail, -tail), "prefix": (head, -head),
  }


def _tdpo(x, ref, term, beta, alpha, chosen):
  h = x["logps"][0] - ref[0] - x["logps"][1] + ref[1]
  h = beta * (h - alpha * (x[term][1] - x[term][0]))
  slope = -beta * _sigmoid(-h)
  return -np.log(_sigmoid(h)), {
      "logps": (slope, -slope),
      term: (chosen * alpha * slope, -alpha * slope),
  }


@_oracle
def _tdpo1(x, ref, lengths, *, beta):
  return _tdpo(x, ref, "kl", beta, 1.0, 1.0)


@_oracle
def _tdpo2(x, ref, lengths, *, beta, alpha):
  return _tdpo(x, ref, "kl", beta, alpha, 0.0)


@_oracle
def _ra_dpo1(x, ref, lengths, *, beta, confidence):
  return _tdpo(x, ref, "risk", beta, 1.0, 1.0)


@_oracle
def _ra_dpo2(x, ref, lengths, *, beta, alpha, confidence):
  return _tdpo(x, ref, "risk", beta, alpha, 0.0)


@_oracle
def _sparse_po(x, ref, lengths, *, beta, mask_penalty, shared_mask):
  u, k, size = x["masked_ratio"], x["masked_kl"], x["mask_size"]
  h = beta * ((u[0] - u[1]) + k[0] - k[1])
  slope = -beta * _sigmoid(-h)
  loss = -np.log(_sigmoid(h)) + mask_penalty * size[0] + mask_penalty * size[1]
  return loss, {
      "masked_ratio": (slope, -slope), "masked_kl": (slope, -slope),
      "mask_size": (mask_penalty, mask_penalty),
  }


def _pmpo(x, sets, *, beta, alpha):
  """Copies stand in a line by score; equals share the places they stand in."""
  lp = x["logps"]
  losses, grads = np.zeros(len(lp)), {name: np.zeros_like(lp) for name in x}
  for b in range(len(lp)):
    valid = [j for j in range(lp.shape[1]) if sets.candidate_mask[b, j]]
    if 0 not in valid or not any(sets.role[b, j] == -1 for j in valid):
      continue
    line = [j for j in valid for _ in range(sets.multiplicity[b, j])]
    line.sort(key=lambda j: -sets.scores[b, j])
    half = len(line) // 2
    for place in range(len(line)):
      equals = [
          j for j in line if sets.scores[b, j] == sets.scores[b, line[place]]
      ]
      for j in equals:
        if place < half:
          grads["logps"][b, j] -= alpha / half / len(equals)
        if place >= len(line) - half:
          grads["logps"][b, j] += (1 - alpha) / half / len(equals)
    for j in line:
      grads["kl"][b, j] += beta / len(line)
    for j in valid:
      losses[b] += grads["logps"][b, j] * lp[b, j]
      losses[b] += grads["kl"][b, j] * x["kl"][b, j]
  return losses, grads


CASES = {
    "wpo": (token_level.wpo_loss, _wpo, {"beta": BETA}),
    "ld_dpo": (
        token_level.ld_dpo_loss, _ld_dpo,
        {"beta": BETA, "tail_weight": TAIL},
    ),
    "tdpo1": (token_level.tdpo1_loss, _tdpo1, {"beta": BETA}),
    "tdpo2": (
        token_level.tdpo2_loss, _tdpo2, {"beta": BETA, "alpha": ALPHA},
    ),
    "ra_dpo1": (
        token_level.ra_dpo1_loss, _ra_dpo1,
        {"beta": BETA, "confidence": 0.95},
    ),
    "ra_dpo2": (
        token_level.ra_dpo2_loss, _ra_dpo2,
        {"beta": BETA, "alpha": ALPHA, "confidence": 0.95},
    ),
    "sparse_po": (
        token_level.sparse_po_loss, _sparse_po,
        {"beta": BETA, "mask_penalty": PENALTY, "shared_mask": False},
    ),
    "pmpo": (token_level.pmpo_loss, _pmpo, {"beta": BETA, "alpha": ALPHA}),
    "dpo": (pairwise.dpo_loss, None, {"beta": BETA}),
}
OURS = [name for name in CASES if name != "dpo"]
# What a constant added to all logps, or to all reference logps, of a prompt
# must not change.
SHIFT_FREE = ["ld_dpo", "tdpo1", "tdpo2", "ra_dpo1", "ra_dpo2", "sparse_po"]


@functools.cache
def _jitted(name):
  loss_fn, _, settings = CASES[name]

  @jax.jit
  def run(x, batch):
    def total(x):
      terms = {key: value for key, value in x.items() if key != "logps"}
      losses, aux, state = loss_fn(
          Features(x["logps"], terms), batch, "state", **settings
      )
      assert state == "state"
      return jnp.sum(losses), (losses, aux)

    (_, (losses, aux)), grads = jax.value_and_grad(total, has_aux=True)(x)
    return losses, grads, aux

  return run


def _run(name, x, batch):
  return jax.tree.map(np.asarray, _jitted(name)(x, batch))


def _same(one, other, atol=1e-12):
  for a, b in zip(one, other, strict=True):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=atol),
        a, b,
    )


@pytest.mark.parametrize("name", OURS)
def test_value_and_gradient_equal_the_oracle(x64, name):
  _, oracle, settings = CASES[name]
  for seed in range(3):
    x, sets = _inputs(seed)
    losses, grads, aux = _run(name, x, sets)
    want, want_grads = oracle(x, sets, **settings)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    for key in x:
      np.testing.assert_allclose(
          grads[key], want_grads[key], atol=1e-9, rtol=1e-9
      )
    assert max(np.abs(g[:3]).max() for g in want_grads.values()) > 0.01
    assert all(np.isfinite(v).all() and v.shape == (5,) for v in aux.values())


# --- by hand ------------------------------------------------------------------


def _one(seed=0):
  """Row 0 with ref -6, -4 and lengths 4, 2 in its pair."""
  x, sets = _inputs(seed)
  sets.anchors["ref"][0, :2] = -6.0, -4.0
  sets.lengths[0, :2] = 4, 2
  x["logps"][0, :2] = -5.0, -7.0
  return x, sets


def test_wpo_by_hand(x64):
  # log W = (-5 + 3) / 4 + (-7 + 6) / 2 = -1; margin 0.3 * (1 + 3) = 1.2
  x, sets = _one()
  x["collision"][0, :2] = -3.0, -6.0
  losses, grads, aux = _run("wpo", x, sets)
  assert losses[0] == pytest.approx(np.exp(-1.0) * 0.2632825, abs=1e-7)
  assert grads["logps"][0, 0] == pytest.approx(
      np.exp(-1.0) * -0.3 * 0.2314752, abs=1e-7
  )
  assert aux["rewards/margins"][0] == pytest.approx(1.2)


def test_ld_dpo_by_hand(x64):
  # chosen: prefix -3 of -5, ref -4 of -6: (-3 - 0.4 * 2) - (-4 - 0.4 * 2) = 1
  # rejected, the shorter one: -7 + 4 = -3
  x, sets = _one()
  x["prefix"][0, :2] = -3.0, -7.0
  x["ref_prefix"][0, :2] = -4.0, -4.0
  losses, grads, _ = _run("ld_dpo", x, sets)
  assert losses[0] == pytest.approx(0.2632825, abs=1e-7)  # margin 1.2
  assert grads["logps"][0, 0] == pytest.approx(
      0.4 * -0.3 * 0.2314752, abs=1e-7
  )


def test_tdpo_by_hand(x64):
  # 4 - (2 - 1) = 3: margin 0.9; with alpha 4 - 0.7 * (2 - 1) = 3.3: 0.99
  x, sets = _one()
  x["kl"][0, :2] = 1.0, 2.0
  losses, _, aux = _run("tdpo1", x, sets)
  assert losses[0] == pytest.approx(np.log1p(np.exp(-0.9)))
  assert aux["rewards/chosen"][0] == pytest.approx(0.3 * (1.0 + 1.0))
  losses, grads, _ = _run("tdpo2", x, sets)
  assert losses[0] == pytest.approx(np.log1p(np.exp(-0.99)))
  assert grads["kl"][0, 0] == 0.0 and grads["kl"][0, 1] > 0.0


def test_sparse_po_by_hand(x64):
  # 0.3 * ((2 - 1) + (0.5 - 1.5)) = 0; masks of size 3 and 5
  x, sets = _one()
  x["masked_ratio"][0, :2] = 2.0, 1.0
  x["masked_kl"][0, :2] = 0.5, 1.5
  x["mask_size"][0, :2] = 3.0, 5.0
  losses, _, _ = _run("sparse_po", x, sets)
  assert losses[0] == pytest.approx(np.log(2.0) + PENALTY * 8.0)


def test_pmpo_by_hand(x64):
  # five: two above, two below, the one of score 2 in neither; then the two
  # of score 2 share places 2 and 3, one of them in the better half of four
  x, sets = _inputs(0, num_slots=5)
  sets.multiplicity[0] = 1
  x["logps"][0] = -1.0, -2.0, -3.0, -4.0, -5.0
  x["kl"][0] = 1.0, 2.0, 3.0, 4.0, 5.0
  sets.scores[0] = 4, 0, 2, 1, 3
  losses, _, _ = _run("pmpo", x, sets)
  want = 0.7 * (1 + 5) / 2 - 0.3 * (2 + 4) / 2 + BETA * 3.0
  assert losses[0] == pytest.approx(want)
  sets.scores[0] = 3, 2, 2, 0, np.nan
  losses, grads, aux = _run("pmpo", x, sets)
  each = BETA * (1 + 2 + 3 + 4) / 4
  want = 0.7 * (1 + 2.5) / 2 - 0.3 * (2.5 + 4) / 2 + each
  assert losses[0] == pytest.approx(want)
  assert grads["logps"][0, 4] == grads["kl"][0, 4] == 0.0
  assert aux["candidates/negatives"][0] == 3.0


def test_pmpo_takes_a_multiplicity_as_that_many_candidates(x64):
  x, sets = _inputs(2)
  sets.multiplicity[0], sets.scores[0] = (1, 2, 1, 1), (5, 1, 1, 0)
  once, grads, _ = _run("pmpo", x, sets)
  twin = [0, 1, 1, 2, 3]
  y = {name: values[:, twin] for name, values in x.items()}
  sets.multiplicity[0] = 1
  _, wide = batches.take_slots(x["logps"], sets, twin)
  twice, twin_grads, _ = _run("pmpo", y, wide)
  assert once[0] == pytest.approx(twice[0], abs=1e-12)
  assert grads["logps"][0, 1] == pytest.approx(
      2 * twin_grads["logps"][0, 1], abs=1e-12
  )


# --- identities ---------------------------------------------------------------


def test_all_of_one_pair_have_dpo_as_a_case(x64):
  x, sets = _inputs(3)
  zero, ref = 0.0 * x["kl"], sets.anchors["ref"]
  want = _run("dpo", x, sets)
  for name, parts in {
      "wpo": {"collision": x["logps"] - 1e-9},  # W > 1 is cut to 1
      "ld_dpo": {"prefix": x["logps"], "ref_prefix": ref},
      "tdpo1": {"kl": zero},
      "tdpo2": {"kl": zero},
      "ra_dpo1": {"risk": zero},
      "ra_dpo2": {"risk": zero},
      "sparse_po": {
          "masked_ratio": x["logps"] - ref, "masked_kl": zero,
          "mask_size": zero,
      },
  }.items():
    losses, grads, aux = _run(name, x | parts, sets)
    _same((losses, aux), (want[0], want[2]))
    if name in ("wpo", "tdpo1"):
      np.testing.assert_allclose(
          grads["logps"], want[1]["logps"], atol=1e-12
      )
  for loss, settings in (
      (token_level.ld_dpo_loss, {"tail_weight": 1.0}),
      (token_level.tdpo2_loss, {"alpha": 0.0}),
  ):
    terms = {name: values for name, values in x.items() if name != "logps"}
    got, _, _ = loss(
        Features(x["logps"], terms), sets, None, beta=BETA, **settings
    )
    np.testing.assert_allclose(got, want[0], atol=1e-12)


def test_risk_is_read_where_tdpo_reads_kl(x64):
  x, sets = _inputs(4)
  swapped = x | {"risk": x["kl"]}
  _same(_run("ra_dpo1", swapped, sets)[::2], _run("tdpo1", x, sets)[::2])
  _same(_run("ra_dpo2", swapped, sets)[::2], _run("tdpo2", x, sets)[::2])


def test_masks_of_one_make_sparse_po_tdpo1(x64):
  x, sets = _inputs(5)
  sizes = 2.0 * sets.lengths  # two masks of 1
  parts = {
      "masked_ratio": x["logps"] - sets.anchors["ref"],
      "masked_kl": x["kl"],
      "mask_size": sizes,
  }
  losses, grads, aux = _run("sparse_po", x | parts, sets)
  want, want_grads, want_aux = _run("tdpo1", x, sets)
  pair = want != 0.0
  penalty = np.where(pair, PENALTY * sizes[:, :2].sum(1), 0.0)
  _same((losses - penalty, aux), (want, want_aux))
  for part, whole in (("masked_ratio", "logps"), ("masked_kl", "kl")):
    np.testing.assert_allclose(grads[part], want_grads[whole], atol=1e-12)


@pytest.mark.parametrize("shared_mask", [True, False])
def test_first_masks_have_the_shapes_that_the_probe_reads(shared_mask):
  config = ModelConfig("llama", 29, 16, 24, 3, 4, 2, 6)
  params = token_level.sparse_po_parameters(
      jax.random.key(0), config, shared_mask=shared_mask
  )
  masks = 1 if shared_mask else 2
  assert params["kernel"].shape == (3, masks, 16)
  assert params["bias"].shape == params["mixer"].shape == (3, masks)


# --- invariances and ugly inputs ----------------------------------------------


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), shift=st.floats(-200, 200),
    order=st.permutations([1, 2, 3]), name=st.sampled_from(OURS),
)
def test_invariances(seed, shift, order, name):
  with jax.enable_x64(True):
    x, sets = _inputs(seed)
    base, base_grads, base_aux = _run(name, x, sets)
    rows = [3, 0, 4, 2, 1]
    y = {key: values[rows] for key, values in x.items()}
    _, moved = batches.take_rows(x["logps"], sets, rows)
    at = lambda tree: jax.tree.map(lambda v: v[rows], tree)
    _same(_run(name, y, moved), (base[rows], at(base_grads), at(base_aux)))
    if name in SHIFT_FREE:
      got, grads, _ = _run(name, x | {"logps": x["logps"] + shift}, sets)
      _same((got, grads), (base, base_grads))
      ref = {"ref": sets.anchors["ref"] + shift}
      got, grads, _ = _run(name, x, sets._replace(anchors=ref))
      _same((got, grads), (base, base_grads))
    if name == "pmpo":
      slots = [0, *order]
      y = {key: values[:, slots] for key, values in x.items()}
      _, moved = batches.take_slots(x["logps"], sets, slots)
      grads = jax.tree.map(lambda v: v[:, slots], base_grads)
      _same(_run(name, y, moved), (base, grads, base_aux))


@pytest.mark.parametrize("name", OURS)
def test_masked_copies_of_candidates_change_nothing(x64, name):
  x, sets = _inputs(6)
  base, base_grads, base_aux = _run(name, x, sets)
  slots = [0, 1, 2, 3, 1, 0]
  y = {key: values[:, slots] for key, values in x.items()}
  _, wide = batches.take_slots(x["logps"], sets, slots)
  wide.candidate_mask[:, 4] = False
  if name == "pmpo":  # a completion of another prompt is no candidate either
    wide.role[:, 5], wide.candidate_id[:, 5] = 0, MISMATCHED_ID
  else:
    wide.candidate_mask[:, 5] = False
  losses, grads, aux = _run(name, y, wide)
  cut = jax.tree.map(lambda v: v[:, :4], grads)
  _same((losses, cut, aux), (base, base_grads, base_aux))
  assert not any(g[:, 4:].any() for g in grads.values())


@pytest.mark.parametrize("name", OURS)
def test_extremes_are_finite_in_value_and_gradient(name):
  x, sets = _inputs(7)
  sets.lengths[0] = 1
  signs = np.random.default_rng(0).choice([-1.0, 1.0], x["logps"].shape)
  signs[0] = 1.0, -1.0, -1.0, -1.0
  signs[1] = -1.0, 1.0, 1.0, 1.0
  for size in (1e4, -1e4, 1e5):
    y = {
        key: np.where(sets.candidate_mask, size * signs, np.nan)
        for key in x
    } | {"kl": np.where(sets.candidate_mask, 1e4, np.nan)}
    losses, grads, aux = _run(name, y, sets)
    assert losses.dtype == grads["logps"].dtype == np.float32
    assert np.isfinite(losses).all()
    assert all(np.isfinite(g).all() for g in grads.values())
    assert all(np.isfinite(v).all() for v in aux.values())


@pytest.mark.parametrize("name", OURS)
def test_rows_without_a_negative_are_zero_without_gradient(name):
  x, sets = _inputs(8)
  sets.role[0, 1:] = 0  # all tied with the preferred one
  sets.candidate_mask[1, 1:] = False  # nothing but the preferred one
  sets.candidate_mask[2, 0] = False  # no preferred one
  losses, grads, aux = _run(name, x, sets)
  for row in (0, 1, 2, 4):
    assert losses[row] == 0.0
    assert not any(g[row].any() for g in grads.values())
    assert all(value[row] == 0.0 for value in aux.values())
  assert losses[3] != 0.0 and any(g[3].any() for g in grads.values())


def test_pmpo_rows_without_known_scores_are_zero():
  x, sets = _inputs(9)
  sets.scores[:3] = np.nan
  sets.scores[1, 1:] = 1.0  # the preferred one's is unknown
  losses, grads, aux = _run("pmpo", x, sets)
  assert not losses[:3].any() and losses[3] != 0.0
  assert not any(g[:3].any() for g in grads.values())
  assert not any(value[:3].any() for value in aux.values())


@pytest.mark.parametrize("name", OURS)
def test_no_gradient_reaches_reference_or_statistics(name):
  loss_fn, _, settings = CASES[name]
  x, sets = _inputs(10)
  x = jax.tree.map(np.nan_to_num, x)

  @jax.jit
  def grads(x, ref):
    def loss(x, ref):
      terms = {key: v for key, v in x.items() if key != "logps"}
      batch = sets._replace(anchors={"ref": ref})
      return loss_fn(Features(x["logps"], terms), batch, None, **settings)

    through_aux = jax.grad(
        lambda x: sum(jnp.sum(v) for v in loss(x, ref)[1].values())
    )
    through_ref = jax.grad(lambda ref: jnp.sum(loss(x, ref)[0]))
    of_terms = jax.grad(lambda x: jnp.sum(loss(x, ref)[0]))
    return through_aux(x), through_ref(ref), of_terms(x)

  of_aux, of_ref, of_terms = grads(x, np.nan_to_num(sets.anchors["ref"]))
  for grad in (*of_aux.values(), of_ref):
    np.testing.assert_array_equal(grad, 0.0)
  for constant in ("collision", "ref_prefix"):
    np.testing.assert_array_equal(of_terms[constant], 0.0)
