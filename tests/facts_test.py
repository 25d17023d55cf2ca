"""The mathematics of the method, by exact enumeration in float64.

Toy: an autoregressive policy over three tokens (a, b, end) and at most two
steps, so 7 completions and 9 parameters. Every expectation is a finite sum.
Inverse tests break one assumption and must see it, by a stated amount. Errors
of laws are total variations, biases of gradients the largest coordinate.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax.kernels import exact, mc, weights
from mcpo_jax.objectives import pairwise, softmax
from mcpo_jax.types import Features

BETA = 0.7
OUTCOMES = [(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)]
V = len(OUTCOMES)
VISITS = np.array([0, 3, 1, 0, 5, 1, 2])  # of each outcome
REPULSION = 0.6
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(autouse=True)
def _float64(x64):
  yield


@jax.jit
def _log_pi(theta):
  """[9] parameters -> [V] log-probabilities of the completions."""
  first = jax.nn.log_softmax(theta[:3])
  second = jax.nn.log_softmax(theta[3:].reshape(2, 3), axis=1)
  return jnp.stack([
      first[y[0]] + (second[y[0], y[1]] if len(y) == 2 else 0.0)
      for y in OUTCOMES
  ])


_jitted_log_weights = jax.jit(
    weights.log_weights,
    static_argnames=("include_preferred", "corrected"),
)
_preferred_weight = jax.jit(weights.preferred_weight)
_transition_matrix = jax.jit(exact.transition_matrix)
_score_gradients = jax.jit(jax.jacfwd(_log_pi))  # [V, 9]


def _log_weights(scores, sets, **settings):
  return np.asarray(_jitted_log_weights(scores, sets, **settings))


class Toy:
  """Policy, reference, and an independent proposal mu."""

  def __init__(self, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    self.theta = rng.normal(size=9) * scale
    self.log_ref, self.log_mu, self.log_q = (
        np.asarray(_log_pi(rng.normal(size=9))) for _ in range(3)
    )

  def rewards(self, theta, beta=BETA):
    return beta * (_log_pi(theta) - self.log_ref)

  @property
  def log_pi(self):
    return np.asarray(_log_pi(self.theta))

  def reward_gradients(self):
    return BETA * np.asarray(_score_gradients(self.theta))

  @property
  def log_p(self):
    return np.asarray(exact.tilted(self.log_mu, self.tilts)[0])

  @property
  def tilts(self):
    """[V] rewards of the toy's own policy."""
    return np.asarray(self.rewards(self.theta))


def _pools(toy, num_candidates, **more):
  """(pools, sets): all of them, with the toy's reference as anchor."""
  pools = exact.all_pools(V, num_candidates)
  return pools, exact.pool_sets(pools, {"ref": toy.log_ref} | more)


def _matrix(toy, num_candidates, *, include_preferred=True, history=None):
  """The categorical kernel's transition matrix for candidates from mu."""
  pools, sets = _pools(toy, num_candidates)
  log_weights = _log_weights(
      toy.tilts[pools],
      sets,
      temperature=1.0,
      include_preferred=include_preferred,
  )
  if history is not None:  # [V] visits of each outcome
    log_weights = jax.nn.log_softmax(
        (1.0 + REPULSION) * toy.tilts[pools]
        - REPULSION * np.log1p(history)[pools], axis=1
    )
  return np.asarray(_transition_matrix(pools, log_weights, toy.log_mu))


def _matrices(toy):
  """name -> (transition matrix, the law it keeps), of every transition."""
  p = np.exp(toy.log_p)
  repelled = p * (np.exp(toy.tilts) / (1.0 + VISITS)) ** REPULSION
  return {
      "categorical": (_matrix(toy, 2), p),
      "self_repellent": (
          _matrix(toy, 2, history=VISITS), repelled / repelled.sum()
      ),
  } | {
      name: (
          np.asarray(exact.accepted_matrix(
              toy.log_mu, toy.tilts, transition=name
          )), p
      )
      for name in ("metropolis", "barker")
  }


