"""The reference cache: ragged, resumable, verified, and the start gate."""

import jax
import numpy as np
import pytest
import training_cases as cases

from mcpo_jax import commit, errors, hosts
from mcpo_jax.training import reference


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(reference, "ROWS_PER_SHARD", 3)


@pytest.fixture(scope="module")
def scored():
  """Seven sets, a model, and its log-probs of streams on the host."""
  rng = np.random.default_rng(0)
  sets = [cases.candidate_set(rng, i + 1, 2 + i % 4) for i in range(7)]
  sets[2].completion_masks[1][:2] = False
  model = cases.make_model()
  params, function = cases.init(model), jax.jit(model.token_logps)
  return sets, model, lambda c: np.asarray(function(params, model.put(c)))


def fill(folder, scored):
  sets, model, token_logps = scored
  cache = reference.ReferenceCache(folder, len(sets))
  cache.fill(sets.__getitem__, token_logps, model.pack)
  return cache


def test_sums_are_those_of_each_candidate_alone(tmp_path, scored, small_shards):
  sets, model, token_logps = scored
  cache = fill(tmp_path, scored)
  for row in (0, 2, 6):
    for k, completion in enumerate(sets[row].completions):
      (chunk,) = model.pack([sets[row]], [[0]], [[k]])
      values = token_logps(chunk)
      np.testing.assert_allclose(cache.logps(row)[k], values.sum(), rtol=1e-5)
      tokens = values[chunk.candidate_slot >= 0]
      assert len(tokens) == len(completion)
    assert len(cache.token_logps(row)) == sum(map(len, sets[row].completions))
  assert (cache.token_logps(2)[len(sets[2].completions[0]):][:2] == 0).all()


def test_filling_goes_on_where_it_stopped(tmp_path, scored, small_shards):
  sets, model, token_logps = scored
  calls = []

  def dies(chunk):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return token_logps(chunk)

  cache = reference.ReferenceCache(tmp_path, len(sets))
  with pytest.raises(KeyboardInterrupt):
    cache.fill(sets.__getitem__, dies, model.pack)
  again = reference.ReferenceCache(tmp_path, len(sets))
  assert again.missing == [3, 6]
  again.fill(sets.__getitem__, token_logps, model.pack)
  whole = fill(tmp_path / "whole", scored)
  for row in range(len(sets)):
    np.testing.assert_array_equal(again.logps(row), whole.logps(row))
  assert reference.ReferenceCache(tmp_path, len(sets)).missing == []


def test_a_flipped_bit_is_found_on_opening(tmp_path, scored):
  fill(tmp_path, scored)
  path = tmp_path / "00000000" / "sums.npy"
  content = bytearray(path.read_bytes())
  content[-2] ^= 1
  path.write_bytes(content)
  with pytest.raises(errors.CheckpointError) as caught:
    reference.ReferenceCache(tmp_path, 7)
  assert caught.value.slug == "ckpt.hash"


def test_with_disks_apart_what_another_has_otherwise_is_scored_again(
    tmp_path, scored, small_shards, monkeypatch):
  sets, model, token_logps = scored
  fill(tmp_path, scored)
  monkeypatch.setattr(hosts, "apart", lambda: True)
  others = {"00000003": "of another run", "00000006": None}
  monkeypatch.setattr(hosts, "gather", lambda what, own: [own, own | others])
  cache = reference.ReferenceCache(tmp_path, len(sets))
  assert cache.missing == [3, 6]
  cache.fill(sets.__getitem__, lambda c: 2 * token_logps(c), model.pack)
  monkeypatch.setattr(hosts, "gather", lambda what, own: [own, own])
  again = reference.ReferenceCache(tmp_path, len(sets))
  assert again.missing == []
  whole = fill(tmp_path / "whole", scored)
  for row in range(len(sets)):
    np.testing.assert_allclose(
        again.logps(row), (1 + (row >= 3)) * whole.logps(row), rtol=1e-6)


def test_log_probs_that_are_not_finite_are_never_written(tmp_path, scored):
  sets, model, token_logps = scored
  cache = reference.ReferenceCache(tmp_path, len(sets))
  with pytest.raises(errors.NonFiniteError):
    cache.fill(sets.__getitem__, lambda c: token_logps(c) * np.nan, model.pack)
  assert not list(tmp_path.glob(f"*/{commit.MANIFEST}"))


def test_the_anchor_follows_the_slots(tmp_path, scored):
  sets, _, _ = scored
  cache = fill(tmp_path, scored)
  batch = cases.host_batch(sets, 6)
  anchor = cache.anchor(batch)
  for b, order in enumerate(batch.order):
    np.testing.assert_array_equal(
        anchor[b, :len(order)], cache.logps(b)[order])
    assert (anchor[b, len(order):] == 0).all()


def test_the_gate_passes_equal_weights_and_stops_others(tmp_path, scored):
  sets, model, token_logps = scored
  cache = fill(tmp_path, scored)
  batch = cases.host_batch(sets, 6)
  gap = reference.check_start(cache, batch, token_logps, model.pack,
                              tolerance=1e-5)
  assert gap <= 1e-5

  def other(chunk):
    values = token_logps(chunk).copy()
    values[chunk.prompt_slot == 4] *= 1.001
    return values

  with pytest.raises(errors.CheckpointError) as caught:
    reference.check_start(cache, batch, other, model.pack, tolerance=1e-5)
  assert caught.value.slug == "ckpt.reference_gate"
  assert "p5" in caught.value.where
