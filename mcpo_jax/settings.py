"""What each config key may hold, checked before JAX is imported.

Three tables: OBJECTIVES (name -> where the function lives, what it needs, its
settings), STRATEGIES of the kernel, and KEYS (every dotted config key -> what
it may hold). `resolve` turns a loaded config into one without gaps or raises
every mistake at once. A key of an objective or a strategy that is None in the
config takes the default given here; a key that is set although nothing reads
it is an error.

This module imports no JAX.
"""

import datetime
import difflib
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from absl import logging

from mcpo_jax import errors

CONFIG_VERSION = 1


class Setting(NamedTuple):
  """Default and range of one number, flag or word."""

  default: Any = None
  low: float | None = None
  high: float | None = None
  open_low: bool = False  # True: the low end itself is refused
  choices: tuple[Any, ...] | None = None
  optional: bool = False  # True: may be None in a config
  slug: str = "config.range"


class Objective(NamedTuple):
  """Where an objective lives and what it needs."""

  place: str  # "module:function"
  settings: dict[str, Setting]
  anchors: tuple[str, ...] = ("ref",)  # names in SetBatch.anchors
  contrast: bool = True  # skips sets without a negative
  strategy: str = "mc"  # kernel strategy unless the config names one
  strategies: tuple[str, ...] | None = None  # None: any but "none"
  pairwise: bool = False  # exactly one negative
  per_token: bool = False  # its reward is a mean over tokens
  replace: bool = False  # draws with replacement
  include_preferred: bool = False  # the preferred is in the candidate set
  separable: bool = True  # loss[b] depends on set b alone
  reduce: str = "sets"  # the step divides by the global count of these


BETA = Setting(0.1, 0.0, None, open_low=True)

OBJECTIVES: dict[str, Objective] = {
    "mcpo": Objective("mcpo_jax.objectives.softmax:rnce_loss", {"beta": BETA}),
    "rnce": Objective(
        "mcpo_jax.objectives.softmax:rnce_loss",
        {"beta": BETA},
        strategy="all",
        strategies=("all",),
    ),
    "cd": Objective(
        "mcpo_jax.objectives.softmax:cd_loss",
        {"beta": BETA},
        strategies=("mc",),
        replace=True,
        include_preferred=True,
    ),
    "dpo": Objective(
        "mcpo_jax.objectives.pairwise:dpo_loss",
        {"beta": BETA, "label_smoothing": Setting(0.0, 0.0, 0.5)},
        strategy="fixed_worst",
        pairwise=True,
    ),
    "ipo": Objective(
        "mcpo_jax.objectives.pairwise:ipo_loss",
        {
            "beta": BETA,
            "length_average": Setting(False, choices=(True, False)),
        },
        strategy="fixed_worst",
        pairwise=True,
    ),
    "simpo": Objective(
        "mcpo_jax.objectives.pairwise:simpo_loss",
        {
            "beta": Setting(2.0, 0.0, None, open_low=True),
            "gamma_beta_ratio": Setting(0.5, 0.0),
        },
        anchors=(),
        strategy="fixed_worst",
        pairwise=True,
        per_token=True,
    ),
    "sft": Objective(
        "mcpo_jax.objectives.supervised:sft_loss",
        {},
        anchors=(),
        contrast=False,
        strategy="none",
        strategies=("none",),
        reduce="tokens",
    ),
}

# Kernel strategy -> does it need the current policy's scores of the pool?
STRATEGIES = {
    "mc": True,
    "max": True,
    "min": True,
    "random": False,
    "fixed_worst": False,
    "all": False,
    "none": False,
}
SCORES = ("reward", "policy_logp", "reward_per_token", "policy_logp_per_token")
REWARDS = {"slot_coverage": "mcpo_jax.rewards.slot_coverage:make_slot_coverage"}
STAGES = ("sft", "preference", "evaluate", "export")

FORMATS = ("auto", "native", "pairs", "nectar", "ultrafeedback",
           "generated_responses", "nemo", "hh", "unpaired", "sft", "tokens")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")

_ANY = Setting()  # text, or checked elsewhere
_POSITIVE = Setting(low=0.0, open_low=True)
_COUNT = Setting(low=1, high=2**31 - 1)
_FLAG = Setting(choices=(True, False))
_FORMAT = Setting(choices=FORMATS)
_DTYPE = Setting(choices=("float32", "bfloat16"))
_AXIS = Setting(low=-1)


def _or_none(setting: Setting = _ANY) -> Setting:
  return setting._replace(optional=True)