def _gradients(toy, per_pool_loss, pools):
  """[N, 9] gradient of each pool's loss, which is a function of its logps."""
  slopes = jax.jit(jax.grad(lambda logps: per_pool_loss(logps).sum()))
  per_logp = slopes(toy.log_pi[pools])
  jacobian = np.asarray(_score_gradients(toy.theta))[pools]
  return np.einsum("nk,nkd->nd", np.asarray(per_logp), jacobian)


def _rnce(sets, beta=BETA):
  def loss(logps):
    return softmax.rnce_loss(Features(logps), sets, None, beta=beta)[0]

  return loss


def _expected_cd(toy, sets, pools, *, temperature, include_preferred):
  scores = toy.tilts[pools]
  settings = {"temperature": temperature}
  log_weights = _log_weights(
      scores, sets, include_preferred=include_preferred, **settings
  )
  p_0 = _preferred_weight(scores, sets, **settings)
  sets = sets._replace(
      anchors=sets.anchors
      | {"preferred_weight": np.broadcast_to(p_0[:, None], scores.shape)}
  )

  def cd(features, pair):
    return softmax.cd_loss(
        features, pair, None, beta=BETA, include_preferred=include_preferred
    )[0]

  return lambda logps: exact.expected_pair_loss(cd, logps, sets, log_weights)


def test_the_toy_is_a_distribution_and_log_z_has_the_gradient_of_the_model():
  toy = Toy()
  for log_law in (toy.log_pi, toy.log_ref, toy.log_mu, toy.log_p):
    assert float(np.exp(log_law).sum()) == pytest.approx(1.0, abs=1e-12)
  log_z = lambda theta: exact.tilted(toy.log_mu, toy.rewards(theta))[1]
  jacobian = toy.reward_gradients()
  got = jax.jit(jax.grad(log_z))(toy.theta)
  np.testing.assert_allclose(got, np.exp(toy.log_p) @ jacobian, **EXACT)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_1_mean_cd_gradient_is_the_rnce_gradient(num_candidates):
  toy = Toy(1)
  pools, sets = _pools(toy, num_candidates)
  want = _gradients(toy, _rnce(sets), pools)
  for include in (True, False):  # left out: times sg[1 - p_0]
    expected = _expected_cd(
        toy, sets, pools, temperature=1.0, include_preferred=include
    )
    got = _gradients(toy, expected, pools)
    np.testing.assert_allclose(got, want, **EXACT)


@pytest.mark.parametrize("include_preferred", [True, False])
def test_1_cd_at_temperature_t_is_t_times_rnce_at_beta_over_t(
    include_preferred,
):
  toy, temperature = Toy(2), 0.4
  pools, sets = _pools(toy, 2)
  expected = _expected_cd(
      toy, sets, pools, temperature=temperature,
      include_preferred=include_preferred,
  )
  got = _gradients(toy, expected, pools)
  want = _gradients(toy, _rnce(sets, BETA / temperature), pools)
  np.testing.assert_allclose(got, temperature * want, **EXACT)


def test_1_inverse_cd_without_its_factor_is_seen():
  toy = Toy(1)
  pools, sets = _pools(toy, 2)
  log_weights = _log_weights(
      toy.tilts[pools], sets, temperature=1.0,
      include_preferred=False,
  )

  def cd(features, pair):
    return softmax.cd_loss(
        features, pair, None, beta=BETA, include_preferred=True
    )[0]

  wrong = lambda x: exact.expected_pair_loss(cd, x, sets, log_weights)
  error = _gradients(toy, wrong, pools) - _gradients(toy, _rnce(sets), pools)
  assert np.abs(error).max() > 0.1


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_2_kernel_leaves_the_model_invariant_in_detailed_balance(
    num_candidates,
):
  toy = Toy(3)
  p, matrix = np.exp(toy.log_p), _matrix(toy, num_candidates)
  np.testing.assert_allclose(matrix.sum(1), 1.0, **EXACT)
  np.testing.assert_allclose(p @ matrix, p, **EXACT)
  flow = p[:, None] * matrix
  np.testing.assert_allclose(flow, flow.T, **EXACT)


