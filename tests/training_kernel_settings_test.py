"""Draws that last several steps, corrected proposals, the softmax gate."""

import jax
import numpy as np
import pytest
import training_cases as cases

from configs import default
from mcpo_jax import errors, settings, types
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import loop, metrics, setup, update
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib

B, K, M = 4, 6, 2


def make_batch(step: int) -> batch_lib.HostBatch:
  rng = np.random.default_rng(step)
  return cases.host_batch(
      [cases.candidate_set(rng, B * step + i + 1, 3 + i) for i in range(B)], K)


def stage_of(objective="mcpo", *, refresh=1, corrected=False, **kernel):
  return cases.stage(objective, batch_size=B, num_steps=6, **kernel)._replace(
      refresh=refresh, corrected=corrected)


def pool_logps(model, score, params, batch):
  """[B, K] of all candidates; `score` is (params, streams, sets)."""
  everything = [list(range(len(o))) for o in batch.order]
  return sum(score(params, model.put(chunk), batch.meta)
             for chunk in model.pack(batch.sets, everything, batch.order))


# Draws that last -------------------------------------------------------------


def test_rhythms_in_steps():
  assert stage_lib.refresh_steps("step", 10, 4) == 1
  assert stage_lib.refresh_steps("1", 10, 4) == 1  # the same in every respect
  assert stage_lib.refresh_steps("20", 10, 4) == 20
  assert stage_lib.refresh_steps("epoch", 10, 4) == 3


def test_a_window_is_drawn_by_the_weights_of_its_start():
  """CD without the preferred: its weight p_0 must be stored beside the draw."""
  model = cases.make_model()
  stage = stage_of("cd", refresh=3, num_negatives=M, temperature=2.0,
                   optimizer=cases.OPTIMIZER | {"learning_rate": 0.1})
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))

  @stage_lib.Reference
  def anchor(batch):
    rng = np.random.default_rng(batch.meta.example_id[0])
    return rng.normal(-20, 2, (B, K)).astype(np.float32)

  def fresh(params):
    """What the weights draw for every step of the window."""
    out = []
    for step in range(3):
      batch = update.with_anchors(make_batch(step), stage, anchor)
      logps = pool_logps(model, functions.score, params, batch)
      drawn, sets, _, seen = functions.draw(
          stage.seed, step, (), logps, batch.meta)
      out.append((drawn, sets.anchors["preferred_weight"], seen))
    return jax.device_get(out)

  before = fresh(state.params)
  state = update.draw_window(
      stage, model, functions, state, make_batch, anchor)
  recalled = []
  for step in range(3):
    batch = make_batch(step)
    drawn, sets, seen = functions.recall(
        state.draws, state.step, model.put_replicated(batch.meta))
    recalled.append(jax.device_get(
        (drawn, sets.anchors["preferred_weight"], seen)))
    state, row = update.run_step(
        stage, model, functions, state, batch, anchor)
    assert row["finite"] and "kernel/ess" in row
  jax.tree.map(np.testing.assert_array_equal, before, recalled)
  now = fresh(state.params)
  assert any((a[0].selected != b[0].selected).any()
             for a, b in zip(before, now)), "the weights do not matter here"
  # Nothing was scored for the gradient: the fused path.
  assert functions.from_loss._cache_size() == 1
  assert functions.from_cotangents._cache_size() == 0


@pytest.fixture(scope="module")
def start():
  """A model, its first weights, and these as the reference."""
  model = cases.make_model()
  params = cases.init(model)
  score = jax.jit(lambda params, streams, sets: model.sequence_logps(
      params, streams, *sets.role.shape))
  return model, lambda batch: np.asarray(
      pool_logps(model, score, params, batch))


