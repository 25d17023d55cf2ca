"""The scripts parse and refuse clearly; a required test cannot be skipped."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")),
           *sorted((ROOT / ".ci").iterdir())]


def _run(*command, **environment):
  return subprocess.run(
      command, capture_output=True, text=True, env=os.environ | environment
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_parses_and_stops_at_the_first_error(script):
  checker = pathlib.Path(sys.executable).parent / "shellcheck"
  done = _run(str(checker), str(script))
  assert done.returncode == 0, done.stdout
  lines = script.read_text().split("\n")
  assert lines[0] == "#!/usr/bin/env bash"
  assert "set -euo pipefail" in lines


@pytest.mark.parametrize("script, given, message", [
    ("run_local", {"CONFIG": ""}, "CONFIG: the config file"),
    ("run_local", {"CONFIG": "c", "WORKDIR": ""}, "WORKDIR: the folder"),
    ("tpu_pod", {"TPU_NAME": ""}, "TPU_NAME: the name of the TPU"),
    ("tpu_pod", {"TPU_NAME": "t", "ZONE": ""}, "ZONE: its zone"),
    ("gke", {"NAME": "n", "IMAGE": "i", "CONFIG": ""}, "CONFIG: the config"),
    ("slurm", {"SLURM_SUBMIT_DIR": ""}, "call this by sbatch"),
    ("slurm", {"SLURM_SUBMIT_DIR": ".", "CONFIG": ""}, "CONFIG: the config"),
])
def test_a_script_names_the_variable_that_is_missing(script, given, message):
  done = _run("bash", str(ROOT / "launch" / f"{script}.sh"), **given)
  assert done.returncode != 0
  assert message in done.stderr


@pytest.fixture
def told(tmp_path):
  """The environment of a script in which python, srun and gcloud write what
  they are told to the file `told`; python exits with its process id."""
  for name in ("python", "srun", "gcloud"):
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$2" = mcpo_jax.supervise ]; then\n'
        f'  PYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n'
        "fi\n"
        'echo "$MCPO_COORDINATOR $MCPO_NUM_PROCESSES $MCPO_PROCESS_ID $*"'
        f' >> "{tmp_path}/told"\n'
        'exit "${MCPO_PROCESS_ID:-0}"\n')
    path.chmod(0o755)
  shutil.copy(ROOT / "requirements.txt", tmp_path / "installed.txt")
  shutil.copy(ROOT / "pyproject.toml", tmp_path / "installed-cuda.toml")
  return {"MCPO_VENV": str(tmp_path), "CONFIG": "c.py", "WORKDIR": "a run",
          "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


LINE = "-m mcpo_jax train --config=c.py --workdir=a run --config.seed=1"


def test_run_local_starts_processes_that_know_their_place(told, tmp_path):
  done = _run("bash", str(ROOT / "launch" / "run_local.sh"),
              "--config.seed=1", PROCESSES="3", PORT="8000", **told)
  assert done.returncode == 2  # of the last that failed
  assert sorted((tmp_path / "told").read_text().splitlines()) == [
      f"127.0.0.1:8000 3 {i} {LINE}" for i in range(3)]


def test_slurm_leaves_the_place_of_a_process_to_jax(told, tmp_path):
  done = _run("bash", str(ROOT / "launch" / "slurm.sh"), "--config.seed=1",
              SLURM_SUBMIT_DIR=str(ROOT), **told)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "told").read_text() == (
      f"auto   --kill-on-bad-exit=1 {tmp_path}/bin/python "
      f"-m mcpo_jax.supervise -- {tmp_path}/bin/python {LINE}\n")


def test_all_workers_of_a_tpu_get_the_same_line(told, tmp_path):
  done = _run("bash", str(ROOT / "launch" / "tpu_pod.sh"), "--config.seed=1",
              TPU_NAME="t", ZONE="z", **told)
  assert done.returncode == 0, done.stderr
  (text,) = (tmp_path / "told").read_text().splitlines()
  assert "tpu-vm ssh t --zone=z --worker=all" in text
  assert text.endswith(
      "--command=cd mcpo_jax && MCPO_COORDINATOR=auto EXTRA=tpu CONFIG=c.py "
      "WORKDIR=a\\ run bash launch/run_local.sh --config.seed=1")


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


@pytest.mark.parametrize("claim", ["runs", ""])
def test_a_jobset_runs_the_same_line_on_every_host(claim):
  flags = ["--config.objective.name=a,b*0.5", '--config.reward.name="x\\y"']
  done = _run("bash", str(ROOT / "launch" / "gke.sh"), *flags, NAME="e2e",
              IMAGE="registry/mcpo_jax:1", CLAIM=claim,
              CONFIG="configs/e2e.py",
              WORKDIR="/runs/a run", TPU="tpu-v5-lite-podslice",
              TOPOLOGY="4x4", HOSTS="4", SLICES="2")
  assert done.returncode == 0, done.stderr
  jobs = yaml.safe_load(done.stdout)
  assert jobs["metadata"]["annotations"] == {
      "alpha.jobset.sigs.k8s.io/exclusive-topology":
          "cloud.google.com/gke-nodepool"}
  job = jobs["spec"]["replicatedJobs"][0]
  assert job["replicas"] == 2
  job = job["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4
  # What these end with would end so again: mistakes, and a loss not finite.
  assert jobs["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
  rule = job["podFailurePolicy"]["rules"][0]
  assert (rule["action"], rule["onExitCodes"]["values"]) == (
      "FailJob", [2, 3, 4, 5, 8])
  (container,) = job["template"]["spec"]["containers"]
  assert container["args"] == flags
  given = {one["name"]: one["value"] for one in container["env"]}
  assert given == {"MCPO_COORDINATOR": "auto", "CONFIG": "configs/e2e.py",
                   "WORKDIR": "/runs/a run"}
  volumes = job["template"]["spec"].get("volumes", [])
  assert [one["persistentVolumeClaim"]["claimName"] for one in volumes] == (
      [claim] if claim else [])
  assert len(container.get("volumeMounts", [])) == len(volumes)


def test_the_image_holds_what_its_script_needs():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split()
          if line.startswith("!")}
  copied = [name for line in text.split("\n") if line.startswith("COPY ")
            for name in line.split()[1:-1]]
  assert {"mcpo_jax", "configs", "launch", "requirements.txt"} <= {*copied}
  for name in copied:
    assert (ROOT / name).exists() and name.split("/")[0] in kept
  entry = re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1]
  assert (ROOT / json.loads(entry)[1]).exists()
