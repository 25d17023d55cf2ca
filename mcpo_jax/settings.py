"""Configs, checked before JAX is imported.

`config_keys` says of every dotted config key what it may hold, `registry` what
objectives take. `resolve` turns a loaded config into one without gaps or
raises every mistake at once. A key of an objective or a strategy that is None
in the config takes the default given there; a key that is set although nothing
reads it is an error.

This module imports no JAX.
"""

import datetime
import ipaddress
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from absl import logging

from mcpo_jax import errors, objective_names, registry, user_code
from mcpo_jax.config_keys import (
    KERNEL,
    KEYS,
    OTHER_NAMES,
    OWN_KERNEL,
    PROJECTIONS,
    STAGES,
    or_none,
)
from mcpo_jax.registry import REWARDS, STRATEGIES, Setting

CONFIG_VERSION = 5

# Tokens of Hugging Face, OpenAI-like services and GitHub; a Weights & Biases
# key is 40 hex digits, as a commit is.
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|gh[oprsu]_[A-Za-z0-9]{36})")
_HEX_KEY = re.compile("[0-9a-f]{40}")
# Models, columns and keys that have these names already.
_TAKEN = ("start", "sft", "aligned", "reference", "prompt", "prompt_ids",
          "difference", "num_prompts")
_COMMITS = ("model.revision", "data.revision")


