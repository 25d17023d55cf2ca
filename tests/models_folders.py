"""A folder of a model, and ways to spoil it: the H rows of bad inputs."""

import functools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import models_streams
import numpy as np
import safetensors.numpy

from mcpo_jax import commit, errors, sharding
from mcpo_jax.models import hf, lora, peft, shards
from mcpo_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
    bos_token_id=1,
    eos_token_ids=(2, 5),
    pad_token_id=0,
)


def make_params(dtype=jnp.float32):
  params = models_streams.random_params(CONFIG)
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def export(base: pathlib.Path) -> pathlib.Path:
  """An export in several files, with a tokenizer, under base."""
  tokenizer = base / "tokenizer"
  tokenizer.mkdir()
  vocab = {f"t{i}": i for i in range(20)}
  (tokenizer / "tokenizer.json").write_text(
      json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"id": 20}]})
  )
  (tokenizer / "tokenizer_config.json").write_text("{}")
  (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
  (tokenizer / "secret.py").write_text("raise SystemExit")
  hf.save_params(
      base / "model", make_params(), CONFIG, tokenizer_dir=tokenizer,
      stop_ids=(5, 9), card="Trained in a test.", max_shard_bytes=3_000,
  )
  # As from elsewhere: one of ours is hashed before anything is read.
  (base / "model" / commit.MANIFEST).unlink()
  return base / "model"


def weights_of(folder):
  return {
      name: array
      for path in sorted(folder.glob("*.safetensors"))
      for name, array in safetensors.numpy.load_file(path).items()
  }


def edit_json(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
  """One file without an index, after change(tensors)."""
  tensors = weights_of(folder)
  for path in folder.glob("model*.safetensors*"):
    path.unlink()
  change(tensors)
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, folder / shards.SINGLE)


def load(folder):
  config = hf.load_config(folder)
  hf.check_tokenizer(folder, config)
  return hf.load_params(folder, config)


def config_is(**changes):
  return lambda folder: edit_json(folder / "config.json", **changes)


def first_shard(folder):
  return min(folder.glob("*.safetensors"))


def shard_is(make):
  def change(folder):
    path = first_shard(folder)
    path.write_bytes(make(path.read_bytes()))

  return change


def index_is(change):
  def edit(folder):
    path = folder / shards.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))

  return edit


def swap_files(weights):
  (a, x), *_, (b, y) = weights.items()
  weights[a], weights[b] = y, x


def outward_link(folder):
  path = first_shard(folder)
  target = folder.parent / path.name
  path.rename(target)
  path.symlink_to(target)


def only_pickle(folder):
  edit_weights(folder, lambda tensors: None)
  (folder / shards.SINGLE).rename(folder / "pytorch_model.bin")


def drop(name):
  return lambda folder: edit_weights(folder, lambda t: t.pop(name))


def put(name, make):
  def change(tensors):
    tensors[name] = make(tensors.get(name))

  return lambda folder: edit_weights(folder, change)


def nan_at(x):
  x = x.copy()
  x.flat[5] = np.nan
  return x


def tokens(**changes):
  return lambda folder: edit_json(folder / "tokenizer.json", **changes)


UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
FP8 = lambda x: x.astype(ml_dtypes.float8_e4m3fn)
ROWS = [
    ("H1", lambda f: (f / "config.json").unlink(), "hf.config", "config.json"),
    ("H1", lambda f: (f / "config.json").write_text("{"), "hf.config", ""),
    ("H1", lambda f: (f / "config.json").write_text("[]"), "hf.config", ""),
    ("H1", config_is(model_type="bert"), "hf.config", ""),
    ("H1", config_is(hidden_size=None), "hf.config", ""),
    ("H2", lambda f: first_shard(f).unlink(), "hf.shard_missing", "model-0"),
    ("H2", index_is(lambda w: w.update({EMBEDDING: "x" * 300})),
     "hf.shard_missing", "xxx"),
    ("H2", index_is(lambda w: w.pop(EMBEDDING)), "hf.index", EMBEDDING),
    ("H2", index_is(swap_files), "hf.index", "model-0"),
    ("H2", index_is(lambda w: w.update(x=w[UP])), "hf.index", "x"),
    ("H3", shard_is(lambda b: b[:-3]), "hf.safetensors", "model-00001"),
    ("H3", shard_is(lambda b: b""), "hf.safetensors", "model-00001"),
    ("H3", shard_is(lambda b: b"1234567"), "hf.safetensors", "model-00001"),
    ("H3", shard_is(lambda b: (2**62).to_bytes(8, "little") + b),
     "hf.safetensors", "model-00001"),
    ("H3", shard_is(lambda b: b + b"junk"), "hf.safetensors", "model-00001"),
    ("H3", shard_is(lambda b: b"<!DOCTYPE html>" + b), "hf.safetensors",
     "model-00001"),
    ("H3", shard_is(lambda b: b"version https://git-lfs.github.com/spec/v1\n"),
     "hf.safetensors", "model-00001"),
    ("H4", only_pickle, "hf.unsafe_format", ""),
    ("H5", config_is(model_type="own", auto_map={"AutoConfig": "a.B"}),
     "hf.remote_code", ""),
    ("H6", put(UP, np.transpose), "hf.tensor", UP),
    ("H6", drop(UP), "hf.tensor", UP),
    ("H6", put("model.layers.1.mlp.up_proj.bias", lambda _: np.zeros(8, "f4")),
     "hf.tensor", "up_proj.bias"),
    ("H6", drop("lm_head.weight"), "hf.tensor", "lm_head.weight"),
    ("H7", config_is(tie_word_embeddings=True), "hf.tied", "lm_head.weight"),
    ("H8", config_is(vocab_size=25), "hf.vocab", EMBEDDING),
    ("H8", tokens(added_tokens=[{"id": 24}]), "hf.vocab", "tokenizer.json"),
    ("H9", put(UP, nan_at), "hf.non_finite", UP),
    ("H9", put(UP, FP8), "hf.dtype", UP),
    ("H9", config_is(quantization_config={"quant_method": "fp8"}), "hf.dtype",
     "quantization_config"),
    ("H10", config_is(rope_scaling=dict(rope_type="yarn", factor=4.0)),
     "hf.feature", "rope_type"),
    ("H10", config_is(rope_scaling=dict(type="dynamic", factor=4.0)),
     "hf.feature", "rope_type"),
    ("H10", config_is(rope_scaling=dict(rope_type="llama3", factor=4.0)),
     "hf.feature", "llama3"),
    ("H10", config_is(attn_logit_softcapping=30.0), "hf.feature",
     "attn_logit_softcapping"),
    ("H10", config_is(attention_bias=True), "hf.feature", "attention_bias"),
    ("H10", config_is(layer_types=["chunked_attention"] * 3), "hf.feature",
     "layer_types"),
    ("H10", config_is(attention_dropout=0.1), "hf.feature",
     "attention_dropout"),
    ("H10", config_is(hidden_act="relu2"), "hf.feature", "hidden_act"),
    ("H10", config_is(partial_rotary_factor=0.5), "hf.feature",
     "partial_rotary_factor"),
    ("H11", lambda f: (f / "tokenizer.json").unlink(), "hf.tokenizer", ""),
    ("H11", tokens(model={}), "hf.tokenizer", ""),
    ("H11", config_is(eos_token_id=22), "hf.tokenizer", "config.json"),
    ("H11", lambda f: (config_is(eos_token_id=None)(f),
                       (f / "generation_config.json").unlink()),
     "hf.tokenizer", "config.json"),
    ("H17", index_is(lambda w: w.update({UP: "../" + w[UP]})),
     "hf.unsafe_path", ""),
    ("H17", index_is(lambda w: w.update({UP: "/etc/passwd"})),
     "hf.unsafe_path", ""),
    ("H17", outward_link, "hf.unsafe_path", ""),
]


