"""Checkpoints: committed by a manifest, verified, the last good one found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcpo_jax import checkpoints, commit, errors

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
