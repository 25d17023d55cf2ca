"""Records that lie in an object store: fetched once, whole, read as files."""

import gzip
import json
import os
import pathlib

import disk_bucket
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcpo_jax import errors, storage
from mcpo_jax.data import files, tokenizer
from mcpo_jax.data import store as store_lib
from mcpo_jax.training import setup

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"}
        for i in range(7)]


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def place(tmp_path, monkeypatch):
  """The folder that pail://data is, with rows in three files, and others."""
  monkeypatch.setenv("MCPO_BUCKET", str(tmp_path / "bucket"))
  monkeypatch.setenv("MCPO_READS", str(tmp_path / "reads"))
  monkeypatch.setattr(storage, "_cache", tmp_path / "cache")
  folder = tmp_path / "bucket/data"
  (folder / "in").mkdir(parents=True)
  (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[:2])))
  (folder / "b.jsonl").write_bytes(lines(ROWS[2:5]))
  pq.write_table(pa.Table.from_pylist(ROWS[5:]), folder / "in/c.parquet")
  (folder / "in/bad.jsonl").write_bytes(lines(ROWS[:1]) + b"{no\n")
  return folder


def read(path):
  return [row.value for row in files.read_rows(path)]


def fetched(place):
  """The names that were read, and how often."""
  path = place.parents[1] / "reads"
  return path.read_text().split()[::2] if path.exists() else []


@pytest.mark.parametrize("path, want", [
    ("pail://data/a.jsonl.gz", ROWS[:2]),
    ("pail://data/*.jsonl*", ROWS[:5]),
    ("pail://data/**/*.parquet", ROWS[5:]),
    ("pail://data/in/c.parquet", ROWS[5:]),
])
def test_urls_and_patterns_give_the_rows_of_files(place, path, want):
  assert read(path) == want
  assert read(path) == want
  assert len(fetched(place)) == len(set(fetched(place))) > 0
  local = path.replace("pail://", f"{place.parent}/")
  assert read(local) == want


def test_what_fsspec_itself_brings_is_a_store(place):
  memory = fsspec.filesystem("memory")
  memory.pipe_file("/rows/b.jsonl", lines(ROWS))
  assert read("memory://rows/*.jsonl") == ROWS
  assert read(f"file://{place}/b.jsonl") == ROWS[2:5]
  memory.rm("/rows", recursive=True)


def test_another_version_is_fetched_and_the_old_one_kept(place):
  old, = files.expand("pail://data/b.jsonl")
  (place / "b.jsonl").write_bytes(lines(ROWS[3:6]))  # as many bytes
  os.utime(place / "b.jsonl", (1, 1))
  assert read("pail://data/b.jsonl") == ROWS[3:6]
  assert old.read_bytes() == lines(ROWS[2:5])


def test_a_copy_that_was_cut_is_fetched_again(place):
  file, = files.expand("pail://data/b.jsonl")
  file.write_bytes(file.read_bytes()[:-3])
  assert read("pail://data/b.jsonl") == ROWS[2:5]


def test_a_bad_row_is_told_with_its_object(place):
  with pytest.raises(errors.DataError) as caught:
    raise read("pail://data/in/bad.jsonl")[1]
  assert caught.value.slug == "data.json"
  assert "bucket/data/in/bad.jsonl:2" in caught.value.where


def test_a_store_is_made_of_content_wherever_it_lies(place, tmp_path):
  tokenizer.train_tokenizer(
      ["question answer"], vocab_size=300, out_dir=tmp_path / "tokenizer")
  build = lambda path: store_lib.build_store(
      [(path, "auto", 1.0, None)],
      tokenizer.load_tokenizer(tmp_path / "tokenizer"),
      cache_dir=tmp_path / "cache/data")
  store = build("pail://data/*.jsonl*")
  assert store.key == build(f"{place}/*.jsonl*").key and len(store) == 5
  with pytest.raises(errors.DataError) as caught:
    build("pail://data/in/bad.jsonl")
  assert caught.value.slug == "data.json"


def test_an_object_that_changes_while_a_store_is_made(
    place, tmp_path, monkeypatch):
  tokenizer.train_tokenizer(
      ["question answer"], vocab_size=300, out_dir=tmp_path / "tokenizer")
  build = store_lib._build

  def change(*args):
    os.utime(place / "b.jsonl", (1, 1))
    return build(*args)

  monkeypatch.setattr(store_lib, "_build", change)
  with pytest.raises(errors.DataError) as caught:
    store_lib.build_store(
        [("pail://data/b.jsonl", "auto", 1.0, None)],
        tokenizer.load_tokenizer(tmp_path / "tokenizer"),
        cache_dir=tmp_path / "cache/data")
  assert caught.value.slug == "data.changed"
  assert not list((tmp_path / "cache/data").iterdir())


def changed(place, monkeypatch):
  """The object changes while it is fetched."""
  get = disk_bucket.Bucket.get_file

  def work(self, rpath, lpath, **kwargs):
    get(self, rpath, lpath)
    os.utime(place / "b.jsonl", (1, 1))

  monkeypatch.setattr(disk_bucket.Bucket, "get_file", work)


def cut(place, monkeypatch):
  """The store hangs up in the middle, and says nothing."""
  get = disk_bucket.Bucket.get_file

  def work(self, rpath, lpath, **kwargs):
    get(self, rpath, lpath)
    path = pathlib.Path(lpath)
    path.write_bytes(path.read_bytes()[:-9])

  monkeypatch.setattr(disk_bucket.Bucket, "get_file", work)


def refused(place, monkeypatch):

  def work(self, rpath, lpath, **kwargs):
    raise PermissionError("403: not yours")

  monkeypatch.setattr(disk_bucket.Bucket, "get_file", work)


@pytest.mark.parametrize("spoil, slug, word", [
    (changed, "data.changed", "data/b.jsonl"),
    (cut, "data.changed", "data/b.jsonl"),
    (refused, "ckpt.store", "403: not yours"),
])
def test_nothing_is_left_of_what_was_not_fetched_whole(
    place, monkeypatch, spoil, slug, word):
  spoil(place, monkeypatch)
  with pytest.raises(errors.McpoError) as caught:
    files.expand("pail://data/b.jsonl")
  assert caught.value.slug == slug and word in str(caught.value)
  assert not [p for p in (place.parents[1] / "cache").rglob("*")
              if p.is_file()]


@pytest.mark.parametrize("path, slug, word", [
    ("pail://data/none.jsonl", "data.no_files", "pail://data/none.jsonl"),
    ("pail://nowhere/*.jsonl", "data.no_files", "pail://nowhere/*.jsonl"),
    ("pail://data/in", "data.no_files", "a folder needs one"),
    ("nowhere://data/a.jsonl", "ckpt.store", "s3fs"),
])
def test_what_is_not_there_is_said_before_a_run_begins(place, path, slug, word):
  config = {"stages": (), "data": {
      "path": path, "format": "auto", "eval_path": None}}
  for work in (lambda: files.expand(path), lambda: setup.check_sources(config)):
    with pytest.raises(errors.McpoError) as caught:
      work()
    assert caught.value.slug == slug and word in str(caught.value)
  config["data"]["path"] = "pail://data/*.jsonl,pail://data/a.jsonl.gz*2.5"
  setup.check_sources(config)
  assert fetched(place) == []  # that they are there is enough