def train(folder, model, reference, *, patience=None, shift=0.0):
  """Six steps in windows of three; `patience` 1 ends them after the fourth."""
  stage = stage_of(refresh=3, num_negatives=M, temperature=0.2)
  schedule = loop.Schedule(
      log_every=1, save_every=100, keep=2, evaluate_every=2,
      patience=patience, keep_best=False)
  folder.mkdir(exist_ok=True)
  columns = shift * np.arange(K, dtype=np.float32)
  params, step = loop.train(
      stage, model, make_batch, lambda: cases.init(model), folder,
      metrics.Writer(folder), schedule, meta={},
      reference=stage_lib.Reference(lambda b: reference(b) + columns),
      evaluate=(lambda *_: {"eval/loss": 1.0, "eval/accuracy": 0.5}
                ) if patience else None,
      expect_start=True)
  return jax.device_get(params), step


def test_a_restart_inside_a_window_changes_nothing(start, tmp_path):
  whole, steps = train(tmp_path / "whole", *start)
  assert steps == 6
  _, steps = train(tmp_path / "broken", *start, patience=1)
  assert steps == 4  # the second window holds steps 3, 4, 5
  again, steps = train(tmp_path / "broken", *start)
  assert steps == 6
  jax.tree.map(np.testing.assert_array_equal, whole, again)


# The softmax start gate ------------------------------------------------------


def test_a_first_loss_of_unequal_policies_stops(start, tmp_path):
  with pytest.raises(errors.CheckpointError) as caught:
    train(tmp_path / "run", *start, shift=0.5)
  assert caught.value.slug == "ckpt.reference_gate"


def test_the_first_loss_counts_negatives_or_their_multiplicities():
  batch = make_batch(0)  # 2, 3, 4 and 5 negatives
  batch.meta.multiplicity[:, 1] = 3  # two more of each
  mask = np.concatenate([batch.meta.candidate_mask[:3], np.zeros((1, K), bool)])
  batch = batch._replace(meta=batch.meta._replace(candidate_mask=mask))
  for objective, kernel, want in (
      ("mcpo", {"num_negatives": 3}, np.log([3, 4, 4]).mean()),
      ("rnce", {"strategy": "all"}, np.log([5, 6, 7]).mean())):
    stage = stage_of(objective, **kernel)
    loop.check_softmax_start(want, stage, batch, np.float32)
    for wrong in (want + 1e-3, want - 1e-3, np.nan):
      with pytest.raises(errors.CheckpointError):
        loop.check_softmax_start(wrong, stage, batch, np.float32)
  loop.check_softmax_start(
      9.0, stage_of("rnce", strategy="all", corrected=True), batch, np.float32)


# Corrected proposals ---------------------------------------------------------


def anchored(ref, q):
  """The batch of step 0 with log-probs of the reference and of the law."""
  batch = make_batch(0)
  meta = batch.meta._replace(anchors={"proposal_q": q.astype(np.float32)})
  return update.with_anchors(
      batch._replace(meta=meta),
      stage_of("rnce", strategy="all", corrected=True),
      stage_lib.Reference(lambda b: ref.astype(np.float32))).meta


def test_corrected_rnce_weights_are_those_of_log_mu_minus_log_q():
  rng = np.random.default_rng(2)
  logps, ref, q = rng.normal(-9, 2, (3, B, K))
  stage = stage_of("rnce", strategy="all", corrected=True)
  model = cases.make_model()
  functions = stage_lib.make_functions(stage, model)
  sets = anchored(ref, q)
  logps = logps.astype(np.float32)
  drawn, sets, *_ = functions.draw(stage.seed, 0, (), logps, sets)
  cotangent, total, _ = functions.cotangents(
      cases.init(model), types.Features(logps),
      step_lib.Inputs(sets, drawn, (), 0))

  beta = stage.objective_settings["beta"]
  logits = beta * (logps - ref) + ref - q
  logits[~sets.candidate_mask] = -np.inf
  w = np.exp(logits - logits.max(axis=1, keepdims=True))
  w /= w.sum(axis=1, keepdims=True)
  chosen = np.arange(K) == 0
  np.testing.assert_allclose(total.loss, -np.log(w[:, 0]), rtol=1e-4)
  np.testing.assert_allclose(
      np.asarray(cotangent.logps) * B / beta, w - chosen, atol=1e-5)


