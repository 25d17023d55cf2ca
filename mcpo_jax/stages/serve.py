"""The verb serve: weights of a run, or given ones, behind the HTTP front."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from mcpo_jax import errors
from mcpo_jax.generation import engine as engine_lib
from mcpo_jax.generation import requests, server, worker
from mcpo_jax.generation import token as token_lib
from mcpo_jax.models import hf
from mcpo_jax.stages import results, sampling
from mcpo_jax.training import architecture, setup
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.types import Params


def run_serve(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Serves what the workdir's last finished stage ended with, else model.path.

  Raises:
    ConfigError, CheckpointError, ModelDirError; ResourceError: `serve.port`.
  """
  results.check_weights(config, workdir)
  options = config["serve"]
  token = token_lib.read_token(options["token_path"])
  if options["public"]:
    logging.warning("others can connect, and nothing is encrypted: let only "
                    "hosts that are trusted reach %s", options["host"])
  own = server.bind(options["host"], options["port"])
  run = setup.open_run(config, workdir)
  weights = results.find_weights(run)
  model, start = architecture.open_model(run, weights.folder)
  front = make_server(run, model, start(), weights.step, token)
  server.run(front.app(), own, grace_seconds=options["grace_seconds"])


def make_server(
    run: setup.Run, model: stage_lib.Model, params: Params, version: int,
    token: str,
) -> server.Server:
  """The HTTP front over an engine with these weights."""
  options, tokenizer = run.config["serve"], run.tokenizer
  length = (run.config["generation"]["max_new_tokens"]
            or run.config["data"]["max_completion_length"])
  engine = engine_lib.Engine(
      model.config, ((params, 1.0),), version, max_new_tokens=length,
      stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size,
      compute_dtype=model.compute_dtype, num_slots=options["num_slots"],
      mesh=run.mesh)
  thread = worker.Worker(
      engine, tokenizer.hf, version, hf.params_sha256(params),
      max_samples=options["max_samples"], num_slots=options["num_slots"],
      tokens_per_step=options["tokens_per_step"])
  limits = requests.Limits(
      max_positions=model.config.max_positions, max_new_tokens=length,
      vocab_size=tokenizer.vocab_size, max_samples=options["max_samples"],
      defaults=sampling.law(run.config), model=options["model_name"])
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.param_shapes))
  return server.Server(
      thread, tokenizer, limits,
      make_loader(model, run.config["model"]["param_dtype"]),
      server.Options(
          token=token, max_body_bytes=options["max_body_mib"] * 2**20,
          max_weights_bytes=8 * count + 2**20,  # float64 and the header
          body_seconds=options["body_seconds"]))


def make_loader(
    model: stage_lib.Model, dtype: str
) -> Callable[[pathlib.Path, str], Params]:
  """(folder, sha256) -> the weights of a folder, on the devices."""
  plain = lambda config: dataclasses.replace(
      config, bos_token_id=None, eos_token_ids=(), pad_token_id=None)

  def load(folder: pathlib.Path, sha256: str) -> Params:
    if (folder / "config.json").exists() and (
        plain(hf.load_config(folder)) != plain(model.config)):
      raise errors.ServiceError(
          "weights.config", "the weights are of another architecture than "
          "what is served", where="path")
    params = hf.load_params(
        folder, model.config, shardings=model.param_shardings, dtype=dtype)
    got = hf.params_sha256(params)
    if got != sha256:
      raise errors.ServiceError(
          "weights.hash", f"the weights, read as {dtype}, have another hash",
          where="sha256", got=got, want=sha256)
    return params

  return load
