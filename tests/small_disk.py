"""A file system that is soon full, for tests."""

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def of(folder: pathlib.Path, *, megabytes: int) -> Iterator[pathlib.Path]:
  """Mounts so much memory at a new folder; a skip where that is not allowed."""
  folder.mkdir()
  done = subprocess.run(
      ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs",
       str(folder)], capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)
