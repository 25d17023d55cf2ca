"""Functions of the user's own: found by name, read from source, loaded.

"my_file:my_loss" is the function `my_loss` of my_file.py in the current
folder, or of a module that can be imported; "__main__:my_loss" that of the
notebook or script that runs. What it takes and needs is read from its text, so
that a mistake is refused before anything that the file imports, JAX first of
all, is imported.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import pathlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mcpo_jax import errors, registry

OBJECTIVE_ARGUMENTS = ("features", "batch", "state")
KERNEL_ARGUMENTS = ("key", "state", "scores", "sets")
KERNEL_SETTINGS = ("temperature", "num_negatives", "include_preferred")

# What `objective` can declare, with the words that are known.
_WORDS = {
    "anchors": tuple(dict.fromkeys(
        name for o in registry.OBJECTIVES.values() for name in o.anchors)),
    "terms": tuple(dict.fromkeys(
        name for o in registry.OBJECTIVES.values() for name in o.terms)),
    "strategy": tuple(registry.STRATEGIES),
    "strategies": tuple(registry.STRATEGIES),
    "reduce": ("sets", "tokens"),
}
_LISTS = ("anchors", "terms", "strategies")
_FLAGS = ("contrast", "scores", "pairwise", "per_token", "replace",
          "include_preferred", "mismatched", "separable")
_PLACES = ("state", "parameters")


class Source(NamedTuple):
  """A function in a file that was read and not imported."""

  place: str  # for `load`: "module:function" or "folder/file.py:function"
  path: pathlib.Path
  sha256: str  # of the file; of what runs, of the function alone
  function: ast.FunctionDef

  def error(self, message: str, line: int, **more: Any) -> errors.ConfigError:
    """A refusal that points at a line of the file."""
    return errors.ConfigError(
        "config.function", message, where=f"{self.path}:{line}", **more)


def objective(**needs: Any) -> Callable[[Callable], Callable]:
  """Declares what an objective of one's own needs.

      @mcpo_jax.objective(anchors=("ref", "prev"), pairwise=True)
      def my_loss(features, batch, state, *, beta=0.1): ...

  Without it an objective needs the anchor "ref" and sets with a negative, and
  may look at the whole batch.

  Args:
    **needs: literals, since they are read before the file is imported: fields
      of `registry.Objective`, but for those that the signature tells.

  Returns:
    A decorator that gives the function back, with `needs` as an attribute.
  """
  _check_needs(needs, lambda message, **more: errors.ConfigError(
      "config.function", message, where="mcpo_jax.objective", **more))

  def declare(loss):
    loss.needs = needs
    return loss

  return declare


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
  """Declares a kernel of one's own: what it takes is looked at now.

      @mcpo_jax.kernel
      def mine(key, state, scores, sets, *, temperature, num_negatives,
               include_preferred): ...

  It is called as `mc.draw` is and replies (KernelState, KernelInfo).

  Raises:
    ConfigError: config.function, it takes other arguments.
  """
  every = inspect.signature(function).parameters.values()
  _check_kernel_arguments(
      [p.name for p in every if p.kind is not p.KEYWORD_ONLY],
      [p.name for p in every if p.kind is p.KEYWORD_ONLY],
      lambda message, **more: errors.ConfigError(
          "config.function", message, where=name_of(function), **more))
  return function


def reward(function: Callable[..., Any]) -> Callable[..., Any]:
  """Declares a reward of one's own: what it takes is looked at now.

      @mcpo_jax.reward
      def short(prompts, completions, **columns):
        return [-len(text) for text in completions]

  Raises:
    ConfigError: config.function, it takes other arguments.
  """
  parameters = inspect.signature(function).parameters.values()
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    raise errors.ConfigError(
        "config.function", "a reward takes **columns", where=name_of(function),
        want="def my_reward(prompts, completions, **columns)")
  return function


def name_of(function: Callable[..., Any]) -> str:
  """What a config calls a function: "module:function".

  Raises:
    ConfigError: config.function, it stands in no module.
  """
  name = getattr(function, "__qualname__", "")
  if not name.isidentifier():
    raise errors.ConfigError(
        "config.function", "only a function of a module or cell has a name "
        "that a later session finds", where=name or repr(function),
        want="def my_function, outside of any other")
  return f"{function.__module__}:{name}"


def find(
    name: str, *, folders: Sequence[str | pathlib.Path] = (), where: str
) -> Source:
  """Finds a function without importing its file.

  Args:
    name: "my_file:my_function"; the file is a path without ".py", a module, or
      `__main__`.
    folders: where else to look for the file than in the current folder.
    where: dotted config key that holds the name, for errors.

  Raises:
    ConfigError: config.range, no such file or function; config.function, the
      file is no Python.
  """
  file, _, function = name.rpartition(":")
  if not file or not function.isidentifier():
    raise errors.ConfigError(
        "config.range", "not a function of a file", where=where, got=name,
        want="my_file:my_function")
  if file == "__main__":
    return _find_running(function, where)
  place, path = _find_file(file, folders)
  if path is None:
    raise errors.ConfigError(
        "config.range", "no such file or module", where=where, got=file,
        want=f"{file}.py in " + " or ".join(
            str(pathlib.Path(folder).resolve()) for folder in (".", *folders)))
  text = path.read_bytes()
  try:
    tree = ast.parse(text)
  except (SyntaxError, ValueError) as e:
    line = getattr(e, "lineno", None) or 1
    raise errors.ConfigError(
        "config.function", f"not Python: {e}", where=f"{path}:{line}") from e
  known = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
  if function not in known:
    raise errors.ConfigError(
        "config.range", f"no such function in {path}", where=where,
        got=function, want=" | ".join(known) or "def " + function,
        hint=errors.nearest(function, known))
  return Source(f"{place}:{function}", path, hashlib.sha256(text).hexdigest(),
                known[function])


def check_kernel(name: str) -> Source:
  """Finds a kernel of the user's own and looks at what it takes.

  It is called as kernel(key, state, scores, sets, *, temperature,
  num_negatives, include_preferred) -> (KernelState, KernelInfo); see `mc.draw`.

  Raises:
    ConfigError: config.range, config.function.
  """
  source = find(name, where="kernel.strategy")
  arguments = source.function.args
  _check_kernel_arguments(
      [a.arg for a in (*arguments.posonlyargs, *arguments.args)],
      [a.arg for a in arguments.kwonlyargs],
      lambda message, **more: source.error(
          message, source.function.lineno, **more))
  return source


def _check_kernel_arguments(first, named, error):
  """Raises error(message, got=, want=) unless they are those of a kernel."""
  if tuple(first) != KERNEL_ARGUMENTS or set(named) != set(KERNEL_SETTINGS):
    raise error(
        "takes other arguments", got=f"{', '.join(first)}, *, "
        f"{', '.join(named)}" if named else ", ".join(first),
        want=f"{', '.join(KERNEL_ARGUMENTS)}, *, {', '.join(KERNEL_SETTINGS)}")


def source_hash(name: str) -> str | None:
  """SHA-256 of the file of "module:function", of a cell's function that of its
  own text; None of what is no Python file."""
  file = name.rpartition(":")[0]
  if file == "__main__":
    return find(name, where="__main__").sha256
  path = _find_file(file, ())[1]
  return path and hashlib.sha256(path.read_bytes()).hexdigest()


def read_settings(
    source: Source, positional: tuple[str, ...]
) -> dict[str, registry.Setting]:
  """The settings of a function: its keyword-only arguments, but `progress`.

  Args:
    source: of `find`.
    positional: the arguments that come before the settings.

  Raises:
    ConfigError: config.function, with the line.
  """
  arguments, line = source.function.args, source.function.lineno
  first = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
  want = f"def {source.function.name}({', '.join(positional)}, *, ...)"
  if len(first) > len(positional):
    raise source.error("settings must be keyword-only: put a * before them",
                       line, got=first[len(positional)], want=want)
  if len(first) < len(positional) or arguments.defaults:
    raise source.error("takes other arguments", line, got=first, want=want)
  got = arguments.vararg or arguments.kwarg
  if got:
    raise source.error("every setting must be named", line, got=got.arg,
                       want=want)
  settings = {}
  for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
    if argument.arg == "progress":
      continue
    if default is None:
      raise source.error("a setting needs a default", argument.lineno,
                         got=argument.arg, want=f"{argument.arg}=...")
    setting = _as_setting(_literal(default))
    if setting is None:
      raise source.error(
          f"the default of {argument.arg} is read without running the file",
          default.lineno, got=ast.unparse(default),
          want="a finite number, True, False, a text or None")
    settings[argument.arg] = setting
  return settings


def read_objective(name: str) -> registry.Objective:
  """The registry entry of an objective of the user's own.

  Raises:
    ConfigError: config.range, config.function.
  """
  source = find(name, where="objective.name")
  settings = read_settings(source, OBJECTIVE_ARGUMENTS)
  needs = _read_needs(source)
  for kind in _PLACES:
    if needs.get(kind):
      needs[kind] = find(
          needs[kind], folders=(source.path.parent,),
          where=f"{source.path}, {kind}").place
  if needs.get("strategies"):
    needs.setdefault("strategy", needs["strategies"][0])
  names = [a.arg for a in source.function.args.kwonlyargs]
  # Wrongly taken as separable, a loss over the batch would silently see parts
  # of it.
  needs.setdefault("separable", False)
  return registry.Objective(
      source.place, settings, progress="progress" in names, **needs)


def load(place: str) -> Callable[..., Any]:
  """The function at "module:function" or "folder/file.py:function".

  Raises:
    ConfigError: config.function, its file cannot be imported or has no such
      function.
  """
  file, _, name = place.rpartition(":")
  try:
    if file.endswith(".py"):
      path = pathlib.Path(file)
      module = _run_file(path, path.read_bytes())
    else:
      module = importlib.import_module(file)
    function = getattr(module, name)
    if not callable(function):
      raise TypeError(f"a {type(function).__name__} cannot be called")
  except errors.McpoError:
    raise
  except Exception as e:  # the file is the user's: anything may come
    raise errors.ConfigError(
        "config.function", f"cannot be loaded: {type(e).__name__}: {e}",
        where=place) from e
  return function


def needs_of(function: Callable[..., Any]) -> registry.Objective:
  """What a function needs: as registered, as declared, or by default."""
  place = f"{function.__module__}:{function.__qualname__}"
  for entry in registry.OBJECTIVES.values():
    if entry.place == place:
      return entry
  needs = {"separable": False} | getattr(function, "needs", {})
  return registry.Objective(place, {}, **needs)


def _find_running(function, where) -> Source:
  """A function of the notebook or script that runs, as it stands now."""
  found: Any = getattr(sys.modules["__main__"], function, None)
  try:
    text = textwrap.dedent(inspect.getsource(found))
    tree = ast.parse(text).body[0]
    if not isinstance(tree, ast.FunctionDef):
      raise TypeError(f"a {type(found).__name__}")
  except (TypeError, OSError, SyntaxError) as e:
    raise errors.ConfigError(
        "config.range", "no such function in what runs", where=where,
        got=function, want=f"def {function} in a cell, or my_file:{function}",
        hint="run its cell before this one") from e
  return Source(f"__main__:{function}", pathlib.Path("__main__"),
                hashlib.sha256(text.encode()).hexdigest(), tree)


def _find_file(file, folders):
  """(place, path) of a file in the folders or of a module, or (.., None)."""
  for folder in (".", *folders):
    path = pathlib.Path(folder) / f"{file.removesuffix('.py')}.py"
    if path.is_file():
      return str(path.resolve()), path
  return file, _module_file(file)


def _module_file(name):
  """The file of a module; importlib.util would import the packages above."""
  parts, search = name.split("."), None
  for i in range(len(parts)):
    if i and not search:
      return None
    full = ".".join(parts[:i + 1])
    specs = (finder.find_spec(full, search) for finder in sys.meta_path)
    spec = next(filter(None, specs), None)
    if spec is None:
      return None
    search = spec.submodule_search_locations
  origin = spec.origin or ""
  return pathlib.Path(origin) if origin.endswith(".py") else None


@functools.cache
def _run_file(path, text):
  """The module of a file: one for each of its texts, so that a changed file
  is run again."""
  name = f"{path.stem}_{hashlib.sha256(text).hexdigest()}"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # dataclasses look themselves up
  # Not by the loader: after two changes within a second it would run what it
  # has compiled of the text before.
  exec(compile(text, str(path), "exec"), module.__dict__)
  return module


def _read_needs(source):
  """The keywords of the decorator `objective`, empty without it."""
  found = [node for node in source.function.decorator_list
           if isinstance(node, ast.Call) and "objective" in (
               getattr(node.func, "attr", ""), getattr(node.func, "id", ""))]
  if not found:
    return {}
  needs, line = {}, found[0].lineno
  for keyword in found[0].keywords:
    needs[keyword.arg] = _literal(keyword.value)
    if needs[keyword.arg] is _UNREAD:
      raise source.error(
          f"the {keyword.arg} that it needs are read without running the file",
          keyword.value.lineno, got=ast.unparse(keyword.value),
          want="a literal")
  _check_needs(needs, lambda message, **more: source.error(
      message, line, **more))
  return {name: tuple(value) if name in _LISTS else value
          for name, value in needs.items()}


def _check_needs(needs, error):
  """Raises error(message, got=, want=, hint=) on what cannot be declared."""
  known = (*_WORDS, *_FLAGS, *_PLACES)
  for name, value in needs.items():
    if name not in known:
      raise error("an objective cannot declare it", got=name,
                  want=" | ".join(known), hint=errors.nearest(str(name), known))
    if name in _FLAGS and not isinstance(value, bool):
      raise error(name, got=value, want="True or False")
    if name in _PLACES and not isinstance(value, str):
      raise error(name, got=value, want="my_file:my_function")
    if name in _LISTS and not isinstance(value, (tuple, list)):
      raise error(name, got=value, want="a tuple of words")
    for word in value if name in _LISTS else (value,) * (name in _WORDS):
      if word not in _WORDS[name]:
        raise error(name, got=word, want=" | ".join(_WORDS[name]),
                    hint=errors.nearest(str(word), _WORDS[name]))


_UNREAD = object()


def _literal(node):
  """The value of a literal, `_UNREAD` of anything else."""
  try:
    return ast.literal_eval(node)
  except ValueError:
    return _UNREAD


def _as_setting(default):
  """The setting of a default: values of the same kind; None if of no kind."""
  if isinstance(default, bool):
    return registry.Setting(default, choices=(True, False))
  if isinstance(default, (int, float)) and math.isfinite(default):
    return registry.Setting(default, -math.inf, open_low=True)
  if isinstance(default, str):
    return registry.Setting(default)
  return registry.Setting(optional=True) if default is None else None
