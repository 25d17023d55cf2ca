"""Bias and variance of the sampled gradient, where they are known."""

import numpy as np
import pytest
import training_cases as cases

from mcpo_jax.training import estimator
from mcpo_jax.training import stage as stage_lib

B, K = 3, 5


def compare(objective, counts, *, num_draws=4, **kernel):
  rng = np.random.default_rng(3)
  batch = cases.host_batch(
      [cases.candidate_set(rng, i + 1, n) for i, n in enumerate(counts)], K)
  ref = rng.normal(-20, 3, (B, K)).astype(np.float32)
  stage = cases.stage(objective, batch_size=B, **kernel)
  model = cases.make_model()
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  return estimator.compare_gradients(
      stage, model, functions, state, batch,
      stage_lib.Reference(lambda b: ref), num_draws=num_draws)


def test_one_candidate_leaves_nothing_to_chance():
  """Every draw is the pool, and CD times 1 - p_0 is RNCE exactly."""
  for objective in ("mcpo", "cd"):
    found = compare(objective, [2, 2, 2])
    assert found["estimator/grad_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["estimator/variance"] == pytest.approx(0, abs=1e-5)
    assert found["estimator/bias"] == pytest.approx(0, abs=1e-2)


def test_more_chains_have_less_variance_and_a_better_direction():
  few = compare("cd", [5, 4, 5], num_negatives=1)
  many = compare("cd", [5, 4, 5], num_negatives=8)
  assert few["estimator/variance"] > 4 * many["estimator/variance"] > 0
  assert few["estimator/grad_cosine"] < many["estimator/grad_cosine"] < 1


def test_the_mean_of_many_draws_of_cd_is_the_gradient_of_the_pool():
  """Its bias is what the draws leave unknown; the lightest has its own."""
  cd = compare("cd", [5, 4, 5], num_draws=48, include_preferred=True)
  lightest = compare("mcpo", [5, 4, 5], strategy="min")
  assert cd["estimator/bias"] < 0.15
  assert lightest["estimator/variance"] == pytest.approx(0, abs=1e-5)
  assert lightest["estimator/bias"] > 0.5
