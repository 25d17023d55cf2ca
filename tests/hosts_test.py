"""One run in several processes: the real command line, against one process."""

import json
import pathlib
import socket
import subprocess
import time

import numpy as np
import pytest
import run_cases
import safetensors.numpy

from mcpo_jax import errors, main

FLAGS = [
    "--config.sft.num_steps=3", "--config.num_steps=4",
    "--config.data.num_streams=4", "--config.checkpoint.every_steps=1",
    "--config.generation.num_samples=2", "--config.evaluation.num_prompts=4",
    "--config.reward.name=length",
]


def start(workdir, flags, *, processes, devices, fault="", odd=()):
  """Starts one run in so many processes of so many devices each.

  Args:
    workdir: of the run; what each process says goes beside it.
    flags: of the command line.
    processes, devices: how many.
    fault, odd: MCPO_FAULT and further flags of the last process.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  started = []
  for i in range(processes):
    env = run_cases.environment(workdir.parent / "cache" / workdir.name)
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    if processes > 1:
      env |= {"MCPO_COORDINATOR": f"127.0.0.1:{port}",
              "MCPO_NUM_PROCESSES": str(processes), "MCPO_PROCESS_ID": str(i)}
    more = ()
    if i == processes - 1:
      env["MCPO_FAULT"], more = fault, odd
    out, err = (open(f"{workdir}.{i}.{kind}", "w") for kind in ("out", "err"))
    started.append(subprocess.Popen(
        run_cases.command("train", workdir, *flags, *more), env=env,
        cwd=run_cases.ROOT, stdout=out, stderr=err))
  return started


def said(workdir, index, kind="err"):
  return pathlib.Path(f"{workdir}.{index}.{kind}").read_text()


def finish(workdir, started):
  """Waits for all; each must have gone well."""
  for i, process in enumerate(started):
    assert process.wait(timeout=1800) == 0, said(workdir, i)[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """One run in 1 process, the same in 2 of 2 devices, and in 4 of which the
  last is killed; then goes on in 1. With the seconds that the others lived
  on, and their exit codes."""
  folder = tmp_path_factory.mktemp("hosts")
  flags = run_cases.write_data(folder / "data") + FLAGS
  one = start(folder / "one", flags, processes=1, devices=1)
  four = start(folder / "four", flags, processes=4, devices=1,
               fault="step.after@6")
  two = start(folder / "two", [*flags, "--config.mesh.fsdp=2"], processes=2,
              devices=2)
  four[3].wait(timeout=1800)
  began = time.monotonic()
  codes = [process.wait(timeout=100) for process in four]
  lived = time.monotonic() - began
  again = start(folder / "four", flags, processes=1, devices=1)
  for name, started in (("one", one), ("two", two), ("four", again)):
    finish(folder / name, started)
  return folder, codes, lived


def losses(workdir):
  rows = [r for r in run_cases.metrics(workdir) if "loss" in r]
  assert len(rows) == len({(r["stage"], r["step"]) for r in rows})
  return {(r["stage"], r["step"]): r["loss"] for r in rows}


def draws(workdir):
  lines = (workdir / "preference/candidates.jsonl").read_text().splitlines()
  return [(row["step"], row["prompt_id"], [
      c["drawn"] for c in row["candidates"]]) for row in map(
          json.loads, lines)]


@pytest.mark.parametrize("name", ["two", "four"])
def test_processes_train_as_one_does(runs, name):
  folder, _, _ = runs
  want, got = losses(folder / "one"), losses(folder / name)
  assert len(want) == 3 + 4 and got.keys() == want.keys()
  for key, value in want.items():
    assert abs(got[key] - value) < 1e-5, key
  assert draws(folder / name) == draws(folder / "one")
  one, other = (run_cases.summary(folder / x) for x in ("one", name))
  assert other.keys() == one.keys()
  for key in ("eval/loss", "score/sft", "score/aligned"):
    assert abs(other[key] - one[key]) < 1e-5, key
  weights = [safetensors.numpy.load_file(
      folder / x / "export/model.safetensors") for x in ("one", name)]
  for key, value in weights[0].items():
    np.testing.assert_allclose(weights[1][key], value, rtol=0, atol=2e-4)


def test_the_first_process_alone_speaks_and_writes(runs):
  folder, _, _ = runs
  assert '"score/aligned"' in said(folder / "two", 0, "out")
  assert "score" not in said(folder / "two", 1, "out")  # but gloo speaks
  assert "sft 1/3" not in said(folder / "two", 1)
  assert "4 cpu device(s) of 2 process(es)" in said(folder / "two", 0)


def test_when_one_is_killed_the_others_end_soon(runs):
  _, codes, lived = runs
  assert codes[3] == -9 and all(codes)
  assert lived < 60


def test_the_rest_is_trained_by_one_process(runs):
  folder, _, _ = runs
  assert "preference resumes at step" in said(folder / "four", 0)


def test_an_error_of_one_ends_all_with_its_message(tmp_path):
  run = tmp_path / "run"
  started = start(run, [], processes=2, devices=1, odd=["--config.seed=5"])
  assert [process.wait(timeout=300) for process in started] == [2, 2]
  for i in range(2):
    assert "error[hosts.config]" in said(run, i)
    assert "seed: 0 -> 5" in said(run, i)
  assert not run.exists()


@pytest.mark.parametrize("verb, variables, slug, where", [
    ("train", {"MCPO_PROCESS_ID": "0"}, "hosts.place", "MCPO_NUM_PROCESSES"),
    ("train", {"MCPO_NUM_PROCESSES": "2", "MCPO_PROCESS_ID": "2"},
     "hosts.place", "below MCPO_NUM_PROCESSES=2"),
    ("train", {"MCPO_NUM_PROCESSES": "2", "MCPO_PROCESS_ID": "0",
               "MCPO_COORDINATOR": "here"}, "hosts.place", "host:port"),
    ("compare", {}, "hosts.verb", "runs in one process"),
])
def test_a_place_that_makes_no_sense_is_refused(
    monkeypatch, verb, variables, slug, where):
  monkeypatch.setenv("MCPO_COORDINATOR", "127.0.0.1:1")
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(errors.ConfigError) as caught:
    main.run([verb, "--config=configs/quickstart.py", "--workdir=unused"])
  assert caught.value.slug == slug
  assert where in str(caught.value)
