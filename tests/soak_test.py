"""Fifteen kills, at named points and random times: nothing is lost."""

import ast
import collections
import os
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
  assert re.search(  # some points need a kill at another one before
      r"\| all \| 1[5-9] \| 1[2-6] \| 3 \| [1-9]\d* \| 0 \|", text), text


def test_exit_codes_are_those_of_the_processes_however_many_threads_ask():
  done = subprocess.run([sys.executable, "-c", """
import concurrent.futures, multiprocessing, os, soak
fork = multiprocessing.get_context("forkserver").Process
def lane(number):
  return {soak.ended(soak.started(fork(target=os._exit, args=(number,))))
          for _ in range(60)}
if __name__ == "__main__":
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    print(*pool.map(lane, (3, 4, 5)))
"""], cwd=run_cases.ROOT / "benchmarks", check=True, capture_output=True,
      text=True, env=os.environ | {"PYTHONPATH": str(run_cases.ROOT)})
  assert done.stdout == "{3} {4} {5}\n"


def test_every_point_of_the_package_is_one_where_a_phase_can_be_killed():
  known = subprocess.run(  # by itself: it sets the environment
      [sys.executable, "-c",
       "import soak; print(*soak.points_of(soak.PHASES))"],
      cwd=run_cases.ROOT / "benchmarks", check=True, capture_output=True,
      text=True, env=os.environ | {"PYTHONPATH": str(run_cases.ROOT)})
  assert set(known.stdout.split()) == points_of_the_package()


def points_of_the_package():
  """Of all `faults.point`, and of functions whose argument `point` is the
  first half of the names."""
  functions, calls = {}, collections.defaultdict(list)
  for path in (run_cases.ROOT / "mcpo_jax").rglob("*.py"):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        names = [a.arg for a in node.args.kwonlyargs]
        if "point" in names:
          functions[node.name] = node, node.args.kw_defaults[
              names.index("point")].value
      if isinstance(node, ast.Call):
        calls[getattr(node.func, "attr", getattr(node.func, "id", None))
              ].append(node)

  def value(call):
    return next((k.value for k in call.keywords if k.arg == "point"), None)

  def halves(name):  # the second ones
    node, _ = functions[name]
    found = {x.args[0].values[1].value for x in ast.walk(node)
             if is_point(x) and isinstance(x.args[0], ast.JoinedStr)}
    for x in ast.walk(node):
      if isinstance(x, ast.Call) and isinstance(value(x), ast.Name):
        found |= halves(x.func.id)
    return found

  points = set()
  for call in calls["point"] + calls["to_thread"]:
    if "faults.point" in map(ast.unparse, (call.func, call.args[0])):
      points |= {x.value for arg in call.args for x in ast.walk(arg)
                 if isinstance(x, ast.Constant)
                 and not isinstance(arg, ast.JoinedStr)}
  for name, (_, default) in functions.items():
    for call in calls[name]:
      first = value(call)
      if not isinstance(first, ast.Name):
        points |= {(first.value if first else default) + half
                   for half in halves(name)}
  return points


def is_point(node):
  return isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point"
