"""What a supervisor does after each end of a run, on one that is played."""

import signal
import subprocess
import sys

import pytest
import run_cases

SUPERVISE = """
import sys
from mcpo_jax import supervise
supervise.PAUSES = 0.01, 0.01
supervise.main()
"""
# Each start takes a line of the file `plan`, STEP CODE: it gets to that step
# and ends with that code, or by that signal, or "waits" for a signal.
TOY = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
index = os.environ.get("MCPO_PROCESS_ID", "0")
plan = workdir / f"plan{index}"
(step, code), *left = [x.split() for x in plan.read_text().splitlines()]
plan.write_text("".join(f"{a} {b}\\n" for a, b in left))
(workdir / "metrics.jsonl").write_text(
    json.dumps({"stage": "sft", "step": int(step)}) + '\\n{"half')
def say(text):  # a handler may come while print is at work
  os.write(1, f"{text}\\n".encode())
def told(number, frame):
  say(f"told {signal.Signals(number).name}")
  os._exit(75)
ready = "ready" if os.getpgid(0) == os.getpid() else "of the same group"
if code == "waits":
  signal.signal(signal.SIGUSR1, told)
  signal.signal(signal.SIGTERM, told)
  say(ready)
  time.sleep(600)
if code == "deaf":
  signal.signal(signal.SIGUSR1, lambda *_: say("told"))
  say(ready)
  while True: time.sleep(600)
if int(code) < 0:
  os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


@pytest.fixture
def supervise(tmp_path):
  """Starts the supervisor of a run in as many processes as plans."""
  started = []

  def begin(*plans):
    for index, lines in enumerate(plans):
      (tmp_path / f"plan{index}").write_text("\n".join(lines))
    started.append(subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, f"--processes={len(plans)}", "--",
         sys.executable, "-c", TOY, f"--workdir={tmp_path}"],
        cwd=run_cases.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True))
    return started[-1]

  yield begin
  for process in started:
    process.kill()
    process.communicate()


def left(tmp_path, index=0):
  return len((tmp_path / f"plan{index}").read_text().splitlines())


def test_it_begins_again_until_all_has_gone_well(supervise, tmp_path):
  told = ["3 75"] * 4  # any number of times, without a pause
  crashed = ["5 -9", "5 1", "6 6", "6 7", "7 -6", "7 75", "7 -6", "7 -6"]
  process = supervise([*told, *crashed, "9 0", "10 0"])
  _, said = process.communicate(timeout=60)
  assert process.returncode == 0, said
  assert left(tmp_path) == 1
  assert "supervise: ended with -9 at sft 5; begins again" in said


@pytest.mark.parametrize("code", [2, 3, 4, 5, 8, 130, 143])
def test_what_would_end_the_same_way_again_is_not_tried_again(
    supervise, tmp_path, code):
  process = supervise([f"3 {code}", "4 0"])
  assert process.wait(timeout=60) == code
  assert left(tmp_path) == 1


def test_three_crashes_at_one_step_are_enough(supervise, tmp_path):
  process = supervise(["4 -9"] * 2 + ["5 1", "5 -9"] + ["5 -11"] * 3)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 128 + 11
  assert left(tmp_path) == 2
  assert "for the third time at sft 5" in said


def test_processes_of_one_run_begin_again_together(supervise, tmp_path):
  process = supervise(["3 -6", "4 2", "5 0"], ["3 -9", "4 6", "5 0"])
  assert process.wait(timeout=60) == 2  # the one that says most
  assert left(tmp_path, 0) == left(tmp_path, 1) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_tells_the_run(supervise, tmp_path, number):
  """Once: the run is not of the group that a terminal tells."""
  process = supervise(["3 waits", "4 0"])
  assert process.stdout.readline() == "ready\n"
  process.send_signal(number)
  assert process.stdout.readline() == "told SIGUSR1\n"
  assert process.wait(timeout=60) == 75
  assert left(tmp_path) == 1


def test_told_twice_it_kills_the_run(supervise):
  process = supervise(["3 deaf"])
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == "told\n"
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 143
  process.communicate(timeout=60)  # ends when the child has let go of the pipe


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children")
def test_a_run_whose_supervisor_is_killed_is_told(supervise):
  process = supervise(["3 waits"])
  assert process.stdout.readline() == "ready\n"
  process.kill()
  assert process.stdout.readline() == "told SIGTERM\n"
