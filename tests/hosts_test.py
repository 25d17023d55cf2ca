"""One run in several processes: the real command line, against one process."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import run_cases
import safetensors.numpy

from mcpo_jax import errors, hosts, main, settings
from mcpo_jax.data import store

TESTS = pathlib.Path(__file__).parent
FLAGS = [
    "--config.sft.num_steps=12", "--config.num_steps=3",
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
  return start_all(workdir, run_cases.command("train", workdir, *flags),
                   processes=processes, devices=devices, fault=fault, odd=odd)


def start_all(workdir, command, *, processes, devices, fault="", odd=(),
              **extra):
  """As `start`, of any command, with extra variables."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  started = []
  for i in range(processes):
    env = run_cases.environment(
        workdir.parent / "cache" / workdir.name, **extra)
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    if processes > 1:
      env |= {"MCPO_COORDINATOR": f"127.0.0.1:{port}",
              "MCPO_NUM_PROCESSES": str(processes), "MCPO_PROCESS_ID": str(i)}
    more = ()
    if i == processes - 1:
      env["MCPO_FAULT"], more = fault, odd
    out, err = (open(f"{workdir}.{i}.{kind}", "w") for kind in ("out", "err"))
    started.append(subprocess.Popen(
        [*command, *more], env=env, cwd=run_cases.ROOT, stdout=out,
        stderr=err))
  return started


def said(workdir, index, kind="err"):
  return pathlib.Path(f"{workdir}.{index}.{kind}").read_text()


def finish(workdir, started, want=0):
  """Waits for all; each must end with this code. The seconds between the first
  end and the last."""
  running, first = dict(enumerate(started)), None
  deadline = time.monotonic() + 900
  while running:
    assert time.monotonic() < deadline
    for i, process in list(running.items()):
      if process.poll() is not None:
        del running[i]
        first = first or time.monotonic()
    time.sleep(0.05)
  lived = time.monotonic() - first
  for i, process in enumerate(started):
    assert process.returncode == want, said(workdir, i)[-3000:]
  return lived


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """One run in 1 process; and another whose last of 4 processes is told to
  stop in sft, which goes on in 1 that is told in the preference stage, and
  then in 2 of 2 devices each."""
  folder = tmp_path_factory.mktemp("hosts")
  flags = run_cases.write_data(folder / "data") + FLAGS
  one = start(folder / "one", flags, processes=1, devices=1)
  many, said_by = folder / "many", []
  four = start(many, flags, processes=4, devices=1, fault="step.after@2:term")
  finish(folder / "one", one)
  finish(many, four, want=75)
  said_by.append([said(many, i) for i in range(4)])
  left = 12 - step_of(said_by[0][0])  # of sft, then the second of preference
  alone = start(many, flags, processes=1, devices=1,
                fault=f"step.after@{left + 2}:term")
  finish(many, alone, want=75)
  said_by.append([said(many, 0)])
  finish(many, start(many, [*flags, "--config.mesh.fsdp=2"], processes=2,
                     devices=2))
  return folder, said_by


def step_of(text):
  """The step that a run that was told to stop says it saved."""
  return int(re.search(r"told to stop by SIGTERM, \w+ is saved at step (\d+)",
                       text)[1])


def losses(workdir):
  rows = [r for r in run_cases.metrics(workdir) if "loss" in r]
  assert len(rows) == len({(r["stage"], r["step"]) for r in rows})
  return {(r["stage"], r["step"]): r["loss"] for r in rows}


def draws(workdir):
  lines = (workdir / "preference/candidates.jsonl").read_text().splitlines()
  return [(row["step"], row["prompt_id"], [
      c["drawn"] for c in row["candidates"]]) for row in map(
          json.loads, lines)]


def test_processes_train_as_one_does_however_many_go_on(runs):
  folder, _ = runs
  want, got = losses(folder / "one"), losses(folder / "many")
  assert len(want) == 12 + 3 and got.keys() == want.keys()
  for key, value in want.items():
    assert abs(got[key] - value) < 1e-5, key
  assert got["sft", 1] == pytest.approx(want["sft", 1], rel=1e-6)
  assert draws(folder / "many") == draws(folder / "one")
  one, other = (run_cases.summary(folder / x) for x in ("one", "many"))
  assert other.keys() == one.keys()
  for key in ("eval/loss", "score/sft", "score/aligned"):
    assert abs(other[key] - one[key]) < 1e-5, key
  weights = [safetensors.numpy.load_file(
      folder / x / "export/model.safetensors") for x in ("one", "many")]
  for key, value in weights[0].items():
    np.testing.assert_allclose(weights[1][key], value, rtol=0, atol=2e-4)


