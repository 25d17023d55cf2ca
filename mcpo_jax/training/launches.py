"""What ran a workdir, in its launches.jsonl: a line per start

  {"time": Unix seconds, "command": words, "versions": {name: text}, "commit",
   "devices": {"kind", "platform", "count"}, "processes", "cores", "system"}

and after it, where the stages of training ended by an error,

  {"time", "error": as it is told}
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from mcpo_jax import commit, errors, hosts, settings, watch

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint",
             "transformers", "tokenizers", "numpy")


def record(workdir: pathlib.Path) -> None:
  """Adds this launch to the workdir's launches.jsonl."""
  _add(workdir, describe())


@contextlib.contextmanager
def errors_told(workdir: pathlib.Path) -> Iterator[None]:
  """Goes round the stages; an error is noted, and goes on its way. So is that
  a run hangs."""

  def note(error):
    with contextlib.suppress(errors.ResourceError):  # the disk may have failed
      _add(workdir, {"time": time.time(), "error": settings.redact(error)})

  with watch.noted(note):
    try:
      yield
    except Exception as e:
      note(str(e) if isinstance(e, errors.McpoError)
           else f"{type(e).__name__}: {e}")
      raise


def _add(workdir: pathlib.Path, line: dict[str, Any]) -> None:
  if hosts.is_first():
    commit.append(workdir / "launches.jsonl", json.dumps(line) + "\n")


def describe() -> dict[str, Any]:
  """This process and what it runs on; the words of the command without what
  looks like a secret."""
  import jax  # who asks for `commit_of_code` alone needs none

  devices = jax.devices()
  return {
      "time": time.time(),
      "command": [settings.redact(word) for word in sys.argv[1:]],
      "versions": {"python": platform.python_version()} | {
          name: importlib.metadata.version(name) for name in _PACKAGES},
      "commit": commit_of_code(),
      "devices": {"kind": devices[0].device_kind,
                  "platform": devices[0].platform, "count": len(devices)},
      "processes": hosts.count(),
      "cores": os.cpu_count(),
      "system": f"{platform.system()} {platform.machine()}",
  }


def commit_of_code() -> str:
  """As `git describe` has it, with "-dirty" after changes; "" outside git."""
  try:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True,
        text=True, cwd=pathlib.Path(__file__).parent)
  except OSError:  # no git here
    return ""
  return described.stdout.strip()
