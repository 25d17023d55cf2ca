"""Runs of several processes that share no disk, with a bucket between them:
real command lines, kill -9 of all, disks that are lost."""

import pathlib
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
import run_cases
import safetensors.numpy

from mcpo_jax import errors, hosts
from mcpo_jax.training import setup

FLAGS = [
    "--config.stages=sft,preference,export", "--config.data.eval_fraction=0.0",
    "--config.sft.num_steps=6", "--config.num_steps=4",
    "--config.objective.name=dpo", "--config.kernel.strategy=random",
    "--config.kernel.temperature=None",
    "--config.model.num_layers=1", "--config.data.num_streams=4",
    "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1", "--config.checkpoint.mirror=pail://run",
]
# Of an array that fsdp=2 cuts in two.
SECOND = "params.layers.mlp.up_proj.kernel/0.1.0"
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
        place / str(i) / "cache", MCPO_BUCKET=str(place / "bucket"),
        MCPO_READS=str(place / f"{i}.reads"))
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
    process.wait(timeout=1800)
  for i, process in enumerate(started):
    assert process.returncode in codes, said(place, i)[-3000:]


def said(place, index):
  return (place / f"{index}.err").read_text()


def kill(place, started, stage, wanted):
  """Kills all with -9 once these steps are committed; their disks go.

  Returns:
    of each disk the pieces of arrays that it held of the last of the steps.
  """
  deadline = time.monotonic() + 1800
  while steps(place, stage) != wanted:
    assert time.monotonic() < deadline and all(
        p.poll() is None for p in started), said(place, 0)[-3000:]
    time.sleep(0.05)
  for process in started:
    process.kill()
  held = []
  for i, process in enumerate(started):
    process.wait()
    folder = place / str(i) / stage / "checkpoints" / str(wanted[-1])
    held.append({str(path.relative_to(folder)) for path in folder.glob(
        "default/*/[0-9]*")})
    shutil.rmtree(place / str(i))
  return held


def steps(place, stage):
  return sorted(int(p.parent.name) for p in (
      place / "bucket" / "run" / stage).glob("*/manifest.json"))


def pieces(folder):
  """Name -> content of the files of a checkpoint that arrays are cut into."""
  return {str(path.relative_to(folder)): path.read_bytes()
          for path in folder.glob("default/*/[0-9]*")}


def damage(place):
  """A flipped bit in the bucket, where the second of two processes reads."""
  path = place / "bucket/run/sft/4/default" / SECOND
  content = bytearray(path.read_bytes())
  content[5] ^= 8
  path.write_bytes(content)


def test_two_processes_whose_disks_are_lost_go_on_from_the_bucket(tmp_path):
  flags = [*run_cases.write_data(tmp_path / "data"), *FLAGS,
           "--config.stages=sft"]
  run, newest = tmp_path / "run", tmp_path / "run/bucket/run/sft/4"
  first, second = kill(
      run, start(run, flags, fault="step.after@5:sleep=3600"), "sft", [2, 4])
  before = pieces(newest)
  assert f"default/{SECOND}" in second and not first & second
  assert first | second == before.keys()
  damage(run)
  finish(run, start(run, flags), 0)
  for i in range(2):
    assert "checkpoint 4 skipped: error[ckpt.hash]" in said(run, i)
  assert "sft resumes at step 2" in said(run, 0)
  assert steps(run, "sft") == [4, 6]
  assert pieces(newest) == before  # weights and optimizer of updates made again
  assert [row["step"] for row in run_cases.metrics(run / "0")] == [
      1, 2, 3, 4, 5, 6]
  one, other = (run / f"{i}/sft/model/model.safetensors" for i in range(2))
  assert one.read_bytes() == other.read_bytes()


@pytest.mark.nightly
def test_lost_in_two_stages_and_ended_by_one_process_a_run_is_the_same(
    tmp_path):
  flags = run_cases.write_data(tmp_path / "data") + FLAGS
  one, many = tmp_path / "one", tmp_path / "many"
  alone = start(one, [*flags, "--config.checkpoint.mirror=None"], processes=1,
                devices=2)
  kill(many, start(many, flags, fault="step.after@5:sleep=3600"), "sft", [2, 4])
  damage(many)
  kill(many, start(many, flags, fault="step.after@7:sleep=3600"),
       "preference", [2])  # 4 of sft and 3 of preference
  finish(one, alone, 0)
  finish(many, start(many, flags, processes=1, devices=2), 0)
  assert "preference resumes at step 2" in said(many, 0)
  for name in ("sft/model", "preference/model", "export"):
    want, got = (safetensors.numpy.load_file(
        x / "0" / name / "model.safetensors") for x in (one, many))
    for key, value in want.items():
      np.testing.assert_array_equal(got[key], value, err_msg=key)
  rows = [[(row["stage"], row["step"], row.get("loss")) for row in
           run_cases.metrics(x / "0")] for x in (one, many)]
  assert rows[0] == rows[1] and len(rows[0]) == 6 + 4
  name = "export/model.safetensors"
  assert (many / "bucket/run" / name).read_bytes() == (
      many / "0" / name).read_bytes()