# Adapters of a model in PEFT's format.
Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.weight"


def load_adapters(folder):
  mesh = sharding.make_mesh(
      data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  return peft.Adapters(folder).load(CONFIG, mesh, dtype=jnp.float32)


def adapters_are(**changes):
  return lambda folder: edit_json(folder / peft.CONFIG, **changes)


def edit_adapters(change):
  def edit(folder):
    path = folder / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)

  return edit


ADAPTER_ROWS = [
    ("A5", lambda f: (f / peft.CONFIG).unlink(), "peft.config", peft.CONFIG),
    ("A5", adapters_are(r=0), "peft.config", peft.CONFIG),
    ("A5", adapters_are(r="4"), "peft.config", peft.CONFIG),
    ("A5", adapters_are(lora_alpha=None), "peft.config", peft.CONFIG),
    ("A5", adapters_are(target_modules=[]), "peft.config", peft.CONFIG),
    ("A5", adapters_are(target_modules=["c_attn"]), "peft.config",
     peft.CONFIG),
    ("A5", adapters_are(target_modules="q_.*"), "peft.config", peft.CONFIG),
    ("A6", adapters_are(peft_type="IA3"), "peft.feature", peft.CONFIG),
    ("A6", adapters_are(use_dora=True), "peft.feature", peft.CONFIG),
    ("A6", adapters_are(new_kind_of_adapter=3), "peft.feature", peft.CONFIG),
    ("A7", adapters_are(r=4), "peft.tensor", "layers.0.self_attn.q_proj"),
    ("A7", adapters_are(target_modules=["q_proj", "o_proj"]), "peft.tensor",
     "o_proj"),
    ("A7", edit_adapters(lambda t: t.pop(Q.format("A"))), "peft.tensor",
     Q.format("A")),
    ("A7", edit_adapters(lambda t: t.update(
        {Q.format("B"): t[Q.format("B")].T.copy()})), "peft.tensor",
     Q.format("B")),
    ("A7", edit_adapters(lambda t: t.update(x=np.ones(2))), "peft.tensor",
     "x"),
    ("A8", edit_adapters(lambda t: t.update(
        {Q.format("B"): nan_at(t[Q.format("B")])})), "hf.non_finite",
     Q.format("B")),
    ("A8", lambda f: (f / peft.WEIGHTS).unlink(), "hf.shard_missing",
     peft.WEIGHTS),
    ("A8", lambda f: (f / peft.WEIGHTS).rename(f / "adapter_model.bin"),
     "hf.unsafe_format", ""),
]


@functools.cache
def _kept_adapters() -> pathlib.Path:
  params = make_params()
  adapters = lora.init_adapters(
      jax.random.key(0), params, rank=3, targets=("q_proj",))
  folder = pathlib.Path(tempfile.mkdtemp(prefix="adapters")) / "model"
  peft.save_adapters(
      folder, lora.join(params, lora.join(adapters, lora.scales(adapters, 2))),
      CONFIG, base="owner/base")
  (folder / commit.MANIFEST).unlink()  # as from elsewhere
  return folder


@functools.cache
def _kept() -> pathlib.Path:
  return export(pathlib.Path(tempfile.mkdtemp(prefix="models_folders")))


def cases(case):
  """The rows as `case(id, make, error, slug, where, exit code)`."""

  def make_of(spoil, kept, load):
    def make(base):
      folder = pathlib.Path(shutil.copytree(kept(), base / "model"))
      spoil(folder)
      return lambda: load(folder)

    return make

  return [
      case(f"{name} {i}", make_of(spoil, kept, how), errors.ModelDirError,
           slug, where, 4)
      for rows, kept, how in ((ROWS, _kept, load),
                              (ADAPTER_ROWS, _kept_adapters, load_adapters))
      for i, (name, spoil, slug, where) in enumerate(rows)
  ]
