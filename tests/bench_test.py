"""The benchmarks' entry on a small model: every part runs, nothing is
compiled in the timed part."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import bench
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf

VOCAB = 24


@pytest.fixture(scope="module")
def fixture(tmp_path_factory):
  """A folder of weights and a file of sets."""
  folder = tmp_path_factory.mktemp("fixture")
  config = config_lib.ModelConfig(
      family="llama", vocab_size=VOCAB, hidden_size=16, num_layers=2,
      num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
      max_positions=1024)
  params = decoder.init_params(jax.random.key(0), config)
  hf.save_params(folder / "model", params, config)
  rng = np.random.default_rng(1)
  ids = lambda size: rng.integers(0, VOCAB, size).tolist()
  with open(folder / "data.jsonl", "w") as file:
    for row in range(6):
      file.write(json.dumps({
          "prompt_ids": ids(5 + row), "chosen_ids": ids(4),
          "candidates_ids": [ids(3 + k) for k in range(3)]}) + "\n")
  return folder


@pytest.mark.parametrize("what", ["score", "mcpo"])
def test_a_benchmark_ends_in_one_json_line(fixture, monkeypatch, capsys, what):
  flags = ["--batch=2", "--steps=3", "--warmup=1", "--candidates=3",
           "--config", "data.stream_length=1024", "--config",
           "data.num_streams=8"]
  monkeypatch.setattr(sys, "argv", [
      "bench.py", what, f"--model={fixture / 'model'}",
      f"--data={fixture / 'data.jsonl'}", *flags])
  bench.main()
  line = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert line["what"] == what
  assert line["rows_per_cpu_s"] > 0
  assert line["ideal_gflops_per_cpu_s"] > 0
  assert line["recompiles"] == 0
  assert 1 <= line["shapes"] <= 4
  assert len(line["first"]) == 4
  assert max(line["first"]) < 0
