"""Models that lie in an object store: what is read of them, and what spoils."""

import json
import os
import pathlib
import shutil

import disk_bucket  # noqa: F401 — makes pail:// a place
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_folders import (
  CONFIG,
  EMBEDDING,
  ROWS,
  edit_weights,
  export,
  first_shard,
  index_is,
  load_adapters,
  make_params,
)

from mcpo_jax import commit, errors, storage
from mcpo_jax.models import hf, hub, lora, peft, shards

URL = "pail://models/one"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  return export(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def place(exported, tmp_path, monkeypatch):
  """The folder that URL is."""
  monkeypatch.setenv("MCPO_BUCKET", str(tmp_path / "bucket"))
  monkeypatch.setenv("MCPO_READS", str(tmp_path / "reads"))
  monkeypatch.setattr(storage, "_cache", tmp_path / "cache")
  return pathlib.Path(shutil.copytree(exported, tmp_path / "bucket/models/one"))


def load(url=URL, known=None, **options):
  folder = hf.resolve_model(url, known)
  config = hf.load_config(folder)
  hf.check_tokenizer(folder, config)
  return hf.load_params(folder, config, **options)


def reads(place):
  """(name, bytes) of what was read in the bucket."""
  lines = (place.parents[2] / "reads").read_text().splitlines()
  return [(name, int(size)) for name, size in map(str.split, lines)]


def equal(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("url", [URL, URL + "/"])
def test_weights_stay_in_the_store_and_are_what_they_are_on_a_disk(
    place, exported, url):
  equal(load(url), make_params())
  folder, = (place.parents[2] / "cache/models").iterdir()
  assert {p.name for p in folder.iterdir()} == {
      p.name for p in exported.iterdir()
      if not p.name.endswith((".safetensors", ".md"))} | {hub.ORIGIN}
  weights = sum(p.stat().st_size for p in place.glob("*.safetensors"))
  assert weights == sum(n for name, n in reads(place) if "safetensors" in name
                        and not name.endswith(".json"))
  before = len(reads(place))
  assert hf.resolve_model(url) == folder  # nothing is fetched again
  assert len(reads(place)) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_of_one_file_and_of_any_dtype(place, exported, dtype):
  edit_weights(place, lambda tensors: tensors.update(
      {name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}))
  assert not (place / shards.INDEX).exists()
  want = jax.tree.map(
      lambda x: x.astype(jnp.dtype(dtype)).astype(jnp.float32), make_params())
  equal(load(), want)


def test_what_fsspec_itself_brings_is_a_store(exported, tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "_cache", tmp_path)
  memory = fsspec.filesystem("memory")
  memory.put(str(exported), "/hub/one", recursive=True)
  equal(load("memory://hub/one"), make_params())
  equal(load(f"file://{exported}"), make_params())
  memory.rm("/hub", recursive=True)


# --- what spoils --------------------------------------------------------------


def cut(place):
  path = first_shard(place)
  path.write_bytes(path.read_bytes()[:-3])


def start_with(content):
  def change(place):
    path = first_shard(place)
    path.write_bytes(content + path.read_bytes()[len(content):])
  return change


def header(change):
  def edit(place):
    path = first_shard(place)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    told = json.loads(content[8:end])
    name = next(x for x in told if x != "__metadata__")
    text = json.dumps(change(told, name)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
  return edit


def entry(**changes):
  return header(lambda told, name: told | {name: told[name] | changes})


def overlap(place):
  """One tensor lies where another one does, and its own place is no one's."""
  edit_weights(place, lambda tensors: None)

  def change(told, name):
    one, other = (f"model.layers.{i}.input_layernorm.weight" for i in range(2))
    return told | {one: told[other]}

  header(change)(place)


def empty(place):
  shutil.rmtree(place)


def only_pickle(place):
  edit_weights(place, lambda tensors: None)
  (place / shards.SINGLE).rename(place / "pytorch_model.bin")


DAMAGE = {
    "cut": (cut, "hf.safetensors", "pail"),
    "longer": (lambda p: first_shard(p).write_bytes(
        first_shard(p).read_bytes() + b"123"), "hf.safetensors", "pail"),
    "no header": (lambda p: first_shard(p).write_bytes(b"12345"),
                  "hf.safetensors", "pail"),
    "long header": (start_with(b"\xff" * 8), "hf.safetensors", "pail"),
    "page": (start_with(b"<!doctype html>"), "hf.safetensors", "web page"),
    "pointer": (start_with(b"version https://git-lfs.github.com"),
                "hf.safetensors", "git lfs pull"),
    "no json": (start_with(b"\x40" + b"\0" * 7 + b"{"),
                "hf.safetensors", "pail"),
    "a list": (header(lambda told, name: [1, 2]), "hf.safetensors", "pail"),
    "shape": (entry(shape=[3, 5]), "hf.safetensors", "pail"),
    "negative": (entry(shape=[-4, -4]), "hf.safetensors", "pail"),
    "no shape": (entry(shape=None), "hf.safetensors", "pail"),
    "offsets": (entry(data_offsets=[4, 8]), "hf.safetensors", "pail"),
    "fraction": (header(lambda told, name: told | {name: told[name] | {
        "data_offsets": [float(x) for x in told[name]["data_offsets"]]}}),
                 "hf.safetensors", "pail"),
    "deep": (lambda p: first_shard(p).write_bytes(
        (200_000).to_bytes(8, "little") + b"[" * 200_000), "hf.safetensors",
             "pail"),
    "overlap": (overlap, "hf.safetensors", "pail"),
    "dtype": (entry(dtype="I8"), "hf.dtype", "I8"),
    "a lost file": (lambda p: first_shard(p).unlink(), "hf.shard_missing",
                    "pail"),
    "pickles": (only_pickle, "hf.unsafe_format", "pytorch_model.bin"),
    "nothing": (empty, "hf.path", URL),
    "no config": (lambda p: (p / "config.json").unlink(), "hf.config",
                  "config.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_the_store_is_named(place, name):
  change, slug, word = DAMAGE[name]
  change(place)
  with pytest.raises(errors.ModelDirError) as caught:
    load()
  assert caught.value.slug == slug and word in str(caught.value)


@pytest.mark.parametrize("change, slug, named", [
    row[1:] for row in ROWS if row[2] != "hf.unsafe_path"])
def test_what_spoils_a_folder_spoils_a_place_in_a_store(
    place, change, slug, named):
  change(place)
  with pytest.raises(errors.ModelDirError) as caught:
    load()
  assert caught.value.slug == slug and named in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "in/ner"])
def test_an_index_in_a_store_leads_nowhere_else(place, name):
  index_is(lambda weights: weights.update({EMBEDDING: name}))(place)
  with pytest.raises(errors.ModelDirError) as caught:
    load()
  assert caught.value.slug == "hf.unsafe_path"


def test_adapters_too(place, tmp_path):
  params = make_params()
  adapters = lora.init_adapters(
      jax.random.key(1), params, rank=3, targets=("q_proj", "down_proj"))
  peft.save_adapters(place.parent / "two", lora.join(params, lora.join(
      adapters, lora.scales(adapters, 2.0))), CONFIG, base="one")
  want = load_adapters(place.parent / "two")
  equal(load_adapters(hf.resolve_model("pail://models/two")), want)
  (place.parent / "two" / commit.MANIFEST).unlink()
  weights = place.parent / "two" / peft.WEIGHTS
  weights.write_bytes(weights.read_bytes()[:-1])
  with pytest.raises(errors.ModelDirError) as caught:
    load_adapters(hf.resolve_model("pail://models/two"))
  assert caught.value.slug == "hf.safetensors"
  assert caught.value.where == f"pail://models/two/{peft.WEIGHTS}"


def test_an_object_that_changes_between_its_header_and_its_slices(
    place, monkeypatch):
  opened = []
  check = hf._check_tensors

  def replace(*args):
    check(*args)
    path = first_shard(place)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # as long as before
    path.write_bytes(content)
    os.utime(path, (1, 1))
    opened.append(path.name)

  monkeypatch.setattr(hf, "_check_tensors", replace)
  with pytest.raises(errors.ModelDirError) as caught:
    load()
  assert caught.value.slug == "hf.changed"
  assert caught.value.where == f"{URL}/{opened[0]}"


def test_an_object_that_is_cut_after_its_header(place, monkeypatch):
  check = hf._check_tensors
  monkeypatch.setattr(
      hf, "_check_tensors", lambda *args: (check(*args), cut(place)))
  with pytest.raises(errors.ModelDirError) as caught:
    load()
  assert caught.value.slug == "hf.safetensors"
  assert "ends too early" in str(caught.value)


def test_a_run_keeps_to_the_model_that_it_began_with(place):
  known = hf.resolve_model(URL).name
  assert hf.resolve_model(URL, known).name == known
  os.utime(first_shard(place), (1, 1))
  with pytest.raises(errors.ModelDirError) as caught:
    hf.resolve_model(URL, known)
  assert caught.value.slug == "hf.changed" and caught.value.where == URL
  assert hf.resolve_model(URL).name != known


def test_sizes_are_those_of_our_manifest(place, tmp_path):
  shutil.rmtree(place)
  hf.save_params(place, make_params(), CONFIG,
                 tokenizer_dir=tmp_path / "none", max_shard_bytes=3_000)
  folder = hf.resolve_model(URL)
  equal(hf.load_params(folder, hf.load_config(folder)), make_params())
  (place / "README.md").write_text("is for its owner to write")
  hf.resolve_model(URL)
  config = (place / "config.json").read_bytes()
  (place / "config.json").write_bytes(config.replace(b"16", b"17"))
  with pytest.raises(errors.CheckpointError) as caught:
    hf.resolve_model(URL)
  assert caught.value.slug == "ckpt.hash"
  (place / "config.json").write_bytes(config)
  cut(place)
  with pytest.raises(errors.CheckpointError) as caught:
    hf.resolve_model(URL)
  assert caught.value.slug == "ckpt.missing_data"
  assert caught.value.where == f"{URL}/{first_shard(place).name}"
  assert not [p for p in (tmp_path / "cache/models").iterdir()
              if p.name.startswith(".")]


def test_what_the_store_says_is_told(place, monkeypatch):

  def refuse(*args, **kwargs):
    raise PermissionError("403: not yours")

  monkeypatch.setattr(disk_bucket.Bucket, "cat_file", refuse)
  with pytest.raises(errors.ResourceError) as caught:
    load()
  assert caught.value.slug == "ckpt.store"
  assert caught.value.got == "PermissionError" and "403" in str(caught.value)
  with pytest.raises(errors.ResourceError) as caught:
    hf.resolve_model("nowhere://models/one")
  assert caught.value.slug == "ckpt.store" and "s3fs" in caught.value.hint
