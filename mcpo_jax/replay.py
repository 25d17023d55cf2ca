"""The verb replay: a failed run once more, on a copy of its workdir."""

import pathlib
import re
import shutil
import subprocess
import sys

from mcpo_jax import errors
from mcpo_jax.evaluation import workdirs


def replay(workdir: pathlib.Path) -> bool:
  """Runs the last launch that ended by an error again, by the same words, on
  the copy WORKDIR.replay, which stays. It goes on from the newest checkpoint
  that verifies, and needs the files outside that the run was given.

  Returns:
    whether it has ended by the same error; what was found may be another, as
    the bytes that are free.

  Raises:
    ConfigError: replay.none, nothing has failed here; replay.processes, it was
      a run of several.
  """
  launches = workdirs.read_launches(workdir / "launches.jsonl", [])
  failed = [one for one in launches
            if {"error", "command", "processes"} <= one.keys()]
  if not failed:
    raise errors.ConfigError(
        "replay.none", "no launch that ended by an error is known here",
        where=str(workdir / "launches.jsonl"))
  launch, told = failed[-1], failed[-1]["error"]
  if launch["processes"] > 1:
    raise errors.ConfigError(
        "replay.processes", "the run was one of several processes",
        where=str(workdir / "launches.jsonl"), got=launch["processes"],
        hint="start so many by the same words, on a copy of the workdir")
  copy = workdir.with_name(f"{workdir.name}.replay")
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(workdir, copy)
  words = launch["command"]
  at = next(i for i, word in enumerate(words) if word.startswith("--workdir"))
  words[at:at + 1 + (words[at] == "--workdir")] = [f"--workdir={copy}"]
  code = subprocess.run([sys.executable, "-m", "mcpo_jax", *words]).returncode
  again = workdirs.read_launches(copy / "launches.jsonl", [])[len(launches):]
  said = [one["error"].replace(str(copy), str(workdir))
          for one in again if "error" in one]
  same = [_named(text) for text in said] == [_named(told)]
  print(f"the run told:    {told}\nits copy told:   "
        f"{said[-1] if said else f'nothing, and ended with {code}'}\n"
        f"{'the same error' if same else 'not the same'}: {copy}")
  return same


def _named(error: str) -> str:
  """An error as it is told, without what was found; see `errors.McpoError`."""
  return re.sub(r", got .*?(?=, want | \(|$)", "", error)
