"""Chains stand where enumeration says, by address, and say what they did."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax import registry
from mcpo_jax.kernels import chains, exact, weights
from mcpo_jax.types import KernelState

KEY = jax.random.key(13)
SETTINGS = {
    "transition": "categorical",
    "num_negatives": 2,
    "num_steps": 2,
    "block_size": 2,
    "init": "preferred",
    "include_preferred": True,
    "repulsion": 0.7,
    "corrected": False,
}
PERSISTENT = {"transition": "metropolis", "init": "persistent"}
LEAVING = {"include_preferred": False, "init": "persistent"}
SCORES = np.array([0.4, 0.9, -0.8, 0.1, 1.3])
COPIES = np.array([1, 1, 3, 2, 1])
HISTORY = np.array([2, 0, 1, 0, 4])
# Rows and slots of every batch here: one shape and few settings, so that few
# programs are compiled. Every row is a fresh draw.
NUM, K = 6_000, 5


@functools.cache
def _jitted(**settings):
  return jax.jit(
      lambda key, state, scores, sets, temperature: chains.walk(
          key, state, scores, sets, temperature=temperature, **settings
      )
  )


def _walk(scores, sets, state, *, key=KEY, temperature=1.0, **settings):
  run = _jitted(**SETTINGS | settings)
  return jax.tree.map(np.asarray, run(key, state, scores, sets, temperature))


def _rows(scores=SCORES, copies=COPIES):
  """(scores, sets, state) of one set as NUM examples; chains at slot 2."""
  tile = lambda row, dtype: np.tile(np.asarray(row, dtype), (NUM, 1))
  sets = exact.pool_sets(np.zeros((NUM, K), np.int64), {})
  sets = sets._replace(multiplicity=tile(copies, np.int32))
  selected = np.full((NUM, 2), 2, np.int32)
  state = KernelState(selected, selected > 0, tile(HISTORY, np.int32))
  return tile(scores, np.float32), sets, state


def _assert_law(selected, law):
  """Chi-square of slot counts against exact probabilities, p > 1e-4."""
  stats = pytest.importorskip("scipy.stats")
  counts, law = np.bincount(selected, minlength=len(law)), np.asarray(law)
  assert counts[law == 0].sum() == 0
  counts, law = counts[law > 0], law[law > 0]
  expected = law / law.sum() * counts.sum()
  assert stats.chisquare(counts, expected).pvalue > 1e-4


def _step_law(at, block, *, transition, copies, tilts, attraction):
  """Where one step leads from slot `at`: {slot: probability}."""
  if transition in ("categorical", "self_repellent"):
    heavy = {i: attraction[i] for i in {at, *block} if attraction[i] > 0}
    if not heavy:
      return {at: 1.0}
    total = sum(heavy.values())
    return {i: weight / total for i, weight in heavy.items()}
  # One of the other copies is proposed; those of its own lead nowhere.
  others = copies[at] - 1 + sum(copies[i] for i in block)
  law = {at: 1.0}
  for i in block:
    ratio = tilts[i] / tilts[at]
    accept = min(1.0, ratio) if transition == "metropolis" else (
        ratio / (1 + ratio)
    )
    law[i] = copies[i] / others * accept
    law[at] -= law[i]
  return law


def _law_by_enumeration(
    tilts, *, transition, num_steps, block_size, init, include_preferred,
    repulsion, **_,
):
  """[K] where a chain stands on the fixed set, over all orders of blocks."""
  whole = COPIES * tilts
  attraction = whole.copy()
  if transition == "self_repellent":
    attraction = attraction * (attraction / (1.0 + HISTORY)) ** repulsion
  elif not include_preferred:
    attraction[0] = 0.0
  starts = {"preferred": {0: 1.0}, "persistent": {2: 1.0},
            "model": dict(enumerate(whole / whole.sum()))}[init]
  law = np.zeros(K)
  for start, share in starts.items():
    orders = list(itertools.permutations({1, 2, 3, 4} - {start}))
    for order in orders:
      at = {start: share / len(orders)}
      for j in range(num_steps):
        block = order[j * block_size:(j + 1) * block_size]
        after = dict.fromkeys(range(K), 0.0)
        for slot, mass in at.items():
          for to, p in _step_law(
              slot, block, transition=transition, copies=COPIES, tilts=tilts,
              attraction=attraction,
          ).items():
            after[to] += mass * p
        at = after
      law += [at[i] for i in range(K)]
  assert law.sum() == pytest.approx(1.0, abs=1e-12)
  return law


def test_the_law_of_the_oracle_by_hand():
  # y0 and two candidates of weight 2 and 1 on it; one is proposed.
  tilts, copies = np.array([1.0, 2.0, 1.0]), np.array([1, 1, 1])
  one = functools.partial(
      _step_law, 0, (1, 2), copies=copies, tilts=tilts, attraction=tilts
  )
  assert one(transition="categorical") == {0: 0.25, 1: 0.5, 2: 0.25}
  assert one(transition="metropolis") == {0: 0.0, 1: 0.5, 2: 0.5}
  law = one(transition="barker")  # 1/2 * 2/3, 1/2 * 1/2
  assert law == pytest.approx({0: 5 / 12, 1: 1 / 3, 2: 1 / 4})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        LEAVING,
        {"include_preferred": False, "init": "model", "block_size": 1},
        PERSISTENT,
        {"transition": "barker"},
        {"transition": "self_repellent"},
    ],
    ids=lambda settings: "-".join(str(x) for x in settings.values()) or "-",
)
def test_draws_follow_the_law_over_all_orders_of_blocks(settings):
  got, info = _walk(*_rows(), temperature=0.8, **settings)
  law = _law_by_enumeration(np.exp(SCORES / 0.8), **SETTINGS | settings)
  _assert_law(got.selected.ravel(), law)
  joint = got.selected[:, 0] * K + got.selected[:, 1]
  _assert_law(joint, np.outer(law, law).ravel())  # chains are independent
  np.testing.assert_array_equal(got.selected_mask, got.selected > 0)
  np.testing.assert_allclose(info.stayed, (got.selected == 0).mean(1))


# Seven outcomes with laws of a proposal and tilts towards the model.
LOG_MU = np.log([0.25, 0.05, 0.2, 0.1, 0.15, 0.05, 0.2])
LOG_TILTS = np.array([0.3, 2.0, -1.0, 0.8, -0.2, 1.1, 0.0])
VISITS = np.array([0, 3, 1, 0, 5, 1, 2])


def _matrix(transition, block_size):
  """Exact law of one step over fresh candidates from mu."""
  if transition in ("metropolis", "barker"):
    return exact.accepted_matrix(LOG_MU, LOG_TILTS, transition=transition)
  pools = exact.all_pools(7, block_size)
  log_weights = LOG_TILTS[pools]
  if transition == "self_repellent":
    log_weights = 1.7 * log_weights - 0.7 * np.log1p(VISITS[pools])
  return exact.transition_matrix(
      pools, jax.nn.log_softmax(log_weights, axis=1), LOG_MU
  )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("transition", "num_steps", "block_size"),
    [("categorical", 1, 2), ("metropolis", 2, 1), ("barker", 1, 1),
     ("self_repellent", 2, 1)],
)
def test_steps_over_fresh_candidates_are_the_product_of_exact_matrices(
    transition, num_steps, block_size, seed
):
  num = 200_000
  rng = np.random.default_rng(seed)
  pools = rng.choice(
      7, p=np.exp(LOG_MU), size=(num, 1 + num_steps * block_size)
  )
  pools[:, 0] = 2
  nowhere = np.zeros((num, 1), np.int32)
  state, _ = _walk(
      LOG_TILTS[pools].astype(np.float32),
      exact.pool_sets(pools, {}),
      KernelState(nowhere, nowhere > 0, VISITS[pools].astype(np.int32)),
      key=jax.random.key(seed), transition=transition, num_negatives=1,
      num_steps=num_steps, block_size=block_size,
  )
  with jax.enable_x64(True):
    matrix = np.asarray(_matrix(transition, block_size))
  drawn = np.take_along_axis(pools, state.selected, axis=1)[:, 0]
  _assert_law(drawn, np.linalg.matrix_power(matrix, num_steps)[2])


@pytest.mark.parametrize("settings", [PERSISTENT, LEAVING])
def test_among_the_negatives_of_a_fixed_set_the_weights_are_invariant(settings):
  # Copies included: started from the weights, chains are left in them.
  law = (COPIES * np.exp(SCORES))[1:]
  start = np.random.default_rng(0).choice(
      [1, 2, 3, 4], p=law / law.sum(), size=(NUM, 2)
  )
  scores, sets, state = _rows()
  state = state._replace(selected=start.astype(np.int32))
  got, _ = _walk(scores, sets, state, **settings)
  assert (got.selected != start).mean() > 0.4
  _assert_law(got.selected.ravel(), [0.0, *law])


def test_a_chain_goes_on_where_it_stood_and_never_meets_itself():
  # Equal scores: Metropolis accepts everything but its own slot, and there is
  # only one other negative, so it must move to and fro.
  scores, sets, state = _rows(np.zeros(K), np.ones(K))
  mask = sets.candidate_mask.copy()
  mask[:, 3:] = False
  sets = sets._replace(candidate_mask=mask)
  for want in (1, 2, 1):
    state, info = _walk(scores, sets, state, **PERSISTENT)
    np.testing.assert_array_equal(state.selected, want)
    np.testing.assert_array_equal(info.stayed, 0.0)


def test_a_chain_whose_slot_is_no_negative_now_starts_at_the_preferred():
  scores, sets, state = _rows([200.0, *SCORES[1:]])
  role = sets.role.copy()
  role[:, 2] = 0
  got, _ = _walk(scores, sets._replace(role=role), state, **PERSISTENT)
  np.testing.assert_array_equal(got.selected, 0)


def test_repelled_chains_draw_by_weight_in_the_long_run_and_more_evenly():
  """What was drawn after 60 visits lies closer to the weights than chance."""
  scores, sets, state = _rows()
  state = KernelState(
      state.selected[:, :1], state.selected_mask[:, :1], state.history * 0
  )
  for visit in range(60):
    state, info = _walk(
        scores, sets._replace(visit=sets.visit + visit), state, repulsion=9.0,
        transition="self_repellent", num_negatives=1, num_steps=1,
        block_size=None,
    )
  law = COPIES * np.exp(SCORES) / np.sum(COPIES * np.exp(SCORES))
  np.testing.assert_allclose(np.exp(info.log_weights[0]), law, rtol=1e-5)
  share = np.asarray(state.history) / 60
  np.testing.assert_allclose(share.mean(0), law, atol=0.02)
  # Independent draws have the variance law (1 - law) / 60.
  assert (share.var(0) < 0.3 * law * (1 - law) / 60).all()


def test_history_counts_all_chains_and_other_transitions_pass_it_through():
  scores, sets, state = _rows()
  got, _ = _walk(scores, sets, state, transition="self_repellent")
  want = state.history.copy()
  np.add.at(want, (np.arange(NUM)[:, None], got.selected), 1)
  np.testing.assert_array_equal(got.history, want)
  assert got.history.dtype == np.int32
  for settings in ({"transition": "barker"}, {}):
    other, _ = _walk(scores, sets, state, **settings)
    np.testing.assert_array_equal(other.history, state.history)
  run = functools.partial(
      chains.walk, temperature=1.0, **SETTINGS | {"transition": "barker"}
  )
  none, _ = jax.eval_shape(run, KEY, None, scores, sets)
  assert none.history == ()


def test_in_the_long_run_repulsion_is_a_higher_temperature():
  # Counts after n visits, in expectation: weight^(1 / (1 + repulsion)).
  law = COPIES * np.exp(SCORES)
  counts = np.zeros(5)
  for _ in range(20_000):
    heavy = law / (1 + counts) ** 0.7
    counts += heavy / heavy.sum()
  want = law ** (1 / 1.7)
  np.testing.assert_allclose(
      counts / counts.sum(), want / want.sum(), rtol=2e-3
  )


def test_the_preferred_is_left_unless_there_is_nowhere_to_go():
  scores, sets, state = _rows()
  scores[:, 0] = 1e30
  scores[:150, 1:] = -1e30
  mask = sets.candidate_mask.copy()
  mask[100:200, 1:] = False
  sets = sets._replace(candidate_mask=mask)
  alone = ~mask[:, 1]
  start = state._replace(selected=0 * state.selected)
  left, info = _walk(scores, sets, start, **LEAVING)
  np.testing.assert_array_equal(left.selected > 0, ~alone[:, None] & [[1, 1]])
  np.testing.assert_array_equal(info.stayed, 0.0)
  stays, info = _walk(scores, sets, state)
  np.testing.assert_array_equal(stays.selected, 0)
  np.testing.assert_array_equal(info.stayed, 1.0 * ~alone)


def test_a_short_block_is_used_and_an_empty_one_skipped():
  # Three negatives in blocks of 2: the second has 1. One negative: the second
  # has none, and the chain has but one chance to move.
  scores, sets, state = _rows(np.zeros(K), np.ones(K))
  for num, stay in ((3, 1 / 3 * 1 / 2), (1, 1 / 2)):
    mask = sets.candidate_mask.copy()
    mask[:, 1 + num:] = False
    got, _ = _walk(scores, sets._replace(candidate_mask=mask), state)
    _assert_law(
        got.selected.ravel(),
        [stay, *[(1 - stay) / num] * num, *[0.0] * (4 - num)],
    )


@pytest.mark.parametrize(
    "settings",
    [{}, PERSISTENT, {"transition": "barker"},
     {"transition": "self_repellent"}],
    ids=chains.TRANSITIONS,
)
def test_rows_without_negatives_are_zeros_and_finite(settings):
  scores, sets, state = _rows()
  role, mask = sets.role.copy(), sets.candidate_mask.copy()
  mask[0] = False  # no set
  role[1, 1:] = 0  # no contrast
  mask[2, 0] = False  # no preferred
  role[3:, 3] = 0
  mask[3:, 4] = False
  sets = sets._replace(role=role, candidate_mask=mask)
  scores = np.where(mask, scores, np.nan).astype(np.float32)
  got, info = _walk(scores, sets, state, **settings)
  np.testing.assert_array_equal(got.selected[:3], 0)
  np.testing.assert_array_equal(got.history[:3], state.history[:3])
  assert {1, 2} <= set(got.selected[3:].ravel()) <= {0, 1, 2}  # not 3, 4
  for value in info[1:]:
    assert np.isfinite(value).all()
    np.testing.assert_array_equal(value[[0, 2]], 0.0)
  assert info.stayed[1] == 0.0
  scores[:, 1] = np.nan
  _, info = _walk(scores, sets, state, **settings)
  assert np.isnan(info.ess[3:]).all()


@pytest.mark.parametrize("transition", ["self_repellent", "barker"])
def test_same_ids_whatever_the_batch_the_slots_and_the_padding(
    x64, transition
):
  logps, sets = batches.random_batch(6, num_sets=300, num_slots=7)
  rng = np.random.default_rng(1)
  mask = sets.candidate_mask & (np.arange(7) != 5)
  mask[100:, 4] = False
  sets = sets._replace(candidate_mask=mask)
  selected = rng.integers(0, 7, (300, 2)).astype(np.int32)
  history = rng.integers(0, 4, mask.shape).astype(np.int32)
  rows, slots = rng.permutation(300), np.array([0, 3, 6, 1, 4, 2, 5])

  def ids(scores, sets, selected, history):
    state = KernelState(selected, selected > 0, history)
    got, info = _walk(
        scores, sets, state, transition=transition, init="persistent"
    )
    drawn = np.take_along_axis(sets.candidate_id, got.selected, 1)
    return np.where(got.selected_mask, drawn.astype(int), -1), info

  base, base_info = ids(np.where(mask, logps, 0.0), sets, selected, history)
  moved = batches.take_slots(
      *batches.take_rows(np.where(mask, logps, 9.0), sets, rows), slots
  )
  where = np.argsort(slots).astype(np.int32)
  got, info = ids(*moved, where[selected[rows]], history[rows][:, slots])
  np.testing.assert_array_equal(got, base[rows])
  assert set(base.ravel()) == {-1, 1, 2, 3, 4, 6}
  for name in ("ess", "negative_rank", "argmax_share", "stayed"):
    np.testing.assert_allclose(
        getattr(info, name), getattr(base_info, name)[rows], atol=1e-12
    )


def test_devices_and_a_schedule_change_nothing():
  rows = _rows()
  want, _ = _walk(*rows, temperature=0.3)
  mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.device_put(rows, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec("data")
  ))
  got, _ = _walk(*split, temperature=0.3)
  np.testing.assert_array_equal(got.selected, want.selected)
  compiled = _jitted(**SETTINGS)._cache_size()
  hot, _ = _walk(*rows, temperature=3.0)
  assert (hot.selected != want.selected).any()
  assert _jitted(**SETTINGS)._cache_size() == compiled


def test_a_later_visit_and_another_seed_draw_anew():
  scores, sets, state = _rows()
  base, _ = _walk(scores, sets, state)
  chance = ((np.bincount(base.selected.ravel()) / (2 * NUM)) ** 2).sum()
  later = sets._replace(visit=sets.visit + 1)
  for got, _ in (
      _walk(scores, later, state),
      _walk(scores, sets, state, key=jax.random.key(14)),
  ):
    same = np.mean(got.selected == base.selected)
    assert same == pytest.approx(chance, abs=0.02)


def test_no_gradient_reaches_the_scores():
  scores, sets, state = _rows(4)

  def total(scores):
    _, info = chains.walk(
        KEY, state, scores, sets, temperature=0.5, **SETTINGS
    )
    return info.log_weights.sum() + info.ess.sum() + info.negative_rank.sum()

  np.testing.assert_array_equal(jax.jit(jax.grad(total))(scores), 0.0)


def test_correction_weighs_slot_zero_too():
  scores, sets, state = _rows()
  q = np.array([0.5, 0.1, 0.1, 0.1, 0.2])
  sets = sets._replace(anchors={
      "proposal_mu": np.tile(np.log(np.full(K, 0.2)), (NUM, 1)),
      "proposal_q": np.tile(np.log(q), (NUM, 1)),
  })
  settings = {"transition": "barker", "corrected": True}
  got, _ = _walk(scores, sets, state, **settings)
  law = _law_by_enumeration(np.exp(SCORES) * 0.2 / q, **SETTINGS | settings)
  _assert_law(got.selected.ravel(), law)


def test_names_are_those_of_the_registry_and_others_are_refused():
  assert chains.TRANSITIONS == registry.TRANSITIONS
  assert chains.INITS == registry.INITS
  for settings, message in (
      ({"transition": "gibbs"}, "self_repellent"),
      ({"init": "reference"}, "persistent"),
      ({"num_steps": 3}, "3 steps of 2 candidates do not fit a pool of 4"),
      ({"block_size": None}, "2 steps need a block_size"),
  ):
    with pytest.raises(ValueError, match=message):
      _walk(*_rows(), **settings)


@pytest.mark.parametrize("schedule", weights.SCHEDULES)
def test_temperature_schedules_by_hand(schedule):
  at = jax.jit(lambda step: jnp.float32(weights.temperature_at(
      step, start=4.0, end=0.25, num_steps=100, schedule=schedule
  )))
  want = {
      "constant": [4.0, 4.0, 4.0, 4.0],
      "linear": [4.0, 2.125, 0.25, 0.25],
      "geometric": [4.0, 1.0, 0.25, 0.25],
  }[schedule]
  np.testing.assert_allclose(
      [at(step) for step in (0, 50, 100, 130)], want, rtol=1e-6
  )


def test_a_constant_temperature_needs_no_end_and_unknown_schedules_fail():
  settings = {"start": 0.3, "end": None, "num_steps": 10}
  assert weights.temperature_at(3, schedule="constant", **settings) == 0.3
  with pytest.raises(ValueError, match="geometric"):
    weights.temperature_at(3, schedule="cosine", **settings)
