"""LoRA by the command line: a run with its exports, a round that goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_cases

from mcpo_jax import sharding
from mcpo_jax.models import hf, lora, peft
from mcpo_jax.training import rounds as rounds_lib


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of adapters on what sft ended with, against their own base."""
  folder = tmp_path_factory.mktemp("lora")
  data = run_cases.write_data(folder / "data")
  done = run_cases.run(
      "train", folder / "run", folder / "cache", *data,
      "--config.stages=sft,preference,export", "--config.lora.rank=3",
      "--config.lora.alpha=4.5", "--config.lora.targets=q_proj,down_proj",
      "--config.reference.source=lora_base",
      "--config.optimizer.learning_rate=5e-2", "--config.data.eval_fraction=0",
      "--config.num_steps=4")
  assert done.returncode == 0, done.stderr[-3000:]
  return folder, data, done.stderr


def rows_of(run):
  return {row["step"]: row for row in run_cases.metrics(run)
          if row["stage"] == "preference" and "loss" in row}


def load(folder):
  config = hf.load_config(folder)
  return config, hf.load_params(folder, config)


def test_a_run_begins_at_its_reference_and_exports_both_forms(trained):
  folder, _, log = trained
  # 2 layers of width 16, down_proj from 24.
  assert f"LoRA: {2 * 3 * (16 + 16 + 24 + 16)} weights are trained" in log
  rows = rows_of(folder / "run")
  assert abs(rows[1]["loss"] - np.log(2)) < 1e-5
  assert max(abs(row["loss"] - np.log(2)) for row in rows.values()) > 1e-3
  export = folder / "run" / "export"
  config, base = load(folder / "run" / "sft" / "model")
  one = sharding.make_mesh(
      data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  adapters = peft.Adapters(export / "adapter").load(
      config, one, dtype=jnp.float32)
  scale = adapters["layers"]["mlp"]["down_proj"]["lora_scale"]
  np.testing.assert_allclose(scale, [1.5, 1.5])
  want = lora.merge(lora.join(base, adapters))
  _, got = load(export)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
  assert run_cases.summary(folder / "run")["params/sha256"] == (
      hf.params_sha256(got))


def test_rounds_go_on_from_adapters_and_sample_from_what_is_trained(trained):
  folder, data, _ = trained
  run = folder / "online"
  done = run_cases.run(
      "train", run, folder / "cache", *data, "--config.stages=preference",
      f"--config.model.path={folder / 'run' / 'sft' / 'model'}",
      f"--config.model.adapter_path={folder / 'run' / 'export' / 'adapter'}",
      "--config.reference.source=lora_base", "--config.online.enabled=True",
      "--config.online.prompts_per_round=10", "--config.num_steps=4",
      "--config.online.num_candidates=4", "--config.online.policy_lag=1",
      "--config.reward.name=online_rewards:letters",
      "--config.generation.max_new_tokens=9", "--config.data.eval_fraction=0",
      PYTHONPATH=f"{run_cases.ROOT}:{run_cases.ROOT / 'tests'}")
  assert done.returncode == 0, done.stderr[-3000:]
  first, second = (rounds_lib.read_pool(place) for place in sorted(
      (run / "preference" / "rounds").glob("[0-9]*")))
  for pool in (first, second):  # the sampler has the trainer's law, merged
    assert pool.metrics["generate/logp_gap"] < 1e-4
    assert max(np.abs(one.anchors["ref"] - one.candidates.behaviour_raw_logps
                      ).max() for one in pool.sets) > 1e-2
  config, base = load(folder / "run" / "sft" / "model")
  one = sharding.make_mesh(
      data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  old, new = (peft.Adapters(place).load(config, one, dtype=jnp.float32)
              for place in (folder / "run" / "export" / "adapter",
                            run / "preference" / "adapter"))
  assert jax.tree.structure(old) == jax.tree.structure(new)
  change = jax.tree.map(lambda x, y: np.abs(x - y).max(), old, new)
  assert change["layers"]["mlp"]["down_proj"]["lora_b"] > 1e-4
  np.testing.assert_allclose(
      load(run / "preference" / "model")[1]["embed"]["embedding"],
      base["embed"]["embedding"])