_OPTIMIZER = {
    "name": Setting(choices=("adamw", "sgd", "rmsprop", "adafactor")),
    "learning_rate": _POSITIVE,
    "schedule": Setting(choices=("cosine", "linear", "constant")),
    "warmup_ratio": Setting(low=0.0, high=1.0),
    "weight_decay": Setting(low=0.0),
    "b1": Setting(low=0.0, high=0.999999),
    "b2": Setting(low=0.0, high=0.999999),
    "eps": _POSITIVE,
    "max_grad_norm": _POSITIVE,
}

KEYS: dict[str, Setting] = {
    "seed": Setting(low=0, high=2**32 - 1),
    "stages": _ANY,
    "num_steps": _or_none(_COUNT),
    "num_epochs": _or_none(_POSITIVE),
    "batch_size": _COUNT,
    "cache_dir": _or_none(),
    "tokenizer.path": _or_none(),
    "tokenizer.vocab_size": Setting(low=260),
    "tokenizer.chat_template": _or_none(),
    "tokenizer.chat_template_kwargs": _or_none(),
    "tokenizer.date": _ANY,
    "tokenizer.bos": Setting(choices=("auto", "add", "none")),
    "proposal.correction": _FLAG,
    "model.path": _or_none(),
    "model.revision": _or_none(),
    "model.family": Setting(choices=FAMILIES),
    "model.hidden_size": _COUNT,
    "model.num_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.num_kv_heads": _COUNT,
    "model.head_dim": _or_none(Setting(low=2)),
    "model.intermediate_size": _COUNT,
    "model.max_position_embeddings": _COUNT,
    "model.rope_theta": _POSITIVE,
    "model.tie_embeddings": _FLAG,
    "model.param_dtype": _DTYPE,
    "model.compute_dtype": _DTYPE,
    "model.remat": Setting(choices=("none", "dots", "full")),
    "data.path": _or_none(),
    "data.eval_path": _or_none(),
    "data.eval_fraction": Setting(low=0.0, high=0.9),
    "data.format": _FORMAT,
    "data.eval_format": _FORMAT,
    "data.revision": _or_none(),
    "data.preferred": Setting(choices=("best", "top_k", "index")),
    "data.top_k": _or_none(Setting(low=2)),
    "data.max_prompt_length": _COUNT,
    "data.max_completion_length": _COUNT,
    "data.prompt_overlength": Setting(
        choices=("error", "skip", "left", "right")),
    "data.completion_overlength": Setting(
        choices=("error", "skip", "truncate")),
    "data.think": Setting(choices=("keep", "strip", "mask")),
    "data.quarantine": _FLAG,
    "data.max_quarantined_share": Setting(low=0.0, high=1.0),
    "data.stream_length": Setting(low=8),
    "data.num_streams": _COUNT,
    "objective.name": _ANY,
    "kernel.strategy": _or_none(),
    "kernel.num_negatives": _COUNT,
    "kernel.refresh": _ANY,
    "reference.source": _or_none(Setting(choices=("cached", "resident"))),
    "reference.path": _or_none(),
    "sft.data_path": _or_none(),
    "sft.data_format": _FORMAT,
    "sft.num_steps": _COUNT,
    "sft.batch_size": _COUNT,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "generation.temperature": Setting(low=0.0, high=100.0),
    "generation.top_p": Setting(low=0.0, high=1.0, open_low=True),
    "generation.max_new_tokens": _or_none(_COUNT),
    "generation.num_samples": _COUNT,
    "reward.name": _or_none(),
    "reward.patterns_path": _or_none(),
    "evaluation.every_steps": _COUNT,
    "evaluation.num_prompts": _or_none(_COUNT),
    "evaluation.num_display": _COUNT,
    "evaluation.patience": _or_none(_COUNT),
    "checkpoint.every_steps": Setting(low=1, slug="config.retention"),
    "checkpoint.keep": Setting(low=2, slug="config.retention"),
    "checkpoint.keep_best": _FLAG,
    "export.dtype": _or_none(_DTYPE),
    "log.every_steps": _COUNT,
    "log.tensorboard": _FLAG,
    "log.wandb": _FLAG,
} | {
    f"{group}optimizer.{name}": setting
    for group in ("", "sft.")
    for name, setting in _OPTIMIZER.items()
} | {  # checked by those that read them
    key: _or_none()
    for key in ("kernel.temperature", "kernel.score",
                "kernel.include_preferred", *(
                    f"objective.{name}" for objective in OBJECTIVES.values()
                    for name in objective.settings))
}