@pytest.mark.parametrize("seed", [3, 37])
def test_2_every_transition_keeps_its_law_in_detailed_balance(seed):
  matrices = _matrices(Toy(seed))
  for name, (matrix, law) in matrices.items():
    np.testing.assert_allclose(matrix.sum(1), 1.0, **EXACT, err_msg=name)
    assert matrix.min() >= 0.0, name
    assert float(exact.stationarity_error(matrix, law)) < 1e-12, name
    flow = law[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, **EXACT, err_msg=name)
  # A history is not forgotten: p itself is not what such a step keeps.
  kept = matrices["self_repellent"][0]
  p = matrices["categorical"][1]
  assert float(exact.stationarity_error(kept, p)) > 0.05


def test_2_barker_is_one_candidate_with_the_preferred_in():
  toy = Toy(3)
  barker = _matrices(toy)["barker"][0]
  np.testing.assert_allclose(_matrix(toy, 1), barker, **EXACT)
  # A history in proportion to the weights changes nothing.
  even = _matrix(toy, 1, history=9.0 * np.exp(toy.tilts) - 1.0)
  np.testing.assert_allclose(even, barker, **EXACT)


@pytest.mark.parametrize("seed", [3, 37])
def test_2_metropolis_moves_more_than_barker_and_mixes_faster(seed):
  # Peskun: off the diagonal nowhere smaller.
  matrices = _matrices(Toy(seed))
  metropolis, barker = matrices["metropolis"][0], matrices["barker"][0]
  more = metropolis - barker
  off = ~np.eye(V, dtype=bool)
  assert more[off].min() >= 0.0 < more.max()
  gaps = [exact.spectral_gap(m) for m in (barker, metropolis)]
  assert 0.0 < gaps[0] < gaps[1] <= 1.0


def test_2_inverse_leaving_the_preferred_out_breaks_invariance():
  toy = Toy(37, scale=1.0)
  p = np.exp(toy.log_p)
  errors = [
      float(exact.stationarity_error(
          _matrix(toy, n, include_preferred=False), p
      ))
      for n in (1, 2, 3)
  ]
  np.testing.assert_allclose(errors, [0.315, 0.165, 0.103], atol=1e-3)


def test_3_proposals_need_their_correction_on_every_slot():
  toy = Toy(15)
  p = np.exp(toy.log_p)

  def error(num_candidates, mu, q, corrected):
    pools = exact.all_pools(V, num_candidates)
    sets = exact.pool_sets(pools, {"proposal_mu": mu, "proposal_q": q})
    return _stationary_error(toy, pools, sets, p, corrected)

  for n in (1, 2, 3):
    assert error(n, toy.log_mu, toy.log_q, True) < 1e-12
  wrong = [error(n, toy.log_mu, toy.log_q, False) for n in (1, 2, 3)]
  np.testing.assert_allclose(wrong, [0.098, 0.152, 0.189], atol=1e-3)
  assert error(2, toy.log_q, toy.log_mu, True) > 0.1  # the wrong sign
  # Metropolis and Barker correct the ratio they accept by.
  for name in ("metropolis", "barker"):
    one = functools.partial(
        exact.accepted_matrix, toy.log_q, transition=name
    )
    right = one(toy.tilts + toy.log_mu - toy.log_q)
    assert float(exact.stationarity_error(right, p)) < 1e-12
    assert float(exact.stationarity_error(one(toy.tilts), p)) > 0.05


def test_3_inverse_a_correction_left_out_at_slot_0_is_seen():
  toy = Toy(23, scale=2.0)
  pools, sets = _pools(
      toy, 2, proposal_mu=toy.log_mu, proposal_q=toy.log_q
  )
  anchors = dict(sets.anchors)
  for name in ("proposal_mu", "proposal_q"):
    anchors[name][:, 0] = 0.0
  sets = sets._replace(anchors=anchors)
  error = _stationary_error(toy, pools, sets, np.exp(toy.log_p), True)
  assert error == pytest.approx(0.216, abs=1e-3)


