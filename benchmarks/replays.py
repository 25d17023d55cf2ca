"""The share of failed runs that `replay` brings to the same error.

Each fault that ends a run of one process by an error is made for real, in a
tiny run of the command line; then `mcpo_jax replay` goes once more over what
lies in its workdir, while the fault lasts.

  python benchmarks/replays.py --out=benchmarks/replays.md

Exits with 1 if fewer than 95 % replay.
"""

import argparse
import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import run_cases  # noqa: E402
import small_disk  # noqa: E402

GOAL = 0.95
LAST = "step.before@13"  # of the preference stage, after its save at step 6
REWARD = """
def broken(prompts, completions, **columns):
  raise RuntimeError("no reward today")

def nan(prompts, completions, **columns):
  return [float("nan")] * len(completions)

def short(prompts, completions, **columns):
  return [0.5] * (len(completions) - 1)
"""
ONLINE = ("online.enabled=True", "online.prompts_per_round=10",
          "online.num_candidates=4", "generation.max_new_tokens=9",
          "data.eval_fraction=0.0", "stages=sft,preference")


class Place(NamedTuple):
  """Of one case."""

  run: pathlib.Path
  data: pathlib.Path


class Fault(NamedTuple):
  """A fault: the run that meets it, and what is done before."""

  id: str  # in the list of faults
  name: str
  flags: tuple[str, ...] = ()  # config.x=y
  fault: str = ""  # MCPO_FAULT, which lasts; before the first save
  # What happens after a first run was killed at LAST, before the run that is
  # to fail; None: there is no first run.
  between: Callable[[Place], None] | None = None
  around: Callable[[Place], contextlib.AbstractContextManager] = (
      lambda place: contextlib.nullcontext())


def each_checkpoint(work: Callable[[pathlib.Path], None]
                    ) -> Callable[[Place], None]:
  """Does something to the largest file of each checkpoint."""

  def between(place):
    for folder in (place.run / "preference/checkpoints").glob("[0-9]*"):
      work(max((p for p in folder.rglob("*") if p.is_file()
                and p.name != "manifest.json"),
               key=lambda p: p.stat().st_size))

  return between


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def cut_data(place: Place) -> None:
  os.truncate(place.data / "kwise.jsonl", 900)  # within a line


def change_data(place: Place) -> None:
  path = place.data / "kwise.jsonl"
  path.write_text(path.read_text().replace("the cup", "a cup"))


def lose_data(place: Place) -> None:
  (place.data / "kwise.jsonl").unlink()


@contextlib.contextmanager
def full(place: Place) -> Iterator[None]:
  """The disk of the workdir is full but for what a start needs."""
  with small_disk.of(place.run.parent, megabytes=3):
    yield


@contextlib.contextmanager
def locked(place: Place) -> Iterator[None]:
  """Another run has the workdir."""
  process = subprocess.Popen(
      [sys.executable, "-c", "import pathlib, sys, time\n"
       "from mcpo_jax import commit\n"
       "commit.lock(pathlib.Path(sys.argv[1]))\nprint(flush=True)\n"
       "time.sleep(600)", str(place.run)], cwd=ROOT, stdout=subprocess.PIPE)
  process.stdout.readline()
  try:
    yield
  finally:
    process.kill()


