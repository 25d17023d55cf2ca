"""The models that an evaluation puts side by side."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from mcpo_jax import checkpoints, errors, hosts, settings, types
from mcpo_jax.data import tokenizer as tokenizer_lib
from mcpo_jax.models import hf, lora
from mcpo_jax.stages import references, results
from mcpo_jax.training import architecture, setup
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib


class Contender(NamedTuple):
  """One of them; nothing of it is loaded yet."""

  name: str
  kind: str  # "start", "reference", "step", "other" or "aligned"
  where: str  # folder or checkpoint
  step: int | None  # updates behind it, None: not known
  run: setup.Run  # the run that evaluates, with this model's own tokenizer
  model: stage_lib.Model
  load: Callable[[], types.Params]  # -> all of its weights, fresh arrays


def find(run: setup.Run) -> list[Contender]:
  """The start, a reference that is another model, those of evaluation.models
  in their order, the aligned one.

  Raises:
    CheckpointError, ModelDirError: one of them is not there, or damaged.
    ConfigError: config.conflict, two have one name.
  """
  aligned = results.finished(run, "preference")
  start_dir = results.find_start(run)
  model, start = architecture.open_model(run, start_dir)
  name = "sft" if "sft" in run.config["stages"] else "start"
  found = [Contender(name, "start", str(start_dir or "random weights"), 0, run,
                     model, start)]
  if run.config["reference"]["source"] and not references.is_start(run.config):
    found.append(_reference(run, model, start))
  for name, where in settings.parse_models(run.config["evaluation"]["models"]):
    if where.startswith("step:"):
      found += _steps(run, model, start, name, where.removeprefix("step:"))
    else:
      found.append(_other(run, name, where))
  found.append(Contender(
      "aligned", "aligned", str(aligned), _step(aligned), run, model,
      lambda: _load(run, model, aligned)))
  names = [one.name for one in found]
  for one in names:
    if names.count(one) > 1:
      raise errors.ConfigError(
          "config.conflict", "two models of the evaluation have one name",
          where="evaluation.models", got=one, hint="NAME=WHERE renames one")
  return found


def _load(run, model, folder) -> types.Params:
  return hf.load_params(folder, model.config, shardings=model.param_shardings,
                        dtype=run.config["model"]["param_dtype"])


def _step(folder: pathlib.Path) -> int:
  """Updates of the stage that ended with a model."""
  return json.loads((folder.parent / "result.json").read_text())["step"]


def _reference(run, model, start) -> Contender:
  path, other = run.config["reference"]["path"], model
  if path is not None:  # else the base beside adapters of the start
    other, _ = architecture.open_model(
        run, setup.resolve_once(run.config, run.workdir, path, None))
  return Contender(
      "reference", "reference", path or "lora_base", None, run, other,
      lambda: references.reference_params(run, model, start)[0])


def _steps(run, model, start, name, text) -> list[Contender]:
  """The checkpoint of a step, or with "*" all that are kept."""
  folder = run.workdir / "preference" / "checkpoints"
  there = hosts.from_first("checkpoints", lambda: checkpoints.steps(folder))
  steps = there if text == "*" else [int(text)]
  if not steps or not set(steps) <= set(there):
    raise errors.CheckpointError(
        "ckpt.none", "no checkpoint of this step is kept", where=str(folder),
        got=f"step:{text}", want=", ".join(map(str, there)) or "checkpoints",
        hint="checkpoint.keep says how many stay")
  trained, _, _ = architecture.open_trained(run, model, start)

  def load(step):
    params = checkpoints.read_params(folder, step, trained.param_shapes)
    return lora.merge(trained.policy(step_lib.policy_of(params)))

  return [Contender(
      f"step-{step}" if text == "*" or not name else name, "step",
      str(folder / str(step)), step, run, model,
      lambda step=step: load(step)) for step in steps]


def _other(run, name, where) -> Contender:
  """Another run's last stage, or a folder or hub name of weights."""
  folder, step = pathlib.Path(where).expanduser(), None
  for stage in ("preference", "sft"):
    if (folder / stage / "result.json").exists():
      folder = results.finished(run._replace(workdir=folder), stage)
      step = _step(folder)
      break
  else:
    if (folder / "metrics.jsonl").exists():
      raise errors.CheckpointError(
          "ckpt.none", "no stage of this run has finished", where=where,
          hint="run `train` first")
    folder = setup.resolve_once(run.config, run.workdir, where, None)
  options = run.config["tokenizer"]
  read = functools.partial(
      tokenizer_lib.load_tokenizer, str(folder), date=options["date"],
      chat_template_kwargs=json.loads(
          options["chat_template_kwargs"] or "{}"),
      bos=options["bos"], think=run.config["data"]["think"])
  tokenizer = read()
  if tokenizer.template is None and run.tokenizer.template is not None:
    tokenizer = read(chat_template=run.tokenizer.template)
  if tokenizer.key != run.tokenizer.key:
    run = run._replace(tokenizer=tokenizer)
  model, load = architecture.open_model(run._replace(model_dir=None), folder)
  return Contender(name, "other", where, step, run, model, load)
