"""The scripts parse and refuse clearly; a required test cannot be skipped."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")),
           *sorted((ROOT / ".ci").iterdir())]


def _run(*command, **environment):
  return subprocess.run(
      command, capture_output=True, text=True, env=os.environ | environment
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_parses_and_stops_at_the_first_error(script):
  assert _run("bash", "-n", str(script)).returncode == 0
  lines = script.read_text().split("\n")
  assert lines[0] == "#!/usr/bin/env bash"
  assert "set -euo pipefail" in lines


def test_run_local_names_the_variable_that_is_missing():
  done = _run("bash", str(ROOT / "launch" / "run_local.sh"), CONFIG="")
  assert done.returncode != 0
  assert "CONFIG: the config file" in done.stderr


def test_setup_refuses_an_old_python(tmp_path):
  for name in ("python", "python3", *(f"python3.{v}" for v in (11, 12, 13))):
    (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / name).chmod(0o755)
  done = _run(
      "bash",
      str(ROOT / "launch" / "setup.sh"),
      PATH=f"{tmp_path}:/usr/bin:/bin",
      MCPO_VENV=str(tmp_path / "venv"),
      PYTHON="",
  )
  assert done.returncode == 1
  assert "no Python 3.11 or newer found" in done.stderr
  assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    "require, outcome", [("", "2 skipped"), ("torch,shared", "1 error")]
)
def test_a_required_skip_is_a_failure(tmp_path, require, outcome):
  conftest = (ROOT / "tests" / "conftest.py").read_text()
  (tmp_path / "conftest.py").write_text(conftest)
  (tmp_path / "inner_test.py").write_text(
      "import pytest\n"
      "def test_other():\n"
      "  pytest.skip('for another reason')\n"
      "def test_data(shared):\n"
      "  pass\n"
  )
  done = _run(
      *(sys.executable, "-m", "pytest", "-q"),
      f"--rootdir={tmp_path}",
      "--override-ini=python_files=*_test.py",
      str(tmp_path / "inner_test.py"),
      MCPO_REQUIRE=require,
      MCPO_SHARED=str(tmp_path / "none"),
  )
  assert outcome in done.stdout, done.stdout
