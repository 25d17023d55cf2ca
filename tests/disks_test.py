"""Runs of several processes that share no disk, with a bucket between them:
real command lines, kill -9 of all, disks that are lost."""

import pathlib
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
import run_cases
import safetensors.numpy

FLAGS = [
    "--config.stages=sft,preference,export", "--config.data.eval_fraction=0.0",
    "--config.sft.num_steps=6", "--config.num_steps=4",
    "--config.objective.name=dpo", "--config.kernel.strategy=random",
    "--config.kernel.temperature=None",
    "--config.model.num_layers=1", "--config.data.num_streams=4",
    "--config.checkpoint.every_steps=2", "--config.mesh.data=1",
    "--config.mesh.fsdp=-1", "--config.checkpoint.mirror=bucket://run",
]
TESTS = pathlib.Path(__file__).parent


def start(place, flags, *, processes=2, fault="", devices=1):
  """Starts one run in so many processes: process i has the workdir place/i,
  and in it its cache; all have the bucket place/bucket.

  Args:
    place: folder of the run.
    flags: of the command line.
    processes, devices: how many of them, and of each.
    fault: MCPO_FAULT of the last process.
  """
  site = place / "site"
  site.mkdir(parents=True, exist_ok=True)
  (site / "sitecustomize.py").write_text("import disk_bucket\n")
  (place / "bucket").mkdir(exist_ok=True)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  started = []
  for i in range(processes):
    env = run_cases.environment(
        place / str(i) / "cache", MCPO_BUCKET=str(place / "bucket"))
    env["PYTHONPATH"] = f"{site}:{TESTS}:{env['PYTHONPATH']}"
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    if processes > 1:
      env |= {"MCPO_COORDINATOR": f"127.0.0.1:{port}",
              "MCPO_NUM_PROCESSES": str(processes), "MCPO_PROCESS_ID": str(i)}
    if i == processes - 1:
      env["MCPO_FAULT"] = fault
    out, err = (open(place / f"{i}.{kind}", "a") for kind in ("out", "err"))
    started.append(subprocess.Popen(
        run_cases.command("train", place / str(i), *flags), env=env,
        cwd=run_cases.ROOT, stdout=out, stderr=err))
  return started


def finish(place, started, *codes):
  """Waits for all; each must end with one of these codes."""
  for process in started:
    process.wait(timeout=900)
  for i, process in enumerate(started):
    assert process.returncode in codes, said(place, i)[-3000:]


def said(place, index):
  return (place / f"{index}.err").read_text()


def kill(place, started, stage, wanted):
  """Kills all with -9 once these steps are committed; their disks go."""
  deadline = time.monotonic() + 600
  while steps(place, stage) != wanted:
    assert time.monotonic() < deadline and all(
        p.poll() is None for p in started), said(place, 0)[-3000:]
    time.sleep(0.05)
  for process in started:
    process.kill()
  for i, process in enumerate(started):
    process.wait()
    shutil.rmtree(place / str(i))


def steps(place, stage):
  return sorted(int(p.parent.name) for p in (
      place / "bucket" / "run" / stage).glob("*/manifest.json"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run in one process that nobody disturbs; and one in two whose disks are
  lost in sft, and again in the preference stage, whose newest checkpoint then
  is damaged; one process ends it."""
  folder = tmp_path_factory.mktemp("disks")
  flags = run_cases.write_data(folder / "data") + FLAGS
  one, many = folder / "one", folder / "many"
  alone = start(one, [*flags, "--config.checkpoint.mirror=None"], processes=1,
                devices=2)
  slow = "step.after@5:sleep=600"  # after sft 5, then after preference 3
  kill(many, start(many, flags, fault=slow), "sft", [2, 4])
  kill(many, start(many, flags, fault=slow), "preference", [2])
  seen = {stage: steps(many, stage) for stage in ("sft", "preference")}
  finish(one, alone, 0)
  finish(many, start(many, flags, processes=1, devices=2), 0)
  return one, many, seen


def test_what_lost_disks_goes_on_and_ends_with_the_same_weights(runs):
  one, many, seen = runs
  assert seen == {"sft": [4, 6], "preference": [2]}
  for name in ("sft/model", "preference/model", "export"):
    want, got = (safetensors.numpy.load_file(
        x / "0" / name / "model.safetensors") for x in (one, many))
    for key, value in want.items():
      np.testing.assert_array_equal(got[key], value, err_msg=key)