# Kernel keys that only some strategies read, with their defaults.
_KERNEL = {
    "temperature": (Setting(1.0, 0.0, None, open_low=True), ("mc",)),
    "score": (Setting("reward", choices=SCORES), ("mc", "max", "min")),
    "include_preferred": (
        Setting(None, choices=(True, False)),
        ("mc", "random"),
    ),
}

# Tokens of Hugging Face, OpenAI-like services and GitHub; a Weights & Biases
# key is 40 hex digits, as a commit is.
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|gh[oprsu]_[A-Za-z0-9]{36})")
_HEX_KEY = re.compile("[0-9a-f]{40}")
_COMMITS = ("model.revision", "data.revision")


def nearest(name: str, known) -> str:
  """The known name most like `name`, as a hint, or an empty string."""
  found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f"did you mean {found[0]!r}?" if found else ""


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
          hint=nearest(str(value), map(str, setting.choices)))]
    return []
  if setting.low is None:
    return []
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return [errors.ConfigError("config.type", "not a number", where=key,
                               got=value, want="a number")]
  low, high = setting.low, setting.high
  bad = (not low <= value < math.inf  # as NaN is
         or (setting.open_low and value == low)
         or (high is not None and value > high))
  if bad:
    left = f"{'>' if setting.open_low else '>='} {low:g}"
    right = f" and <= {high:g}" if high is not None else ""
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
  flat = flatten(config)
  secrets = [key for key, value in flat.items() if isinstance(value, str) and (
      _SECRET.search(value)
      or key not in _COMMITS and _HEX_KEY.fullmatch(value))]
  _raise_all([errors.ConfigError(
      "config.secret", "looks like a secret", where=key,
      hint="give tokens through the environment (HF_TOKEN), never here")
      for key in secrets])
  _raise_all([errors.ConfigError(
      "config.unknown_key", "no such key", where=key, hint=nearest(key, KEYS))
      for key in flat if key not in KEYS] + [errors.ConfigError(
          "config.missing", "the config lacks a key", where=key,
          hint="begin with default.get_config()")
          for key in KEYS if key not in flat])
  found = [e for key in flat for e in _check(key, flat[key], KEYS[key])]
  found += _check_run(config)
  found += _check_texts(config)
  found += _check_mesh(config)
  found += _resolve_objective(config)
  if not found:  # these calculate with the values
    found += _check_lengths(config)
  _raise_all(found)
  if config["model"]["param_dtype"] == "bfloat16":
    logging.warning(
        "config.precision: weights and moments in bfloat16 lose small updates "
        "(model.param_dtype); log-probs and losses stay float32")
  return config


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
        want=" | ".join(STAGES), hint=nearest(stage, STAGES)))
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
  if "sft" in stages and not config["sft"]["data_path"]:
    found.append(errors.ConfigError(
        "config.missing", "the sft stage needs data", where="sft.data_path",
        hint="--config.sft.data_path=FILE, or leave sft out of stages"))
  if not config["tokenizer"]["path"] and config["model"]["path"]:
    config["tokenizer"]["path"] = config["model"]["path"]
  if config["data"]["eval_path"] and config["data"]["eval_fraction"]:
    found.append(errors.ConfigError(
        "config.conflict", "eval_fraction has no effect beside eval_path",
        where="data.eval_fraction", got=config["data"]["eval_fraction"]))
  name = config["reward"]["name"]
  if name is not None and ":" not in name and name not in REWARDS:
    found.append(errors.ConfigError(
        "config.range", "unknown reward", where="reward.name", got=name,
        want=" | ".join(REWARDS) + " | module:function",
        hint=nearest(name, REWARDS)))
  if name == "slot_coverage" and not config["reward"]["patterns_path"]:
    found.append(errors.ConfigError(
        "config.missing", "slot_coverage needs its pattern file",
        where="reward.patterns_path",
        hint="--config.reward.patterns_path=FILE"))
  if name != "slot_coverage" and config["reward"]["patterns_path"]:
    found.append(errors.ConfigError(
        "config.unused", "only reward.name=slot_coverage reads it",
        where="reward.patterns_path"))
  if config["evaluation"]["patience"] and not (
      config["data"]["eval_path"] or config["data"]["eval_fraction"]):
    found.append(errors.ConfigError(
        "config.unused", "patience needs held-out data",
        where="evaluation.patience", hint="set data.eval_path"))
  preferred, top_k = config["data"]["preferred"], config["data"]["top_k"]
  if (preferred == "top_k") != (top_k is not None):
    found.append(errors.ConfigError(
        "config.unused" if top_k else "config.missing",
        "data.top_k goes with data.preferred=top_k", where="data.top_k",
        got=top_k))
  return found


