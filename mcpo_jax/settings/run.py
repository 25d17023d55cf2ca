"""What concerns every run: stages, data, mesh, adapters, sizes, the server."""

import datetime
import ipaddress
import json
import os
from typing import Any

from mcpo_jax import errors, storage
from mcpo_jax.config_keys import PROJECTIONS, STAGES
from mcpo_jax.settings.values import parse_models, parse_sources


def check_run(config) -> list[errors.McpoError]:
  """Stages, steps, paths."""
  found = []
  stages = tuple(map(str, config["stages"] or ()))
  unknown = [stage for stage in stages if stage not in STAGES]
  for stage in unknown:
    found.append(errors.ConfigError(
        "config.range", "unknown stage", where="stages", got=stage,
        want=" | ".join(STAGES), hint=errors.nearest(stage, STAGES)))
  if not unknown and (not stages or list(stages) != sorted(
      set(stages), key=STAGES.index)):
    found.append(errors.ConfigError(
        "config.conflict", "stages must be named once each and in order",
        where="stages", got=stages, want=" -> ".join(STAGES)))
  if "preference" in stages:
    if (config["num_steps"] is None) == (config["num_epochs"] is None):
      found.append(errors.ConfigError(
          "config.conflict", "give exactly one of num_steps and num_epochs",
          where="num_steps", got=(config["num_steps"], config["num_epochs"])))
    if not config["data"]["path"]:
      found.append(errors.ConfigError(
          "config.missing", "the preference stage needs data",
          where="data.path", hint="--config.data.path=FILE"))
  for stage in ("sft", "reward_model"):
    if stage in stages and not config[stage]["data_path"]:
      found.append(errors.ConfigError(
          "config.missing", f"the {stage} stage needs data",
          where=f"{stage}.data_path", hint=f"--config.{stage}.data_path=FILE, "
          f"or leave {stage} out of stages"))
  if not config["tokenizer"]["path"] and config["model"]["path"]:
    config["tokenizer"]["path"] = config["model"]["path"]
  if config["data"]["eval_path"] and config["data"]["eval_fraction"]:
    found.append(errors.ConfigError(
        "config.conflict", "eval_fraction has no effect beside eval_path",
        where="data.eval_fraction", got=config["data"]["eval_fraction"]))
  if config["evaluation"]["patience"] and not (
      config["data"]["eval_path"] or config["data"]["eval_fraction"]):
    found.append(errors.ConfigError(
        "config.unused", "patience needs held-out data",
        where="evaluation.patience", hint="set data.eval_path"))
  if config["data"]["quarantine_text"] and not config["data"]["quarantine"]:
    found.append(errors.ConfigError(
        "config.unused", "no row is set aside", where="data.quarantine_text",
        got=True, want="data.quarantine=True beside it"))
  preferred, top_k = config["data"]["preferred"], config["data"]["top_k"]
  if (preferred == "top_k") != (top_k is not None):
    found.append(errors.ConfigError(
        "config.unused" if top_k else "config.missing",
        "data.top_k goes with data.preferred=top_k", where="data.top_k",
        got=top_k))
  return found


def check_evaluation(config) -> list[errors.McpoError]:
  """Models beside each other, and a benchmark's files."""
  evaluation, benchmark = config["evaluation"], config["benchmark"]
  found = []
  try:
    evaluation["models"] = tuple(evaluation["models"] or ())
    names = [name for name, _ in parse_models(evaluation["models"])]
    for name in sorted({name for name in names if names.count(name) > 1}):
      found.append(errors.ConfigError(
          "config.conflict", "two models of the evaluation have one name",
          where="evaluation.models", got=name or "step:*",
          hint="NAME=WHERE renames one"))
  except errors.ConfigError as e:
    found.append(e)
  for key in ("questions_path", "judgments_path", "baseline_path"):
    if benchmark[key] and not benchmark["name"]:
      found.append(errors.ConfigError(
          "config.missing", "whose file this is", where="benchmark.name",
          hint=f"benchmark.{key} is set"))
  if benchmark["name"] and not benchmark["questions_path"]:
    found.append(errors.ConfigError(
        "config.missing", "a benchmark needs its questions",
        where="benchmark.questions_path",
        hint="--config.benchmark.questions_path=FILE"))
  if benchmark["baseline_path"] and not benchmark["judgments_path"]:
    found.append(errors.ConfigError(
        "config.unused", "it goes with judgments",
        where="benchmark.baseline_path", got=benchmark["baseline_path"]))
  if benchmark["judgments_path"] and benchmark["name"] == "gsm8k":
    found.append(errors.ConfigError(
        "config.unused", "no judge says which of these answers are right",
        where="benchmark.judgments_path", got=benchmark["judgments_path"]))
  return found


