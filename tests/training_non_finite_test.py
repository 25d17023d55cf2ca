"""Updates that are not finite: what is kept of them, and what comes after."""

import json

import jax
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax import errors
from mcpo_jax.training import loop, metrics
from mcpo_jax.training import stage as stage_lib

B, K = 3, 5


def make_batch(step):
  rng = np.random.default_rng(step)
  return cases.host_batch(
      [cases.candidate_set(rng, 10 * step + b, 3 + b) for b in range(B)], K)


def train(folder, poisoned, *, max_skipped=0, num_steps=5):
  """DPO on a reference that has no number for the second set of some steps.

  Returns: the weights at the end.
  """
  folder.mkdir(exist_ok=True)
  stage = cases.stage(
      "dpo", strategy="fixed_worst", score=None, temperature=None,
      batch_size=B, num_steps=num_steps,
      optimizer=cases.OPTIMIZER | {"max_skipped": max_skipped})
  model = cases.make_model()

  def reference(batch):
    logps = np.full(batch.meta.role.shape, -20.0, np.float32)
    if any(batch.sets[1].prompt_id == f"p{10 * step + 1}" for step in poisoned):
      logps[1, 0] = np.nan
    return logps

  return jax.device_get(loop.train(
      stage, model, make_batch, lambda: cases.init(model), folder,
      metrics.Writer(folder), loop.Schedule(
          log_every=1, save_every=1, keep=9, evaluate_every=9, patience=None,
          keep_best=False), meta={},
      reference=stage_lib.Reference(reference))[0])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def saved(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*"))


def test_a_loss_that_is_not_finite_stops_and_leaves_its_batch(tmp_path):
  with pytest.raises(errors.NonFiniteError) as caught:
    train(tmp_path, [2])
  assert caught.value.slug == "train.non_finite"
  assert "p21" in caught.value.where and "p20" not in caught.value.where
  assert saved(tmp_path) == [1, 2]
  rows = lines(tmp_path / "non_finite.jsonl")
  assert [(r["step"], r["prompt_id"], len(r["logps"])) for r in rows] == [
      (3, "p20", 3), (3, "p21", 4), (3, "p22", 5)]
  assert rows[1]["loss"] == "nan" and isinstance(rows[0]["loss"], float)
  assert all(-100 < x < 0 for r in rows for x in r["logps"])
  assert len(rows[2]["candidate_ids"]) == 5
  with pytest.raises(errors.NonFiniteError):  # again, from the same weights
    train(tmp_path, [2])
  again = lines(tmp_path / "non_finite.jsonl")
  assert again == rows * 2
  assert saved(tmp_path) == [1, 2]


def test_so_many_in_a_row_are_left_out_and_counted(tmp_path):
  end = train(tmp_path / "skips", [0, 2, 3], max_skipped=2)
  rows = lines(tmp_path / "skips/metrics.jsonl")
  assert [r["updates_skipped"] for r in rows] == [1, 1, 2, 3, 3]
  assert [r["loss"] is None for r in rows] == [True, False, True, True, False]
  with pytest.raises(errors.NonFiniteError) as caught:
    train(tmp_path / "stops", [0, 2, 3], max_skipped=1)
  assert "p31" in caught.value.where
  assert saved(tmp_path / "stops") == [1, 2, 3]
  # The count goes on where a run does, and nothing of the poison is kept.
  with pytest.raises(errors.NonFiniteError):
    train(tmp_path / "stops", [3], max_skipped=1)
  for leaf in jax.tree.leaves(end):
    assert np.isfinite(leaf).all()
  end_of_stops = train(tmp_path / "stops", [3], max_skipped=2)
  jax.tree.map(np.testing.assert_array_equal, end, end_of_stops)
