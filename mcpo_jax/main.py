"""Command line: reads the flags and the config, calls one verb.

Nothing here imports JAX before the config has been checked, so a wrong flag or
key answers within two seconds.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import traceback
from typing import Any, NamedTuple, NoReturn

from absl import logging

from mcpo_jax import (
    config_file,
    errors,
    hosts,
    memory,
    preempt,
    settings,
    user_code,
    watch,
)

VERBS = {
    "train": "run the stages of a config, or resume them",
    "evaluate": "metrics of a trained workdir on held-out prompts",
    "generate": "candidates from a model to JSON Lines",
    "serve": "the generation service over HTTP",
    "export": "a folder that transformers loads (--out=DIR)",
    "audit": "the data report, before any training",
    "score": "fill the reference cache ahead of training",
    "compare": "a table of settings beside each other, over seeds",
    "report": "a page of the run in --workdir, or of several: --workdir=A,B",
    "replay": "what failed in --workdir once more, on a copy of it",
    "plan": "memory, FLOPs and cost on --topology, before any training",
}
SHARED_VERBS = ("train", "evaluate", "generate", "export", "score")
FLAGS = {
    "config": "a Python file with get_config()",
    "workdir": "where the run keeps its files; the same one resumes",
    "out": "export: the folder, or a place gs://...; report: the page, if not "
           "WORKDIR/report.html",
    "topology": "plan: devices to plan for, such as v5e:4x4 or h200:8",
    "price-per-chip-hour": "plan, report: what a chip costs, for that of a run",
    "profile": "train: a trace of a few updates in <workdir>/profile",
    "debug": "show tracebacks",
    "help": "this text",
}
SWITCHES = ("profile", "debug", "help")  # flags without a value


class CommandLine(NamedTuple):
  """What was typed."""

  verb: str
  flags: dict[str, str]
  overrides: list[tuple[str, str]]  # dotted key, text


def usage() -> str:
  """The help text."""
  verbs = "\n".join(f"  {name:10} {text}" for name, text in VERBS.items())
  flags = "\n".join(f"  --{name:20} {text}" for name, text in FLAGS.items())
  return (f"python -m mcpo_jax VERB --config=FILE --workdir=DIR "
          f"[--config.group.field=value ...]\n\n{verbs}\n\n{flags}")


def parse(argv: list[str]) -> CommandLine:
  """Splits the arguments; `--flag value` is read as `--flag=value`.

  Raises:
    ConfigError: cli.verb, cli.flag.
  """
  verb, flags, overrides, rest = "", {}, [], list(argv)
  while rest:
    word = rest.pop(0)
    if not word.startswith("-"):
      if verb:
        raise errors.ConfigError("cli.flag", "unexpected word", where=word)
      verb = word
      continue
    name, has_value, value = word.lstrip("-").partition("=")
    if name == "h":
      name = "help"
    if name in SWITCHES and not has_value:
      flags[name] = "true"
      continue
    if name not in FLAGS and not name.startswith("config."):
      raise errors.ConfigError("cli.flag", "unknown flag", where=f"--{name}",
                               hint=errors.nearest(name, FLAGS))
    if name in SWITCHES:
      raise errors.ConfigError("cli.flag", "takes no value", where=f"--{name}",
                               got=value)
    if not has_value:
      if not rest or rest[0].startswith("--"):
        raise errors.ConfigError("cli.flag", "no value", where=f"--{name}",
                                 hint=f"--{name}=VALUE")
      value = rest.pop(0)
    if name.startswith("config."):
      overrides.append((name.removeprefix("config."), value))
    else:
      flags[name] = value
  if "help" not in flags and verb not in VERBS:
    raise errors.ConfigError("cli.verb", "no such verb" if verb else "no verb",
                             got=verb or None, want=" | ".join(VERBS),
                             hint=errors.nearest(verb, VERBS))
  return CommandLine(verb, flags, overrides)


def read_config(command: CommandLine) -> dict[str, Any]:
  """The resolved config of a command: file, overrides, checks, defaults.

  Without --config it is that of the run in the workdir, with the overrides.

  Raises:
    ConfigError or an ErrorGroup of them; CheckpointError: ckpt.none.
  """
  workdir = command.flags.get("workdir")
  saved = pathlib.Path(workdir or "", "config.json")
  if command.verb in ("evaluate", "export") and workdir and (
      not saved.is_file()):
    raise errors.CheckpointError(
        "ckpt.none", "no run lies in this workdir", where=workdir,
        hint="run `train` first")
  if "config" not in command.flags:
    if workdir and saved.is_file():
      config = settings.check_saved(settings.read_saved(saved), saved)
      if not command.overrides:
        return config
      return config_file.resolve(  # the default one knows the fields' types
          config_file.load("configs/default.py"),
          [*settings.flatten(config).items(), *command.overrides])
    raise errors.ConfigError("config.missing", "no config given",
                             where="--config", hint="--config=configs/FILE.py")
  return config_file.resolve(
      config_file.load(command.flags["config"]), command.overrides)


def check_same(config: dict[str, Any]) -> None:
  """Compares config and code with those of the first process.

  Raises:
    ConfigError: hosts.config, hosts.code, with the difference.
  """
  if hosts.count() == 1:
    return
  hosts.check_same("hosts.config", "the config", settings.flatten(config),
                   hint="start all of them by the same line")
  hosts.check_same("hosts.code", "the code", code_of(config),
                   hint="give all of them the same checkout and environment")


def code_of(config: dict[str, Any]) -> dict[str, str | None]:
  """Hash of the package, of each file of the user's own that the config names,
  and the versions of what computes."""
  package = pathlib.Path(__file__).parent
  whole = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
  names = re.findall(r"[\w./]+:[A-Za-z_]\w*", " ".join(
      str(config[group]["strategy" if group == "kernel" else "name"])
      for group in ("objective", "kernel", "reward")))
  return {"mcpo_jax": whole.hexdigest()} | {
      name: user_code.source_hash(name) for name in names} | {
      name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


def run(argv: list[str]) -> None:
  """Parses and calls the verb. Raises McpoError."""
  command = parse(argv)
  if "help" in command.flags:
    print(usage())
    return
  workdir = command.flags.get("workdir")
  if command.verb not in ("audit", "serve", "plan") and (
      not workdir):
    raise errors.ConfigError("cli.flag", "this verb needs a workdir",
                             where="--workdir", hint="--workdir=runs/NAME")
  if command.verb != "report" and (
      command.verb == "export") != ("out" in command.flags):
    raise errors.ConfigError("cli.flag", "goes with the verb export",
                             where="--out", hint="export --out=DIR")
  if "profile" in command.flags and command.verb != "train":
    raise errors.ConfigError("cli.flag", "goes with the verb train",
                             where="--profile")
  if command.verb in SHARED_VERBS:
    hosts.join()
    preempt.follow()
  elif hosts.expected():
    raise errors.ConfigError(
        "hosts.verb", "this verb runs in one process", where="MCPO_COORDINATOR",
        got=command.verb, want=" | ".join(SHARED_VERBS))
  if command.verb == "report":
    _report(command)
    return
  if command.verb == "replay":
    _check_no_config(command)
    from mcpo_jax import replay

    if not replay.replay(pathlib.Path(workdir)):
      sys.exit(1)
    return
  if command.verb == "compare":
    from mcpo_jax.compare import verb

    typed = [f"--config.{key}={text}" for key, text in command.overrides]
    verb.compare(
        lambda more: read_config(command._replace(
            overrides=[*command.overrides, *more])),
        [f"--config={command.flags.get('config')}", *typed],
        pathlib.Path(workdir))
    return
  if (command.verb == "plan") != ("topology" in command.flags):
    raise errors.ConfigError("cli.flag", "goes with the verb plan",
                             where="--topology", hint="plan --topology=v5e:4x4")
  config = read_config(command)
  if command.verb == "plan":
    _plan(config, command.flags)
    return
  check_same(config)
  if command.verb in SHARED_VERBS:
    preempt.allow(config["checkpoint"]["grace_seconds"])
    hosts.allow(config["watchdog"]["work_seconds"])
    watch.start(**config["watchdog"] | {  # the last save and the next
        "save_seconds": 2 * config["checkpoint"]["timeout_seconds"]})
  if command.verb in ("audit", "score") and not config["data"]["path"]:
    raise errors.ConfigError("config.missing", "this verb needs data",
                             where="data.path", hint="--config.data.path=FILE")
  if command.verb == "generate" and not config["generate"]["data_path"]:
    raise errors.ConfigError(
        "config.missing", "this verb needs prompts",
        where="generate.data_path", hint="--config.generate.data_path=FILE")
  if command.verb == "serve":
    from mcpo_jax.generation import token

    token.read_token(config["serve"]["token_path"])
    if not (workdir or config["model"]["path"]):
      raise errors.ConfigError(
          "config.missing", "there is nothing to serve", where="model.path",
          hint="--config.model.path=FOLDER, or --workdir of a trained run")
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  from mcpo_jax import verbs

  more = {}
  if command.verb == "train":
    more = {"profile": "profile" in command.flags}
  elif command.verb == "export":
    out = command.flags["out"]
    more = {"out": out.rstrip("/") if "://" in out else pathlib.Path(out)}
  summary = getattr(verbs, command.verb)(
      config, pathlib.Path(workdir) if workdir else None, **more)
  if summary is not None:
    print(json.dumps(summary, indent=1), flush=True)
    numbers = [summary.get(f"score/{name}") for name in (
        "aligned", "difference", "difference_ci95_low",
        "difference_ci95_high")]
    if None not in numbers:
      logging.info("held-out score %.3f, %+.3f [%+.3f, %+.3f] to the start; a "
                   "page to look at: %s", *numbers, f"{workdir}/report.html")
  hosts.leave()


def _plan(config: dict[str, Any], flags: dict[str, str]) -> None:
  """The verb plan, which compiles for devices that are not here."""
  from mcpo_jax.planning import topology

  topology.parse(flags["topology"])
  price = _price(flags)
  topology.prepare()
  from mcpo_jax.planning import verb

  workdir = flags.get("workdir")
  verb.plan(config, flags["topology"], price,
            pathlib.Path(workdir) if workdir else None)


def _price(flags: dict[str, str]) -> float | None:
  """Of a chip for an hour, if it was given."""
  text = flags.get("price-per-chip-hour")
  try:
    return None if text is None else float(text)
  except ValueError:
    raise errors.ConfigError(
        "cli.flag", "not a number", where="--price-per-chip-hour",
        got=text) from None


def _check_no_config(command: CommandLine) -> None:
  """Of verbs for which all lies in the workdir."""
  unused = [*(f"--config.{key}" for key, _ in command.overrides),
            *(f"--{flag}" for flag in ("config", "topology")
              if flag in command.flags)]
  if unused:
    raise errors.ConfigError("cli.flag", f"the verb {command.verb} takes what "
                             "lies in the workdir", where=unused[0])


def _report(command: CommandLine) -> None:
  """The verb report, which reads workdirs and no config."""
  text = command.flags["workdir"]
  workdirs = [pathlib.Path(path) for path in dict.fromkeys(
      [text] if pathlib.Path(text).is_dir() else text.split(","))]
  _check_no_config(command)
  if len(workdirs) > 1 and "out" not in command.flags:
    raise errors.ConfigError("cli.flag", "a page of several runs needs a place",
                             where="--out", hint="--out=report.html")
  from mcpo_jax.evaluation import report

  out = pathlib.Path(command.flags.get("out", workdirs[0] / "report.html"))
  report.write_report(workdirs, out, price=_price(command.flags))
  print(out)


def _worth_showing(record) -> bool:
  """Orbax tells every step of a save, and errors that `checkpoints` raises; its
  warnings are enough, but those of every save that there is nothing to merge
  and that a host counts its own bytes."""
  if record.name == "asyncio":  # each file of a save that failed
    return "async_serialize" not in record.getMessage()
  return "orbax" not in record.pathname or (
      record.levelno == 30 and not re.search(
          "ocdbt_utils|async_io_engine", record.pathname))


def _unraisable(found) -> None:
  """Tells what could not be raised, but not what each file of a save has to
  say when the error of one has ended all."""
  if "Event loop is closed" not in str(found.exc_value):
    sys.__unraisablehook__(found)


def _fail(error: errors.McpoError, argv: list[str]) -> NoReturn:
  if "--debug" in argv:
    traceback.print_exc()
  text = settings.redact(str(error))
  if error.slug == "ckpt.timeout":  # at exit the thread that hangs is awaited
    hosts.abort(text, error.exit_code)
  print(text, file=sys.stderr)
  hosts.fail(text, error.exit_code)


def main() -> None:
  """Exit codes: 0, 2..8 by kind of error and 75 when told to stop (`errors`),
  1 for a bug, and as shells have it 130 and 143 when told twice and 141 when
  nobody reads the output."""
  argv = sys.argv[1:]
  if "serve" not in argv:  # which has nothing to save
    preempt.listen()
  sys.unraisablehook = _unraisable
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_worth_showing)
  try:
    run(argv)
    if sys.stdout:
      sys.stdout.flush()
  except errors.McpoError as e:
    _fail(e, argv)
  except KeyboardInterrupt:
    if preempt.asked() is None:
      hosts.fail("interrupted", 130)
    _fail(preempt.stopped(""), argv)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    hosts.fail("nobody reads the output", 141)
  except Exception as e:
    if ours := memory.as_ours(e):
      _fail(ours, argv)
    if hosts.count() == 1:
      raise
    traceback.print_exc()  # now: the others will end this process
    hosts.fail(f"{type(e).__name__}: {e}", 1)