@pytest.mark.parametrize("strategy", ["mc", "random"])
def test_a_corrected_draw_from_q_is_the_plain_draw_from_mu(strategy):
  """Copies in q's proportions, weighed by mu / q, are copies in mu's. The
  correction is spent in the draw, as the multiplicity is: equal losses."""
  rng = np.random.default_rng(4)
  logps, ref = rng.normal(-9, 2, (2, B, K)).astype(np.float32)
  from_q, from_mu = rng.integers(1, 9, (2, B, K)).astype(np.int32)
  out = []
  for corrected, copies in ((True, from_q), (False, from_mu), (False, from_q)):
    stage = stage_of(corrected=corrected, strategy=strategy, num_negatives=M)
    functions = stage_lib.make_functions(stage, cases.make_model())
    sets = anchored(ref, np.log(from_q))._replace(multiplicity=copies)
    sets.anchors["proposal_mu"] = np.log(from_mu).astype(np.float32)
    drawn, sets, _, seen = functions.draw(stage.seed, 0, (), logps, sets)
    loss, _ = functions.evaluate(
        types.Features(logps), step_lib.Inputs(sets, drawn, (), 0))
    out.append((drawn.selected, loss, seen["kernel/ess"]))
  for got, want in zip(out[0], out[1]):
    np.testing.assert_allclose(got, want, rtol=1e-5)
  assert abs(out[0][2] - out[2][2]) > 0.01


class Store:
  """One row: four completions, of which the second repeats the first."""

  def __init__(self, column, cut=False):
    self._columns = {"behaviour_logps": column} if column else {}
    self._cut = cut

  def candidate_set(self, i):
    return cases.candidate_set(np.random.default_rng(i), i + 1, 3)._replace(
        candidate_ids=np.array([0, 2, 3], np.uint32),
        scores=np.array([0, 2, 1], np.float32))

  def columns(self, i):
    return self._columns

  def truncated(self, i):
    return np.array([False, False, self._cut])


def test_the_column_reaches_the_slots_of_its_candidates():
  batch = batch_lib.collect(
      Store([-1.0, -1.5, -2.0, -3]), np.array([5]), np.zeros(1, np.int32),
      seed=0, num_slots=5, preferred="best", top_k=None, behaviour=True,
      batch_size=2)
  np.testing.assert_array_equal(
      batch.meta.anchors["proposal_q"], [[-2, -1, -3, 0, 0], [0] * 5])


@pytest.mark.parametrize("column,cut,slug", [
    (None, False, "data.field_missing"),
    ([-1.0, -1.0, None, -2.0], False, "data.non_finite"),
    ([-1.0, -1.0, float("nan"), -2.0], False, "data.non_finite"),
    ([-1.0, -1.0, -2.0, float("-inf")], False, "data.non_finite"),
    ([-1.0, -1.0, "-2", -2.0], False, "data.field_type"),
    ([-1.0, -1.0, -2.0], False, "data.length_mismatch"),
    ([-1.0, -1.0, -2.0, -3.0], True, "data.completion_too_long"),
])
def test_rows_without_a_usable_law_are_refused(column, cut, slug):
  with pytest.raises(errors.DataError) as caught:
    batch_lib.behaviour_logps(Store(column, cut), 5)
  assert caught.value.slug == slug
  assert caught.value.where == "prompt_id p6, behaviour_logps"


# Settings -------------------------------------------------------------------


def resolve(**values):
  config = default.get_config()
  config.stages, config.num_steps = ("preference",), 3
  config.data.path = "rows.jsonl"
  config.update_from_flattened_dict(
      {key.replace("__", "."): value for key, value in values.items()})
  return settings.resolve(config.to_dict())


