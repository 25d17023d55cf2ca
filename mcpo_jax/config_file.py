"""Config files: run, overridden, opened for a user's own settings, resolved.

Nothing here imports JAX.
"""

import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import ml_collections

from mcpo_jax import errors, objective_names, settings, user_code

# Where `configs/` lies beside the package.
_CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def load(path: str) -> ml_collections.ConfigDict:
  """Runs a config file's get_config().

  Args:
    path: of the file, from the current folder; what is not there is looked for
      in the checkout that the package lies in.

  Raises:
    ConfigError: config.missing, config.untrusted_code, config.invalid,
      config.unknown_key and config.type for what get_config() sets.
  """
  file = pathlib.Path(path)
  if not file.is_file() and (_CHECKOUT / file).is_file():
    file = _CHECKOUT / file
  if not file.is_file():
    near = [p.name for p in file.parent.glob("*.py")] if (
        file.parent.is_dir()) else []
    raise errors.ConfigError(
        "config.missing", "no such config file", where=path,
        hint=errors.nearest(file.name, near) or (
            f"looked for it in {pathlib.Path.cwd()}"))
  for foreign in ("config.json", "manifest.json", "model.safetensors"):
    if (file.parent / foreign).exists():
      raise errors.ConfigError(
          "config.untrusted_code", "a config is Python code and is not run "
          "from a model or checkpoint folder", where=path)
  if file.suffix != ".py":
    raise errors.ConfigError(
        "config.invalid", "a config is a Python file", where=path,
        hint="without --config, the config that lies in --workdir is read")
  spec = importlib.util.spec_from_file_location("mcpo_config", file)
  module = importlib.util.module_from_spec(spec)
  root = str(file.resolve().parent.parent)  # where `configs` is a package
  sys.path.insert(0, root)
  slugs = {AttributeError: "config.unknown_key", KeyError: "config.unknown_key",
           TypeError: "config.type"}  # what a locked config raises
  try:
    spec.loader.exec_module(module)
    config = vars(module).get("get_config", lambda: None)()
    if not isinstance(config, ml_collections.ConfigDict):
      raise ValueError("needs a get_config() that returns a ConfigDict")
    return config
  except Exception as e:
    lines = [f":{frame.lineno}" for frame in traceback.extract_tb(
        e.__traceback__) if frame.filename == spec.origin]
    # A locked config tells all of its fields between its first words and its
    # hint.
    text = re.sub(
        r"\. Other fields .*(\n|\\n)", ". ", str(e), flags=re.DOTALL)
    raise errors.ConfigError(
        slugs.get(type(e), "config.invalid"), f"{type(e).__name__}: {text}",
        where=path + "".join(lines[-1:])) from e
  finally:
    sys.path.remove(root)


def resolve(
    config: ml_collections.ConfigDict, overrides: Iterable[tuple[str, Any]]
) -> dict[str, Any]:
  """The resolved config: overridden, checked, its gaps filled.

  Args:
    config: of `load`; changed.
    overrides: (dotted key, value) as `override` takes them.

  Raises:
    ConfigError or an ErrorGroup of them.
  """
  overrides, found = list(overrides), []
  for key, value in overrides:
    if key == "objective.name":
      override(config, key, value)
  admit_own_settings(config)
  for key, value in overrides:
    try:
      override(config, key, value)
    except errors.ConfigError as e:
      found.append(e)
  if found:
    raise found[0] if len(found) == 1 else errors.ErrorGroup(found)
  return settings.resolve(config.to_dict())


def override(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
  """Sets one dotted key, in the field's type.

  Args:
    config: changed.
    key: dotted.
    value: what was typed; or a Python value, a path or a function of the
      user's own, for fields that name one.

  Raises:
    ConfigError: config.unknown_key with the nearest one, config.type.
  """
  *groups, name = key.split(".")
  node = config
  for group in groups:
    node = node.get(group) if isinstance(node, ml_collections.ConfigDict) else (
        None)
  if not isinstance(node, ml_collections.ConfigDict) or name not in node:
    raise settings.unknown_key(key, settings.flatten(config.to_dict()))
  kind = node.get_type(name)
  if isinstance(node[name], ml_collections.ConfigDict):
    raise errors.ConfigError("config.type", "a group, not a field", where=key,
                             want=", ".join(f"{key}.{k}" for k in node[name]))
  try:
    node[name] = _convert(value, kind)
  except (ValueError, TypeError):
    raise errors.ConfigError("config.type", "wrong type", where=key, got=value,
                             want=kind.__name__) from None


def _convert(value: Any, kind: type) -> Any:
  if callable(value):
    return user_code.name_of(value)
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if not isinstance(value, str):
    return tuple(value) if kind is tuple and value is not None else value
  text = value
  if text == "None":
    return None
  if kind is bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in words:
      raise ValueError(text)
    return words[text.lower()]
  if kind is tuple:
    words = (word.strip(" '\"") for word in text.strip("()[]").split(","))
    return tuple(filter(None, words))
  return kind(text)


def admit_own_settings(config: ml_collections.ConfigDict) -> None:
  """Opens the keys that an objective of the user's own takes.

  Raises:
    ConfigError: see `objective_names.find_objective`.
  """
  name = str(config.objective.name)
  if ":" not in name:
    return
  with config.unlocked():
    for key, setting in objective_names.find_objective(name).settings.items():
      if key not in config.objective:
        kind = str if setting.default is None else type(setting.default)
        config.objective[key] = ml_collections.config_dict.placeholder(kind)