def _stationary_error(toy, pools, sets, p, corrected):
  """Distance of p after one step, with candidates from q."""
  log_weights = _log_weights(
      toy.tilts[pools], sets, temperature=1.0,
      include_preferred=True, corrected=corrected,
  )
  matrix = _transition_matrix(pools, log_weights, toy.log_q)
  return float(exact.stationarity_error(matrix, p))


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_4_started_at_the_model_one_step_gives_the_gradient_of_log_z(
    num_candidates,
):
  toy = Toy(5)
  log_z = lambda theta: exact.tilted(toy.log_mu, toy.rewards(theta))[1]
  jacobian = toy.reward_gradients()
  p, matrix = np.exp(toy.log_p), _matrix(toy, num_candidates)
  np.testing.assert_allclose(
      p @ matrix @ jacobian, jax.jit(jax.grad(log_z))(toy.theta), **EXACT
  )
  # The preferred from the model too: nothing is left to learn.
  pools, sets = _pools(toy, num_candidates)
  law = np.exp(
      toy.log_p[pools[:, 0]] + toy.log_mu[pools[:, 1:]].sum(axis=1)
  )
  rnce = law @ _gradients(toy, _rnce(sets), pools)
  np.testing.assert_allclose(rnce, 0.0, atol=1e-12)


def test_4_started_at_the_model_any_number_of_any_steps_is_unbiased():
  toy = Toy(5)
  jacobian = toy.reward_gradients()
  for name, (matrix, law) in _matrices(toy).items():
    at = law
    for _ in range(3):
      at = at @ matrix
      np.testing.assert_allclose(
          at @ jacobian, law @ jacobian, **EXACT, err_msg=name
      )


def test_4_inverse_from_another_law_the_bias_shrinks_with_candidates():
  toy = Toy(20)
  jacobian = toy.reward_gradients()
  truth = np.exp(toy.log_p) @ jacobian
  start = np.eye(V)[np.argmin(toy.log_p)]
  bias = [
      float(np.abs(start @ _matrix(toy, n) @ jacobian - truth).max())
      for n in (1, 2, 3)
  ]
  np.testing.assert_allclose(bias, [0.360, 0.225, 0.157], atol=1e-3)
  # and the learning signal is not zero
  pools, sets = _pools(toy, 1)
  law = (start[pools[:, 0]] * np.exp(toy.log_mu[pools[:, 1]]))
  rnce = law @ _gradients(toy, _rnce(sets), pools)
  assert np.abs(rnce).max() > 0.05


def test_5_with_mu_the_reference_the_model_is_a_geometric_mixture():
  toy = Toy(6)
  log_pi = toy.log_pi
  for beta in (0.1, 0.7, 1.0):
    log_p, _ = exact.tilted(toy.log_ref, toy.rewards(toy.theta, beta))
    mixture = (1 - beta) * toy.log_ref + beta * log_pi
    np.testing.assert_allclose(log_p, jax.nn.log_softmax(mixture), **EXACT)
    distance = exact.total_variation(np.exp(log_p), np.exp(log_pi))
    assert (distance < 1e-12) if beta == 1.0 else (distance > 0.05)


def test_6_more_steps_come_closer_to_the_model():
  toy = Toy(45)
  p, start = np.exp(toy.log_p), np.exp(toy.log_pi)
  far = exact.mixing(_matrix(toy, 2), start, p, num_steps=6)
  np.testing.assert_allclose(
      far, [0.562, 0.204, 0.077, 0.030, 0.012, 0.005, 0.002], atol=1e-3
  )
  # In the long run by the second eigenvalue a step, and from the model none.
  gap = exact.spectral_gap(_matrix(toy, 2))
  assert float(far[6] / far[5]) == pytest.approx(1 - gap, abs=1e-2)
  at_home = exact.mixing(_matrix(toy, 2), p, p, num_steps=2)
  np.testing.assert_allclose(at_home, 0.0, atol=1e-12)


def test_6_every_transition_mixes_and_more_candidates_mix_faster():
  toy = Toy(45)
  for name, (matrix, law) in _matrices(toy).items():
    far = exact.mixing(
        matrix, np.exp(toy.log_pi), law, num_steps=10
    )
    assert np.all(far[1:] < far[:-1]) and float(far[-1]) < 0.1, name
  gaps = [exact.spectral_gap(_matrix(toy, n)) for n in (1, 2, 3)]
  assert gaps == sorted(gaps) and gaps[0] < 0.9 * gaps[2]


