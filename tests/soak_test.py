"""Fifteen kills, at named points and random times: nothing is lost."""

import re
import subprocess
import sys

import run_cases


def test_killed_runs_are_those_that_were_left_alone(tmp_path):
  done = subprocess.run(
      [sys.executable, run_cases.ROOT / "benchmarks" / "soak.py", "--kills=15",
       "--seed=1", "--phases=offline,overlapped,generate",
       f"--folder={tmp_path}", f"--out={tmp_path / 'table.md'}"],
      capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  text = (tmp_path / "table.md").read_text()
  assert re.search(r"\| all \| 15 \| 12 \| 3 \| [1-9]\d* \| 0 \|", text), text
