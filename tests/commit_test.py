"""Folders are whole or not there, and damage is seen."""

import json
import os
import signal
import subprocess
import sys

import pytest
import small_disk

from mcpo_jax import commit, errors, faults


def fill(folder):
  (folder / "inner").mkdir()
  (folder / "inner" / "a.bin").write_bytes(bytes(range(200)))
  (folder / "b.txt").write_text("text")


def test_a_committed_folder_verifies_and_gives_its_meta(tmp_path):
  commit.write_folder(tmp_path / "x", fill, {"step": 7})
  assert commit.verify(tmp_path / "x") == {"step": 7}
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path):
  commit.write_folder(tmp_path / "x", fill, {"step": 1})

  def broken(folder):
    fill(folder)
    raise RuntimeError("disk")

  with pytest.raises(RuntimeError):
    commit.write_folder(tmp_path / "x", broken, {"step": 2})
  assert commit.verify(tmp_path / "x") == {"step": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_old_folder_goes_only_where_it_is_to_be_replaced(tmp_path):
  for replace, step, want in ((False, 1, 1), (False, 2, 1), (True, 3, 3)):
    commit.write_folder(tmp_path / "x", fill, {"step": step}, replace=replace)
    assert commit.verify(tmp_path / "x") == {"step": want}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("damage,slug", [
    (lambda f: (f / "inner" / "a.bin").write_bytes(
        bytes([1]) + bytes(range(1, 200))), "ckpt.hash"),
    (lambda f: (f / "inner" / "a.bin").write_bytes(b"short"),
     "ckpt.missing_data"),
    (lambda f: (f / "b.txt").unlink(), "ckpt.missing_data"),
    (lambda f: (f / commit.MANIFEST).unlink(), "ckpt.uncommitted"),
    (lambda f: (f / commit.MANIFEST).write_text("{\"files\": "),
     "ckpt.metadata"),
])
def test_damage_is_named(tmp_path, damage, slug):
  commit.write_folder(tmp_path / "x", fill, {})
  damage(tmp_path / "x")
  with pytest.raises(errors.CheckpointError) as caught:
    commit.verify(tmp_path / "x")
  assert caught.value.slug == slug


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path):
  commit.write_folder(tmp_path / "x", fill, {"step": 7, "loss": 0.5})
  path = tmp_path / "x" / commit.MANIFEST
  whole = path.read_bytes()
  for i in range(len(whole)):
    path.write_bytes(
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
    with pytest.raises(errors.CheckpointError):
      commit.verify(tmp_path / "x")


def test_a_manifest_of_another_version_is_told_from_a_damaged_one(tmp_path):
  commit.write_folder(tmp_path / "x", fill, {})
  path = tmp_path / "x" / commit.MANIFEST
  path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
  with pytest.raises(errors.CheckpointError) as caught:
    commit.verify(tmp_path / "x")
  assert caught.value.slug == "ckpt.version"


def test_several_processes_hash_all_files_between_them(tmp_path):
  commit.write_folder(tmp_path / "x", fill, {})
  (tmp_path / "x" / "b.txt").write_text("tEXT")  # the first of two files
  commit.verify(tmp_path / "x", part=1, parts=2)
  with pytest.raises(errors.CheckpointError) as caught:
    commit.verify(tmp_path / "x", part=0, parts=2)
  assert "b.txt" in caught.value.where


def test_a_folder_is_hashed_once_but_anew_after_it_was_replaced(
    tmp_path, monkeypatch):
  commit.verify_once(tmp_path)  # from elsewhere: nothing to compare with
  hashed, real = [], commit.file_sha256
  monkeypatch.setattr(
      commit, "file_sha256", lambda path: hashed.append(path) or real(path))
  for step in (1, 2):
    commit.write_folder(tmp_path / "x", fill, {"step": step}, replace=True)
    hashed.clear()
    commit.verify_once(tmp_path / "x")
    commit.verify_once(tmp_path / "x")
    assert len(hashed) == 2


def test_a_folder_of_links_with_a_card_of_its_owner_is_taken(tmp_path):
  commit.write_folder(tmp_path / "x", lambda folder: (
      fill(folder), (folder / "README.md").write_text("card")), {})
  (tmp_path / "x" / "README.md").write_text("my own card")
  (tmp_path / "x" / "b.txt").rename(tmp_path / "blob")
  (tmp_path / "x" / "b.txt").symlink_to(tmp_path / "blob")  # as hubs cache
  commit.verify_once(tmp_path / "x")
  for exact, slug in ((False, "ckpt.missing_data"), (True, "ckpt.unsafe_path")):
    with pytest.raises(errors.CheckpointError) as caught:
      commit.verify(tmp_path / "x", exact=exact)
    assert caught.value.slug == slug


# --- killed writers -----------------------------------------------------------

WRITE = """
import pathlib, sys
from mcpo_jax import commit
path = pathlib.Path(sys.argv[1])
commit.lock(path.parent)
print("locked", flush=True)
for step in (1, 2):
  commit.write_folder(path, lambda f: (f / "a").write_text(str(step)),
                      {"step": step}, replace=True)
sys.stdin.read()
"""


def writer(path, fault=""):
  return subprocess.Popen(
      [sys.executable, "-c", WRITE, str(path)], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True, env=os.environ | {
          "MCPO_FAULT": fault, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("fault", [
    "folder.write@2", "folder.manifest@2", "folder.rename@2",
    "folder.move@2", "folder.moved"])
def test_a_killed_writer_leaves_the_old_folder_whole(tmp_path, fault):
  process = writer(tmp_path / "x", fault)
  assert process.wait(60) == -signal.SIGKILL
  commit.lock(tmp_path)  # the dead hold no lock
  commit.sweep(tmp_path)
  assert commit.verify(tmp_path / "x") == {"step": 1}
  assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "x"]


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
  process = writer(tmp_path / "x")
  assert process.stdout.readline() == "locked\n"
  with pytest.raises(errors.CheckpointError) as caught:
    commit.lock(tmp_path)
  assert caught.value.slug == "ckpt.locked"
  assert json.loads(caught.value.got)["process"] == process.pid
  process.kill()
  process.wait()
  commit.lock(tmp_path)


def test_only_what_the_dead_were_writing_is_swept_away(tmp_path):
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  host = os.uname().nodename
  names = {f".x.{gone.pid}@{host}.00000000.tmp": False,
           f".x.{os.getpid()}@{host}.00000000.tmp": True,
           f".x.{gone.pid}@elsewhere.00000000.tmp": True,
           ".x.tmp": True, "x.tmp": True}
  for name in names:
    (tmp_path / "inner" / name).mkdir(parents=True)
  commit.sweep(tmp_path)
  assert {n: (tmp_path / "inner" / n).exists() for n in names} == names


# --- full disks ---------------------------------------------------------------


def test_a_full_disk_is_told_with_what_is_free_and_leaves_no_part(tmp_path):
  with small_disk.of(tmp_path / "disk", megabytes=1) as disk:
    commit.write_folder(disk / "x", fill, {"step": 1})
    for write in (
        lambda: commit.write_folder(
            disk / "x", lambda f: (f / "a").write_bytes(b"0" * 2**21), {},
            replace=True),
        lambda: commit.write_file(disk / "y", "0" * 2**21),
        lambda: commit.append(disk / "z", "0" * 2**21)):
      with pytest.raises(errors.ResourceError) as caught:
        write()
      assert caught.value.slug == "ckpt.disk_full"
      assert "bytes free" in caught.value.got
      assert commit.verify(disk / "x") == {"step": 1}
      assert not list(disk.glob(".*.tmp"))
    assert (disk / "z").read_text() == ""


@pytest.mark.parametrize("point", ["export.write", "export.manifest"])
def test_a_disk_that_fills_in_an_export_leaves_the_old_one(
    tmp_path, monkeypatch, point):
  commit.write_folder(tmp_path / "x", fill, {"step": 1})
  monkeypatch.setenv("MCPO_FAULT", f"{point}:full")
  monkeypatch.setattr(faults, "_counts", {})
  with pytest.raises(errors.ResourceError):
    commit.write_folder(
        tmp_path / "x", fill, {"step": 2}, replace=True, point="export")
  assert commit.verify(tmp_path / "x") == {"step": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x"]
