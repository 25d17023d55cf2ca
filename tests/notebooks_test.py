"""The notebooks run as shipped, in a kernel, and go on after a lost runtime."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import nbclient
import nbformat
import pytest
import run_cases

NOTEBOOKS = sorted((run_cases.ROOT / "notebooks").glob("*.ipynb"))
ONLINE = "your_own_reward_online"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """As one user's notebooks have: what one has tokenised or trained to start
  from, the next one takes."""
  return tmp_path_factory.mktemp("cache")


def _client(path: pathlib.Path, folder: pathlib.Path):
  """A client of a notebook whose workdir lies in the folder."""
  folder.mkdir(exist_ok=True)
  return nbclient.NotebookClient(
      nbformat.read(path, 4), timeout=900, kernel_name="python3",
      resources={"metadata": {"path": str(folder)}})


def _environment(cache) -> dict[str, str]:
  """As a user has it: one device, compiled to be fast."""
  return run_cases.environment(cache, XLA_FLAGS="")


def _printed(notebook, name: str = "stdout") -> list[str]:
  """What each cell wrote to a stream."""
  return ["".join(out.text for out in cell.get("outputs", ())
                  if out.get("name") == name) for cell in notebook.cells]


def _first_cell(path: pathlib.Path) -> str:
  return next(cell.source for cell in nbformat.read(path, 4).cells
              if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_ships_bare_and_says_how_long_it_takes(path):
  notebook = nbformat.read(path, 4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert not any(cell.outputs or cell.execution_count for cell in code)
  first = notebook.cells[0].source
  assert re.search(r"\d+ s of CPU time", first) and "Colab" in first
  assert '"google.colab" in sys.modules' in code[0].source
  assert code[0].source == _first_cell(NOTEBOOKS[0])


def test_on_colab_the_first_cell_installs_a_clone(tmp_path):
  """With Colab's module, its folder elsewhere and a python that only tells
  what it was asked."""
  source, content = tmp_path / "source", tmp_path / "content"
  for name in ("mcpo_jax", "configs"):
    shutil.copytree(run_cases.ROOT / name, source / name)
  git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=b"]
  for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
    subprocess.run([*git, *words], check=True)
  content.mkdir()
  python = tmp_path / "python"
  python.write_text(f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/asked'\n")
  python.chmod(0o755)
  code = _first_cell(NOTEBOOKS[0]).replace("/content", str(content))
  told = ("import sys, unittest.mock as mock;"
          "sys.modules['google.colab'] = mock.MagicMock();"
          f"sys.executable = {str(python)!r}\n{code}")
  run = lambda text: subprocess.run(
      [sys.executable, "-c", f"{text}\nimport mcpo_jax\n"
       "print(mcpo_jax.__file__)"],
      cwd=content, text=True, capture_output=True)
  assert "the address of your copy" in run(told).stderr
  told = re.sub("https:.*OWNER/mcpo_jax", str(source), told)
  for _ in range(2):  # all cells once more
    done = run(told)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{content}/mcpo_jax/mcpo_jax/__init__.py\n"
  asked = (tmp_path / "asked").read_text().splitlines()
  assert len(asked) == 2
  assert asked[0].startswith(f"-m pip install --quiet {content}/mcpo_jax")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_cells_run_as_shipped(path, tmp_path, cache):
  notebook = _client(path, tmp_path).execute(env=_environment(cache))
  outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
  assert sum("image/png" in out.get("data", {}) for out in outputs) >= 1
  if (tmp_path / "runs").exists():
    assert "preference: 100%" in "".join(_printed(notebook, "stderr"))


@pytest.mark.nightly
def test_interrupted_then_killed_it_ends_as_if_nothing_had_happened(tmp_path):
  path = run_cases.ROOT / "notebooks" / f"{ONLINE}.ipynb"
  env = _environment(tmp_path / "cache")
  client = _client(path, tmp_path / "broken")
  cells = list(enumerate(client.nb.cells))
  number, train = next(
      (i, cell) for i, cell in cells if "mcpo_jax.train(" in cell.source)
  log = tmp_path / "broken/runs/own_reward/metrics.jsonl"

  def run(source):
    cell = nbformat.v4.new_code_cell(source)
    client.nb.cells.append(cell)
    return client.execute_cell(cell, len(client.nb.cells) - 1)

  # Three updates a round: it waits in the fourth round and dies in a later one.
  with client.setup_kernel(
      env=env | {"MCPO_FAULT": "online.scored@4:sleep=900"}):
    pid = int(run("import os; print(os.getpid())").outputs[0].text)

    def interrupt():
      while not (log.exists() and any(
          row["stage"] == "preference" and row["step"] == 9
          for row in map(json.loads, log.read_text().splitlines()))):
        time.sleep(0.05)
      os.kill(pid, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    for i, cell in cells[:number]:
      client.execute_cell(cell, i)
    with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
      client.execute_cell(train, number)
    assert caught.value.ename == "KeyboardInterrupt"
    # The kernel lives. Again, and this time the runtime is lost.
    run("os.environ['MCPO_FAULT'] = 'online.scored@7'")
    with pytest.raises(nbclient.exceptions.DeadKernelError):
      client.execute_cell(train, number)
  assert not (log.parent / "preference" / "result.json").exists()

  resumed = _client(path, tmp_path / "broken").execute(env=env)
  whole = _client(path, tmp_path / "whole").execute(env=env)
  read = lambda name: json.loads(
      (tmp_path / name / "runs/own_reward/summary.json").read_text())
  assert read("broken") == read("whole")
  assert _printed(resumed)[number + 1:] == _printed(whole)[number + 1:]
  assert "preference: 100%" in "".join(_printed(whole, "stderr"))
  assert read("whole")["score/difference_ci95_low"] > 0
