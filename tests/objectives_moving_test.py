"""Losses with a moving log Z: oracle, memory across visits, ugly inputs."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest

from mcpo_jax.objectives import moving, softmax
from mcpo_jax.types import Features

RATE = 0.7
NUM_EXAMPLES = 6
SETTINGS = {
    "compositional": {"beta": 0.3},
    "dft": {"tau": 0.8},
    "dft2": {"tau": 0.4},
}
LOSSES = {
    "compositional": moving.compositional_loss,
    "dft": moving.dft_loss,
    "dft2": moving.dft2_loss,
}
# Rows of `random_batch` are a permutation of 0 .. 4; row 5 is never visited.
STATE = {
    "log_z": np.array([0.3, -1.0, 0.8, 2.0, -0.4, 7.0]),
    "seen": np.array([True, True, False, True, False, True]),
}


def _terms(name, logps, ref, lengths):
  """Values, log-terms, tau and slopes d values / d logps of one row."""
  if name == "compositional":
    r = 0.3 * (logps - ref)
    return r, r, 1.0, np.full(len(r), 0.3)
  if name == "dft":
    return logps, logps / 0.8 - ref, 0.8, np.ones(len(logps))
  a = logps / np.maximum(lengths, 1)
  return a, a / 0.4, 0.4, 1.0 / np.maximum(lengths, 1)


def _oracle(name, logps, sets, state):
  """Loops over rows: losses [B], gradients [B, J], the state after."""
  losses, grads = np.zeros(len(logps)), np.zeros_like(logps)
  log_z, seen = state["log_z"].copy(), state["seen"].copy()
  for b, row in enumerate(sets.row):
    negatives = [
        j
        for j in range(1, logps.shape[1])
        if sets.candidate_mask[b, 0] and sets.candidate_mask[b, j]
        and sets.role[b, j] == -1
    ]
    if not negatives:
      continue
    values, terms, tau, slopes = _terms(
        name, logps[b], sets.anchors["ref"][b], sets.lengths[b]
    )
    share = sets.multiplicity[b] / sum(sets.multiplicity[b, negatives])
    u = sum(share[j] * np.exp(terms[j]) for j in negatives)
    if row >= 0 and state["seen"][row]:
      u = (1 - RATE) * np.exp(state["log_z"][row]) + RATE * u
    losses[b] = -values[0] + tau * np.log(u)
    grads[b, 0] = -slopes[0]
    for j in negatives:
      grads[b, j] = share[j] * np.exp(terms[j]) / u * slopes[j]
    if row >= 0:
      log_z[row], seen[row] = np.log(u), True
  return losses, grads, {"log_z": log_z, "seen": seen}


@functools.cache
def _jitted(name):
  @jax.jit
  def run(logps, ref, state, batch):
    def total(logps, ref):
      losses, aux, new = LOSSES[name](
          Features(logps), batch._replace(anchors={"ref": ref}), state,
          moving_rate=RATE, **SETTINGS[name],
      )
      # Neither the statistics nor the state add anything to the gradient.
      constant = sum(jnp.sum(x) for x in aux.values()) + jnp.sum(new["log_z"])
      return jnp.sum(losses) + constant, (losses, aux, new)

    (_, (losses, aux, new)), grads = jax.value_and_grad(
        total, (0, 1), has_aux=True
    )(logps, ref)
    return losses, grads, aux, new

  return run


def _run(name, logps, batch, state=STATE):
  """Losses, gradient, statistics, state."""
  losses, (grad, through_ref), aux, new = jax.tree.map(
      np.asarray,
      _jitted(name)(
          logps, batch.anchors["ref"], state, batch._replace(anchors={})
      ),
  )
  np.testing.assert_array_equal(through_ref, 0.0)
  return losses, grad, aux, new


def _close(got, want, atol=1e-12):
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=atol),
      got, want,
  )


@pytest.mark.parametrize("name", LOSSES)
def test_value_gradient_and_state_equal_the_oracle(x64, name):
  for seed in range(4):
    logps, sets = batches.random_batch(seed)
    losses, grad, aux, new = _run(name, logps, sets)
    want, want_grad, want_state = _oracle(name, logps, sets, STATE)
    np.testing.assert_allclose(losses, want, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(grad, want_grad, atol=1e-9, rtol=1e-9)
    assert np.abs(want_grad[:4]).max(axis=1).min() > 0.01
    _close(new, want_state, atol=1e-10)
    assert new["log_z"][5] == 7.0
    np.testing.assert_allclose(
        aux["log_z"][:4], new["log_z"][sets.row[:4]], atol=1e-12
    )
    assert all(np.isfinite(x).all() and x.shape == (5,) for x in aux.values())


def _rewards(rewards):
  """Row 0 with these rewards beta * (logps - ref), all others no set."""
  logps, sets = batches.random_batch(0)
  mask = np.zeros_like(sets.candidate_mask)
  mask[0] = True
  sets.multiplicity[0] = 9, 2, 1, 1
  sets.anchors["ref"][0] = -1.0
  logps[0] = -1.0 + np.array(rewards) / 0.3
  return logps, sets._replace(candidate_mask=mask)


def test_compositional_by_hand_over_two_visits(x64):
  state = moving.log_z_state(NUM_EXAMPLES)
  assert state["log_z"].dtype == np.float32 and not state["seen"].any()
  state = {"log_z": np.zeros(6), "seen": np.zeros(6, bool)}
  # Z = (2 * 1 + 2 + 4) / 4 = 2, taken as it is.
  logps, sets = _rewards(np.log([8.0, 1.0, 2.0, 4.0]))
  row = sets.row[0]
  losses, grad, aux, state = _run("compositional", logps, sets, state)
  assert losses[0] == pytest.approx(np.log(2 / 8), abs=1e-12)
  np.testing.assert_allclose(
      grad[0], 0.3 * np.array([-8, 2, 2, 4]) / 8, atol=1e-12
  )
  assert aux["log_z"][0] == pytest.approx(np.log(2))
  assert state["log_z"][row] == pytest.approx(np.log(2))
  np.testing.assert_array_equal(state["seen"], np.arange(6) == row)
  # Z = (2 * 10 + 0 + 12) / 4 = 8: u = 0.3 * 2 + 0.7 * 8 = 6.2.
  logps, sets = _rewards(np.log([1.0, 10.0, 1e-300, 12.0]))
  losses, grad, _, state = _run("compositional", logps, sets, state)
  assert losses[0] == pytest.approx(np.log(6.2), abs=1e-12)
  # The pull of the negatives is 8 / 6.2 in all: the surrogate is no softmax.
  np.testing.assert_allclose(
      grad[0], 0.3 * np.array([-1, 5 / 6.2, 0, 3 / 6.2]), atol=1e-12
  )
  assert state["log_z"][row] == pytest.approx(np.log(6.2))


def test_dft_by_hand(x64):
  # exp(logps / tau - ref) = 3 (twice), 1, 5: u = 12 / 4 = 3, fresh.
  logps, sets = _rewards([0.0, 0.0, 0.0, 0.0])
  sets = sets._replace(row=np.full(5, -1, np.int32))
  logps[0] = -2.0, -0.8, -1.6, -2.4
  sets.anchors["ref"][0, 1:] = np.array([-1, -2, -3]) - np.log([3, 1, 5])
  losses, grad, _, _ = _run("dft", logps, sets)
  assert losses[0] == pytest.approx(2.0 + 0.8 * np.log(3), abs=1e-12)
  np.testing.assert_allclose(grad[0], [-1, 6 / 12, 1 / 12, 5 / 12], atol=1e-12)
  # Means over tokens -1, -2, -1, -1.2 at tau = 0.4
  logps[0], sets.lengths[0] = (-2.0, -8.0, -3.0, -6.0), (2, 4, 3, 5)
  losses, grad, _, _ = _run("dft2", logps, sets)
  terms = np.array([2.0, 1.0, 1.0]) / 4 * np.exp([-5.0, -2.5, -3.0])
  want = 1.0 + 0.4 * np.log(terms.sum())
  assert losses[0] == pytest.approx(want, abs=1e-12)
  np.testing.assert_allclose(
      grad[0, 1:], terms / terms.sum() / [4, 3, 5], atol=1e-12
  )
  assert grad[0, 0] == -0.5


@pytest.mark.parametrize("name", LOSSES)
def test_held_out_prompts_take_the_fresh_estimate_and_leave_none(x64, name):
  logps, sets = batches.random_batch(1)
  nothing = {"log_z": np.zeros(6), "seen": np.zeros(6, bool)}
  fresh, fresh_grad, _, _ = _run(name, logps, sets, nothing)
  for row in (-1, NUM_EXAMPLES, 10**6):
    out = sets._replace(row=np.full(5, row, np.int32))
    losses, grad, _, state = _run(name, logps, out)
    np.testing.assert_array_equal(losses, fresh)
    np.testing.assert_array_equal(grad, fresh_grad)
    _close(state, STATE, atol=0)


def test_without_memory_it_is_the_plain_estimate(x64):
  logps, sets = batches.random_batch(2)

  @jax.jit
  def plain(logps):
    r = 0.3 * jnp.where(
        sets.candidate_mask, logps - sets.anchors["ref"], 0.0
    )
    rest = (sets.role == -1) & sets.candidate_mask
    count = jnp.where(rest, sets.multiplicity, 0)[:4]
    z = jnp.sum(count * jnp.exp(r[:4]), axis=1) / jnp.sum(count, axis=1)
    return jnp.sum(-r[:4, 0] + jnp.log(z))

  @jax.jit
  def ours(logps, rate):
    losses, _, state = moving.compositional_loss(
        Features(logps), sets, STATE, beta=0.3, moving_rate=rate
    )
    return jnp.sum(losses), state

  ours = jax.value_and_grad(ours, has_aux=True)
  (total, _), grad = ours(logps, 1.0)
  want, want_grad = jax.value_and_grad(plain)(logps)
  np.testing.assert_allclose(total, want, atol=1e-12)
  np.testing.assert_allclose(grad, want_grad, atol=1e-12)
  # At the other end u stands still where the prompt was seen.
  (_, state), _ = ours(logps, 0.0)
  seen = STATE["seen"]
  np.testing.assert_allclose(
      state["log_z"][seen], STATE["log_z"][seen], atol=1e-12
  )


def test_estimates_settle_on_log_z(x64):
  # Three negatives a visit, E exp(r) = 1: the average forgets the noise.
  _, sets = batches.random_batch(0)
  sets = sets._replace(
      anchors={"ref": np.zeros((5, 4))},
      multiplicity=np.ones_like(sets.multiplicity),
  )
  visit = jax.jit(functools.partial(
      moving.compositional_loss, beta=1.0, moving_rate=0.1
  ))
  rng = np.random.default_rng(0)
  state = {"log_z": np.zeros(6), "seen": np.zeros(6, bool)}
  errors, fresh_errors = [], []
  for step in range(200):
    r = np.log(rng.exponential(size=(5, 4)))
    _, aux, state = visit(Features(r), sets, state)
    if step >= 30:
      errors.append(np.abs(aux["log_z"][0]))
      fresh_errors.append(np.abs(np.log(np.exp(r[0, 1:]).mean())))
  assert np.mean(errors) < 0.4 * np.mean(fresh_errors)


def test_a_prompt_twice_in_a_batch_keeps_the_later_of_two_moves(x64):
  logps, sets = batches.random_batch(3)
  sets = sets._replace(row=np.array([0, 3, 0, 0, 0], np.int32))
  # Row 3 has no negative: that of row 2 is the last of prompt 0.
  role = sets.role.copy()
  role[3, 1:] = 0
  sets = sets._replace(role=role)
  losses, grad, aux, state = _run("compositional", logps, sets)
  want, want_grad, want_state = _oracle("compositional", logps, sets, STATE)
  np.testing.assert_allclose(losses, want, atol=1e-12)
  np.testing.assert_allclose(grad, want_grad, atol=1e-12)
  _close(state, want_state)
  assert state["log_z"][0] == pytest.approx(aux["log_z"][2])
  assert aux["log_z"][0] != pytest.approx(aux["log_z"][2])


def test_at_the_reference_log_z_is_zero_and_the_gradient_that_of_a_mean(x64):
  logps, sets = batches.random_batch(4)
  sets = sets._replace(
      anchors={"ref": logps}, multiplicity=np.ones_like(sets.multiplicity)
  )
  nothing = {"log_z": np.zeros(6), "seen": np.zeros(6, bool)}
  losses, grad, _, state = _run("compositional", logps, sets, nothing)
  np.testing.assert_allclose(losses, 0.0, atol=1e-12)
  np.testing.assert_allclose(state["log_z"], 0.0, atol=1e-12)
  np.testing.assert_allclose(grad[0], [-0.3, 0.1, 0.1, 0.1], atol=1e-12)


def test_one_negative_without_memory_pulls_like_cd(x64):
  logps, sets = batches.random_batch(5)
  sets = sets._replace(row=np.full(5, -1, np.int32))
  logps, sets = batches.take_slots(logps, sets, [0, 1])
  cd = lambda logps: jnp.sum(softmax.cd_loss(
      Features(logps), sets, None, beta=0.3, include_preferred=True
  )[0])
  ours = lambda logps: jnp.sum(moving.compositional_loss(
      Features(logps), sets, STATE, beta=0.3, moving_rate=RATE
  )[0])
  np.testing.assert_allclose(
      jax.grad(ours)(logps), jax.grad(cd)(logps), atol=1e-12
  )


@batches.MANY
@hypothesis.given(
    seed=st.integers(0, 10**6), shift=st.floats(-200, 200),
    order=st.permutations([1, 2, 3]), name=st.sampled_from(list(LOSSES)),
)
def test_invariances(seed, shift, order, name):
  with jax.enable_x64(True):
    logps, sets = batches.random_batch(seed)
    base, base_grad, base_aux, base_state = _run(name, logps, sets)
    rows, slots = [3, 0, 4, 2, 1], [0, *order]
    got, grad, _, state = _run(name, *batches.take_rows(logps, sets, rows))
    _close((got, grad, state), (base[rows], base_grad[rows], base_state))
    got, grad, aux, state = _run(
        name, *batches.take_slots(logps, sets, slots)
    )
    _close(
        (got, grad, aux, state),
        (base, base_grad[:, slots], base_aux, base_state),
    )
    if name == "compositional":
      got, grad, _, state = _run(name, logps + shift, sets._replace(
          anchors={"ref": sets.anchors["ref"] + shift}
      ))
      _close((got, grad, state), (base, base_grad, base_state), atol=1e-12)
    if name == "dft":
      # The law of the negatives off by a factor: u takes it up.
      start = STATE | {"log_z": STATE["log_z"] - shift}
      got, grad, _, state = _run(name, logps, sets._replace(
          anchors={"ref": sets.anchors["ref"] + shift}
      ), start)
      _close((got, grad), (base - 0.8 * shift * (base != 0), base_grad), 1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite_in_value_and_gradient(name):
  logps, sets = batches.random_batch(6)
  sets = sets._replace(lengths=np.minimum(sets.lengths, 1))
  start = {
      "log_z": STATE["log_z"].astype(np.float32), "seen": STATE["seen"],
  }
  signs = np.random.default_rng(0).choice([-1.0, 1.0], logps.shape)
  signs[:2, 0], signs[0, 1:], signs[1, 1:] = (1.0, -1.0), -1.0, 1.0
  for size in (1e4, 1e5):
    for values in (signs * size, -np.full(logps.shape, size)):
      state = start
      values = np.where(sets.candidate_mask, values, np.nan)
      for flip in (1.0, -1.0):  # what the state holds is extreme too
        losses, grad, aux, state = _run(name, flip * values, sets, state)
        assert np.isfinite(losses).all() and np.isfinite(grad).all()
        assert all(np.isfinite(x).all() for x in aux.values())
        assert np.isfinite(state["log_z"]).all()
        assert losses.dtype == grad.dtype == state["log_z"].dtype == np.float32


def test_exponents_are_cut():
  # Without a share of the fresh estimate in u nothing else holds them.
  logps, sets = _rewards([0.0, 0.0, 0.0, 1e5])
  sets = sets._replace(row=np.zeros(5, np.int32))

  @jax.jit
  def total(logps):
    losses, _, _ = moving.compositional_loss(
        Features(logps), sets, STATE, beta=0.3, moving_rate=0.0
    )
    return jnp.sum(losses)

  grad = jax.grad(total)(jnp.asarray(logps, jnp.float32))
  want = 0.3 * np.exp(moving.MAX_EXPONENT) / 4
  assert grad[0, 3] == pytest.approx(want, rel=1e-4)
  assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_a_negative_are_zero_and_leave_the_state(name):
  logps, sets = batches.random_batch(7)
  role, mask = sets.role.copy(), sets.candidate_mask.copy()
  role[0, 1:] = 0  # all tied with the preferred one
  mask[1, 1:] = False  # nothing but the preferred one
  mask[2, 0] = False  # no preferred one
  losses, grad, aux, state = _run(
      name, logps, sets._replace(role=role, candidate_mask=mask)
  )
  for b in (0, 1, 2, 4):
    assert losses[b] == 0.0 and not grad[b].any()
    assert all(value[b] == 0.0 for value in aux.values())
    row = sets.row[b]
    assert state["log_z"][row] == np.float32(STATE["log_z"][row])
    assert state["seen"][row] == STATE["seen"][row]
  assert losses[3] != 0.0 and grad[3].any() and state["seen"][sets.row[3]]
