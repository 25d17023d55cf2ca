"""What each config key may hold, checked before JAX is imported.

Three tables: OBJECTIVES (name -> where the function lives, what it needs, its
settings), STRATEGIES of the kernel, and KEYS (dotted config key -> range).
`resolve` turns a loaded config into one without gaps or raises every mistake
at once. A key that is None in the config takes the default given here; a key
that is set although nothing reads it is an error.

This module imports no JAX.
"""

import difflib
import math
import os
import re
from typing import Any, NamedTuple

from mcpo_jax import errors

CONFIG_VERSION = 1


class Setting(NamedTuple):
  """Default and range of one number, flag or word."""

  default: Any
  low: float | None = None
  high: float | None = None
  open_low: bool = False  # True: the low end itself is refused
  choices: tuple[Any, ...] | None = None


class Objective(NamedTuple):
  """Where an objective lives and what it needs."""

  place: str  # "module:function"
  settings: dict[str, Setting]
  anchors: tuple[str, ...] = ("ref",)  # names in SetBatch.anchors
  contrast: bool = True  # skips sets without a negative
  strategy: str = "mc"  # kernel strategy unless the config names one
  strategies: tuple[str, ...] | None = None  # None: any but "none"
  pairwise: bool = False  # exactly one negative
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

_POSITIVE = Setting(None, 0.0, None, open_low=True)
_COUNT = Setting(None, 1)
_OPTIMIZER = {
    "name": Setting(None, choices=("adamw", "sgd", "rmsprop", "adafactor")),
    "learning_rate": _POSITIVE,
    "schedule": Setting(None, choices=("cosine", "linear", "constant")),
    "warmup_ratio": Setting(None, 0.0, 1.0),
    "weight_decay": Setting(None, 0.0),
    "b1": Setting(None, 0.0, 0.999999),
    "b2": Setting(None, 0.0, 0.999999),
    "eps": _POSITIVE,
    "max_grad_norm": _POSITIVE,
}
_DTYPES = Setting(None, choices=("float32", "bfloat16", "float16"))

