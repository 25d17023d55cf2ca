"""Every objective of the registry, from a config by its name to an update.

The model is a table with one parameter for each completion, so that a step
compiles in no time; real models run in other tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases

from configs import default
from mcpo_jax import objective_names, registry, settings, types
from mcpo_jax.data import packing
from mcpo_jax.training import setup, update
from mcpo_jax.training import stage as stage_lib

B, K = 4, 6
# At equal rewards these fall towards the rejected one: the first two by their
# formulas, the last by this table's terms.
DOWNHILL = ("discopop", "aql", "sparse_po")
NAMES = [*registry.OBJECTIVES, "dpo*1.0,sft*0.5", "sft->mcpo"]


def resolve(name, **values):
  config = default.get_config()
  config.stages, config.num_steps = ("preference",), 4
  config.data.path, config.batch_size = "rows.jsonl", B
  config.objective.name = name
  config.optimizer.learning_rate, config.optimizer.warmup_ratio = 0.03, 0.0
  config.update_from_flattened_dict(
      {key.replace("__", "."): value for key, value in values.items()})
  return settings.resolve(config.to_dict())


class Table(stage_lib.Model):
  """Log-prob [b, k] is a parameter; terms are smooth functions of it."""

  def _present(self, streams, shape):
    slot = jnp.where(streams.candidate_slot >= 0,
                     streams.prompt_slot * shape[1] + streams.candidate_slot,
                     shape[0] * shape[1])
    return jnp.bincount(
        slot.ravel(), length=shape[0] * shape[1] + 1)[:-1].reshape(shape) > 0

  def sequence_logps(self, params, streams, num_sets, num_slots):
    shape = num_sets, num_slots
    return jnp.where(self._present(streams, shape), params["table"], 0.0)

  def features(self, params, reference, streams, sets, *, terms=(),
               confidence=None, reference_config=None):
    assert ("risk" in terms) == (confidence is not None)
    assert bool(registry.REFERENCE_TERMS & set(terms)) == bool(
        jax.tree.leaves(reference))
    logps = self.sequence_logps(params, streams, *sets.role.shape)
    if "prefix" in terms:
      logps += 0.0 * sets.anchors["prefix_length"]
    extra = 0.0
    if "objective" in params:
      extra = sum(jnp.sum(x) for x in jax.tree.leaves(params["objective"]))
    term = lambda i: jnp.where(
        logps != 0, 0.1 * (i + 1) * logps**2 / 9 + 1e-3 * extra, 0.0)
    return types.Features(
        logps, {name: term(i) for i, name in enumerate(terms)})


@functools.cache
def table_model():
  real = cases.make_model()
  shape = jax.ShapeDtypeStruct(
      (B, K), jnp.float32, sharding=jax.tree.leaves(
          real.param_shapes)[0].sharding)
  return Table(*real._replace(param_shapes={"table": shape}))


def make_batch(entry):
  rng = np.random.default_rng(0)
  sets = []
  for i in range(B):
    one = cases.candidate_set(rng, i + 1, 3 + i % 3)
    if entry.mismatched:
      foreign = rng.integers(1, 9, 5).astype(np.int32)
      one = one._replace(
          completions=[*one.completions, foreign],
          completion_masks=[*one.completion_masks, np.ones(5, bool)],
          candidate_ids=np.append(
              one.candidate_ids, types.MISMATCHED_ID),
          multiplicity=np.append(one.multiplicity, 1),
          scores=np.append(one.scores, np.float32(np.nan)))
    sets.append(one._replace(scores=one.scores / 5))
  batch = cases.host_batch(sets, K)
  order = [packing.order_candidates(s, preferred="best")[0] for s in sets]
  return batch._replace(meta=packing.make_set_batch(
      sets, np.zeros(B, np.int32), num_slots=K, order=order,
      rows=np.arange(B)))


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_runs_from_a_config_and_moves_its_policy(name):
  config = resolve(name)
  entry = objective_names.find_objective(name)
  stage = setup.stage_of(config, 9, supervised=False, num_slots=K)
  batch, model = make_batch(entry), table_model()
  rng = np.random.default_rng(1)
  table = -rng.uniform(8, 12, (B, K)).astype(np.float32)
  reference = stage_lib.Reference(
      lambda b: table + 0.1,
      {"w": table} if registry.REFERENCE_TERMS & set(entry.terms) else ())
  functions = stage_lib.make_functions(stage, model)
  state = functions.init({"table": jnp.asarray(table)})
  for _ in range(2):
    state, metrics = update.run_step(
        stage, model, functions, state, batch, reference)
    assert metrics["finite"]
  moved = np.asarray(state.params["table"]) - table
  assert moved[:, 0].any() and np.isfinite(moved).all()
  assert not moved[~batch.meta.candidate_mask].any()
  if name not in DOWNHILL and (
      entry.pairwise or entry.strategy in ("all", "pool")):
    # What is chosen gains on what is not, on the average of the batch.
    rejected = batch.meta.role == -1
    assert moved[:, 0].mean() > moved[rejected].mean()
  foreign = batch.meta.candidate_id == types.MISMATCHED_ID
  assert not moved[foreign].any()
