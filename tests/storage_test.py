"""Committed folders in a bucket that knows whole objects only."""

import itertools
import shutil
import types

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations import memory

from mcpo_jax import checkpoints, chunks, commit, errors, faults, hosts, storage
from mcpo_jax.stages import export
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


def test_a_folder_takes_the_place_of_another(tmp_path, bucket):
  commit.write_folder(tmp_path / "1", fill, {"step": 1})
  commit.write_folder(
      tmp_path / "2", lambda to: (to / "c").write_text("3"), {"step": 2})
  for step in (1, 2):
    storage.replace(tmp_path / f"{step}", "bucket://runs/x")
    storage.pull("bucket://runs/x", tmp_path / f"back{step}")
    assert commit.verify(tmp_path / f"back{step}") == {"step": step}
  assert sorted(bucket) == ["/runs/x/c", "/runs/x/manifest.json"]


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


def damage_disk(folder, how):
  """One kind of real damage to a step on the disk."""
  path = folder / ("manifest.json" if how in ("manifest", "uncommitted")
                   else "default/w/0.0")
  content = bytearray(path.read_bytes())
  content[5] ^= 8
  if how in ("delete", "uncommitted"):
    path.unlink()
  else:
    path.write_bytes(content[:7] if how == "cut" else content)


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "delete", "manifest", "uncommitted"])
def test_a_step_damaged_on_the_disk_is_taken_from_the_store(
    tmp_path, bucket, caplog, damage):
  save(tmp_path / "a", 1, 2)
  damage_disk(tmp_path / "a/2", damage)
  there = {name: file.getvalue() for name, file in bucket.items()}
  got, meta = restore(tmp_path / "a")
  assert meta["step"] == 2
  np.testing.assert_array_equal(got["w"], state(2)["w"])
  assert "checkpoint 2 is taken from bucket://runs/one/sft" in caplog.text
  assert {name: file.getvalue() for name, file in bucket.items()} == there
  assert commit.verify(tmp_path / "a/2", exact=True)["step"] == 2
  assert (tmp_path / "a/2.damaged").exists() == (damage != "uncommitted")
  save(tmp_path / "a", 3)
  assert storage.steps("bucket://runs/one/sft") == [2, 3]
  assert keeper_of(tmp_path / "a").steps() == [2, 3]


def test_a_step_damaged_on_the_disk_and_in_the_store_is_made_again(
    tmp_path, bucket, caplog):
  save(tmp_path / "a", 1, 2)
  damage_disk(tmp_path / "a/2", "flip")
  fsspec.filesystem("bucket").pipe_file(
      "/runs/one/sft/2/default/w/0.0", b"cut")
  got, meta = restore(tmp_path / "a")
  assert meta["step"] == 1
  np.testing.assert_array_equal(got["w"], state(1)["w"])
  assert "ckpt.hash" in caplog.text  # of the disk
  assert "checkpoint 2 skipped: error[ckpt.missing_data]" in caplog.text
  keeper = keeper_of(tmp_path / "a")
  keeper.save(2, state(2), {"run": "by other code"})
  keeper.close()
  for folder in ("a", "b"):
    got, meta = restore(tmp_path / folder)
    assert (meta["step"], meta["run"]) == (2, "by other code")
    np.testing.assert_array_equal(got["w"], state(2)["w"])


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


@pytest.fixture
def apart():
  """As if each of several processes had a disk of its own; this is one."""
  hosts.set_apart(True)
  yield
  hosts.set_apart(False)


def test_with_disks_apart_the_store_alone_says_what_is_committed(
    tmp_path, bucket, apart, monkeypatch):
  save(tmp_path / "a", 1)
  monkeypatch.setenv("MCPO_FAULT", "store.manifest:raise")
  monkeypatch.setattr(faults, "_counts", {})
  with pytest.raises(errors.CheckpointError):
    save(tmp_path / "a", 2)
  monkeypatch.delenv("MCPO_FAULT")
  assert (tmp_path / "a/2/manifest.json").exists()
  got, meta = restore(tmp_path / "a")
  assert meta["step"] == 1
  np.testing.assert_array_equal(got["w"], state(1)["w"])
  assert not (tmp_path / "a/2").exists()
  save(tmp_path / "a", 2, 3, 4)
  assert storage.steps("bucket://runs/one/sft") == [3, 4]
  assert sorted(p.name for p in (tmp_path / "a").glob("[0-9]*")) == ["3", "4"]


def test_with_disks_apart_what_a_disk_holds_is_not_fetched_again(
    tmp_path, bucket, apart, monkeypatch):
  save(tmp_path / "a", 1)
  fetched = []
  get_file = Bucket.get_file
  monkeypatch.setattr(Bucket, "get_file", lambda self, path, *args: (
      fetched.append(path), get_file(self, path, *args)))
  restore(tmp_path / "a")
  assert fetched == []
  (tmp_path / "a/1/default/w/0.0").write_bytes(b"another")
  (tmp_path / "a/1/default/w/7.7").write_bytes(b"of a save that was killed")
  got, _ = restore(tmp_path / "a")
  assert fetched == ["/runs/one/sft/1/default/w/0.0"]
  np.testing.assert_array_equal(got["w"], state(1)["w"])
  assert not (tmp_path / "a/1/default/w/7.7").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_with_disks_apart_a_damaged_step_is_skipped_and_made_again(
    tmp_path, bucket, apart, damage):
  save(tmp_path / "a", 1, 2)
  shutil.rmtree(tmp_path / "a")
  name = "/runs/one/sft/2/" + (
      "manifest.json" if damage == "manifest" else "default/w/0.0")
  content = bytearray(bucket[name].getvalue())
  content[5] ^= 8
  if damage == "delete":
    del bucket[name]
  else:
    fsspec.filesystem("bucket").pipe_file(
        name, bytes(content[:7] if damage == "cut" else content))
  got, meta = restore(tmp_path / "b")
  assert meta["step"] == 1
  np.testing.assert_array_equal(got["w"], state(1)["w"])
  save(tmp_path / "b", 2)
  got, meta = restore(tmp_path / "c")
  assert meta["step"] == 2
  np.testing.assert_array_equal(got["w"], state(2)["w"])