FAULTS = (
    Fault("F6", "the disk is full", ("checkpoint.keep=4",), around=full),
    Fault("F6", "the disk is full in a save", fault="ckpt.begin:full"),
    Fault("F6", "the disk is full in the export", fault="export.write:full"),
    Fault("F8", "the disk hangs in a save",
          ("checkpoint.timeout_seconds=3",), "ckpt.shard:sleep=60"),
    Fault("F9", "the data file is another one", between=change_data),
    Fault("F9", "the data file is cut", between=cut_data),
    Fault("F9", "the data file is gone", between=lose_data),
    Fault("F10", "a bit of every checkpoint is flipped",
          between=each_checkpoint(flip)),
    Fault("F10", "a file of every checkpoint is cut",
          between=each_checkpoint(cut)),
    Fault("F10", "a file of every checkpoint is gone",
          between=each_checkpoint(pathlib.Path.unlink)),
    Fault("F11", "the reward raises", (*ONLINE, "reward.name=odd:broken")),
    Fault("F11", "the reward is NaN", (*ONLINE, "reward.name=odd:nan")),
    Fault("F11", "the reward's reply is short",
          (*ONLINE, "reward.name=odd:short")),
    Fault("F11", "the reward server is away",
          (*ONLINE, "reward.name=remote", "reward.url=http://127.0.0.1:9/",
           "reward.patience_s=3")),
    Fault("F12", "the generation server is away",
          (*ONLINE, "reward.name=length", "generation.patience_s=3",
           "generation.url=http://127.0.0.1:9", "generation.token_path=token")),
    Fault("F17", "an update hangs", ("watchdog.step_seconds=3",),
          "step.drawn@2:sleep=60"),
    Fault("F21", "the loss is not finite", ("optimizer.learning_rate=1e30",)),
    Fault("F32", "another run has the workdir", between=lambda place: None,
          around=locked),
    Fault("–", "an error in the program", fault="step.drawn@2:raise"),
    Fault("–", "an error in the user's code, in the evaluation",
          ("evaluation.num_prompts=4", "reward.name=odd:broken")),
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  parser.add_argument("--only", metavar="WORDS", help="of the names")
  args = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for number, fault in enumerate(FAULTS):
      if args.only is None or args.only in fault.name:
        rows.append((fault, *try_one(fault, pathlib.Path(folder), number)))
        print(f"{fault.id} {fault.name}: {rows[-1][1:]}", file=sys.stderr)
  same = sum(row[-1] == "the same" for row in rows)
  text = table(rows, same)
  if args.out:
    args.out.write_text(text)
  sys.stdout.write(text)
  return int(same < GOAL * len(rows))


def try_one(fault: Fault, folder: pathlib.Path, number: int) -> tuple[str, str]:
  """What the run told, and how its replay ended."""
  home = folder / str(number)
  place = Place(home / "disk/run", home / "data")
  data = run_cases.write_data(place.data)
  (home / "odd.py").write_text(REWARD)
  (home / "token").write_text("x" * 40)
  env = {"PYTHONPATH": f"{ROOT}:{home}"}
  run = lambda **more: subprocess.run(
      run_cases.command("train", place.run, *data, *(
          f"--config.{flag}" for flag in fault.flags)), cwd=home,
      env=run_cases.environment(folder / "cache", **env | more),
      capture_output=True, text=True, timeout=900)
  os.symlink(ROOT / "configs", home / "configs")
  if fault.between is not None:
    place.run.parent.mkdir()
    assert run(MCPO_FAULT=LAST).returncode == -9
    fault.between(place)
  with fault.around(place):
    env["MCPO_FAULT"] = fault.fault
    place.run.parent.mkdir(exist_ok=True)
    failed = run()
    assert failed.returncode > 0, failed.stderr[-2000:]
    lines = failed.stderr.strip().splitlines()
    told = next((re.sub(r"^error\[(.*?)\].*", r"`\1`", line) for line in lines
                 if line.startswith("error[")), lines[-1])
    again = subprocess.run(
        [sys.executable, "-m", "mcpo_jax", "replay", f"--workdir={place.run}"],
        env=run_cases.environment(folder / "cache", **env), cwd=home,
        capture_output=True, text=True, timeout=900)
  if again.returncode == 0:
    return told, "the same"
  print(again.stdout[-3000:], again.stderr[-1500:], file=sys.stderr)
  lines = [line for line in again.stderr.splitlines()
           if line.startswith("error[")]
  return told, "another" if "\nnot the same" in again.stdout else (
      re.sub(r"^error\[(.*?)\].*", r"refused: `\1`", lines[-1]) if lines
      else "it ends with a traceback")


def table(rows: list[tuple[Fault, str, str]], same: int) -> str:
  """Markdown, one line a fault."""
  lines = [f"| {fault.id} | {fault.name} | {told} | {how} |"
           for fault, told, how in rows]
  return f"""# Failed runs that replay

Command: `python benchmarks/replays.py --out=benchmarks/replays.md`

{same} of {len(rows)} reach the same error.

| | fault | the run told | its replay |
|---|---|---|---|
{chr(10).join(lines)}
"""


if __name__ == "__main__":
  sys.exit(main())
