"""Configs, checked before JAX is imported.

`config_keys` says of every dotted config key what it may hold, `registry` what
objectives take. `resolve` turns a loaded config into one without gaps or
raises every mistake at once. A key of an objective or a strategy that is None
in the config takes the default given there; a key that is set although nothing
reads it is an error.

This module imports no JAX.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from absl import logging

from mcpo_jax import errors, objective_names
from mcpo_jax.config_keys import KEYS, OTHER_NAMES, or_none
from mcpo_jax.registry import Setting
from mcpo_jax.settings import objective, online, run
from mcpo_jax.settings.objective import has_memory
from mcpo_jax.settings.run import has_lora
from mcpo_jax.settings.values import (
    check_value,
    parse_models,
    parse_rewards,
    parse_sources,
)

__all__ = ["CONFIG_VERSION", "check_saved", "flatten", "has_lora", "has_memory",
           "parse_models", "parse_rewards", "parse_sources", "read_saved",
           "redact", "resolve", "unknown_key"]

CONFIG_VERSION = 5

# Tokens of Hugging Face, OpenAI-like services and GitHub; a Weights & Biases
# key is 40 hex digits, as a commit is.
_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{32,}|gh[oprsu]_[A-Za-z0-9]{36})")
_HEX_KEY = re.compile("[0-9a-f]{40}")
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


def redact(text: str) -> str:
  """The text with what looks like a secret taken out."""
  return _SECRET.sub("***", text)


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
            for e in check_value(key, flat[key], KEYS[key])]
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
  found = [e for key in flat for e in check_value(key, flat[key], known[key])]
  for check in (run.check_run, run.check_texts, run.check_mesh,
                run.check_optimizers, run.check_serve, run.resolve_lora,
                objective.resolve_objective, online.check_reward,
                run.check_evaluation, online.check_online):
    found += check(config)
  if not found:  # these calculate with the values
    found += online.check_generate(config) + run.check_lengths(config)
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
