"""The stage sft: imitation of sft.data_path, the start of all that follows."""

import shutil
from typing import Any

import numpy as np
from absl import logging

from mcpo_jax import commit, errors, hosts
from mcpo_jax.models import hf
from mcpo_jax.stages import pools, results
from mcpo_jax.training import architecture, loop, metrics, setup
from mcpo_jax.training import batch as batch_lib


def run_sft(run: setup.Run, writer: metrics.Writer) -> dict[str, Any]:
  """Imitates sft.data_path; the result lies in <workdir>/sft/model and, for
  other runs with the same settings and data, in the cache."""
  config, folder = run.config, run.workdir / "sft"
  done = results.read_result(run, "sft")
  if done is not None:
    return done
  data = setup.open_store(
      run, config["sft"]["data_path"], config["sft"]["data_format"], name="sft")
  model, start = architecture.open_model(run, run.model_dir)
  rows = setup.trained_rows(
      run, data, np.arange(len(data)), pools.open_eval_store(run))
  key = setup.digest([
      data.key, len(rows), hf.params_sha256(start()), config["model"],
      config["sft"], config["seed"], config["data"]["stream_length"],
      config["data"]["num_streams"]])
  shared, target = run.cache / "starts" / key, folder / "model"
  stage = setup.stage_of(config, len(rows), supervised=True)

  def look() -> str | None:
    """The hash of the start in the cache, if it is there."""
    if not (shared / commit.MANIFEST).exists():
      return None
    try:
      commit.verify(shared)
    except errors.CheckpointError as e:
      logging.warning("sft: the shared start is made anew: %s", e)
      commit.remove_folder(shared)
      return None
    return commit.file_sha256(shared / commit.MANIFEST)

  def copy() -> None:
    logging.info("sft: the same start was trained before, in %s", shared)
    shutil.rmtree(target, ignore_errors=True)
    commit.write_folder(
        target, lambda to: shutil.copytree(shared, to, dirs_exist_ok=True), {})

  if hosts.on_all_disks("a start", look):
    hosts.on_disk("a start", copy)
  else:
    make_batch = batch_lib.make_batch_fn(
        data, rows, batch_size=stage.batch_size, seed=stage.seed,
        num_slots=data.max_candidates, preferred="best", top_k=None)
    params, _ = loop.train(
        stage, model, make_batch, start, folder, writer,
        setup.schedule_of(run)._replace(estimate_every=None),
        meta=run.origin | {"stage": "sft", "key": key})
    results.save_model(run, target, params, model)
    commit.write_folder(
        shared, lambda to: shutil.copytree(target, to, dirs_exist_ok=True), {},
        replace=hosts.apart())
  params = hf.load_params(
      target, model.config, shardings=model.param_shardings)
  return results.write_result(run, "sft", {
      "params/sha256": hf.params_sha256(params), "step": stage.num_steps})