def check_texts(config) -> list[errors.McpoError]:
  """Sources, revisions and texts with a form of their own."""
  data, model, tokenizer = (
      config["data"], config["model"], config["tokenizer"])
  found, sources = [], []
  for key, text in (("data.path", data["path"]),
                    ("data.eval_path", data["eval_path"]),
                    ("sft.data_path", config["sft"]["data_path"]),
                    ("reward_model.data_path",
                     config["reward_model"]["data_path"]),
                    ("generate.data_path", config["generate"]["data_path"])):
    try:
      sources += parse_sources(text) if text else []
    except errors.ConfigError as e:
      e.where = key
      found.append(e)
  for key, revision, paths in (
      ("data.revision", data["revision"], [path for path, _ in sources]),
      ("model.revision", model["revision"], [model["path"] or "."])):
    if revision is not None and all(map(_is_local, paths)):
      found.append(errors.ConfigError(
          "config.unused", "only a name on the hub has revisions", where=key,
          got=revision, want="None"))
  try:
    kwargs = json.loads(tokenizer["chat_template_kwargs"] or "{}")
  except ValueError:
    kwargs = None
  if not isinstance(kwargs, dict):
    found.append(errors.ConfigError(
        "config.type", "not a JSON object",
        where="tokenizer.chat_template_kwargs",
        got=tokenizer["chat_template_kwargs"], want='{"name": value}'))
  try:
    datetime.date.fromisoformat(tokenizer["date"] or "")
  except ValueError:
    found.append(errors.ConfigError(
        "config.type", "not a date", where="tokenizer.date",
        got=tokenizer["date"], want="YYYY-MM-DD"))
  path = config["reference"]["path"]
  if path is not None and not storage.is_url(path) and _is_local(path) and (
      not os.path.isdir(path)):
    found.append(errors.ConfigError(
        "config.reference", "no such folder", where="reference.path", got=path))
  return found


def _is_local(path: str) -> bool:
  """Whether a path is no name on the hub, whatever the hub holds."""
  return (path.startswith(("/", ".", "~", "embedded:"))
          or path.count("/") > 1 or os.path.exists(path))


def check_mesh(config) -> list[errors.McpoError]:
  """What can be said of a mesh without looking at the devices."""
  mesh = config["mesh"]
  if 0 in mesh.values() or list(mesh.values()).count(-1) > 1:
    return [errors.ConfigError(
        "config.mesh", "mesh sizes are whole numbers above 0, and at most one "
        "is -1", where="mesh", got=mesh)]
  return []


def check_optimizers(config) -> list[errors.McpoError]:
  """What an update rule does not read."""
  found = []
  for group, optimizer in (
      ("", config["optimizer"]), ("sft.", config["sft"]["optimizer"]),
      ("reward_model.", config["reward_model"]["optimizer"])):
    if optimizer["moment_dtype"] != "float32" and (
        optimizer["name"] not in ("adamw", "sgd")):
      found.append(errors.ConfigError(
          "config.unused", f"{optimizer['name']} has no first moment",
          where=f"{group}optimizer.moment_dtype",
          got=optimizer["moment_dtype"], want="float32"))
  return found


def has_lora(config: dict[str, Any]) -> bool:
  """Whether the preference stage trains adapters."""
  return (config["lora"]["rank"] is not None
          or config["model"]["adapter_path"] is not None)


