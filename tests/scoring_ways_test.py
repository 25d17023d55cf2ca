"""Three ways to the pool's scores: one loss, one gradient, and their cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import update

OPTIMIZER = cases.OPTIMIZER | {
    "name": "sgd", "b1": 0.0, "learning_rate": 1e-3}
REFERENCE = stage_lib.Reference(lambda batch: np.where(
    batch.meta.candidate_mask, -20.0 - batch.meta.scores, 0.0))


def make_sets(counts, **about):
  rng = np.random.default_rng(7)
  return [cases.candidate_set(rng, i + 1, n)._replace(**about)
          for i, n in enumerate(counts)]


def make_stage(scoring, objective="mcpo", **kernel):
  return cases.stage(objective, optimizer=OPTIMIZER, **kernel)._replace(
      scoring=scoring)


@functools.cache
def make_model():
  """Of the tests in float64: chunks of two streams, one for each device."""
  return cases.make_model(num_streams=2, devices=2, dtype=jnp.float64)


@functools.cache
def make_functions():
  """They serve every way."""
  return stage_lib.make_functions(make_stage("auto"), make_model())


def run(stage, functions, sets):
  """Parameters, metrics and the functions of chunks called in one update."""
  called = []

  def noting(name, function):
    def call(*args):
      called.append(name)
      return function(*args)
    return call

  watched = functions._replace(**{
      name: noting(name, getattr(functions, name))
      for name in ("score", "forward", "features", "from_loss",
                   "from_cotangents", "backward")})
  state, metrics = update.run_step(
      stage, make_model(), watched, functions.init(cases.init(make_model())),
      cases.host_batch(sets, 8), REFERENCE)
  return jax.device_get(state.params), jax.device_get(metrics), called


def assert_same_update(got, want, tolerance):
  np.testing.assert_array_equal(
      got[1]["kernel/selected"], want[1]["kernel/selected"])
  np.testing.assert_allclose(got[1]["loss"], want[1]["loss"], rtol=1e-6)
  np.testing.assert_allclose(
      got[1]["grads/global_norm"], want[1]["grads/global_norm"],
      rtol=tolerance)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance), got[0], want[0])


COUNTS = (3, 5, 2, 6)


def test_one_pass_gives_the_update_of_two(x64):
  """On a mesh, with several chunks; and each says what it needs."""
  sets, functions = make_sets(COUNTS), make_functions()
  want, got = (run(make_stage(way), functions, sets)
               for way in ("separate", "together"))
  assert set(want[2]) == {"score", "from_cotangents"}
  assert set(got[2]) == {"forward", "backward"} and len(got[2]) > 2
  assert want[1]["grads/global_norm"] > 1e-3
  assert_same_update(got, want, 1e-12)
  batch = cases.host_batch(sets, 8)
  drawn = [[0, int(k)] for k in want[1]["kernel/selected"][:, 0]]
  pool, trained = (update.forward_flops(make_model(), batch, slots)
                   for slots in (None, drawn))
  assert trained < pool
  for (_, metrics, _), passes in ((want, 3), (got, 2)):
    np.testing.assert_allclose(metrics["flops"], pool + passes * trained)


def test_the_samplers_scores_draw_as_the_policys_do(x64):
  plain, functions = make_sets(COUNTS), make_functions()
  want = run(make_stage("separate"), functions, plain)
  logps, batch = want[1]["logps"], cases.host_batch(plain, 8)
  sampled = [one._replace(policy_step=0, behaviour_raw_logps=np.array(
      [logps[b, batch.order[b].index(k)] for k in range(len(one.scores))],
      np.float32)) for b, one in enumerate(plain)]
  got = run(make_stage("sampler"), functions, sampled)
  assert set(got[2]) <= {"from_loss", "features", "from_cotangents"}
  assert_same_update(got, want, 1e-12)
  # Weights of another step wrote one of them, or nobody told: scored anew.
  for changed in ({"policy_step": 1}, {"behaviour_raw_logps": np.full(
      COUNTS[-1], np.nan, np.float32)}):
    again = run(make_stage("sampler"), functions,
                [*sampled[:-1], sampled[-1]._replace(**changed)])
    assert "score" in again[2]
    assert_same_update(again, want, 1e-12)


def test_residuals_hold_no_layers_weights():
  """What is kept for the backward pass is no second copy of the model; the head
  is laid out anew for its products."""
  model = cases.make_model(num_streams=1)
  functions = stage_lib.make_functions(make_stage("together"), model)
  batch = cases.host_batch(make_sets([2]), 8)
  _, kept = jax.eval_shape(
      functions.forward, model.param_shapes, (), model.pack_all(batch)[0],
      batch.meta)
  weights = {x.shape for x in jax.tree.leaves(model.param_shapes)
             if x.ndim > 2}
  assert not weights & {x.shape for x in kept.arrays}
  assert any(place is not None for place in kept.places)


@pytest.mark.parametrize("counts,prompt,num_streams,way", [
    ([3, 3], 5, 16, "forward"),  # L = 2: always cheaper in one pass
    ([7, 7], 5, 16, "score"),  # undrawn candidates cost more than the prompt
    ([7, 7], 400, 64, "forward"),  # unless it is long
    ([3] * 9, 5, 1, "score"),  # activations of several chunks at once
])
def test_auto_takes_the_cheaper_way_that_fits(counts, prompt, num_streams, way):
  model = cases.make_model(
      num_streams=num_streams, stream_length=48 if prompt < 48 else 512)
  stage = make_stage("auto")
  sets = make_sets(counts, prompt=np.arange(prompt, dtype=np.int32) % 30)
  batch = update.with_anchors(cases.host_batch(sets, 8), stage, REFERENCE)
  chosen = []
  functions = stage_lib.make_functions(stage, model)
  stop = lambda name: lambda *args: chosen.append(name) or (0.0, None)
  scores = functions._replace(
      forward=stop("forward"),
      score=lambda *args: chosen.append("score") or 0.0)
  state = functions.state_shapes._replace(step=np.int32(0))
  update.score_pool(stage, model, scores, state, batch, batch.meta)
  assert set(chosen) == {way}


def test_pairs_that_are_drawn_without_scores_pay_for_none():
  """DPO goes to its loss at once: no pass over the pool comes before."""
  stage = make_stage("auto", "dpo", strategy="random", score=None,
                     temperature=None)
  model = cases.make_model()
  functions = stage_lib.make_functions(stage, model)

  class Reached(Exception):
    """The first function of chunks was called, with this name."""

  def reach(name):
    def call(*args):
      raise Reached(name)
    return call

  watched = functions._replace(zeros=lambda *args: None, **{
      name: reach(name)
      for name in ("score", "forward", "features", "from_loss")})
  with pytest.raises(Reached, match="from_loss"):
    update.run_step(
        stage, model, watched, functions.init(cases.init(model)),
        cases.host_batch(make_sets([2, 2, 2]), 8), REFERENCE)
