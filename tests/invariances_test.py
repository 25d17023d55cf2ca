"""What must not change an update of MC-PO, on many random batches (nightly).

Loss, gradient and drawn slots of a batch are compared with those of the same
sets where something else differs that they must not depend on. The fixed cases
lie in `training_step_test`, `models_decoder_test` and `sharding_test`.
"""

import functools
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import objectives_batches as batches
import pytest
import training_cases as cases

from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import update

pytestmark = pytest.mark.nightly

SETS, SLOTS = 6, 12
# Of one update the parameters move by the gradient.
STAGE = cases.stage(num_negatives=2, batch_size=SETS, optimizer=cases.OPTIMIZER
                    | {"name": "sgd", "b1": 0.0, "learning_rate": 1.0})
# Name -> models of which one does it, and the gates of the goal: of the loss
# in float64 and float32, of the gradient likewise (N10 to N13).
FORMS = {
    "padding": ([dict(stream_length=48), dict(num_streams=16)],
                (1e-12, 1e-6), (1e-12, 5e-6)),
    "company": ([dict()], (1e-12, 1e-6), (1e-12, 5e-6)),
    "meshes": ([dict(devices=2), dict(devices=4, fsdp=2),
                dict(devices=8, data=1, fsdp=4, tensor=2),
                dict(devices=8)], (1e-13, 1e-6), (1e-13, 5e-6)),
    "accumulation": ([dict(num_streams=4), dict(num_streams=2)],
                     (1e-12, 1e-6), (1e-12, 5e-6)),
}


class Update(NamedTuple):
  """What one update gave."""

  losses: np.ndarray  # [B]
  loss: float
  gradient: np.ndarray  # all of it, flat
  drawn: list[tuple]  # [B] of (slot, whether it counts)


@functools.cache
def made(dtype, **model):
  model = {"num_streams": 8, "stream_length": 20} | model
  model = cases.make_model(dtype=dtype, **model)
  return model, stage_lib.make_functions(STAGE, model)


def anchors(batch):
  """[B, K] log-probs of a reference, by set and candidate alone."""
  out = np.zeros(batch.meta.role.shape, np.float32)
  for row, (one, order) in enumerate(zip(batch.sets, batch.order)):
    rng = np.random.default_rng(one.example_id)
    out[row, :len(order)] = rng.normal(-20, 2, len(order))[list(order)]
  return out


def run(sets, dtype, pad_id=0, **model):
  """One update of fresh weights on these sets."""
  model, functions = made(dtype, **model)
  batch = cases.host_batch(sets, SLOTS)
  state = functions.init(cases.init(model))
  before = jax.device_get(state.params)
  state, metrics = update.run_step(
      STAGE, model._replace(pad_id=pad_id), functions, state, batch,
      stage_lib.Reference(anchors))
  change = jax.tree.map(np.subtract, before, jax.device_get(state.params))
  gradient = np.concatenate([x.ravel() for x in jax.tree.leaves(change)])
  assert np.abs(gradient).max() > 1e-3
  drawn = [list(zip(*map(np.ndarray.tolist, row))) for row in zip(
      np.asarray(metrics["kernel/selected"]),
      np.asarray(metrics["kernel/selected_mask"]))]
  return Update(np.asarray(metrics["loss_per_set"]), float(metrics["loss"]),
                gradient, drawn)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_an_update_does_not_depend_on(form, dtype):
  models, of_loss, of_gradient = FORMS[form]
  place = ["float64", "float32"].index(dtype)
  worst = {"loss": 0.0, "gradient": 0.0}

  @batches.MANY
  @hypothesis.given(
      seed=st.integers(0, 10**6), order=st.permutations(range(SETS)),
      pad_id=st.integers(0, cases.VOCAB - 1), model=st.sampled_from(models))
  def check(seed, order, pad_id, model):
    rng = np.random.default_rng(seed)
    sets = [cases.candidate_set(rng, i + 1, int(n)) for i, n in enumerate(
        rng.integers(2, 9, SETS))]
    one = run(sets, jnp.dtype(dtype))
    moved = [sets[i] for i in order]
    if form == "company":  # those that are left stand elsewhere
      moved = moved[:1 + seed % 2 * 2]
    other = run(moved, jnp.dtype(dtype), **model, **(
        {"pad_id": pad_id} if form == "padding" else {}))
    order = order[:len(moved)]
    assert other.drawn == [one.drawn[i] for i in order]
    gap = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    gaps = {"loss": gap(other.losses, one.losses[list(order)])}
    if form != "company":
      gaps["loss"] = max(gaps["loss"], gap(other.loss, one.loss))
      gaps["gradient"] = gap(other.gradient, one.gradient)
    for name, value in gaps.items():
      worst[name] = max(worst[name], value)
    assert gaps["loss"] <= of_loss[place]
    assert gaps.get("gradient", 0.0) <= of_gradient[place]

  with jax.enable_x64(dtype == "float64"):
    check()
  print(form, dtype, worst)  # shown by -s
