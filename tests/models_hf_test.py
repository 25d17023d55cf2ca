"""Hugging Face folders without torch: in and out, whole or not at all."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import tracemalloc

import huggingface_hub
import huggingface_hub.errors as hub_errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models_folders import (
  CONFIG,
  EMBEDDING,
  config_is,
  edit_json,
  edit_weights,
  export,
  first_shard,
  load,
  make_params,
  weights_of,
)

from mcpo_jax import errors, sharding
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf, shards


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  return export(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def folder(exported, tmp_path):
  return pathlib.Path(shutil.copytree(exported, tmp_path / "model"))


# --- round trips --------------------------------------------------------------


def test_an_export_holds_what_readers_look_for(exported):
  index = json.loads((exported / shards.INDEX).read_text())
  tensors = weights_of(exported)
  assert len(set(index["weight_map"].values())) > 2
  assert set(index["weight_map"]) == set(tensors)
  assert index["metadata"]["total_size"] == sum(
      x.nbytes for x in tensors.values()
  )
  config = json.loads((exported / "config.json").read_text())
  assert config["torch_dtype"] == "float32"
  assert config["architectures"] == ["Qwen2ForCausalLM"]
  generation = json.loads((exported / "generation_config.json").read_text())
  assert generation == dict(bos_token_id=1, eos_token_id=[2, 5, 9],
                            pad_token_id=0)
  assert (exported / "chat_template.jinja").read_text() == "{{ messages }}"
  assert (exported / "tokenizer.json").exists()
  assert not (exported / "secret.py").exists()
  card = (exported / "README.md").read_text()
  assert card.startswith("---\nlibrary_name: transformers\n")
  assert "Trained in a test." in card
  hf.check_tokenizer(exported, hf.load_config(exported))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_import_then_export_gives_the_same_bytes(dtype, tmp_path):
  params = make_params(dtype=dtype)
  hf.save_params(tmp_path / "a", params, CONFIG)
  again = hf.load_params(tmp_path / "a", hf.load_config(tmp_path / "a"),
                         dtype=dtype)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  hf.save_params(tmp_path / "b", again, CONFIG)
  one, two = (tmp_path / x / shards.SINGLE for x in "ab")
  assert one.read_bytes() == two.read_bytes()
  name = "model.layers.1.mlp.down_proj.weight"
  kernel = params["layers"]["mlp"]["down_proj"]["kernel"][1]
  np.testing.assert_array_equal(weights_of(tmp_path / "a")[name].T, kernel)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_weights_go_straight_into_their_shards(folder):
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  shardings = sharding.infer_shardings(
      decoder.param_shapes(CONFIG), decoder.PARAM_RULES, mesh
  )
  params = hf.load_params(folder, CONFIG, shardings=shardings)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
  kernel = params["layers"]["attention"]["q_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 4, 12)
  jax.tree.map(np.testing.assert_array_equal, params, make_params())
  assert hf.params_sha256(params) == hf.params_sha256(make_params())
  hf.save_params(folder / "again", params, CONFIG, max_shard_bytes=3_000)
  for path in folder.glob("*.safetensors"):
    assert path.read_bytes() == (folder / "again" / path.name).read_bytes()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("alone, data, fsdp, context, dtype", [
    (True, 2, 2, 1, "float32"),
    (False, 2, 2, 1, "float32"),  # as if each device were a process
    (False, 1, 2, 2, "bfloat16"),
    (False, 1, 8, 1, "float32"),
])
def test_every_row_is_read_once_and_by_one_device(
    folder, monkeypatch, alone, data, fsdp, context, dtype):
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, context=context, tensor=-1)
  shardings = sharding.infer_shardings(
      decoder.param_shapes(CONFIG), decoder.PARAM_RULES, mesh
  )
  read, seen = shards.Shards.read, {}

  def note(self, name, index):
    array = read(self, name, index)
    rows, = index
    seen.setdefault(name, []).append(range(rows.start, rows.stop))
    return array

  monkeypatch.setattr(shards.Shards, "read", note)
  monkeypatch.setattr(hf, "_alone", lambda placed: alone)
  params = hf.load_params(folder, CONFIG, shardings=shardings, dtype=dtype)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
  jax.tree.map(np.testing.assert_array_equal, params, make_params(dtype))
  for name, shape in shards.Shards(folder).shapes.items():
    read_rows = sorted(row for rows in seen[name] for row in rows)
    assert read_rows == list(range(shape[0]))
    if not alone and len(shape) == 2:  # no device has many more than its share
      assert max(map(len, seen[name])) <= shape[0] // 8 + 1


def test_a_file_is_never_whole_in_memory(tmp_path):
  config = dataclasses.replace(CONFIG, vocab_size=256, hidden_size=128,
                               intermediate_size=512, num_layers=24)
  params = jax.tree.map(
      lambda x: jnp.ones(x.shape, x.dtype), decoder.param_shapes(config)
  )
  sizes = [x.nbytes for x in jax.tree.leaves(params)]
  work = lambda: hf.save_params(tmp_path / "model", params, config)
  work()  # compiles
  tracemalloc.start()
  work()
  assert tracemalloc.get_traced_memory()[1] < sum(sizes) / 4
  tracemalloc.stop()


def test_the_hash_of_the_weights_sees_every_bit():
  params = make_params()
  seen = {hf.params_sha256(params)}
  flipped = jax.tree.map(lambda x: x, params)
  scale = np.array(flipped["final_norm"]["scale"])
  scale.view(np.uint32)[3] ^= 1
  flipped["final_norm"]["scale"] = scale
  seen.add(hf.params_sha256(flipped))
  renamed = dict(params, other_norm=params["final_norm"])
  del renamed["final_norm"]
  seen.add(hf.params_sha256(renamed))
  seen.add(hf.params_sha256(jax.tree.map(lambda x: x.view(jnp.int32), params)))
  seen.add(hf.params_sha256(dict(params, lm_head={
      "kernel": params["lm_head"]["kernel"].reshape(24, 16)})))
  assert len(seen) == 5
  same = {name: params[name] for name in reversed(params)}
  assert hf.params_sha256(same) in seen


@pytest.mark.parametrize("fault", ["killed", "wrong bytes"])
def test_h15_a_failed_export_leaves_the_old_one(fault, folder, monkeypatch):
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  write, calls = hf.write_file, []

  def write_two(path, shapes, dtype, tensors):
    calls.append(path)
    if fault == "killed" and len(calls) == 3:
      raise KeyboardInterrupt
    write(path, shapes, dtype, tensors)

  @contextlib.contextmanager
  def open_wrong(path, framework):
    with open(path, "r+b") as file:  # the last bit of the last tensor
      file.seek(-1, os.SEEK_END)
      last = file.read(1)[0]
      file.seek(-1, os.SEEK_END)
      file.write(bytes([last ^ 1]))
    with open_file(path, framework=framework) as file:
      yield file

  open_file = safetensors.safe_open
  monkeypatch.setattr(hf, "write_file", write_two)
  if fault == "wrong bytes":
    monkeypatch.setattr(safetensors, "safe_open", open_wrong)
  with pytest.raises((KeyboardInterrupt, errors.ModelDirError)) as caught:
    hf.save_params(folder, make_params(), CONFIG, max_shard_bytes=3_000)
  if fault == "wrong bytes":
    assert caught.value.slug == "hf.export"
  assert calls
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("family", config_lib.FAMILIES)
def test_config_survives_writing_and_reading(family):
  raw = dict(
      model_type=family, vocab_size=31, hidden_size=16, intermediate_size=24,
      num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2,
      head_dim=6, rope_theta=5e5, sliding_window=9, use_sliding_window=True,
      max_window_layers=3, eos_token_id=[3, 4], rms_norm_eps=1e-4,
      query_pre_attn_scalar=32, final_logit_softcapping=20.0,
  )
  if family == "llama":
    del raw["sliding_window"], raw["query_pre_attn_scalar"]
    del raw["use_sliding_window"], raw["max_window_layers"]
    del raw["final_logit_softcapping"]
    raw["rope_scaling"] = dict(type="linear", factor=2.0)
  known = config_lib._KEYS["all"] | config_lib._KEYS[family]
  raw = {
      key: value for key, value in raw.items()
      if key in known or not config_lib._FEATURE.search(key)
  }
  config = config_lib.from_hf(raw)
  written = config_lib.to_hf(config)
  assert config_lib.from_hf(json.loads(json.dumps(written))) == config
  assert hash(config) == hash(dataclasses.replace(config))
  windows = dict(
      llama=0, mistral=7, qwen2=4, qwen3=4, gemma2=4, gemma3_text=6
  )
  assert sum(w == 9 for w in config.windows) == windows[family]


def test_h14_generation_config_gives_way_with_a_warning(folder, caplog):
  edit_json(folder / "generation_config.json", eos_token_id=[7])
  with caplog.at_level(logging.WARNING):
    assert hf.load_config(folder).eos_token_ids == (2, 5)
  assert "eos_token_id" in caplog.text
  edit_json(folder / "config.json", eos_token_id=None)
  assert hf.load_config(folder).eos_token_ids == (7,)


# --- bad folders --------------------------------------------------------------


def test_pointer_and_web_page_get_their_own_hint(folder):
  for start, hint in ((b"version https://git-lfs", "git lfs pull"),
                      (b"<html>", "web page")):
    first_shard(folder).write_bytes(start + b" " * 90)
    with pytest.raises(errors.ModelDirError, match=hint):
      load(folder)


def test_harmless_extras_are_taken(folder):
  config_is(
      auto_map={"AutoModel": "code.Model"}, use_cache=True, mlp_bias=False,
      transformers_version="4.1", rope_scaling=None, sliding_window=4096,
  )(folder)
  (folder / "code.py").write_text("raise SystemExit")
  edit_weights(folder, lambda t: t.update(
      {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, "f4")}))
  jax.tree.map(np.testing.assert_array_equal, load(folder), make_params())


def test_a_tied_head_that_is_stored_too_may_be_equal(folder):
  edit_weights(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING]}))
  config_is(tie_word_embeddings=True)(folder)
  assert "lm_head" not in load(folder)


# --- the hub ------------------------------------------------------------------


def answer(status, **headers):
  """The real exception that the library makes of an answer of the hub."""
  import huggingface_hub.utils._http as http

  client = http.httpx2 if hasattr(http, "httpx2") else http.httpx
  url = "https://huggingface.co/api/models/owner/name"
  response = client.Response(
      status, headers=headers, request=client.Request("GET", url)
  )
  with pytest.raises(hub_errors.HfHubHTTPError) as caught:
    huggingface_hub.utils.hf_raise_for_status(response)
  return caught.value


HUB = [
    (lambda: answer(403, **{"X-Error-Code": "GatedRepo"}), "hf.gated",
     "https://huggingface.co/owner/name"),
    (lambda: answer(401), "hf.unauthorised",
     "https://huggingface.co/settings/tokens"),
    (lambda: answer(403), "hf.unauthorised",
     "https://huggingface.co/settings/tokens"),
    (lambda: answer(404, **{"X-Error-Code": "RepoNotFound"}), "hf.missing",
     "https://huggingface.co/owner/name"),
    (lambda: answer(404, **{"X-Error-Code": "RevisionNotFound"}),
     "hf.revision", "https://huggingface.co/owner/name/commits"),
    (lambda: answer(500), "hf.hub", "https://huggingface.co/owner/name"),
    (lambda: hub_errors.OfflineModeIsEnabled("off"), "hf.hub", "owner/name"),
    (lambda: ConnectionError("no route"), "hf.hub", "owner/name"),
]


@pytest.mark.parametrize("make_error, slug, page", HUB,
                         ids=[f"{i}-{row[1]}" for i, row in enumerate(HUB)])
def test_a_refusal_of_the_hub_names_the_page_to_visit(
    make_error, slug, page, monkeypatch
):
  def refuse(*args, **kwargs):
    raise make_error()

  def not_cached(*args, **kwargs):
    raise hub_errors.LocalEntryNotFoundError("not there")

  monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
  with pytest.raises(errors.ModelDirError) as caught:
    hf.resolve_model("owner/name")
  assert caught.value.slug == slug
  assert page in caught.value.hint


def test_a_hub_name_becomes_a_folder_of_one_commit(
    folder, tmp_path, monkeypatch
):
  commit = "0123456789abcdef0123456789abcdef01234567"
  asked = []

  def repo_info(self, name, *, revision, timeout):
    asked.append((name, revision))
    return huggingface_hub.ModelInfo(
        id=name, sha=commit, private=False, downloads=0, likes=0, tags=[]
    )

  def snapshot_download(name, *, revision, allow_patterns):
    asked.append((name, revision))
    # as in the hub's cache: a folder of links to blobs
    base = tmp_path / "models--owner--name"
    target, blobs = base / "snapshots" / revision, base / "blobs"
    target.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
      shutil.copy(path, blobs / path.name)
      (target / path.name).symlink_to(f"../../blobs/{path.name}")
    return str(target)

  monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  found = hf.resolve_model("owner/name", "main")
  assert asked == [("owner/name", "main"), ("owner/name", commit)]
  assert found.name == commit
  jax.tree.map(np.testing.assert_array_equal, load(found), make_params())


def test_a_folder_is_itself_and_a_lost_one_is_named(folder):
  assert hf.resolve_model(str(folder)) == folder
  with pytest.raises(errors.ModelDirError) as caught:
    hf.resolve_model(str(folder / "nowhere"))
  assert caught.value.slug == "hf.path"
