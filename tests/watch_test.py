"""A process that hangs is ended, and says where."""

import subprocess
import sys
import time

import pytest
import run_cases

PROGRAM = """
import time
from mcpo_jax import watch
limits = dict.fromkeys(("compile_seconds", "step_seconds", "save_seconds",
                        "work_seconds"))
watch.start(**limits | {limits})
def stuck_here():
  {body}
  print("went on")
{call}
"""
IN_PHASE = 'with watch.phase("step", "sft: update 3"): stuck_here()'


def run(body, call, **limits):
  return subprocess.run(
      [sys.executable, "-c", PROGRAM.format(
          limits=limits, body=body, call=call)], cwd=run_cases.ROOT,
      capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("call, limits, key, what", [
    (IN_PHASE, {"step_seconds": 0.5}, "watchdog.step", "sft: update 3"),
    (IN_PHASE.replace('"step"', '"save"'), {"save_seconds": 0.5},
     "checkpoint.timeout", "sft: update 3"),
    # Not told of by any phase, and after one that has ended.
    (f"{IN_PHASE.replace('stuck_here()', 'pass')}\nstuck_here()",
     {"step_seconds": 0.5, "work_seconds": 1.5}, "watchdog.work",
     "what is in no phase"),
])
def test_what_hangs_ends_with_its_phase_and_its_stack(
    call, limits, key, what):
  began = time.monotonic()
  done = run("time.sleep(600)", call, **limits)
  assert done.returncode == 6 and not done.stdout
  assert time.monotonic() - began < 30
  assert "error[run.hangs]: process 0 hangs" in done.stderr
  assert f"({what})" in done.stderr
  assert f"{key}_seconds" in done.stderr
  assert "in stuck_here" in done.stderr


@pytest.mark.parametrize("limits", [
    {"step_seconds": 60.0, "work_seconds": 0.5}, {}])
def test_what_is_within_its_limit_or_has_none_goes_on(limits):
  done = run("time.sleep(1.5)", IN_PHASE, **limits)
  assert done.returncode == 0 and done.stdout == "went on\n"


def test_the_end_is_noted_and_does_not_wait_for_a_note_that_hangs():
  done = run("time.sleep(600)", """
watch._NOTE_SECONDS = 0.5
def note(text):
  print(text, flush=True)
  time.sleep(600)
with watch.noted(note), watch.phase("step", "sft: update 3"): stuck_here()
""", step_seconds=0.5)
  assert done.returncode == 6
  assert done.stdout.startswith("error[run.hangs]: process 0 hangs")
  assert done.stdout.strip() in done.stderr