@pytest.mark.parametrize("values,slug,where", [
    ({"kernel__refresh": "0"}, "config.range", "kernel.refresh"),
    ({"kernel__refresh": "epochs"}, "config.range", "kernel.refresh"),
    ({"kernel__refresh": "epoch", "kernel__strategy": "random"},
     "config.unused", "kernel.refresh"),
    ({"kernel__refresh": "20", "objective__name": "rnce"},
     "config.unused", "kernel.refresh"),
    ({"kernel__scoring": "both"}, "config.range", "kernel.scoring"),
    ({"kernel__scoring": "together", "kernel__strategy": "random"},
     "config.unused", "kernel.scoring"),
    ({"kernel__scoring": "together", "kernel__refresh": "20"},
     "config.conflict", "kernel.scoring"),
    ({"kernel__scoring": "together", "objective__name": "wpo",
      "kernel__strategy": "mc"}, "config.conflict", "kernel.scoring"),
    ({"kernel__scoring": "sampler"}, "config.conflict", "kernel.scoring"),
    ({"proposal__correction": True, "objective__name": "cd"},
     "config.unused", "proposal.correction"),
    ({"proposal__correction": True, "kernel__strategy": "max"},
     "config.unused", "proposal.correction"),
    ({"kernel__num_steps": 3}, "config.missing", "kernel.block_size"),
    ({"kernel__transition": "barker", "kernel__include_preferred": False},
     "config.conflict", "kernel.include_preferred"),
    ({"kernel__transition": "barker", "kernel__repulsion": 1.0},
     "config.unused", "kernel.repulsion"),
    ({"kernel__transition": "gibbs"}, "config.range", "kernel.transition"),
    ({"kernel__temperature_end": 0.1},
     "config.unused", "kernel.temperature_end"),
    ({"kernel__temperature_schedule": "linear"},
     "config.missing", "kernel.temperature_end"),
    ({"kernel__init": "persistent", "kernel__refresh": "epoch"},
     "config.conflict", "kernel.refresh"),
    ({"kernel__transition": "self_repellent", "data__preferred": "top_k",
      "data__top_k": 2}, "config.conflict", "data.preferred"),
    ({"kernel__num_steps": 2, "kernel__strategy": "max"},
     "config.unused", "kernel.num_steps"),
    ({"evaluation__estimator_every_steps": 5, "objective__name": "dpo"},
     "config.unused", "evaluation.estimator_every_steps"),
    ({"objective__name": "tdpo1", "reference__source": "cached"},
     "config.conflict", "reference.source"),
    ({"objective__name": "infonca", "kernel__strategy": "random"},
     "config.range", "kernel.strategy"),
    ({"objective__name": "dpo", "kernel__strategy": "pool"},
     "config.range", "kernel.strategy"),
    ({"objective__name": "robust_dpo", "objective__label_smoothing": 0.5},
     "config.range", "objective.label_smoothing"),
    ({"kernel__strategy": "no_file:walk"}, "config.range", "kernel.strategy"),
])
def test_settings_without_effect_are_refused(values, slug, where):
  with pytest.raises(errors.ConfigError) as caught:
    resolve(**values)
  assert (caught.value.slug, caught.value.where) == (slug, where)


def test_settings_with_effect_are_taken():
  resolve(kernel__refresh="20", proposal__correction=True)
  resolve(kernel__refresh="epoch", kernel__strategy="max")
  resolve(objective__name="rnce", proposal__correction=True)
  chain = resolve(kernel__transition="self_repellent")["kernel"]
  assert chain["include_preferred"] is True and chain["repulsion"] == 1.0
  assert resolve()["kernel"]["include_preferred"] is False
  assert resolve(objective__name="cd")["kernel"]["include_preferred"] is True
  assert resolve(objective__name="tdpo1")["reference"]["source"] == "resident"
  assert resolve(objective__name="simpo")["reference"]["source"] is None


def test_only_samples_of_the_policy_itself_bring_its_scores():
  online = {"online__enabled": True, "reward__name": "length"}
  for values, want in (
      ({}, False), (online, True),
      (online | {"online__extrapolation": 0.5}, False)):
    stage = setup.stage_of(resolve(**values), 100, supervised=False)
    assert (stage.scoring, stage.on_policy) == ("auto", want)