def test_6_two_blocks_of_one_pool_are_the_squared_matrix():
  # Over every pool of two candidates: a step on the first of them, then one
  # on the second, from where the first has led.
  toy = Toy(7)
  pools, _ = _pools(toy, 2)

  def step(order, mask):
    sets = exact.pool_sets(pools[:, order], {})
    return np.exp(_log_weights(
        toy.tilts[pools[:, order]],
        sets._replace(candidate_mask=np.broadcast_to(mask, pools.shape)),
        temperature=1.0,
        include_preferred=True,
    ))

  first = step([0, 1, 2], [True, True, False])
  drawn = np.exp(toy.log_mu[pools[:, 1:]].sum(axis=1))
  law = np.zeros((V, V))
  for slot in (0, 1):
    order = [slot, 1 - slot, 2]
    mass = (drawn * first[:, slot])[:, None]
    mass = mass * step(order, [True, False, True])
    np.add.at(law, (pools[:, :1], pools[:, order]), mass)
  matrix = _matrix(toy, 1)
  np.testing.assert_allclose(law, matrix @ matrix, **EXACT)


def test_6_on_one_fixed_set_a_second_step_changes_nothing():
  toy = Toy(7)
  pools, sets = _pools(toy, 2)
  log_weights = _log_weights(
      toy.tilts[pools], sets, temperature=1.0,
      include_preferred=True,
  )
  step = np.tile(np.exp(log_weights[5]), (3, 1))  # same law from any slot
  np.testing.assert_allclose(step @ step, step, **EXACT)


def test_7_at_the_reference_weights_are_uniform_and_losses_count():
  toy = Toy(8)
  pools, sets = _pools(toy, 3)
  scores = mc.kernel_scores(
      toy.log_ref[pools], sets.anchors["ref"], sets.lengths,
      score="reward", beta=BETA,
  )
  probs = np.exp(_log_weights(
      scores, sets, temperature=0.3, include_preferred=False
  ))
  np.testing.assert_allclose(probs[:, 1:], 1 / 3, **EXACT)
  np.testing.assert_allclose(
      jax.jit(_rnce(sets))(toy.log_ref[pools]), np.log(4.0), **EXACT
  )
  pair, _, _ = pairwise.dpo_loss(
      Features(toy.log_ref[pools]), sets, None, beta=BETA
  )
  np.testing.assert_allclose(pair, np.log(2.0), **EXACT)


def _expected_dpo(toy, sets, pools, log_weights):
  def dpo(features, pair):
    return pairwise.dpo_loss(features, pair, None, beta=BETA)[0]

  return lambda logps: exact.expected_pair_loss(dpo, logps, sets, log_weights)


def test_8_random_is_easier_than_mc_is_easier_than_max():
  toy = Toy(9)
  pools, sets = _pools(toy, 3)
  scores, logps = toy.tilts[pools], toy.log_pi[pools]
  settings = {"temperature": 1.0, "include_preferred": False}
  law = _log_weights(scores, sets, **settings)
  flat = _log_weights(np.zeros_like(scores), sets, **settings)
  cold = _log_weights(scores, sets, **settings | {"temperature": 1e-9})
  random, drawn, hardest = (
      jax.jit(_expected_dpo(toy, sets, pools, w))(logps)
      for w in (flat, law, cold)
  )
  whole = jax.jit(_rnce(sets))(logps)
  for low, high in ((random, drawn), (drawn, hardest), (hardest, whole)):
    assert np.all(low <= high + 1e-12)
    assert float(np.mean(high - low)) > 0.01


def test_8_a_constant_per_prompt_and_the_order_change_nothing():
  toy = Toy(9)
  pools, sets = _pools(toy, 3)
  logps = toy.log_pi[pools]
  rnce = jax.jit(_rnce(sets))
  base = rnce(logps)
  np.testing.assert_allclose(rnce(logps + 123.4), base, atol=1e-11)
  order = np.array([0, 3, 1, 2])
  swapped = exact.pool_sets(pools[:, order], {"ref": toy.log_ref})
  np.testing.assert_allclose(
      jax.jit(_rnce(swapped))(logps[:, order]), base, **EXACT
  )
  settings = {"temperature": 0.5, "include_preferred": True}
  scores = toy.tilts[pools]
  np.testing.assert_allclose(
      _log_weights(scores + 123.4, sets, **settings),
      _log_weights(scores, sets, **settings), atol=1e-11,
  )


