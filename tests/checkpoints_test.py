"""Checkpoints: committed by a manifest, verified, the last good one found.

What each kind of damage is called is in bad_checkpoints.py.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_disk

from mcpo_jax import checkpoints, chunks, commit, errors, faults

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step):
  return {"w": jnp.arange(6.0).reshape(2, 3) + step,
          "step": jnp.asarray(step, jnp.int32)}


def shapes():
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING),
      state(0))


def save_some(folder, steps=(1, 2, 3), keep=2, protect=None):
  keeper = checkpoints.Checkpointer(folder, keep=keep)
  for step in steps:
    keeper.save(step, state(step), {"run": "a"})
    keeper.protect(protect)
  keeper.close()


def restore(folder):
  keeper = checkpoints.Checkpointer(folder, keep=2)
  try:
    return keeper.restore_latest(shapes())
  finally:
    keeper.close()


def test_the_newest_step_comes_back_with_its_meta(tmp_path):
  save_some(tmp_path)
  got, meta = restore(tmp_path)
  assert meta == {"run": "a", "step": 3}
  np.testing.assert_array_equal(got["w"], state(3)["w"])


def test_only_the_kept_and_the_protected_steps_stay(tmp_path):
  save_some(tmp_path, steps=(1, 2, 3, 4), keep=2, protect=1)
  keeper = checkpoints.Checkpointer(tmp_path, keep=2)
  assert keeper.steps() == [1, 3, 4]
  keeper.close()


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  assert restore(tmp_path) is None


def test_a_step_without_manifest_is_no_step(tmp_path):
  save_some(tmp_path)
  (tmp_path / "3" / commit.MANIFEST).unlink()
  assert restore(tmp_path)[1]["step"] == 2


def test_an_uncommitted_step_is_written_again(tmp_path):
  save_some(tmp_path)
  (tmp_path / "3" / commit.MANIFEST).unlink()
  assert restore(tmp_path)[1]["step"] == 2
  save_some(tmp_path, steps=(3,))
  assert restore(tmp_path)[1]["step"] == 3


def test_a_step_whose_removal_was_killed_goes(tmp_path):
  save_some(tmp_path)
  (tmp_path / "2" / commit.MANIFEST).unlink()  # the first thing that is removed
  assert restore(tmp_path)[1]["step"] == 3
  assert not (tmp_path / "2").exists()


def flip(folder):
  path = max((p for p in folder.rglob("*") if p.is_file()
              and p.name != commit.MANIFEST), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def test_one_flipped_bit_sends_it_to_the_step_before(tmp_path):
  save_some(tmp_path)
  flip(tmp_path / "3")
  assert restore(tmp_path)[1]["step"] == 2


def test_when_no_step_verifies_it_says_so(tmp_path):
  save_some(tmp_path)
  flip(tmp_path / "2")
  flip(tmp_path / "3")
  with pytest.raises(errors.CheckpointError) as caught:
    restore(tmp_path)
  assert caught.value.slug == "ckpt.none_complete"


def test_a_step_below_a_damaged_one_can_be_saved(tmp_path):
  save_some(tmp_path, steps=(2, 4))
  flip(tmp_path / "4")
  assert restore(tmp_path)[1]["step"] == 2
  save_some(tmp_path, steps=(3,))
  assert restore(tmp_path)[1]["step"] == 3


def test_the_best_step_is_verified_before_it_is_used(tmp_path):
  save_some(tmp_path, steps=(1, 2))
  flip(tmp_path / "1")
  keeper = checkpoints.Checkpointer(tmp_path, keep=2)
  with pytest.raises(errors.CheckpointError):
    keeper.restore(1, shapes())
  keeper.close()


def keeper_of(folder, **settings):
  return checkpoints.Checkpointer(folder, keep=2, **settings)


def fault(monkeypatch, text):
  monkeypatch.setenv("MCPO_FAULT", text)
  monkeypatch.setattr(faults, "_counts", {})


def poll_until_done(keeper):
  """What a run does between a save and the next, without its steps."""
  while keeper._save is not None:
    keeper.poll()
    time.sleep(0.01)


# --- what is in a manifest ----------------------------------------------------


def test_the_hash_of_a_file_is_that_of_a_piece_of_one_array(tmp_path):
  mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
  w = jax.device_put(jnp.arange(24.0).reshape(8, 3), split)
  b = jnp.arange(5, dtype=jnp.bfloat16)
  keeper = keeper_of(tmp_path)
  keeper.save(7, {"w": w, "b": [b, ()]}, {"run": "a"})
  keeper.close()
  body = commit.read_manifest(tmp_path / "7")
  assert body["meta"] == {"run": "a", "step": 7}
  assert body["leaves"] == {"w": {"shape": [8, 3], "dtype": "float32"},
                            "b.0": {"shape": [5], "dtype": "bfloat16"}}
  sha = lambda x: hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
  hashes = {n: e["sha256"] for n, e in body["files"].items()}
  for i in range(4):
    assert hashes[f"default/w/{i}.0"] == sha(np.asarray(w)[2 * i:2 * i + 2])
  assert hashes["default/b.0/0"] == sha(b)


def test_a_disk_that_holds_something_else_than_memory_is_seen(
    tmp_path, monkeypatch):
  save_some(tmp_path, steps=(1,))
  real = commit.hash_files

  def rotten(folder, names):
    path = folder / "default/w/0.0"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return real(folder, names)

  keeper = keeper_of(tmp_path)
  monkeypatch.setattr(commit, "hash_files", rotten)
  keeper.save(2, state(2), {})
  with pytest.raises(errors.CheckpointError) as caught:
    poll_until_done(keeper)
  assert caught.value.slug == "ckpt.hash"
  assert keeper.steps() == [1]
  assert not (tmp_path / "2").exists()
  keeper.close()


def test_values_of_the_step_are_saved_though_the_next_one_takes_its_buffers(
    tmp_path):
  grow = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  values, keeper = grow(state(0)), keeper_of(tmp_path)
  keeper.save(1, values, {})
  for _ in range(20):
    values = grow(values)
  keeper.close()
  np.testing.assert_array_equal(restore(tmp_path)[0]["w"], state(1)["w"])


# --- errors and time ----------------------------------------------------------


@pytest.mark.parametrize("point", ["begin", "shard", "manifest", "gc"])
def test_a_full_disk_is_told_at_the_next_step_and_the_old_steps_stay(
    tmp_path, monkeypatch, point):
  save_some(tmp_path, steps=(1, 2))
  fault(monkeypatch, f"ckpt.{point}:full")
  keeper = keeper_of(tmp_path)
  with pytest.raises(errors.ResourceError) as caught:
    keeper.save(3, state(3), {})
    poll_until_done(keeper)
  assert caught.value.slug == "ckpt.disk_full"
  assert "bytes free" in caught.value.got
  keeper.close()
  assert [s for s in (1, 2, 3) if s in keeper.steps()][:2] == [1, 2]
  assert (3 in keeper.steps()) == (point == "gc")  # that is after the commit
  monkeypatch.delenv("MCPO_FAULT")
  save_some(tmp_path, steps=(4,))
  assert restore(tmp_path)[1]["step"] == 4


def test_a_save_that_hangs_is_given_up_and_names_its_phase(
    tmp_path, monkeypatch):
  save_some(tmp_path, steps=(1,))
  fault(monkeypatch, "ckpt.manifest:sleep=60")
  keeper = keeper_of(tmp_path, timeout=0.5)
  keeper.save(2, state(2), {})
  began = time.monotonic()
  with pytest.raises(errors.ResourceError) as caught:
    poll_until_done(keeper)
  assert caught.value.slug == "ckpt.timeout"
  assert "committing" in str(caught.value)
  keeper.close()  # does not wait for it
  assert time.monotonic() - began < 30


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
  fault(monkeypatch, "ckpt.manifest:sleep=1")
  keeper = keeper_of(tmp_path)
  keeper.save(1, state(1), {})
  keeper.save(2, state(2), {})
  assert keeper.steps()[0] == 1  # the first one was committed by then
  keeper.close()
  assert keeper.steps() == [1, 2]


def test_room_on_the_disk_is_predicted_within_a_tenth(tmp_path):
  many = {f"w{i}": np.ones((64, 100 * i + 7)) for i in range(1, 30)}
  many |= {f"b{i}": np.ones(i) for i in range(1, 20)}
  many = jax.device_put(many)
  keeper = keeper_of(tmp_path)
  keeper.save(1, many, {})
  keeper.close()
  taken = sum(512 * p.stat().st_blocks for p in (tmp_path / "1").rglob("*"))
  assert abs(chunks.size_of(many) / taken - 1) < 0.1


def test_a_disk_that_holds_a_few_steps_but_not_all_is_refused_at_start(
    tmp_path):
  big = {"w": jnp.ones((1024, 1024))}  # 4 MiB; keep 2, and 1 under way
  with small_disk.of(tmp_path / "disk", megabytes=10) as disk:
    keeper = keeper_of(disk / "steps")
    with pytest.raises(errors.ResourceError) as caught:
      keeper.check_room(big, best=False)
    assert caught.value.slug == "ckpt.disk_full"
    keeper.close()
  with small_disk.of(tmp_path / "larger", megabytes=14) as disk:
    keeper = keeper_of(disk / "steps")
    keeper.check_room(big, best=False)
    with pytest.raises(errors.ResourceError):
      keeper.check_room(big, best=True)
    keeper.close()


def test_a_disk_that_is_full_stops_at_that_step_and_goes_on_with_room(tmp_path):
  big = lambda step: {"w": jnp.full((1024, 1024), float(step))}
  with small_disk.of(tmp_path / "disk", megabytes=18) as disk:
    other = disk / "other"
    other.write_bytes(b"0" * 7 * 2**20)
    keeper = keeper_of(disk / "steps")
    with pytest.raises(errors.ResourceError) as caught:
      for step in (1, 2, 3):
        keeper.save(step, big(step), {})
        poll_until_done(keeper)
    assert step == 3 and keeper.steps() == [1, 2]
    assert caught.value.slug == "ckpt.disk_full"
    assert str(chunks.size_of(big(0))) in caught.value.want
    for good in (1, 2):
      commit.verify(disk / "steps" / str(good))
    keeper.close()
    other.unlink()
    keeper = keeper_of(disk / "steps")
    got, _ = keeper.restore_latest(jax.eval_shape(lambda: big(0)))
    np.testing.assert_array_equal(got["w"], big(2)["w"])
    keeper.save(3, big(3), {})
    keeper.close()
    assert keeper.steps() == [2, 3]


# --- which steps stay ---------------------------------------------------------


def test_what_is_kept_has_been_verified(tmp_path):
  save_some(tmp_path, steps=(1, 2, 3), keep=3)
  flip(tmp_path / "2")
  keeper = keeper_of(tmp_path)
  keeper.restore_latest(shapes())
  keeper.save(4, state(4), {})
  keeper.close()
  assert keeper.steps() == [3, 4]
  save_some(tmp_path / "again", steps=(1, 2, 3), keep=3)
  flip(tmp_path / "again" / "3")  # not looked at: nothing was restored
  save_some(tmp_path / "again", steps=(4,), keep=2)
  assert keeper_of(tmp_path / "again").steps() == [2, 3, 4]


def test_steps_that_were_committed_and_are_gone_are_no_fresh_start(tmp_path):
  save_some(tmp_path, steps=(1, 2))
  for step in (1, 2):
    commit.remove_folder(tmp_path / str(step))
  with pytest.raises(errors.CheckpointError) as caught:
    restore(tmp_path)
  assert caught.value.slug == "ckpt.none_complete"


def test_what_a_killed_save_left_goes_when_a_step_is_restored(tmp_path):
  save_some(tmp_path, steps=(1, 2))
  (tmp_path / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
  (tmp_path / "3").mkdir()
  assert restore(tmp_path)[1]["step"] == 2
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "newest.json"]


def test_a_damaged_step_lies_aside_until_two_newer_ones_are_there(tmp_path):
  save_some(tmp_path, steps=(1, 2, 3))
  flip(tmp_path / "3")
  assert restore(tmp_path)[1]["step"] == 2
  assert (tmp_path / "3.damaged").exists()
  save_some(tmp_path, steps=(3, 4))
  assert not (tmp_path / "3.damaged").exists()


SAVER = """
import pathlib, sys
import jax.numpy as jnp
from mcpo_jax import checkpoints
keeper = checkpoints.Checkpointer(pathlib.Path(sys.argv[1]), keep=2)
for step in range(1, 100):
  keeper.save(step, {"w": jnp.full((2, 3), float(step)),
                     "step": jnp.int32(step)}, {})
"""


def test_a_saver_killed_anywhere_leaves_a_step_that_verifies(tmp_path):
  points = ["ckpt.begin@4", "ckpt.shard@4", "ckpt.manifest@4", "ckpt.gc@3",
            "ckpt.rename@5"]
  killed = [subprocess.Popen(
      [sys.executable, "-c", SAVER, str(tmp_path / point)],
      env=os.environ | {"MCPO_FAULT": point, "XLA_FLAGS": "",
                        "PYTHONPATH": os.pathsep.join(sys.path)})
      for point in points]
  for point, process in zip(points, killed):
    assert process.wait(300) == -signal.SIGKILL
    got, meta = restore(tmp_path / point)
    assert meta["step"] >= 3
    assert float(got["w"][0, 0]) == int(got["step"]) == meta["step"]
    keeper = keeper_of(tmp_path / point)
    keeper.save(50, state(50), {})
    keeper.close()
    assert len(keeper.steps()) == 2