def test_the_first_process_alone_speaks_and_writes(runs):
  folder, _ = runs
  assert '"score/aligned"' in said(folder / "many", 0, "out")
  assert "score" not in said(folder / "many", 1, "out")  # but gloo speaks
  assert "preference 3/3" not in said(folder / "many", 1)
  assert "4 cpu device(s) of 2 process(es)" in said(folder / "many", 0)


def test_when_one_is_told_to_stop_all_save_the_same_step(runs):
  _, (four, (alone,)) = runs
  (step,) = {step_of(text) for text in four}
  assert f"sft resumes at step {step}" in alone
  assert "preference is saved at step 2" in alone


# One life of a run: updates in float64, on all devices of all processes.
LIFE = """
import json, pathlib, sys
from mcpo_jax import hosts
hosts.join()
import jax
import training_cases as cases
folder, num_steps, fsdp = sys.argv[1:]
print(json.dumps(cases.train_on(
    pathlib.Path(folder), int(num_steps), devices=len(jax.devices()),
    fsdp=int(fsdp), dtype=jax.numpy.float64)))
hosts.leave()
"""


@pytest.mark.nightly
def test_in_float64_the_number_of_processes_changes_the_last_digits(tmp_path):
  def live(name, num_steps, *, processes, devices, fsdp=1):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    finish(folder, start_all(
        folder, [sys.executable, "-c", LIFE, str(folder), str(num_steps),
                 str(fsdp)], processes=processes, devices=devices,
        JAX_ENABLE_X64="1", PYTHONPATH=f"{run_cases.ROOT}:{TESTS}"))
    return json.loads(said(folder, 0, "out").splitlines()[-1])  # gloo speaks

  want = live("one", 8, processes=1, devices=1)
  got = [update for life in (
      live("many", 2, processes=4, devices=1),
      live("many", 4, processes=2, devices=2, fsdp=2),
      live("many", 6, processes=1, devices=1),
      live("many", 8, processes=2, devices=1)) for update in life]
  assert len(got) == len(want) == 8 == len({loss for loss, _ in want})
  assert [drawn for _, drawn in got] == [drawn for _, drawn in want]
  gaps = [abs(a - b) / abs(b) for (a, _), (b, _) in zip(got, want)]
  assert max(gaps) <= 1e-13, gaps


# The second process hangs in its first life.
LIVES = """
if [ "$MCPO_PROCESS_ID" = 1 ] && [ ! -e "$0" ]; then
  touch "$0"
  export MCPO_FAULT=step.after@7:sleep=600
fi
exec "$@"
"""