KEYS: dict[str, Setting] = {
    "seed": Setting(None, 0, 2**32 - 1),
    "num_steps": _COUNT,
    "num_epochs": _POSITIVE,
    "batch_size": _COUNT,
    "tokenizer.vocab_size": Setting(None, 260),
    "model.hidden_size": _COUNT,
    "model.num_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.num_kv_heads": _COUNT,
    "model.head_dim": Setting(None, 2),
    "model.intermediate_size": _COUNT,
    "model.max_position_embeddings": _COUNT,
    "model.rope_theta": _POSITIVE,
    "model.param_dtype": _DTYPES,
    "model.compute_dtype": _DTYPES,
    "model.remat": Setting(None, choices=("none", "dots", "full")),
    "data.preferred": Setting(None, choices=("best", "top_k", "index")),
    "data.top_k": Setting(None, 2),
    "data.eval_fraction": Setting(None, 0.0, 0.9),
    "data.max_prompt_length": _COUNT,
    "data.max_completion_length": _COUNT,
    "data.stream_length": Setting(None, 8),
    "data.num_streams": _COUNT,
    "data.think": Setting(None, choices=("keep", "strip", "mask")),
    "data.max_quarantined_share": Setting(None, 0.0, 1.0),
    "kernel.num_negatives": _COUNT,
    "reference.source": Setting(None, choices=("cached", "resident")),
    "mesh.data": Setting(None, -1),
    "mesh.fsdp": Setting(None, -1),
    "mesh.tensor": Setting(None, -1),
    "generation.temperature": Setting(None, 0.0, 100.0),
    "generation.top_p": Setting(None, 0.0, 1.0, open_low=True),
    "generation.max_new_tokens": _COUNT,
    "evaluation.every_steps": _COUNT,
    "evaluation.num_prompts": _COUNT,
    "evaluation.patience": _COUNT,
    "checkpoint.every_steps": _COUNT,
    "checkpoint.keep": Setting(None, 2),
    "log.every_steps": _COUNT,
    "sft.num_steps": _COUNT,
    "sft.batch_size": _COUNT,
} | {
    f"{group}optimizer.{name}": setting
    for group in ("", "sft.")
    for name, setting in _OPTIMIZER.items()
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

_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,}|[0-9a-f]{40})\b")


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
    return []
  if setting.choices is not None:
    if value not in setting.choices:
      return [errors.ConfigError(
          "config.range", "not one of the known values", where=key, got=value,
          want=" | ".join(map(str, setting.choices)),
          hint=nearest(str(value), map(str, setting.choices)))]
    return []
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return [errors.ConfigError("config.type", "not a number", where=key,
                               got=value, want="a number")]
  low, high = setting.low, setting.high
  bad = (not math.isfinite(value)
         or (low is not None and value < low)
         or (setting.open_low and value == low)
         or (high is not None and value > high))
  if bad:
    left = ("> " if setting.open_low else ">= ") + f"{low:g}" if (
        low is not None) else ""
    right = f"<= {high:g}" if high is not None else ""
    return [errors.ConfigError(
        "config.range", "out of range", where=key, got=value,
        want=" and ".join(filter(None, ["finite", left, right])))]
  return []


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
  found: list[errors.McpoError] = []
  flat = flatten(config)
  for key, value in flat.items():
    if key in KEYS:
      found += _check(key, value, KEYS[key])
    if isinstance(value, str) and _SECRET.search(value):
      if key not in ("model.revision", "data.revision"):
        found.append(errors.ConfigError(
            "config.secret", "looks like a secret", where=key,
            hint="give tokens through the environment (HF_TOKEN), never here"))
  found += _check_run(config)
  found += _resolve_objective(config)
  found += _resolve_lengths(config)
  if found:
    raise found[0] if len(found) == 1 else errors.ErrorGroup(found)
  return config


def _check_run(config) -> list[errors.McpoError]:
  """Stages, steps, paths."""
  found = []
  stages = tuple(config["stages"])
  for stage in stages:
    if stage not in STAGES:
      found.append(errors.ConfigError(
          "config.range", "unknown stage", where="stages", got=stage,
          want=" | ".join(STAGES), hint=nearest(stage, STAGES)))
  if not stages or list(stages) != sorted(
      set(stages), key=lambda s: STAGES.index(s) if s in STAGES else -1):
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
        where="reward.patterns_path", hint="--config.reward.patterns_path=FILE"))
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
      found += _check(f"objective.{key}", objective[key], entry.settings[key])
      if objective[key] is None:
        objective[key] = entry.settings[key].default
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
      found += _check(f"kernel.{key}", value, setting)
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
        "config.range", f"{name} compares one pair", where="kernel.num_negatives",
        got=kernel["num_negatives"], want="1"))

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
  path = reference["path"]
  if path is not None and os.sep in path and not os.path.isdir(path):
    found.append(errors.ConfigError(
        "config.reference", "no such folder", where="reference.path", got=path))
  return found


def _resolve_lengths(config) -> list[errors.McpoError]:
  """Lengths that must fit into each other."""
  data, model, found = config["data"], config["model"], []
  total = data["max_prompt_length"] + data["max_completion_length"]
  if total > data["stream_length"]:
    found.append(errors.ConfigError(
        "config.length", "max_prompt_length + max_completion_length must fit "
        "into one stream", where="data.stream_length",
        got=data["stream_length"], want=f">= {total}"))
  if not model["path"] and total > model["max_position_embeddings"]:
    found.append(errors.ConfigError(
        "config.length", "max_prompt_length + max_completion_length exceeds "
        "the context", where="model.max_position_embeddings",
        got=model["max_position_embeddings"], want=f">= {total}"))
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