def flatten(tree, prefix: str = "") -> dict[str, Any]:
  """Nested dict -> {dotted key: leaf}."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out |= flatten(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = value
  return out


def _check(key: str, value: Any, setting: Setting) -> list[errors.McpoError]:
  """What is wrong with one value; bools count as words, not as numbers."""
  if value is None:
    return [] if setting.optional else [errors.ConfigError(
        setting.slug, "must be set", where=key, got="None")]
  if setting.choices is not None:
    if value not in setting.choices:
      return [errors.ConfigError(
          setting.slug, "not one of the known values", where=key, got=value,
          want=" | ".join(map(str, setting.choices)),
          hint=errors.nearest(str(value), map(str, setting.choices)))]
    return []
  if setting.low is None:
    return []
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return [errors.ConfigError("config.type", "not a number", where=key,
                               got=value, want="a number")]
  low, high = setting.low, setting.high
  bad = (not low <= value < math.inf  # as NaN is
         or (setting.open_low and value == low)
         or (setting.open_high and value == high)
         or (high is not None and value > high))
  if bad:
    left = f"{'>' if setting.open_low else '>='} {low:g}"
    right = "" if high is None else (
        f" and {'<' if setting.open_high else '<='} {high:g}")
    return [errors.ConfigError(
        setting.slug, "out of range", where=key, got=value,
        want=f"finite and {left}{right}")]
  return []


def redact(text: str) -> str:
  """The text with what looks like a secret taken out."""
  return _SECRET.sub("***", text)


def parse_sources(text: str) -> list[tuple[str, float]]:
  """"a.jsonl*2,b.jsonl" -> [("a.jsonl", 2.0), ("b.jsonl", 1.0)].

  A star is a weight's if a number follows to the end, else a pattern's.

  Raises:
    ConfigError: config.range for a weight that is not finite and above 0, or
      an empty path.
  """
  out = []
  for entry in text.split(","):
    path, star, weight = entry.strip().rpartition("*")
    try:
      weight = float(weight) if star else 1.0
    except ValueError:
      star = ""
    if not star:
      path, weight = entry.strip(), 1.0
    if not path or not 0.0 < weight < math.inf:
      raise errors.ConfigError(
          "config.range", "not a source", got=entry,
          want="PATH or PATH*WEIGHT, with a finite weight > 0")
    out.append((path, weight))
  return out


def parse_models(entries: Iterable[str]) -> list[tuple[str, str]]:
  """("dpo=runs/dpo", "step:4", "step:*") -> names and places of models.

  Without a name a folder has its own, a checkpoint "step-4"; all of them have
  their steps' ("").

  Raises:
    ConfigError: config.range, no entry of this form, or a name that tables
      and files have for something else.
  """
  out = []
  for entry in entries:
    name, has_name, where = str(entry).partition("=")
    if not has_name:
      name, where = "", str(entry)
    step = re.fullmatch(r"step:(\d+|\*)", where)
    every = where == "step:*"
    if not name and not every:
      name = where.replace(":", "-") if step else re.split(
          r"[/\\]", where.rstrip("/"))[-1]
    if (every and name or not every and not re.fullmatch(r"[\w.+-]+", name)
        or name in _TAKEN or where.startswith("step:") and not step
        or not where):
      raise errors.ConfigError(
          "config.range", "not a model of an evaluation",
          where="evaluation.models", got=entry, want="NAME=WHERE; names have "
          "letters, digits and ._+-, and are not " + ", ".join(_TAKEN))
    out.append((name, where))
  return out


def read_saved(path: pathlib.Path) -> dict[str, Any]:
  """The resolved config that a workdir keeps as JSON.

  Raises:
    ConfigError: config.invalid, config.version.
  """
  try:
    saved = json.loads(path.read_text())
    version, config = saved["version"], dict(saved["config"])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.ConfigError(
        "config.invalid", f"not the config of a run: {type(e).__name__}",
        where=str(path)) from e
  if version != CONFIG_VERSION:
    raise errors.ConfigError(
        "config.version", "saved by another version", where=str(path),
        got=version, want=CONFIG_VERSION)
  return config


def unknown_key(key: str, known: Iterable[str]) -> errors.ConfigError:
  """The refusal of a key, with the name that it has now or one like it."""
  hint = errors.nearest(key, known)
  if key in OTHER_NAMES:
    hint = f"it is called {OTHER_NAMES[key]!r}"
  return errors.ConfigError(
      "config.unknown_key", "no such key", where=key, hint=hint)


def check_saved(config: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """A config that was read back, if it is as `resolve` once gave it.

  Raises:
    ErrorGroup of ConfigError: config.missing, or what a value is not.
  """
  flat = flatten(config)
  found = [errors.ConfigError(
      "config.missing", "the saved config lacks a key", where=f"{path}, {key}",
      hint="it was changed by hand: restore it") for key in KEYS
      if key not in flat and not key.startswith("objective.")]
  found += [e for key in KEYS.keys() & flat.keys()
            for e in _check(key, flat[key], KEYS[key])]
  _raise_all(found)
  return config


def resolve(config: dict[str, Any]) -> dict[str, Any]:
  """Checks a nested config dict and fills in the defaults that depend on it.

  Args:
    config: nested plain dict, as `ConfigDict.to_dict()` gives it.

  Returns:
    A new nested dict: objective and kernel settings filled, unused ones gone.

  Raises:
    ErrorGroup of ConfigError: all mistakes found.
  """
  config = {k: dict(v) if isinstance(v, dict) else v
            for k, v in config.items()}
  flat, known = flatten(config), KEYS | _own_settings(config)
  secrets = [key for key, value in flat.items() if isinstance(value, str) and (
      _SECRET.search(value)
      or key not in _COMMITS and _HEX_KEY.fullmatch(value))]
  _raise_all([errors.ConfigError(
      "config.secret", "looks like a secret", where=key,
      hint="give tokens through the environment (HF_TOKEN), never here")
      for key in secrets])
  _raise_all([unknown_key(key, known) for key in flat if key not in known] + [
      errors.ConfigError(
          "config.missing", "the config lacks a key", where=key,
          hint="begin with default.get_config()")
      for key in KEYS if key not in flat])
  found = [e for key in flat for e in _check(key, flat[key], known[key])]
  found += _check_run(config)
  found += _check_texts(config)
  found += _check_mesh(config)
  found += _check_optimizers(config)
  found += _check_serve(config)
  found += _resolve_lora(config)
  found += _resolve_objective(config)
  found += _check_reward(config)
  found += _check_evaluation(config)
  found += _check_online(config)
  if not found:  # these calculate with the values
    found += _check_generate(config)
    found += _check_lengths(config)
  _raise_all(found)
  if config["model"]["param_dtype"] == "bfloat16" and not has_lora(config):
    logging.warning(
        "config.precision: a chunk's gradient comes in bfloat16, as the weights"
        " (model.param_dtype); sums over chunks, updates, log-probs and losses "
        "stay float32")
  return config


def _own_settings(config: dict[str, Any]) -> dict[str, Setting]:
  """Keys that only an objective of the user's own takes."""
  name = str(config["objective"].get("name"))
  if ":" not in name:
    return {}
  return {f"objective.{key}": or_none()
          for key in objective_names.find_objective(name).settings}


