"""Folders are whole or not there, and damage is seen."""

import pytest

from mcpo_jax import commit, errors


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
