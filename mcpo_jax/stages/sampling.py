"""Prompts, rewards and the sampler of a run."""

import os
import pathlib
from typing import Any

import numpy as np

from mcpo_jax import errors, settings, storage, user_code
from mcpo_jax.data import files
from mcpo_jax.data import store as store_lib
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.evaluation import samples
from mcpo_jax.generation import client
from mcpo_jax.generation import service as service_lib
from mcpo_jax.generation import token as token_lib
from mcpo_jax.generation.sampling import Sampling
from mcpo_jax.rewards import functions as rewards
from mcpo_jax.training import setup
from mcpo_jax.training import stage as stage_lib


def load_reward(
    config: dict[str, Any], tokenizer: tokenizer_lib.Tokenizer | None = None,
    name: str | None = None,
) -> rewards.Reward | None:
  """The reward of a config, None without one.

  Args:
    config: resolved.
    tokenizer: of the policy: whether its prompts open a thought. None: not
      known yet.
    name: instead of reward.name.
  """
  options = dict(config["reward"])
  configured = options.pop("name")
  name = name or configured
  if name is None:
    return None
  shaping = {key: options.pop(key) for key in (
      "missing_eos_penalty", "length_penalty", "thinking")}
  members = [(rewards.load_reward(member, **options), weight)
             for member, weight in settings.parse_rewards(name)]
  return rewards.combine(
      members, **shaping,
      opens_thinking=tokenizer is not None and tokenizer.opens_thinking)


def check_reward(config: dict[str, Any]) -> None:
  """Finds at the start what would be missed hours later.

  A reward model is not loaded: the stage reward_model may have to make it.

  Raises:
    ConfigError: as `rewards.load_reward`; reward.path, no such folder.
  """
  options = dict(config["reward"])
  for member, _ in settings.parse_rewards(options.pop("name") or "length"):
    if member != "reward_model":
      rewards.load_reward(member, **options)
    elif "reward_model" not in config["stages"] and not (
        os.path.isdir(options["path"]) or storage.is_url(options["path"])
        or files.is_hub_name(options["path"])):
      raise errors.ConfigError(
          "reward.path", "no such folder", where="reward.path",
          got=options["path"])


def own_rewards(config: dict[str, Any]) -> dict[str, str | None]:
  """Name -> SHA-256 of the file, of rewards of the user's own."""
  members = settings.parse_rewards(config["reward"]["name"] or "length")
  return {name: user_code.source_hash(name)
          for name, _ in members if ":" in name}


def prompt_set(data: store_lib.Store, rows: np.ndarray) -> samples.PromptSet:
  """The prompts of some rows, with the columns that all of them have."""
  sets = [data.candidate_set(int(i)) for i in rows]
  columns = [data.columns(int(i)) for i in rows]
  shared = set.intersection(*(set(c) for c in columns)) - {
      "prompt", "prompt_id", "where", "prompts", "completions", "reward",
      "finish_reasons", "lengths"}
  return samples.PromptSet(
      tokens=[s.prompt for s in sets],
      prompt_ids=np.stack([s.example_id for s in sets]),
      prompts=[c["prompt"] for c in columns],
      columns={name: [c[name] for c in columns] for name in sorted(shared)})


def law(config: dict[str, Any]) -> Sampling:
  """How the config draws samples."""
  options = config["generation"]
  return Sampling(**{
      name: tuple(options[name]) if name == "stop" else options[name]
      for name in Sampling._fields if name != "stop_ids"})


def longest_sample(config: dict[str, Any]) -> int:
  """Tokens of a completion, of the resolved config."""
  return (config["generation"]["max_new_tokens"]
          or config["data"]["max_completion_length"])


def make_service(
    run: setup.Run, model: stage_lib.Model, params, mesh=None,
    length: int | None = None,
) -> service_lib.GenerationService:
  """The sampler of this run's architecture and tokenizer, on the mesh that
  trains or on another one; `length` tokens at most, None: the config's."""
  return service_lib.GenerationService(
      model.config, params, 0,
      max_completion_length=length or longest_sample(run.config),
      stop_ids=run.tokenizer.stop_ids, pad_id=run.tokenizer.pad_id,
      tokenizer=run.tokenizer.hf, vocab_size=run.tokenizer.vocab_size,
      compute_dtype=model.compute_dtype, mesh=mesh or run.mesh)


def make_online_service(
    run: setup.Run, model: stage_lib.Model, params
) -> service_lib.GenerationService | client.RemoteService:
  """Who samples for rounds: this mesh, devices of its own, or a server."""
  options = run.config["generation"]
  if options["url"] is None:
    return make_service(run, model, params, run.sampler_mesh)
  spool = run.workdir / "spool"
  if options["spool"] is not None:  # others may use it too
    spool = pathlib.Path(options["spool"]) / setup.digest(
        str(run.workdir.resolve()))
  return client.RemoteService(
      options["url"], token=token_lib.read_token(options["token_path"]),
      config=model.config, max_completion_length=longest_sample(run.config),
      stop_ids=run.tokenizer.stop_ids, pad_id=run.tokenizer.pad_id,
      spool=spool, patience=options["patience_s"])
