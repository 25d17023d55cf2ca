"""The kernel draws what its weights say, by address, and says what it did."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.kernels import mc, weights
from mcpo_jax.types import KernelState, SetBatch

KEY = jax.random.key(11)
SETTINGS = {
    "strategy": "mc",
    "temperature": 1.0,
    "num_negatives": 1,
    "include_preferred": False,
    "replace": False,
}


DRAWS = [name for name in mc.STRATEGIES if name != "pool"]  # pool takes all
NUM = 4000  # rows of every batch here: one shape, few compilations


@functools.cache
def _jitted(strategy, num_negatives, include_preferred, replace):
  return jax.jit(
      lambda key, scores, sets, temperature: mc.draw(
          key,
          None,
          scores,
          sets,
          strategy=strategy,
          temperature=temperature,
          num_negatives=num_negatives,
          include_preferred=include_preferred,
          replace=replace,
      )
  )


def _draw(scores, sets, key=KEY, **settings):
  settings = SETTINGS | settings
  temperature = settings.pop("temperature")
  out = _jitted(**settings)(key, scores, sets, temperature)
  return jax.tree.map(np.asarray, out)


def _copies(scores, multiplicity=None, role=None, external=None):
  """One set of up to 5 slots as NUM examples: every row is a fresh draw."""
  def tile(x, default, dtype):
    row = np.full(5, default, dtype)
    if x is not None:
      row[: len(x)] = x
    return np.tile(row, (NUM, 1))

  role = role or [1] + [-1] * (len(scores) - 1)
  ids = np.arange(NUM, dtype=np.uint32)
  sets = SetBatch(
      role=tile(role, 0, np.int8),
      candidate_mask=tile([True] * len(scores), False, bool),
      candidate_id=tile(np.arange(5), 0, np.uint32),
      multiplicity=tile(multiplicity, 1, np.int32),
      scores=tile(external, 0, np.float32),
      lengths=tile(None, 1, np.int32),
      anchors={},
      example_id=np.stack([ids, ids[::-1]], axis=1),
      visit=np.zeros(NUM, np.int32),
      row=np.arange(NUM, dtype=np.int32),
  )
  return tile(scores, 0, np.float32), sets


def _assert_frequencies(selected, probs):
  """Chi-square of slot counts against exact probabilities, p > 1e-4."""
  stats = pytest.importorskip("scipy.stats")
  counts = np.bincount(selected, minlength=len(probs))
  probs = np.asarray(probs, np.float64) / np.sum(probs)
  assert counts[probs == 0].sum() == 0
  counts, probs = counts[probs > 0], probs[probs > 0]
  assert stats.chisquare(counts, probs * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frequencies_follow_score_temperature_and_multiplicity(seed):
  scores, sets = _copies(
      [9.0, 0.5, -1.0, 1.0, 3.0], [5, 1, 3, 2, 1], [1, -1, -1, -1, 0]
  )
  state, _ = _draw(
      scores, sets, jax.random.key(seed), temperature=0.5, num_negatives=50,
      replace=True,
  )
  w = np.array([0, np.exp(1.0), 3 * np.exp(-2.0), 2 * np.exp(2.0), 0])
  assert state.selected.size == 200_000
  _assert_frequencies(state.selected.ravel(), w)
  _assert_frequencies(state.selected[:, 0], w)


def test_random_draws_by_multiplicity_alone():
  scores, sets = _copies([0.0, 50.0, -50.0, 2.0], [1, 1, 2, 3])
  state, info = _draw(scores, sets, strategy="random", num_negatives=4)
  _assert_frequencies(state.selected[:, 0], [0, 1, 2, 3, 0])
  np.testing.assert_allclose(
      np.exp(info.log_weights[0]), [0, 1 / 6, 2 / 6, 3 / 6, 0], rtol=1e-6
  )


def test_multiplicity_weighs_as_duplicated_candidates(x64):
  scores, merged = _copies([0.3, 0.5, -1.0, 1.2], [1, 3, 1, 2])
  spread = [0, 1, 1, 1, 2, 3, 3, 4]
  scores_d, duplicated = batches.take_slots(scores, merged, spread)
  duplicated = duplicated._replace(multiplicity=np.ones((NUM, 8), np.int32))
  for include in (False, True):
    kw = {"temperature": 0.7, "include_preferred": include}
    got = np.exp(weights.log_weights(scores, merged, **kw))
    each = np.exp(weights.log_weights(scores_d, duplicated, **kw))
    want = np.zeros_like(got)
    for slot, weight in zip(spread, each.T):
      want[:, slot] += weight
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_preferred_counts_once():
  scores, sets = _copies([0.0, 0.0], [7, 1])
  _, info = _draw(scores, sets, include_preferred=True)
  np.testing.assert_allclose(
      np.exp(info.log_weights[:, :2]), 0.5, rtol=1e-6
  )


def test_top_m_inclusion_follows_drawing_without_replacement():
  stats = pytest.importorskip("scipy.stats")
  scores, sets = _copies([0.0, 0.0, 1.0, -1.0, 0.7], [1, 1, 1, 2, 1])
  state, info = _draw(scores, sets, num_negatives=4)
  assert state.selected_mask.all()
  w = np.exp(info.log_weights[0].astype(np.float64))
  pairs = list(itertools.permutations(range(1, 5), 2))
  probs = np.array([w[i] * w[j] / (1 - w[i]) for i, j in pairs])
  drawn = [tuple(row) for row in state.selected[:, :2]]
  counts = np.array([drawn.count(pair) for pair in pairs])
  assert counts.sum() == len(drawn)  # never the same twice
  expected = probs / probs.sum() * len(drawn)
  assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_chains_with_replacement_are_independent():
  scores, sets = _copies([0.2, 0.0, 1.0])
  state, info = _draw(
      scores, sets, num_negatives=4, replace=True, include_preferred=True
  )
  w = np.exp(info.log_weights[0].astype(np.float64))
  for a, b in ((0, 1), (1, 2), (0, 2)):
    joint = state.selected[:, a] * 5 + state.selected[:, b]
    _assert_frequencies(joint, np.outer(w, w).ravel())
  np.testing.assert_allclose(
      info.stayed, (~state.selected_mask).mean(1), rtol=1e-6
  )


def test_masked_and_roleless_are_never_drawn():
  scores, sets = _copies([90.0, 0.0, 80.0, 0.0, 99.0])
  mask = sets.candidate_mask.copy()
  mask[:, 4] = False
  role = sets.role.copy()
  role[:, 2] = 0
  sets = sets._replace(candidate_mask=mask, role=role)
  for strategy in DRAWS:
    state, _ = _draw(scores, sets, strategy=strategy, num_negatives=4)
    assert set(state.selected[state.selected_mask]) == {1, 3}
    np.testing.assert_array_equal(state.selected_mask.sum(1), 2)
  state, _ = _draw(scores, sets, num_negatives=4, replace=True)
  assert set(state.selected.ravel()) == {1, 3}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"include_preferred": True, "replace": True},
        {"strategy": "max", "include_preferred": True},
        {"strategy": "fixed_worst"},
    ],
)
def test_same_ids_whatever_the_batch_the_slots_and_the_padding(x64, settings):
  logps, sets = batches.random_batch(6, num_sets=40, num_slots=9)
  padded = sets.candidate_mask.copy()
  padded[:, 7:] = False
  sets = sets._replace(candidate_mask=padded)
  scores = np.where(padded, logps, 0.0)
  rows = np.random.default_rng(0).permutation(40)
  moved, moved_sets = batches.take_slots(
      *batches.take_rows(np.where(padded, logps, 9.0), sets, rows),
      [0, 5, 8, 3, 1, 2, 6, 4, 7],
  )

  def ids(scores, sets):
    state, info = _draw(scores, sets, num_negatives=3, **settings)
    drawn = np.take_along_axis(sets.candidate_id, state.selected, 1)
    return np.where(state.selected_mask, drawn.astype(int), -1), info

  base, base_info = ids(scores, sets)
  got, info = ids(moved, moved_sets)
  np.testing.assert_array_equal(got, base[rows])
  for name in ("ess", "entropy", "max_weight", "negative_rank", "stayed"):
    np.testing.assert_allclose(
        getattr(info, name), getattr(base_info, name)[rows], atol=1e-12
    )


def test_a_later_visit_and_another_seed_draw_anew():
  scores, sets = _copies(np.zeros(5))
  base, _ = _draw(scores, sets)
  later, _ = _draw(scores, sets._replace(visit=sets.visit + 1))
  other, _ = _draw(scores, sets, jax.random.key(12))
  for state in (later, other):
    same = np.mean(state.selected == base.selected)
    assert same == pytest.approx(0.25, abs=0.04)  # by chance


def test_temperature_goes_from_the_maximum_to_uniform():
  scores, sets = _copies([9.0, 0.1, 0.3, 0.3, -5.0])
  cold, _ = _draw(scores, sets, temperature=1e-30)
  top, _ = _draw(scores, sets, strategy="max")
  np.testing.assert_array_equal(cold.selected, top.selected)
  assert set(cold.selected.ravel()) == {2, 3}  # the tie goes either way
  _, hot = _draw(scores, sets, temperature=1e30)
  np.testing.assert_allclose(np.exp(hot.log_weights[:, 1:]), 0.25, rtol=1e-6)
  low, _ = _draw(scores, sets, strategy="min")
  assert set(low.selected.ravel()) == {4}


def test_fixed_worst_takes_the_lowest_external_score_then_the_lowest_id():
  scores, sets = _copies(
      [0, 0, 0, 0, 0], external=[-9.0, np.nan, -2.0, 1.0, -2.0]
  )
  ids = np.array([0, 1, 2**32 - 1, 3, 2**31], np.uint32)
  sets = sets._replace(candidate_id=np.tile(ids, (NUM, 1)))
  state, _ = _draw(scores, sets, strategy="fixed_worst", num_negatives=4)
  np.testing.assert_array_equal(state.selected, [[4, 2, 3, 1]] * NUM)


def test_all_returns_every_negative_in_slot_order():
  scores, sets = _copies([0.0, 3.0, 1.0, 2.0, 5.0], role=[1, -1, 0, -1, -1]
  )
  state, info = _draw(
      scores, sets, strategy="all", include_preferred=True, replace=True
  )
  np.testing.assert_array_equal(state.selected, [[1, 3, 4, 0]] * NUM)
  np.testing.assert_array_equal(state.selected_mask.sum(1), 3)
  np.testing.assert_array_equal(info.stayed, 0)


def test_pool_takes_every_candidate_in_its_slot_ties_included():
  scores, sets = _copies([0.0, 3.0, 1.0, 2.0, 5.0], role=[1, -1, 0, -1, -1])
  mask = sets.candidate_mask.copy()
  mask[:, 3] = False
  mask[1, 0] = False  # no set
  role = sets.role.copy()
  role[2, 1:] = 0  # all tied: no negative, and still a pool
  sets = sets._replace(candidate_mask=mask, role=role)
  state, info = _draw(
      scores, sets, strategy="pool", include_preferred=True, replace=True
  )
  np.testing.assert_array_equal(state.selected, [[1, 2, 3, 4]] * NUM)
  np.testing.assert_array_equal(state.selected_mask[0], mask[0, 1:])
  np.testing.assert_array_equal(state.selected_mask[2], mask[2, 1:])
  assert not state.selected_mask[1].any()
  # What the log shows is about the negatives, slots 1 and 4.
  np.testing.assert_allclose(info.negative_rank[0], 0.5)
  np.testing.assert_array_equal(info.stayed, 0)
  _, batch = mc.take_drawn(scores, sets, state, spent=False)
  np.testing.assert_array_equal(batch.role[0], [1, -1, 0, 0, -1])
  np.testing.assert_array_equal(batch.candidate_mask, mask & mask[:, :1])
  np.testing.assert_array_equal(batch.multiplicity, sets.multiplicity)


def test_preferred_drawn_is_masked_and_counted():
  scores, sets = _copies([50.0, 0.0, 1.0, 2.0])
  one, info = _draw(scores, sets, include_preferred=True)
  assert not one.selected_mask.any() and (one.selected == 0).all()
  np.testing.assert_array_equal(info.stayed, 1.0)
  three, info = _draw(
      scores, sets, include_preferred=True, num_negatives=4
  )
  np.testing.assert_array_equal(three.selected_mask.sum(1), 2)
  np.testing.assert_allclose(info.stayed, 1 / 3, rtol=1e-6)


def test_rows_with_few_negatives_use_fewer():
  scores, sets = _copies([0.0, 3.0, 1.0, 2.0])
  mask = sets.candidate_mask.copy()
  mask[1, 2:] = False
  state, _ = _draw(
      scores, sets._replace(candidate_mask=mask), num_negatives=6
  )
  assert state.selected.shape == (NUM, 6)
  np.testing.assert_array_equal(state.selected_mask[:2].sum(1), [3, 1])
  assert not state.selected_mask[0, 3:].any()
  np.testing.assert_array_equal(state.selected[~state.selected_mask], 0)


def test_info_of_a_hand_worked_row():
  # weights 1/2, 1/4, 1/4 over the negatives; the lowest two tie
  scores, sets = _copies([7.0, np.log(2.0), 0.0, 0.0])
  _, info = _draw(scores, sets, num_negatives=4)
  np.testing.assert_allclose(
      np.exp(info.log_weights[0]), [0, 0.5, 0.25, 0.25, 0], rtol=1e-6
  )
  assert info.ess[0] == pytest.approx(8 / 3, rel=1e-6)
  assert info.entropy[0] == pytest.approx(1.5 * np.log(2), rel=1e-6)
  assert info.max_weight[0] == pytest.approx(0.5, rel=1e-6)
  assert info.negative_rank[0] == pytest.approx(1.0)  # mean of 0, 1.5, 1.5
  _, info = _draw(scores, sets, strategy="max")
  assert info.negative_rank[0] == 0.0 and info.argmax_share[0] == 1.0
  _, info = _draw(scores, sets, strategy="min")
  assert info.negative_rank[0] == 1.5 and info.argmax_share[0] == 0.0


def test_info_tells_the_rank_by_external_score_and_the_share_of_the_heaviest():
  # Kernel scores fall along the slots. By external score the negatives are
  # ranked 3 (slot 1 has none), 1.5 and 1.5 (a tie), 0.
  scores, sets = _copies(
      [9.0, 3.0, 2.0, 1.0, 0.0], external=[9.0, np.nan, 5.0, 5.0, 7.0]
  )
  for strategy, num, rank, share in (
      ("max", 1, 3.0, 1.0),
      ("min", 1, 0.0, 0.0),
      ("max", 4, 1.5, 0.25),
  ):
    _, info = _draw(scores, sets, strategy=strategy, num_negatives=num)
    np.testing.assert_allclose(info.negative_score_rank, rank)
    np.testing.assert_allclose(info.argmax_share, share)


def test_multiplicity_makes_heavy_and_ties_share_the_heaviest():
  # The weights of the negatives are 2, 2, 1: two of three are the heaviest.
  scores, sets = _copies([9.0, np.log(2.0), 0.0, 0.0], [1, 1, 2, 1])
  _, info = _draw(scores, sets, num_negatives=4)
  np.testing.assert_allclose(info.argmax_share, 2 / 3, rtol=1e-6)
  np.testing.assert_allclose(info.negative_score_rank, 1.0)


@pytest.mark.parametrize(
    ("strategy", "replace"),
    [(strategy, False) for strategy in DRAWS] + [("mc", True)],
)
def test_rows_without_candidates_are_zeros_and_finite(strategy, replace):
  scores, sets = _copies([1.0, 2.0, 3.0, 4.0, 5.0])
  role, mask = sets.role.copy(), sets.candidate_mask.copy()
  mask[0] = False  # no set
  role[1, 1:] = 0  # no contrast
  mask[2, 0] = False  # no preferred
  sets = sets._replace(role=role, candidate_mask=mask)
  scores = np.where(mask, scores, np.nan).astype(np.float32)
  state, info = _draw(
      scores, sets, strategy=strategy, replace=replace, num_negatives=4
  )
  assert not state.selected_mask[:3].any() and not state.selected[:3].any()
  assert np.isneginf(info.log_weights[:3]).all()
  for value in info[1:]:
    np.testing.assert_array_equal(value[:3], 0.0)
  assert state.selected_mask[3:].all()


@pytest.mark.parametrize(
    "scores",
    [
        [0.0, 1e4, -1e4, 1e4],
        [1e30, -1e30, 1e30, 0.0],
        [0.0, -np.inf, 0.0, -np.inf],
        [0.0, np.inf, 0.0, -np.inf],
        [0.0, -np.inf, -np.inf, -np.inf],
    ],
)
def test_extreme_scores_stay_finite(scores):
  scores, sets = _copies(scores)
  for include, temperature in itertools.product((0, 1), (1e-30, 1.0, 1e30)):
    state, info = _draw(
        scores,
        sets,
        include_preferred=bool(include),
        temperature=temperature,
        num_negatives=4,
    )
    assert np.isfinite(info.log_weights[:, 1:4]).all()
    assert all(np.isfinite(value).all() for value in info[1:])
    np.testing.assert_allclose(
        np.exp(info.log_weights).sum(1), 1.0, rtol=1e-5
    )
    assert (state.selected_mask.sum(1) >= 2).all()


def test_a_nan_score_is_not_hidden():
  scores, sets = _copies([0.0, 1.0, 2.0])
  scores[1, 2] = np.nan
  _, info = _draw(scores, sets)
  assert np.isnan(info.ess[1]) and np.isfinite(np.delete(info.ess, 1)).all()


def test_no_gradient_reaches_the_scores():
  scores, sets = _copies([0.0, 1.0, 2.0])

  def total(scores):
    _, info = mc.draw(KEY, None, scores, sets, **SETTINGS)
    p_0 = weights.preferred_weight(scores, sets, temperature=1.0)
    finite = jnp.where(
        jnp.isfinite(info.log_weights), info.log_weights, 0.0
    )
    kernel = mc.kernel_scores(
        scores, scores * 2, sets.lengths, score="reward", beta=0.1
    )
    return finite.sum() + info.ess.sum() + p_0.sum() + kernel.sum()

  np.testing.assert_array_equal(jax.jit(jax.grad(total))(scores), 0.0)


def test_a_temperature_schedule_compiles_once():
  scores, sets = _copies([0.0, 1.0, 2.0, 0.5])
  cold, _ = _draw(scores, sets, temperature=0.3)
  run = _jitted(**{k: v for k, v in SETTINGS.items() if k != "temperature"})
  compiled = run._cache_size()
  hot, _ = _draw(scores, sets, temperature=3.0)
  assert run._cache_size() == compiled
  assert (hot.selected != cold.selected).any()


def test_kernel_scores_by_hand():
  logps, ref = np.array([[-6.0, -8.0]]), np.array([[-7.0, -4.0]])
  lengths = np.array([[2, 0]])
  for score, want in {
      "reward": [[0.5, -2.0]],
      "policy_logp": [[-6.0, -8.0]],
      "reward_per_token": [[0.25, -2.0]],
      "policy_logp_per_token": [[-3.0, -8.0]],
  }.items():
    got = mc.kernel_scores(logps, ref, lengths, score=score, beta=0.5)
    np.testing.assert_allclose(got, want)
  no_ref = mc.kernel_scores(
      logps, None, lengths, score="policy_logp", beta=0.5
  )
  np.testing.assert_allclose(no_ref, logps)


def test_unknown_names_are_refused_with_the_known_ones():
  scores, sets = _copies([0.0, 1.0, 2.0])
  with pytest.raises(ValueError, match="fixed_worst"):
    _draw(scores, sets, strategy="hardest")
  with pytest.raises(ValueError, match="policy_logp_per_token"):
    mc.kernel_scores(scores, scores, sets.lengths, score="logp", beta=0.1)


def test_correction_adds_log_mu_minus_log_q_after_the_temperature():
  _, sets = batches.random_batch(0, num_slots=3)
  sets = sets._replace(
      anchors={
          "proposal_mu": np.log(np.tile([0.2, 0.4, 0.1], (5, 1))),
          "proposal_q": np.log(np.tile([0.1, 0.1, 0.4], (5, 1))),
      },
      multiplicity=np.ones((5, 3), np.int32),
  )
  scores = np.tile([1.0, 2.0, 3.0], (5, 1))
  got = weights.log_weights(
      scores, sets, temperature=2.0, include_preferred=True, corrected=True
  )
  w = np.exp([0.5, 1.0, 1.5]) * [2.0, 4.0, 0.25]
  np.testing.assert_allclose(np.exp(got)[0], w / w.sum(), rtol=1e-6)


def test_taking_the_drawn_keeps_what_belongs_to_them():
  logps, sets = batches.random_batch(8, num_slots=6)
  rng = np.random.default_rng(8)
  selected = rng.integers(1, 6, (5, 3)).astype(np.int32)
  mask = np.take_along_axis(sets.candidate_mask, selected, axis=1)
  mask[0, 1] = False
  state = KernelState(np.where(mask, selected, 0), mask)
  taken, batch = mc.take_drawn(logps, sets, state)
  assert taken.shape == batch.role.shape == (5, 4)
  np.testing.assert_array_equal(
      weights.negatives(batch)[:, 1:],
      mask & (np.take_along_axis(sets.role, selected, axis=1) == -1),
  )
  assert not batch.candidate_mask[0, 2] and batch.lengths[0, 2] == 0
  for row, j in zip(*np.nonzero(mask)):
    slot = selected[row, j]
    assert batch.candidate_id[row, j + 1] == sets.candidate_id[row, slot]
    assert batch.lengths[row, j + 1] == sets.lengths[row, slot]
    assert batch.scores[row, j + 1] == sets.scores[row, slot]
    ref = sets.anchors["ref"][row, slot]
    assert taken[row, j + 1] == pytest.approx(logps[row, slot])
    assert batch.anchors["ref"][row, j + 1] == pytest.approx(ref)
  np.testing.assert_array_equal(batch.multiplicity, 1)
  np.testing.assert_array_equal(batch.example_id, sets.example_id)