@pytest.mark.nightly
def test_online_rounds_come_back_to_disks_that_were_lost_within_one(tmp_path):
  flags = [*run_cases.write_data(tmp_path / "data"), *FLAGS,
           "--config.stages=sft,preference", "--config.num_steps=6",
           "--config.checkpoint.every_steps=3",
           "--config.online.enabled=True",
           "--config.online.prompts_per_round=10",
           "--config.online.num_candidates=4",
           "--config.generation.max_new_tokens=9",
           "--config.reward.name=online_rewards:letters"]
  one, many = tmp_path / "one", tmp_path / "many"
  alone = start(one, [*flags, "--config.checkpoint.mirror=None"], processes=1,
                devices=2)
  # Rounds are of two updates; after the fourth of them, and 6 of sft.
  kill(many, start(many, flags, fault="step.after@10:sleep=3600"),
       "preference", [3])
  assert [path.name for path in sorted((
      many / "bucket/run/preference/rounds").iterdir())] == ["000000", "000001"]
  finish(one, alone, 0)
  finish(many, start(many, flags), 0)
  assert "preference resumes at step 3" in said(many, 0)
  assert "round 1:" not in said(many, 0).split("resumes at step 3")[1]
  weights = [safetensors.numpy.load_file(
      x / "preference/model/model.safetensors")
             for x in (one / "0", many / "0", many / "1")]
  for key, value in weights[0].items():
    for other in weights[1:]:
      np.testing.assert_array_equal(other[key], value, err_msg=key)


@pytest.fixture
def third(monkeypatch, tmp_path):
  """This is the last of three processes, on the machine of all; gives what it
  finds of (workdir, cache), or its error, and whether disks are apart."""

  def look(shares=(), mirror=None, second=(), models=()):
    """`shares`: folders that are the first's; `second`: of them and whether
    its own were left alone, as the second process has it."""
    folders = {name: tmp_path / name for name in ("workdir", "cache")}
    for name in shares:
      folders[name].mkdir()
      (folders[name] / ".shared").write_text("the first's")
    monkeypatch.setattr(hosts, "_place", hosts.Place(2, 3, None))
    monkeypatch.setattr(hosts, "from_first", lambda what, make: [
        "the first's", socket.gethostname()])
    monkeypatch.setattr(hosts, "meet", lambda what: None)
    monkeypatch.setattr(hosts, "gather", lambda what, own: [
        ["first", [True, True], [True, True]], ["second", *second], own])
    config = {"checkpoint": {"mirror": mirror},
              "evaluation": {"models": models}}
    try:
      setup.find_disks(config, *folders.values())
      return None, hosts.apart()
    except errors.McpoError as e:
      return f"{e.slug} {e.where}", None
    finally:
      hosts.set_apart(False)

  return look


OWN = ([False, False], [True, True])
SHARED = ([True, True], [False, False])


@pytest.mark.parametrize("case, want, apart", [
    ({"shares": ["workdir", "cache"], "second": SHARED}, None, False),
    ({"mirror": "gs://b/run", "second": OWN}, None, True),
    ({"second": OWN}, "hosts.shared .*workdir and", None),
    ({"shares": ["workdir"], "mirror": "gs://b/run", "second": OWN},
     "hosts.shared .*workdir and", None),
    ({"mirror": "gs://b/run", "second": SHARED}, "hosts.shared second", None),
    ({"mirror": "gs://b/run", "second": ([False, False], [True, False])},
     "hosts.shared second", None),
    ({"mirror": "gs://b/run", "second": OWN, "models": ["a=step:3"]},
     "hosts.disks evaluation.models", None),
])
def test_processes_find_out_whether_they_share_their_disks(
    third, case, want, apart):
  found, is_apart = third(**case)
  assert is_apart == apart
  assert (found is None) == (want is None)
  if want is not None:
    assert re.match(want, found), found