def _mcpo_loss(theta, toy, pools, sets, key, num_negatives):
  """The whole of MC-PO in one function of the parameters: score, draw, loss."""
  logps = _log_pi(theta)[pools]
  scores = mc.kernel_scores(
      logps, sets.anchors["ref"], sets.lengths, score="reward", beta=BETA
  )
  state, _ = mc.draw(
      key, None, scores, sets, strategy="mc", temperature=0.5,
      num_negatives=num_negatives, include_preferred=False, replace=False,
  )
  drawn_logps, drawn = mc.take_drawn(logps, sets, state)
  losses, _, _ = softmax.rnce_loss(
      Features(drawn_logps), drawn, None, beta=BETA
  )
  return losses, state.selected


def test_9_mcpo_gradient_for_a_fixed_key_is_that_of_dpo_on_the_drawn_pair():
  toy = Toy(10)
  pools, sets = _pools(toy, 2)
  run = functools.partial(
      _mcpo_loss, toy=toy, pools=pools, sets=sets, key=jax.random.key(3),
      num_negatives=1,
  )
  got, selected = jax.jit(jax.jacfwd(run, has_aux=True))(toy.theta)
  drawn = np.take_along_axis(pools, np.asarray(selected), axis=1)
  pairs = np.concatenate([pools[:, :1], drawn], axis=1)
  dpo = lambda logps: pairwise.dpo_loss(
      Features(logps), exact.pool_sets(pairs, {"ref": toy.log_ref}), None,
      beta=BETA,
  )[0]
  np.testing.assert_allclose(got, _gradients(toy, dpo, pairs), **EXACT)
  assert set(np.unique(selected)) == {1, 2}


def test_mcpo_is_rnce_only_when_all_are_drawn():
  toy = Toy(11)
  pools, sets = _pools(toy, 2)
  key = jax.random.key(4)
  whole = _gradients(toy, _rnce(sets), pools)
  run = functools.partial(
      _mcpo_loss, toy=toy, pools=pools, sets=sets, key=key, num_negatives=2
  )
  both, _ = jax.jit(jax.jacfwd(run, has_aux=True))(toy.theta)
  np.testing.assert_allclose(both, whole, **EXACT)
  scores = toy.tilts[pools]
  log_weights = _log_weights(
      scores, sets, temperature=1.0, include_preferred=False
  )
  one = _gradients(toy, _expected_dpo(toy, sets, pools, log_weights), pools)
  assert np.abs(one - whole).max() > 0.05
  # Its mean is sum_i w_i sigmoid(r_i - r_0) grad(r_i - r_0).
  gap = scores - scores[:, :1]
  slope = np.exp(log_weights) * jax.nn.sigmoid(gap)
  grads = toy.reward_gradients()[pools]
  want = np.einsum("nk,nkd->nd", slope, grads - grads[:, :1])
  np.testing.assert_allclose(one, want, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drawn_cd_gradients_average_to_rnce(seed):
  # One pool, many addresses: the sampler and the estimator together.
  toy, num = Toy(12), 200_000
  pools = np.tile([4, 2, 0, 6], (num, 1))
  sets = exact.pool_sets(pools, {"ref": toy.log_ref})
  scores = toy.tilts[pools]
  state, _ = jax.jit(functools.partial(
      mc.draw, strategy="mc", temperature=1.0, num_negatives=1,
      include_preferred=True, replace=True,
  ))(jax.random.key(seed), None, scores, sets)
  jacobian = toy.reward_gradients()
  drawn = np.take_along_axis(pools, np.asarray(state.selected), axis=1)[:, 0]
  sample = np.asarray(jacobian[drawn] - jacobian[pools[:, 0]])
  one = exact.pool_sets(pools[:1], {"ref": toy.log_ref})
  want = _gradients(toy, _rnce(one), pools[:1])[0]
  error = sample.std(0) / np.sqrt(num) + 1e-12
  assert np.abs((sample.mean(0) - want) / error).max() < 4