def test_a_step_is_not_committed_while_a_piece_of_an_array_is_missing(
    tmp_path, bucket, apart, monkeypatch):
  hash_own = checkpoints.Checkpointer._hash_own

  def lose(self, save, folder):
    (folder / "default/w/0.0").unlink()
    return hash_own(self, save, folder)

  monkeypatch.setattr(checkpoints.Checkpointer, "_hash_own", lose)
  with pytest.raises(errors.CheckpointError) as caught:
    save(tmp_path / "a", 1)
  assert caught.value.slug == "ckpt.incomplete"
  assert storage.steps("bucket://runs/one/sft") == []


@pytest.mark.parametrize("spec", [(), ("x",), ("y", "x"), (None, ("x", "y"))])
def test_a_process_asks_for_the_chunks_that_its_devices_read(tmp_path, spec):
  mesh = jax.make_mesh((2, 4), ("x", "y"))
  shape, sizes = (8, 24), (4, 3)
  (tmp_path / ".zarray").write_text('{"chunks": [4, 3]}')
  sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*spec))
  places = sharding.devices_indices_map(shape)
  numbers = np.arange(8 * 24).reshape(shape)
  for devices in itertools.combinations(jax.devices(), 2):
    own = {d: places[d] for d in devices}
    leaf = types.SimpleNamespace(shape=shape, sharding=types.SimpleNamespace(
        addressable_devices_indices_map=lambda shape, own=own: own))
    read = np.unique(np.concatenate([numbers[i].ravel() for i in own.values()]))
    want = {f"{n // 24 // sizes[0]}.{n % 24 // sizes[1]}" for n in read}
    assert chunks.needed(tmp_path, leaf) == want


def test_a_shard_is_the_chunks_that_lie_whole_in_it(tmp_path):
  (tmp_path / ".zarray").write_text('{"chunks": [2, 3]}')
  array = np.arange(8 * 6).reshape(8, 6)
  shards = [((2, 0), array[2:6, :3]), ((6, 3), array[6:, 3:]),
            ((1, 3), array[1:3, 3:])]  # the last one cuts two chunks
  found = list(chunks.pieces(tmp_path, shards))
  assert [name for name, _ in found] == ["1.0", "2.0", "3.1"]
  for (_, got), (row, column) in zip(found, ((2, 0), (4, 0), (6, 3))):
    np.testing.assert_array_equal(
        got, array[row:row + 2, column:column + 3])
  (tmp_path / ".zarray").write_text('{"chunks": []}')
  ((name, got),) = chunks.pieces(tmp_path, [((), np.float32(7))])
  assert (name, got) == ("0", 7)


def test_a_fresh_workdir_takes_the_run_on_and_another_run_is_refused(bucket):
  claim = lambda run, fresh: storage.claim(
      "bucket://runs/one", run, fresh=fresh)
  assert claim("a", True) == "a"
  assert claim("b", True) == "a"  # another machine, nothing on its disk
  assert claim("a", False) == "a"
  with pytest.raises(errors.CheckpointError) as caught:
    claim("b", False)
  assert caught.value.slug == "ckpt.run_id"


def test_a_fresh_workdir_takes_the_commit_of_a_branch_that_has_moved(
    tmp_path, bucket, monkeypatch):
  monkeypatch.setattr(
      setup.hf, "resolve_model", lambda path, revision: tmp_path / (
          revision or "newest"))
  config = {"checkpoint": {"mirror": "bucket://runs/one"}}
  resolve = lambda folder: setup.resolve_once(
      config, tmp_path, "some/model", None).name
  assert resolve(tmp_path) == "newest"
  monkeypatch.setattr(
      setup.hf, "resolve_model", lambda path, revision: tmp_path / (
          revision or "newer"))
  (tmp_path / "revisions.json").unlink()
  assert resolve(tmp_path) == "newest"


def test_a_store_that_cannot_be_asked_is_named(tmp_path):
  with pytest.raises(errors.ResourceError) as caught:
    storage.steps("nowhere://runs/one")
  assert (caught.value.slug, caught.value.exit_code) == ("ckpt.store", 6)


def test_an_export_to_a_store_leaves_nothing_on_the_disk(
    tmp_path, bucket, monkeypatch):
  run, asked = types.SimpleNamespace(workdir=tmp_path), []

  def fake(run, out, url):
    asked.append(url)
    out.mkdir()
    return {"export/path": str(out)}

  monkeypatch.setattr(export, "_export", fake)
  out = "bucket://models/one"
  assert export.run_export(run, None, out) == {"export/path": out}
  assert asked == [out] and not list(tmp_path.iterdir())
  with pytest.raises(errors.ResourceError) as caught:
    export.run_export(run, None, "nowhere://models/one")
  assert caught.value.slug == "ckpt.store" and asked == [out]


def test_a_bucket_is_no_workdir(tmp_path):
  with pytest.raises(errors.ResourceError) as caught:
    setup.claim({}, "gs://bucket/run")
  assert "checkpoint.mirror" in caught.value.hint
