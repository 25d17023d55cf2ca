"""What a stage ended with, where the next one finds it."""

import json
import pathlib
from typing import Any, NamedTuple

from mcpo_jax import commit, errors, hosts
from mcpo_jax.models import hf
from mcpo_jax.training import setup

POLICIES = ("preference", "sft")  # the later one first


class Weights(NamedTuple):
  """What is sampled from."""

  name: str  # told in the records' `sources`
  folder: pathlib.Path
  step: int  # updates behind them, 0 of given weights


def save_model(run, folder, params, model) -> None:
  """What a stage ends with, as a Hugging Face folder with a manifest."""
  hf.save_params(folder, params, model.config,
                 tokenizer_dir=run.workdir / "tokenizer",
                 stop_ids=run.tokenizer.stop_ids)
  hosts.wait_for_first("a model")


def read_result(run: setup.Run, stage: str) -> dict[str, Any] | None:
  """What a stage that has finished gave; None before."""
  path = run.workdir / stage / "result.json"
  return hosts.on_all_disks(
      f"the result of {stage}",
      lambda: json.loads(path.read_text()) if path.exists() else None)


def write_result(
    run: setup.Run, stage: str, result: dict[str, Any]
) -> dict[str, Any]:
  """Ends a stage; gives the result back."""
  commit.write_file(run.workdir / stage / "result.json",
                    json.dumps(result, indent=1))
  return result


def find_start(run: setup.Run) -> pathlib.Path | None:
  """Where the preference stage starts: sft's result, given weights, or None."""
  if "sft" not in run.config["stages"]:
    return run.model_dir
  return finished(run, "sft")


def finished(run: setup.Run, stage: str) -> pathlib.Path:
  """The verified model that a stage ended with.

  Raises:
    CheckpointError: ckpt.none, or what `commit.verify` finds.
    ConfigError: hosts.model, another process's disk has another.
  """
  folder = finished_in(run.workdir / stage)
  hosts.check_same(
      "hosts.model", f"the model of {stage}",
      {str(stage): commit.file_sha256(folder / commit.MANIFEST)},
      hint="`train` again brings what is missing")
  return folder


def finished_in(folder: pathlib.Path) -> pathlib.Path:
  """The verified model of a stage's folder; raises as `finished`."""
  if not (folder / "result.json").exists():
    raise errors.CheckpointError(
        "ckpt.none", f"the {folder.name} stage has not finished",
        where=str(folder), hint="run `train` first")
  commit.verify(folder / "model")
  return folder / "model"


def check_weights(config: dict[str, Any], workdir: pathlib.Path) -> None:
  """Looks for weights before anything is made.

  Raises:
    ConfigError: config.missing, random weights have nothing to say.
  """
  finished = [(workdir / stage / "result.json").exists() for stage in POLICIES]
  if not (config["model"]["path"] or any(finished)):
    raise errors.ConfigError(
        "config.missing", "no stage has finished in this workdir, and no "
        "weights are given", where="model.path",
        hint="--config.model.path=FOLDER, or run `train` first")


def find_weights(run: setup.Run) -> Weights:
  """Those that the last finished stage ended with, or those of model.path.

  Raises:
    CheckpointError, ConfigError: as `finished`.
  """
  hosts.check_same(
      "hosts.model", "the finished stages",
      {stage: (run.workdir / stage / "result.json").exists()
       for stage in POLICIES}, hint="`train` again brings what is missing")
  for stage in POLICIES:
    result = run.workdir / stage / "result.json"
    if result.exists():
      return Weights(f"{run.workdir.resolve().name}/{stage}",
                     finished(run, stage),
                     json.loads(result.read_text())["step"])
  return Weights(run.config["model"]["path"], run.model_dir, 0)
