"""What a stage ended with, where the next one finds it."""

import pathlib

from mcpo_jax import commit, errors
from mcpo_jax.models import hf
from mcpo_jax.training import setup


def save_model(run, folder, params, model) -> None:
  """What a stage ends with, as a Hugging Face folder with a manifest."""
  hf.save_params(folder, params, model.config,
                 tokenizer_dir=run.workdir / "tokenizer",
                 stop_ids=run.tokenizer.stop_ids)
  commit.write_manifest(folder, {})


def find_start(run: setup.Run) -> pathlib.Path | None:
  """Where the preference stage starts: sft's result, given weights, or None."""
  if "sft" not in run.config["stages"]:
    return run.model_dir
  return finished(run, "sft")


def finished(run: setup.Run, stage: str) -> pathlib.Path:
  """The verified model that a stage ended with.

  Raises:
    CheckpointError: ckpt.none, or what `commit.verify` finds.
  """
  folder = run.workdir / stage
  if not (folder / "result.json").exists():
    raise errors.CheckpointError(
        "ckpt.none", f"the {stage} stage has not finished", where=str(folder),
        hint="run `train` first")
  commit.verify(folder / "model")
  return folder / "model"
