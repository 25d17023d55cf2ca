"""Committed folders in a bucket that knows whole objects only."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations import memory

from mcpo_jax import checkpoints, commit, errors, faults, storage
from mcpo_jax.training import setup


class Bucket(memory.MemoryFileSystem):
  """Objects are put whole, read, listed and deleted; there is nothing else."""

  protocol = "bucket"
  store, pseudo_dirs = {}, [""]

  def _refuse(self, *args, **kwargs):
    raise NotImplementedError("not in a bucket")

  mv = rename = move = cp_file = copy = touch = truncate = _refuse

  def _open(self, path, mode="rb", **kwargs):
    if mode not in ("rb", "wb", "xb"):
      raise NotImplementedError(f"no mode {mode} in a bucket")
    return super()._open(path, mode, **kwargs)

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(
        path.replace("bucket://", "memory://"))


@pytest.fixture
def bucket():
  fsspec.register_implementation("bucket", Bucket, clobber=True)
  Bucket.store.clear()
  yield Bucket.store
  Bucket.store.clear()


def state(step):
  return {"w": jnp.arange(6.0).reshape(2, 3) + step, "step": jnp.int32(step)}


def shapes():
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), state(0))


def keeper_of(folder):
  return checkpoints.Checkpointer(
      folder, keep=2, mirror="bucket://runs/one/sft")


def save(folder, *steps):
  keeper = keeper_of(folder)
  for step in steps:
    keeper.save(step, state(step), {"run": "a"})
  keeper.close()


def restore(folder):
  keeper = keeper_of(folder)
  try:
    return keeper.restore_latest(shapes())
  finally:
    keeper.close()


def fill(folder):
  (folder / "inner").mkdir()
  (folder / "inner" / "a.bin").write_bytes(bytes(range(200)))
  (folder / "b.txt").write_text("text")


def test_the_bucket_refuses_what_buckets_refuse(bucket):
  store = fsspec.filesystem("bucket")
  store.pipe_file("/x", b"1", mode="create")
  for work in (lambda: store.mv("/x", "/y"), lambda: store.open("/x", "ab"),
               lambda: store.copy("/x", "/y")):
    with pytest.raises(NotImplementedError):
      work()
  with pytest.raises(FileExistsError):
    store.pipe_file("/x", b"2", mode="create")


def test_a_folder_goes_there_and_comes_back(tmp_path, bucket):
  commit.write_folder(tmp_path / "x", fill, {"step": 7})
  storage.push(tmp_path / "x", "bucket://runs/x")
  storage.push(tmp_path / "x", "bucket://runs/x")  # once more is no change
  storage.pull("bucket://runs/x", tmp_path / "new" / "y")
  assert commit.verify(tmp_path / "new" / "y", exact=True) == {"step": 7}
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["y"]


def test_the_first_commit_stands(tmp_path, bucket):
  for step in (1, 2):
    commit.write_folder(tmp_path / f"{step}", fill, {"step": step})
  storage.push(tmp_path / "1", "bucket://runs/x")
  with pytest.raises(errors.CheckpointError) as caught:
    storage.push(tmp_path / "2", "bucket://runs/x")
  assert caught.value.slug == "ckpt.locked"
  storage.pull("bucket://runs/x", tmp_path / "y")
  assert commit.verify(tmp_path / "y") == {"step": 1}


def test_what_was_not_finished_does_not_count(tmp_path, bucket, monkeypatch):
  save(tmp_path / "a", 1)
  monkeypatch.setenv("MCPO_FAULT", "store.manifest:raise")
  monkeypatch.setattr(faults, "_counts", {})
  with pytest.raises(errors.CheckpointError):
    save(tmp_path / "a", 2)
  assert any("/2/default/" in name for name in bucket)
  assert storage.steps("bucket://runs/one/sft") == [1]
  got, meta = restore(tmp_path / "b")  # a machine that has nothing
  assert meta["step"] == 1
  np.testing.assert_array_equal(got["w"], state(1)["w"])
  save(tmp_path / "b", 2)  # over what was left there
  assert storage.steps("bucket://runs/one/sft") == [1, 2]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_copy_is_skipped_for_the_one_before(
    tmp_path, bucket, damage):
  save(tmp_path / "a", 1, 2)
  name = "/runs/one/sft/2/default/w/0.0"
  content = bytearray(bucket[name].getvalue())
  content[5] ^= 8
  if damage == "delete":
    del bucket[name]
  else:
    fsspec.filesystem("bucket").pipe_file(
        name, bytes(content if damage == "flip" else content[:7]))
  got, meta = restore(tmp_path / "b")
  assert meta["step"] == 1
  np.testing.assert_array_equal(got["w"], state(1)["w"])


def test_the_store_keeps_what_the_disk_keeps(tmp_path, bucket):
  save(tmp_path / "a", 1, 2, 3)
  assert storage.steps("bucket://runs/one/sft") == [2, 3]
  assert not any("/sft/1/" in name for name in bucket)
  restore(tmp_path / "b")
  save(tmp_path / "b", 4)
  assert storage.steps("bucket://runs/one/sft") == [3, 4]
  assert keeper_of(tmp_path / "b").steps() == [3, 4]


def test_copies_that_are_all_damaged_are_no_fresh_start(tmp_path, bucket):
  save(tmp_path / "a", 1)
  del bucket["/runs/one/sft/1/default/w/0.0"]
  with pytest.raises(errors.CheckpointError) as caught:
    restore(tmp_path / "b")
  assert caught.value.slug == "ckpt.none_complete"


def test_a_fresh_workdir_takes_the_run_on_and_another_run_is_refused(bucket):
  claim = lambda run, fresh: storage.claim(
      "bucket://runs/one", run, fresh=fresh)
  assert claim("a", True) == "a"
  assert claim("b", True) == "a"  # another machine, nothing on its disk
  assert claim("a", False) == "a"
  with pytest.raises(errors.CheckpointError) as caught:
    claim("b", False)
  assert caught.value.slug == "ckpt.run_id"


def test_a_store_that_cannot_be_asked_is_named(tmp_path):
  with pytest.raises(errors.ResourceError) as caught:
    storage.steps("nowhere://runs/one")
  assert (caught.value.slug, caught.value.exit_code) == ("ckpt.store", 6)


def test_a_bucket_is_no_workdir(tmp_path):
  with pytest.raises(errors.ResourceError) as caught:
    setup.claim({}, "gs://bucket/run")
  assert "checkpoint.mirror" in caught.value.hint