def _raise_all(found: list[errors.McpoError]) -> None:
  if found:
    raise found[0] if len(found) == 1 else errors.ErrorGroup(found)


def _check_run(config) -> list[errors.McpoError]:
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


def _check_evaluation(config) -> list[errors.McpoError]:
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


def _check_texts(config) -> list[errors.McpoError]:
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
  if path is not None and _is_local(path) and not os.path.isdir(path):
    found.append(errors.ConfigError(
        "config.reference", "no such folder", where="reference.path", got=path))
  return found


def _is_local(path: str) -> bool:
  """Whether a path is no name on the hub, whatever the hub holds."""
  return (path.startswith(("/", ".", "~", "embedded:"))
          or path.count("/") > 1 or os.path.exists(path))


def _check_mesh(config) -> list[errors.McpoError]:
  """What can be said of a mesh without looking at the devices."""
  mesh = config["mesh"]
  if 0 in mesh.values() or list(mesh.values()).count(-1) > 1:
    return [errors.ConfigError(
        "config.mesh", "mesh sizes are whole numbers above 0, and at most one "
        "is -1", where="mesh", got=mesh)]
  return []


def _check_optimizers(config) -> list[errors.McpoError]:
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


def _resolve_lora(config) -> list[errors.McpoError]:
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
    if not os.path.isdir(path):
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


def parse_rewards(text: str) -> list[tuple[str, float]]:
  """"a*2,b" -> [("a", 2.0), ("b", 1.0)]; a weight may be negative.

  Raises:
    ConfigError: config.range, an empty name or a weight that is 0 or no number.
  """
  out = []
  for entry in text.split(","):
    name, star, weight = entry.strip().rpartition("*")
    try:
      weight = float(weight) if star else 1.0
    except ValueError:
      weight = 0.0
    name = name if star else entry.strip()
    if not name or not 0.0 < abs(weight) < math.inf:
      raise errors.ConfigError(
          "config.range", "not a reward", where="reward.name", got=entry,
          want="NAME or NAME*WEIGHT, with a finite weight that is not 0")
    out.append((name, weight))
  return out


def _names(text: str | None) -> list[str]:
  """The names in a sum of rewards, as far as it can be read."""
  return [x.partition("*")[0].strip() for x in (text or "").split(",")]


def _check_reward(config) -> list[errors.McpoError]:
  """The rewards and what each of them needs."""
  group, found, read = config["reward"], [], set()
  for key, text in (("reward.name", group["name"]),
                    ("online.judge", config["online"]["judge"]),
                    ("evaluation.reward", config["evaluation"]["reward"])):
    try:
      members = parse_rewards(text) if text else []
    except errors.ConfigError as e:
      e.where = key
      found.append(e)
      continue
    for name, _ in members:
      if ":" not in name and name not in REWARDS:
        found.append(errors.ConfigError(
            "config.range", "unknown reward", where=key, got=name,
            want=" | ".join(REWARDS) + " | module:function",
            hint=errors.nearest(name, REWARDS)))
        continue
      entry = REWARDS.get(name, registry.Reward(""))
      read |= {*entry.needs, *entry.takes}
      found += [errors.ConfigError(
          "config.missing", f"{name} needs it", where=f"reward.{setting}",
          hint=f"--config.reward.{setting}=VALUE")
          for setting in entry.needs if group[setting] is None]
  watched = next((f"{key}.{name}" for key, name in (
      ("online", "judge"), ("evaluation", "reward"))
      if "judge" in _names(config[key][name])), None)
  if "judge" in _names(group["name"]) and "evaluate" in (
      config["stages"] or ()):
    watched = "reward.name"
  if watched:
    found.append(errors.ConfigError(
        "config.conflict", "win rates among a model's own samples are 1/2 on "
        "average, whatever the model", where=watched, got="judge",
        want="another reward; judge is for online.enabled, and stages without "
        "evaluate"))
  for setting in ("patterns_path", "path", "url", "judge"):
    if group[setting] is not None and setting not in read:
      readers = [name for name, entry in REWARDS.items()
                 if setting in entry.needs]
      found.append(errors.ConfigError(
          "config.unused", f"only {' and '.join(readers)} reads it",
          where=f"reward.{setting}"))
  return found