def resolve_lora(config) -> list[errors.McpoError]:
  """Adapters: fills scale and targets of those that are made anew."""
  lora, model, reference = config["lora"], config["model"], config["reference"]
  path, found = model["adapter_path"], []

  def refuse(slug, message, key, want, got=None):
    found.append(errors.ConfigError(
        slug, message, where=key, got=got, want=want))

  if lora["rank"] is None or path is not None:
    reason = ("the adapters of model.adapter_path say it" if path
              else "only lora.rank makes adapters")
    for key, value in lora.items():
      if value not in (None, (), []):
        refuse("config.unused", reason, f"lora.{key}", "leave it out", value)
  else:
    lora["alpha"] = lora["alpha"] or 2.0 * lora["rank"]
    lora["targets"] = tuple(lora["targets"] or PROJECTIONS)
    for name in lora["targets"]:
      if name not in PROJECTIONS:
        found.append(errors.ConfigError(
            "config.range", "no such projection", where="lora.targets",
            got=name, want=" | ".join(PROJECTIONS),
            hint=errors.nearest(str(name), PROJECTIONS)))
    if not model["path"] and "sft" not in (config["stages"] or ()):
      refuse("config.missing", "adapters to random weights are of no use",
             "model.path", "a folder, a hub name, or the stage sft")
  if path is not None:
    if not storage.is_url(path) and not os.path.isdir(path):
      refuse("config.missing", "no such folder", "model.adapter_path",
             "a folder in PEFT's format", path)
    if not model["path"]:
      refuse("config.missing", "adapters need the weights they were trained on",
             "model.path", "a folder or a hub name")
    for stage in {"sft", "reward_model"} & set(config["stages"] or ()):
      refuse("config.conflict", f"the stage {stage} trains all weights",
             "model.adapter_path", f"None, or no stage {stage}", path)
    if reference["path"] is not None and reference["path"] == model["path"]:
      refuse("config.conflict", "that is the base of the adapters",
             "reference.path", "reference.source=lora_base", reference["path"])
  if reference["source"] == "lora_base":
    if not has_lora(config):
      refuse("config.conflict", "there are no adapters to leave out",
             "reference.source", "lora.rank, or another source", "lora_base")
    if reference["path"] is not None:
      refuse("config.unused", "the reference is the policy's own base",
             "reference.path", "None", reference["path"])
  return found


def check_serve(config) -> list[errors.McpoError]:
  """Whom the server listens to."""
  host = str(config["serve"]["host"])
  try:
    inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return [errors.ConfigError(
        "config.range", "not an address", where="serve.host", got=host,
        want="an IP address or localhost")]
  if not (inside or config["serve"]["public"]):
    return [errors.ConfigError(
        "config.conflict", "others than this machine could connect",
        where="serve.host", got=host, want="127.0.0.1",
        hint="serve.public=True allows it; the connection is not encrypted")]
  return []


def check_lengths(config) -> list[errors.McpoError]:
  """Lengths that must fit into each other, sizes that must divide."""
  data, model, found = config["data"], config["model"], []
  total = data["max_prompt_length"] + data["max_completion_length"]
  if total > data["stream_length"]:
    found.append(errors.ConfigError(
        "config.length", "max_prompt_length + max_completion_length must fit "
        "into one stream", where="data.stream_length",
        got=data["stream_length"], want=f">= {total}"))
  generation = config["generation"]
  own = generation["num_devices"] or 1
  if own % generation["tensor"]:
    found.append(errors.ConfigError(
        "config.divisible", "the sampler's own devices are split by tensor",
        where="generation.tensor", got=generation["tensor"],
        want=f"a divisor of generation.num_devices = {own}"))
  longest = max(total, data["max_prompt_length"] + (
      generation["max_new_tokens"] or 0))
  if not model["path"] and longest > model["max_position_embeddings"]:
    found.append(errors.ConfigError(
        "config.length", "a longest prompt with a longest completion or sample "
        "exceeds the context", where="model.max_position_embeddings",
        got=model["max_position_embeddings"], want=f">= {longest}"))
  if not model["path"]:
    heads, kv = model["num_heads"], model["num_kv_heads"]
    if heads % kv:
      found.append(errors.ConfigError(
          "config.divisible", "num_heads must be a multiple of num_kv_heads",
          where="model.num_kv_heads", got=kv, want=f"a divisor of {heads}"))
    if model["head_dim"] is None and model["hidden_size"] % heads:
      found.append(errors.ConfigError(
          "config.divisible", "hidden_size must be a multiple of num_heads",
          where="model.num_heads", got=heads,
          want=f"a divisor of {model['hidden_size']}"))
  return found