@pytest.mark.nightly
def test_a_run_whose_hosts_hang_and_die_begins_again_and_ends_the_same(
    runs, tmp_path):
  folder, _ = runs
  flags = [*run_cases.write_data(folder / "data"), *FLAGS,
           "--config.stages=sft", "--config.watchdog.step_seconds=12",
           "--config.checkpoint.every_steps=3"]  # not where the second hangs
  run = subprocess.Popen(
      [sys.executable, "-c", "from mcpo_jax import supervise\n"
       "supervise.PAUSES = 0.1, 0.1\nsupervise.main()", "--processes=2", "--",
       "bash", "-c", LIVES, str(tmp_path / "hung"),
       *run_cases.command("train", tmp_path / "run", *flags)],
      env=run_cases.environment(tmp_path / "cache"), cwd=run_cases.ROOT,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  seen = {"hangs": [], "begins again": [], "sft 11/12": []}
  text = ""
  for line in run.stderr:
    text += line
    for what, times in seen.items():
      if what in line:
        times.append(time.monotonic())
    if "sft 11/12" in line and len(seen["sft 11/12"]) == 1:
      (second,) = [pid for pid in children_of(run.pid) if place_of(pid) == 1]
      os.kill(second, signal.SIGKILL)
  assert run.wait(timeout=60) == 0, text[-3000:]
  assert "sft: update 8" in text  # where the first one waited,
  assert "faults.py" in text  # and where the second one stood
  assert "ended with 6 at sft 7" in text
  hung, killed = seen["begins again"]
  assert hung - seen["hangs"][0] < 30 and killed - seen["sft 11/12"][0] < 60
  got = losses(tmp_path / "run")
  assert got == pytest.approx(
      {k: v for k, v in losses(folder / "one").items() if k in got}, abs=1e-5)
  assert len(got) == 12


def children_of(pid):
  return map(int, pathlib.Path(
      f"/proc/{pid}/task/{pid}/children").read_text().split())


def place_of(pid):
  names = pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0")
  return int(dict(x.split("=", 1) for x in names if x)["MCPO_PROCESS_ID"])


# JAX aborts in a thread when the first process has gone before this one.
ABORTS = """
import ctypes, threading, time
from mcpo_jax import hosts
def say(*args):
  threading.Thread(target=ctypes.CDLL(None).abort).start()
  time.sleep(1)
hosts._place, hosts.say = hosts.Place(1, 2), say
hosts._leave(75)
"""


def test_who_leaves_after_the_first_one_has_the_code_of_the_run():
  done = subprocess.run([sys.executable, "-c", ABORTS], cwd=run_cases.ROOT,
                        timeout=60)
  assert done.returncode == 75


def test_an_error_of_one_ends_all_with_its_message(tmp_path):
  run = tmp_path / "run"
  started = start(run, [], processes=2, devices=1, odd=["--config.seed=5"])
  assert [process.wait(timeout=300) for process in started] == [2, 2]
  for i in range(2):
    assert "error[hosts.config]" in said(run, i)
    assert "seed: 0 -> 5" in said(run, i)
  assert not run.exists()


@pytest.fixture
def second(monkeypatch):
  """This is the second of two processes; `words` are what the first says."""
  words = []
  monkeypatch.setattr(hosts, "_place", hosts.Place(1, 2, None))
  monkeypatch.setattr(hosts, "from_first", lambda what, make: words.pop(0))
  return words


def test_values_that_differ_are_named(second):
  second.append({"same": [1, 2], "other": 1, "gone": None})
  with pytest.raises(errors.ConfigError) as caught:
    hosts.check_same("hosts.data", "the data", {
        "same": (1, 2), "other": 2, "new": "x"}, hint="")
  assert caught.value.slug == "hosts.data"
  assert caught.value.got == "new: None -> 'x'; other: 1 -> 2"
  second.append({"same": [1, 2]})
  hosts.check_same("hosts.data", "the data", {"same": (1, 2)}, hint="")


@pytest.mark.parametrize("other, want", [
    ({"b": 1, "a": [2, 3.5]}, {"a": [2, 3.5], "b": 1}),
    ({"a": [2, 3.5], "b": 2}, None),
    (None, None),
])
def test_what_disks_do_not_agree_on_is_not_there(monkeypatch, other, want):
  monkeypatch.setattr(hosts, "_apart", True)
  monkeypatch.setattr(hosts, "gather", lambda what, own: [
      json.dumps(other, sort_keys=True), own])
  assert hosts.on_all_disks(
      "a result", lambda: {"a": (2, 3.5), "b": 1}) == want


def test_the_code_of_all_is_the_same(second, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  loss = tmp_path / "mine.py"
  loss.write_text("def loss(features, batch, state): pass\n")
  config = {"objective": {"name": "dpo"}, "kernel": {"strategy": "mc"},
            "reward": {"name": "length*2,mine:loss"}}
  first = main.code_of(config)
  assert {"mcpo_jax", "mine:loss", "jax"} < first.keys()
  second += [settings.flatten(config), first]
  main.check_same(config)
  loss.write_text("def loss(features, batch, state): return 0.0\n")
  second += [settings.flatten(config), first]
  with pytest.raises(errors.ConfigError) as caught:
    main.check_same(config)
  assert caught.value.slug == "hosts.code"
  assert caught.value.got.startswith("mine:loss: ")


def test_data_that_the_first_process_has_not_made_is_refused(second, tmp_path):
  flags = run_cases.write_data(tmp_path)
  path = flags[0].partition("=")[2]
  with pytest.raises(errors.ConfigError) as caught:
    store.build_store(
        [(path, "auto", 1.0, None)], types.SimpleNamespace(
            vocab_size=300, key="a tokenizer"), cache_dir=tmp_path / "cache",
        max_prompt_length=48, max_completion_length=24)
  assert caught.value.slug == "hosts.data" and path in caught.value.where
  assert not (tmp_path / "cache").exists()


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