def _check_texts(config) -> list[errors.McpoError]:
  """Sources, revisions and texts with a form of their own."""
  data, model, tokenizer = (
      config["data"], config["model"], config["tokenizer"])
  found, sources = [], []
  for key, text in (("data.path", data["path"]),
                    ("data.eval_path", data["eval_path"]),
                    ("sft.data_path", config["sft"]["data_path"])):
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


def _resolve_objective(config) -> list[errors.McpoError]:
  """Fills objective, kernel and reference from the registry."""
  objective, kernel = config["objective"], config["kernel"]
  name = objective["name"]
  if name not in OBJECTIVES:
    return [errors.ConfigError(
        "config.range", "unknown objective", where="objective.name", got=name,
        want=" | ".join(OBJECTIVES), hint=nearest(str(name), OBJECTIVES))]
  entry, found = OBJECTIVES[name], []
  for key in [k for k in objective if k != "name"]:
    if key in entry.settings:
      setting = _or_none(entry.settings[key])
      found += _check(f"objective.{key}", objective[key], setting)
      if objective[key] is None:
        objective[key] = setting.default
    elif objective.pop(key) is not None:
      found.append(errors.ConfigError(
          "config.unused", f"{name} does not take it",
          where=f"objective.{key}", want=", ".join(entry.settings)))

  strategy = kernel["strategy"] or entry.strategy
  allowed = entry.strategies or tuple(s for s in STRATEGIES if s != "none")
  if entry.pairwise:
    allowed = tuple(s for s in allowed if s != "all")
  if strategy not in allowed:
    found.append(errors.ConfigError(
        "config.range", f"{name} does not work with it",
        where="kernel.strategy", got=strategy, want=" | ".join(allowed),
        hint=nearest(strategy, allowed)))
    return found
  kernel["strategy"] = strategy
  for key, (setting, readers) in _KERNEL.items():
    value = kernel[key]
    if strategy in readers:
      found += _check(f"kernel.{key}", value, _or_none(setting))
      if value is None:
        kernel[key] = (entry.include_preferred if key == "include_preferred"
                       else setting.default)
    elif value is not None:
      found.append(errors.ConfigError(
          "config.unused", f"strategy {strategy} does not read it",
          where=f"kernel.{key}", got=value, want="leave it out"))
  kernel["include_preferred"] = bool(kernel["include_preferred"])
  if entry.pairwise and kernel["num_negatives"] != 1:
    found.append(errors.ConfigError(
        "config.range", f"{name} compares one pair",
        where="kernel.num_negatives", got=kernel["num_negatives"], want="1"))

  reads_scores = STRATEGIES[strategy]
  refresh = str(kernel["refresh"])
  if refresh not in ("step", "epoch") and not re.fullmatch(
      "[1-9][0-9]*", refresh):
    found.append(errors.ConfigError(
        "config.range", "not a rhythm", where="kernel.refresh", got=refresh,
        want="step | epoch | a whole number of steps >= 1",
        hint=nearest(refresh, ("step", "epoch"))))
  elif refresh != "step" and not reads_scores:
    found.append(errors.ConfigError(
        "config.unused", f"strategy {strategy} draws without the policy's "
        "scores", where="kernel.refresh", got=refresh, want="step"))
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
  needs_reference = bool(entry.anchors) or (
      reads_scores and str(kernel["score"]).startswith("reward"))
  reference = config["reference"]
  if needs_reference:
    reference["source"] = reference["source"] or "cached"
  else:
    for key in ("source", "path"):
      if reference[key] is not None:
        found.append(errors.ConfigError(
            "config.unused", f"{name} needs no reference",
            where=f"reference.{key}", got=reference[key], want="None"))
  return found


def _check_lengths(config) -> list[errors.McpoError]:
  """Lengths that must fit into each other, sizes that must divide."""
  data, model, found = config["data"], config["model"], []
  total = data["max_prompt_length"] + data["max_completion_length"]
  if total > data["stream_length"]:
    found.append(errors.ConfigError(
        "config.length", "max_prompt_length + max_completion_length must fit "
        "into one stream", where="data.stream_length",
        got=data["stream_length"], want=f">= {total}"))
  longest = max(total, data["max_prompt_length"] + (
      config["generation"]["max_new_tokens"] or 0))
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
