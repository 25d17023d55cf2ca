"""The verb replay: a failed run once more, on a copy of its workdir."""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from mcpo_jax import errors


def replay(workdir: pathlib.Path) -> bool:
  """Runs the last launch that ended by an error again, by the same words, on
  the copy WORKDIR.replay, which stays. It goes on from the newest checkpoint
  that verifies, and needs the files outside that the run was given.

  Returns:
    whether it has ended by the same error.

  Raises:
    ConfigError: replay.none, nothing has failed here; replay.processes, it was
      a run of several.
  """
  lines = _lines(workdir)
  failed = [i for i, line in enumerate(lines) if "error" in line]
  launched = [line for line in lines[:max(failed, default=0)]
              if "command" in line]
  if not launched:
    raise errors.ConfigError(
        "replay.none", "no launch that ended by an error is known here",
        where=str(workdir / "launches.jsonl"))
  launch, told = launched[-1], lines[failed[-1]]["error"]
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
  said = [line["error"].replace(str(copy), str(workdir))
          for line in _lines(copy)[len(lines):] if "error" in line]
  same = said == [told]
  print(f"the run told:    {told}\nits copy told:   "
        f"{said[-1] if said else f'nothing, and ended with {code}'}\n"
        f"{'the same error' if same else 'not the same'}: {copy}")
  return same


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  path = workdir / "launches.jsonl"
  return list(map(json.loads, path.read_text().splitlines())) if (
      path.exists()) else []
