"""A run whose model and data lie in an object store: real command lines,
against the same run from folders."""

import math
import shutil

import jax
import pytest
import run_cases
import safetensors.numpy
from disks_test import finish, said, start

from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf, shards

FLAGS = [
    "--config.stages=sft", "--config.sft.num_steps=2",
    "--config.data.eval_fraction=0.0", "--config.data.num_streams=4",
    "--config.checkpoint.every_steps=1", "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
]


def make_model(folder):
  """A folder with random weights in two files and a tokenizer."""
  tokenizer_lib.train_tokenizer(
      [f"the {thing} is {colour}" for thing in run_cases.THINGS
       for colour in run_cases.COLOURS], vocab_size=300,
      out_dir=folder / "tokenizer")
  tokenizer = tokenizer_lib.load_tokenizer(folder / "tokenizer")
  config = config_lib.from_hf({
      "model_type": "qwen2", "vocab_size": 304, "hidden_size": 24,
      "intermediate_size": 40, "num_hidden_layers": 3,
      "num_attention_heads": 4, "num_key_value_heads": 2,
      "max_position_embeddings": 256, "bos_token_id": tokenizer.bos_id,
      "eos_token_id": list(tokenizer.stop_ids),
      "pad_token_id": tokenizer.pad_id})
  hf.save_params(
      folder / "model", decoder.init_params(jax.random.key(1), config), config,
      tokenizer_dir=folder / "tokenizer", max_shard_bytes=50_000)


def test_two_processes_read_half_of_a_model_each_and_no_run_differs(tmp_path):
  make_model(tmp_path)
  data, model = run_cases.write_data(tmp_path / "data"), tmp_path / "model"
  one, two = tmp_path / "one", tmp_path / "two"
  alone = start(
      one, [*data, *FLAGS, f"--config.model.path={model}"], processes=1,
      devices=2)
  shutil.copytree(model, two / "bucket/models/one")
  shutil.copytree(tmp_path / "data", two / "bucket/data")
  both = start(
      two, [*FLAGS, "--config.model.path=pail://models/one",
            "--config.data.path=pail://data/kwise.jsonl",
            "--config.sft.data_path=pail://data/s*.jsonl",
            "--config.checkpoint.mirror=pail://run"])
  finish(one, alone, 0)
  finish(two, both, 0)
  weights = [safetensors.numpy.load_file(x / "sft/model/model.safetensors")
             for x in (one / "0", two / "0", two / "1")]
  for name, array in weights[0].items():
    for other in weights[1:]:
      assert (other[name] == array).all(), name
  shapes = shards.Shards(model).shapes.values()
  files = sorted(path.name for path in model.glob("*.safetensors"))
  assert len(files) > 2 and not list(two.glob("?/cache/**/model-*.safetensors"))
  headers = sum(8 + int.from_bytes((model / x).read_bytes()[:8], "little")
                for x in files)
  split = [4 * math.prod(x) for x in shapes if len(x) == 2]
  whole = [4 * math.prod(x) for x in shapes if len(x) == 1]
  for i in range(2):
    lines = (two / f"{i}.reads").read_text().splitlines()
    read = [int(line.split()[1]) for line in lines if line.split()[0] in files]
    # Twice: for the hash of the start, and to train.
    assert sum(read) == 2 * (sum(split) // 2 + sum(whole) + headers)
    assert [x for x in lines if "sft.jsonl" in x] == [
        f"sft.jsonl {(tmp_path / 'data/sft.jsonl').stat().st_size}"]


@pytest.mark.nightly
def test_what_one_process_finds_in_its_rows_ends_both(tmp_path):
  make_model(tmp_path)
  two = tmp_path / "two"
  model = shutil.copytree(tmp_path / "model", two / "bucket/models/one")
  (model / "manifest.json").unlink()  # as from elsewhere
  name = "model.layers.1.mlp.up_proj.weight"
  path, = (x for x in model.glob("*.safetensors")
           if name in safetensors.numpy.load_file(x))
  tensors = safetensors.numpy.load_file(path)
  tensors[name][-1, 3] = float("nan")
  safetensors.numpy.save_file(tensors, path)
  both = start(two, [
      *run_cases.write_data(tmp_path / "data"), *FLAGS,
      "--config.model.path=pail://models/one",
      "--config.checkpoint.mirror=pail://run"])
  finish(two, both, 4)
  for i in range(2):
    assert "error[hf.non_finite]" in said(two, i)
    assert f"pail://models/one/{path.name}: {name}" in said(two, i)
  assert not list(two.glob("?/sft/model"))
