"""The objective, and what of kernel and reference follows from it."""

import re
from typing import Any

from mcpo_jax import errors, objective_names, registry, user_code
from mcpo_jax.config_keys import KERNEL, OWN_KERNEL, or_none
from mcpo_jax.registry import STRATEGIES
from mcpo_jax.settings.run import has_lora
from mcpo_jax.settings.values import check_value


def resolve_objective(config) -> list[errors.McpoError]:
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
      found += check_value(f"objective.{key}", objective[key], setting)
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
      found += check_value(f"kernel.{key}", value, or_none(setting))
      if value is None:
        kernel[key] = setting.default
    elif value is not None and (key, value) != (
        "include_preferred", entry.include_preferred):  # as a saved config says
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