def _check_online(config) -> list[errors.McpoError]:
  """The rounds of on-policy candidates."""
  online, reference, found = config["online"], config["reference"], []

  def refuse(slug, message, key, want, got=None):
    found.append(errors.ConfigError(
        slug, message, where=key, got=got, want=want))

  source = reference["source"]
  if not online["enabled"]:
    if source in ("previous_round", "ema"):
      refuse("config.unused", "there are no rounds offline",
             "reference.source", "cached or resident", source)
    if reference["ema_decay"] is not None:
      refuse("config.unused", "only reference.source=ema reads it",
             "reference.ema_decay", "None", reference["ema_decay"])
    return found
  generation = config["generation"]
  if generation["url"] is None:
    for key in ("spool", "token_path"):
      if generation[key] is not None:
        refuse("config.unused", "only generation.url reads it",
               f"generation.{key}", "None", generation[key])
  elif online["mixture"] or generation["num_devices"]:
    refuse("config.conflict", "a server samples from one model, on devices of "
           "its own", "generation.url", "None, or online.mixture=0 and "
           "generation.num_devices=None", generation["url"])
  if source == "cached":
    refuse("config.conflict", "fresh samples are in no cache",
           "reference.source", "resident, lora_base, previous_round or ema",
           source)
  if source == "ema" and reference["ema_decay"] is None:
    reference["ema_decay"] = 0.9
  if source != "ema" and reference["ema_decay"] is not None:
    refuse("config.unused", "only reference.source=ema reads it",
           "reference.ema_decay", "None", reference["ema_decay"])
  if source in ("previous_round", "ema") and reference["path"]:
    refuse("config.unused", "the reference is the policy's own past",
           "reference.path", "None", reference["path"])
  prompts = online["prompts_per_round"] * online["epochs_per_round"]
  if prompts % config["batch_size"]:
    refuse("config.divisible", "a round is a whole number of updates",
           "online.prompts_per_round",
           f"a multiple of batch_size = {config['batch_size']}, times "
           "online.epochs_per_round", online["prompts_per_round"])
  refresh = str(config["kernel"]["refresh"])
  if refresh == "epoch" or refresh.isdigit() and (
      prompts // config["batch_size"] % int(refresh)):
    refuse("config.divisible", "draws are made anew with every round",
           "kernel.refresh", "a divisor of the updates of a round", refresh)
  by_data = online["preferred"] == "data"
  if not by_data and config["reward"]["name"] is None:
    refuse("config.missing", "samples are preferred by a reward",
           "reward.name", "a reward, or online.preferred=data")
  if by_data and online["online_fraction"] < 1:
    refuse("config.unused", "beside the preferred completion of the data all "
           "are sampled", "online.online_fraction", "1.0",
           online["online_fraction"])
  if config["data"]["preferred"] == "index" and not by_data:
    refuse("config.conflict", "samples are preferred by their scores",
           "data.preferred", "best or top_k", "index")
  kept = online["num_candidates"] - 1 if by_data else max(1, round(
      online["num_candidates"] * online["online_fraction"]))
  rejects = online["rejection_beta"] is not None
  if rejects and (by_data or (online["num_samples"] or 0) <= kept):
    refuse("config.conflict", "rejection keeps some of many scored samples",
           "online.num_samples",
           f"more than the {kept} kept, and online.preferred=score",
           online["num_samples"])
  if not rejects and online["num_samples"] not in (None, kept):
    refuse("config.unused", "all samples are candidates without rejection",
           "online.num_samples", "None", online["num_samples"])
  if online["mixture"] and source is None:
    refuse("config.missing", "a mixture needs a reference", "online.mixture",
           "0.0, or reference.source", online["mixture"])
  if online["extrapolation"] and source == "ema":
    refuse("config.conflict", "one kind of moving weights at a time",
           "online.extrapolation", "0.0", online["extrapolation"])
  if config["proposal"]["correction"]:
    if online["online_fraction"] < 1 or rejects or by_data:
      refuse("config.conflict", "the law of every candidate must be known",
             "proposal.correction", "candidates of the policy alone", True)
    if (generation["top_k"], generation["top_p"], generation["min_p"]) != (
        0, 1.0, 0.0) or generation["stop"]:
      refuse("config.conflict", "truncated sampling gives some completions no "
             "probability", "proposal.correction", "top_k=0, top_p=1, min_p=0 "
             "and no stop texts", True)
  return found


def _check_generate(config) -> list[errors.McpoError]:
  """The verb generate; fills where its prompts are and the temperatures."""
  group, found = config["generate"], []
  if group["data_path"] is None:
    group["data_path"] = config["data"]["path"]
    if group["data_format"] == "auto":
      group["data_format"] = config["data"]["format"]
    else:
      found.append(errors.ConfigError(
          "config.unused", "generate.data_path is not given",
          where="generate.data_format", got=group["data_format"],
          want="auto"))
  if group["data_format"] == "tokens":
    found.append(errors.ConfigError(
        "config.conflict", "records are text, and prompts given as ids have "
        "none", where="generate.data_format", got="tokens",
        want="a layout with text"))
  texts = group["temperatures"] or (config["generation"]["temperature"],)
  try:
    group["temperatures"] = tuple(map(float, texts))
  except (TypeError, ValueError):
    group["temperatures"] = ()
  setting = KEYS["generation.temperature"]
  wrong = [e for value in group["temperatures"] for e in _check(
      "generate.temperatures", value, setting)]
  if len(set(group["temperatures"])) != len(texts):  # no number, or one twice
    wrong.append(errors.ConfigError(
        "config.range", "temperatures are different numbers",
        where="generate.temperatures", got=texts, want="such as 0.7,1.0"))
  found += wrong
  if not group["part"] < group["num_parts"]:
    found.append(errors.ConfigError(
        "config.range", "parts are counted from 0", where="generate.part",
        got=group["part"], want=f"below num_parts = {group['num_parts']}"))
  return found


def _check_serve(config) -> list[errors.McpoError]:
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


def _resolve_objective(config) -> list[errors.McpoError]:
  """Fills objective, kernel and reference from what the objective needs."""
  objective = config["objective"]
  name = str(objective["name"])
  try:
    entry, found = objective_names.find_objective(name), []
  except errors.ConfigError as e:
    return [e]
  for key in [k for k in objective if k != "name"]:
    if key in entry.settings:
      setting = or_none(entry.settings[key])
      found += _check(f"objective.{key}", objective[key], setting)
      if objective[key] is None:
        objective[key] = setting.default
    elif objective.pop(key) is not None:
      found.append(errors.ConfigError(
          "config.unused", f"{name} does not take it",
          where=f"objective.{key}", want=", ".join(entry.settings)))
  refused = _resolve_strategy(config, entry)
  if refused:  # what follows depends on it
    return found + [refused]
  found += _resolve_kernel(config, entry)
  found += _check_estimates(config)
  found += _resolve_reference(config, entry)
  return found


def _resolve_strategy(config, entry) -> errors.McpoError | None:
  """Fills the kernel's strategy; tells what is wrong with it."""
  name, kernel = config["objective"]["name"], config["kernel"]
  strategy = kernel["strategy"] or entry.strategy
  allowed = objective_names.allowed_strategies(entry)
  if ":" in strategy and entry.strategies is None:
    try:
      user_code.check_kernel(strategy)
    except errors.ConfigError as e:
      return e
  elif strategy not in allowed:
    return errors.ConfigError(
        "config.range", f"{name} does not work with it",
        where="kernel.strategy", got=strategy, want=" | ".join(allowed),
        hint=errors.nearest(strategy, allowed))
  kernel["strategy"] = strategy
  return None


def _resolve_kernel(config, entry) -> list[errors.McpoError]:
  """Fills the settings that the kernel's strategy reads."""
  kernel, found = config["kernel"], []
  strategy = kernel["strategy"]
  for key, (setting, readers) in KERNEL.items():
    value = kernel[key]
    if strategy in readers or ":" in strategy and key in OWN_KERNEL:
      found += _check(f"kernel.{key}", value, or_none(setting))
      if value is None:
        kernel[key] = setting.default
    elif value is not None:
      found.append(errors.ConfigError(
          "config.unused", f"strategy {strategy} does not read it",
          where=f"kernel.{key}", got=value, want="leave it out"))
  found += _resolve_chain(config, entry)
  if entry.pairwise and kernel["num_negatives"] != 1:
    found.append(errors.ConfigError(
        "config.range", f"{config['objective']['name']} compares one pair",
        where="kernel.num_negatives", got=kernel["num_negatives"], want="1"))

  refresh = str(kernel["refresh"])
  if refresh not in ("step", "epoch") and not re.fullmatch(
      "[1-9][0-9]*", refresh):
    found.append(errors.ConfigError(
        "config.range", "not a rhythm", where="kernel.refresh", got=refresh,
        want="step | epoch | a whole number of steps >= 1",
        hint=errors.nearest(refresh, ("step", "epoch"))))
  elif refresh != "step" and not STRATEGIES.get(strategy, True):
    found.append(errors.ConfigError(
        "config.unused", f"strategy {strategy} draws without the policy's "
        "scores", where="kernel.refresh", got=refresh, want="step"))
  return found + _check_scoring(config, entry)


def _check_scoring(config, entry) -> list[errors.McpoError]:
  """How the pool gets its scores."""
  kernel, online = config["kernel"], config["online"]
  scoring, slug, why = kernel["scoring"], "config.conflict", None
  if scoring == "auto":
    return []
  if not STRATEGIES.get(kernel["strategy"], True):
    slug = "config.unused"
    why = f"strategy {kernel['strategy']} draws without the policy's scores"
  elif scoring != "separate" and str(kernel["refresh"]) != "step":
    why = "draws that are stored are scored ahead of their updates"
  elif scoring == "together" and entry.terms:
    why = f"{config['objective']['name']} reads more than the pool's log-probs"
  elif scoring == "sampler" and (
      not online["enabled"] or online["policy_lag"] or online["extrapolation"]):
    why = "only right after the policy's own samples its sampler's scores hold"
  return [errors.ConfigError(
      slug, why, where="kernel.scoring", got=scoring, want="auto")
          ] if why else []


def _check_estimates(config) -> list[errors.McpoError]:
  """What concerns candidates as samples: corrections, comparisons."""
  name, strategy = config["objective"]["name"], config["kernel"]["strategy"]
  found = []
  if config["proposal"]["correction"]:
    if name not in ("mcpo", "rnce"):
      found.append(errors.ConfigError(
          "config.unused", f"{name} does not read it",
          where="proposal.correction", got=True, want="mcpo or rnce"))
    elif strategy not in ("mc", "random", "all"):
      found.append(errors.ConfigError(
          "config.unused", f"strategy {strategy} does not weigh candidates",
          where="proposal.correction", got=True,
          want="kernel.strategy mc, random or all"))
  every = config["evaluation"]["estimator_every_steps"]
  if every is not None and (
      name not in ("mcpo", "cd") or config["proposal"]["correction"]):
    found.append(errors.ConfigError(
        "config.unused", "only uncorrected draws of mcpo and cd are compared "
        "with the whole pool", where="evaluation.estimator_every_steps",
        got=every, want="None"))
  return found


def _resolve_reference(config, entry) -> list[errors.McpoError]:
  """Fills where the reference comes from, if anything reads one."""
  name, kernel = config["objective"]["name"], config["kernel"]
  reads_scores, found = STRATEGIES.get(kernel["strategy"], True), []
  needs_weights = bool(registry.REFERENCE_TERMS & set(entry.terms))
  needs_reference = bool(entry.anchors) or needs_weights or (
      reads_scores and str(kernel["score"]).startswith("reward"))
  reference = config["reference"]
  online = config["online"]["enabled"]
  if needs_reference:
    held = "resident"
    if has_lora(config) and not (
        reference["path"] or config["model"]["adapter_path"]):
      held = "lora_base"  # the same policy without a second copy
    reference["source"] = reference["source"] or (
        held if needs_weights or online else "cached")
    if needs_weights and reference["source"] not in ("resident", "lora_base"):
      found.append(errors.ConfigError(
          "config.conflict", f"{name} reads the reference's whole distribution",
          where="reference.source", got=reference["source"],
          want="resident or lora_base"))
    if online and entry.mismatched:
      found.append(errors.ConfigError(
          "config.conflict", f"{name} compares with completions of other "
          "prompts, which rounds do not carry along", where="objective.name",
          got=name, want="another objective, or online.enabled=False"))
    if online and has_memory(kernel):
      found.append(errors.ConfigError(
          "config.conflict", "a chain with a memory needs the same candidates "
          "at every visit", where="kernel.init", want="preferred"))
  else:
    for key in ("source", "path", "ema_decay"):
      if reference[key] is not None:
        found.append(errors.ConfigError(
            "config.unused", f"{name} needs no reference",
            where=f"reference.{key}", got=reference[key], want="None"))
  return found


def _resolve_chain(config, entry) -> list[errors.McpoError]:
  """Settings of a kernel of several steps, with a memory or a schedule."""
  kernel, found = config["kernel"], []

  def refuse(slug, message, key, want):
    found.append(errors.ConfigError(
        slug, message, where=f"kernel.{key}", got=kernel[key], want=want))

  if kernel["transition"] in (None, "categorical"):
    if kernel["include_preferred"] is None:
      kernel["include_preferred"] = entry.include_preferred
  elif kernel["include_preferred"] is False:
    refuse("config.conflict", f"a {kernel['transition']} chain may stay where "
           "it stands", "include_preferred", "True, or leave it out")
  else:
    kernel["include_preferred"] = True
  constant = kernel["temperature_schedule"] in (None, "constant")
  if constant != (kernel["temperature_end"] is None):
    refuse("config.unused" if constant else "config.missing",
           "temperature_end goes with a temperature_schedule",
           "temperature_end", "None" if constant else "a number > 0")
  if kernel["transition"] is None:  # no chain
    return found
  if kernel["transition"] == "self_repellent":
    kernel["repulsion"] = kernel["repulsion"] or 1.0
  elif kernel["repulsion"] is not None:
    refuse("config.unused", "only self_repellent chains read it", "repulsion",
           "leave it out")
  if kernel["num_steps"] > 1 and kernel["block_size"] is None:
    refuse("config.missing", "every step needs candidates of its own: on one "
           "fixed set a second step changes nothing", "block_size",
           "a whole number, num_steps * block_size <= candidates")
  if has_memory(kernel):
    if str(kernel["refresh"]) != "step":
      refuse("config.conflict", "a chain with a memory moves at every step",
             "refresh", "step")
    if config["data"]["preferred"] == "top_k":
      found.append(errors.ConfigError(
          "config.conflict", "a chain with a memory needs the same preferred "
          "completion at every visit", where="data.preferred", got="top_k",
          want="best or index"))
  return found


def has_memory(kernel: dict[str, Any]) -> bool:
  """Whether a kernel carries state from one visit of an example to the next."""
  return (kernel.get("init") == "persistent"
          or kernel.get("transition") == "self_repellent")


def _check_lengths(config) -> list[errors.McpoError]:
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
