"""Speed beside TRL, torch, transformers and Tunix: ratios of CPU time.

  python benchmarks/ratios.py --trl=trl/bin/python --tunix=tunix/bin/python \\
      --fixtures=fx --out=benchmarks/ratios.md

Every run is a process of its own, pinned to one core with one thread, on the
same weights and data in float32, and its figure is per second of its own CPU
time: a machine that others use too cannot be measured by a clock on the wall.
Sides take turns, round after round, and must agree on the first log-probs. The
other sides' programs are those of ../shared/perf, in environments of their own
(trl 1.16.0 with torch 2.13.0; google-tunix 0.1.7 with jax 0.10.2), with a
preload that lets torch's BLAS use AVX-512 on processors of other makers.

Figures go to --results as they come; what stands there is not run again, so
that a run goes on where it was stopped. A changed commit needs a new file, or
one that holds the other sides alone.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PERF = pathlib.Path(
    os.environ.get("MCPO_SHARED", ROOT.parent / "shared")) / "perf"
BATCH = {"tiny": 4, "small": 2}
LENGTHS = "--steps=6 --warmup=2"
# Shorter streams for smaller batches.
PAIRS = f"{LENGTHS} --config=data.stream_length=2048"
POOLS = "--steps=4 --warmup=1"
TORCH = "bench_torch_mc.py --threads=1 " + POOLS
TRL = "bench_trl_dpo.py --threads=1 " + LENGTHS

# Side -> whose environment, and its command line.
SIDES = {
    "DPO": ("ours", f"dpo {PAIRS}"),
    "DPO, reference in the step": (
        "ours", f"dpo --reference=resident {PAIRS}"),
    "scoring": ("ours", f"score {POOLS}"),
    "MC-PO step": ("ours", f"mcpo {POOLS}"),
    "sampling": ("ours", "generate"),
    "TRL": ("trl", f"{TRL} --precompute-ref"),
    "TRL, reference in the step": ("trl", TRL),
    "torch scoring, sorted": (
        "trl", f"{TORCH} --mode=score --sort --precomputed-ref"),
    "torch MC-PO step, sorted": ("trl", f"{TORCH} --sort --precomputed-ref"),
    "torch MC-PO step, naive": ("trl", TORCH),
    "transformers": ("trl", "bench_hf_generate.py --threads=1 --samples=8"),
    "Tunix": ("tunix", f"bench_tunix_dpo.py --ref {LENGTHS}"),
    "Tunix, bucketed": (
        "tunix", f"bench_tunix_dpo.py --ref --bucket=128 {LENGTHS}"),
    "Tunix sampling": ("tunix", "bench_tunix_generate.py --samples=8"),
}


class Goal(NamedTuple):
  """Ours against theirs."""

  name: str
  ours: str
  theirs: str
  bars: dict[str, float]  # preset -> least ratio


GOALS = [
    Goal("B1", "DPO", "TRL", {"tiny": 4.0, "small": 2.2}),
    Goal("B2", "DPO, reference in the step", "TRL, reference in the step",
         {"tiny": 4.0}),
    Goal("B3", "scoring", "torch scoring, sorted", {"tiny": 4.0, "small": 3.0}),
    Goal("B4", "MC-PO step", "torch MC-PO step, sorted", {"tiny": 4.0}),
    Goal("B4", "MC-PO step", "torch MC-PO step, naive", {"tiny": 8.0}),
    Goal("B5", "DPO, reference in the step", "Tunix", {"tiny": 10.0}),
    Goal("B5", "DPO, reference in the step", "Tunix, bucketed", {"tiny": 5.0}),
    Goal("B6", "sampling", "transformers", {"tiny": 8.0, "small": 5.0}),
    Goal("B6", "sampling", "Tunix sampling", {"tiny": 10.0}),
]
UNITS = ("pairs_per_cpu_s", "rows_per_cpu_s", "new_tokens_per_cpu_s")


def chosen(args: argparse.Namespace) -> list[Goal]:
  return [goal for goal in GOALS if goal.name in args.goals.split(",")]


def figure(run: dict[str, Any]) -> float:
  """What a run is compared by."""
  return next(run[unit] for unit in UNITS if unit in run)


def last_json(command: list, **how) -> dict[str, Any]:
  """Runs a command; the JSON of the last such line that it prints."""
  done = subprocess.run(command, capture_output=True, text=True, **how)
  lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
  if done.returncode or not lines:
    raise SystemExit(f"{command}: {done.stderr[-2000:]}")
  return json.loads(lines[-1])


def run_side(
    side: str, preset: str, args: argparse.Namespace, preload: str | None
) -> dict[str, Any]:
  """One process on one core: the JSON of its last line."""
  owner, line = SIDES[side]
  fixture = (args.fixtures / preset).resolve()
  env = os.environ | {
      "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu",
      # As launch/*.sh ask for, of all sides: large pages for large arrays, and
      # for those in JAX vectors of 512 bits.
      "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
      "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512"}
  batch = [] if "generat" in line else [f"--batch={BATCH[preset]}"]
  if owner == "ours":
    command = [sys.executable, ROOT / "benchmarks" / "bench.py", *line.split(),
               f"--model={fixture / 'model'}",
               f"--data={fixture / 'data.jsonl'}"]
  else:
    script, *flags = line.split()
    command = [getattr(args, owner), PERF / script, *flags,
               f"--fixture={fixture}", f"--preset={preset}"]
    if owner == "trl" and preload:
      env["LD_PRELOAD"] = preload
  return last_json(
      [*command, *batch], env=env,
      preexec_fn=lambda: os.sched_setaffinity(0, {args.core}))


def measure(
    args: argparse.Namespace, folder: pathlib.Path
) -> dict[str, dict[str, list]]:
  """preset -> side -> a run for each round, read or run."""
  found = json.loads(args.results.read_text()) if args.results.exists() else {}
  preload = folder / "blas.so"
  if shutil.which("cc"):
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", preload, PERF / "intel_blas.c"],
        check=True)
  for number in range(args.rounds):
    for preset in args.presets.split(","):
      sides = dict.fromkeys(
          side for goal in chosen(args) if preset in goal.bars
          for side in (goal.ours, goal.theirs))
      for side in sides:
        runs = found.setdefault(preset, {}).setdefault(side, [])
        missing = len(runs) <= number and (
            SIDES[side][0] == "ours" or getattr(args, SIDES[side][0]))
        if missing:
          runs.append(run_side(
              side, preset, args, str(preload) if preload.exists() else None))
          print(f"{preset}, {side}: {figure(runs[-1])}", flush=True)
          args.results.write_text(json.dumps(found))
  return found


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
  """Both sides compute the same function, where the other says what it saw."""
  field = "logps_chosen_first" if "logps_chosen_first" in theirs else "first"
  if field not in theirs:
    return
  flat = lambda x: x if isinstance(x, list) else [x]
  for a, b in zip(flat(ours[field]), flat(theirs[field])):
    if abs(a - b) > 1e-4 * abs(b):
      raise SystemExit(f"not the same function: {field} {a} against {b}")


def compare(
    goals: list[Goal], found: dict[str, dict[str, list]]
) -> list[list]:
  """Rows of the table: goal, what, ours, theirs, ratio, bar, met."""
  rows = []
  median = lambda runs: statistics.median(map(figure, runs))
  for preset, sides in found.items():
    for goal in goals:
      ours, theirs = sides.get(goal.ours), sides.get(goal.theirs)
      if preset not in goal.bars or not ours:
        continue
      what, bar = f"{preset}: {goal.ours} / {goal.theirs}", goal.bars[preset]
      name = "B8" if goal.name in ("B1", "B3") and preset == "small" else (
          goal.name)
      if not theirs:
        rows.append(
            [name, what, f"{median(ours):.3g}", "not run", "", bar, ""])
        continue
      check_same(ours[0], theirs[0])
      ratio = median(ours) / median(theirs)
      rows.append([name, what, f"{median(ours):.3g}",
                   f"{median(theirs):.3g}", f"{ratio:.2f}", f"{bar:g}",
                   "yes" if ratio >= bar else "no"])
    if sides.get("DPO") and sides.get("TRL"):
      ours, theirs = (statistics.median(run["peak_rss_mb"] for run in sides[x])
                      for x in ("DPO", "TRL"))
      rows.append(["B7", f"{preset}: peak memory, MB, DPO / TRL",
                   f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}",
                   "<= 0.5", "yes" if ours <= theirs / 2 else "no"])
  return rows


def versions(python: str | None, names: list[str]) -> str:
  """Of packages in an environment."""
  if not python:
    return ""
  code = ("import importlib.metadata as m, sys;"
          "print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))")
  return subprocess.run([python, "-c", code, *names], capture_output=True,
                        text=True, check=True).stdout.strip()


def table(rows: list[list], found: dict, args: argparse.Namespace) -> str:
  """Markdown."""
  commit = subprocess.run(
      ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"],
      capture_output=True, text=True).stdout.strip()
  rounds = {preset: min(len(runs) for runs in sides.values() if runs)
            for preset, sides in found.items()}
  lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
  sides = "; ".join(filter(None, [
      versions(sys.executable, ["jax"]),
      versions(args.trl, ["torch", "transformers", "trl"]),
      versions(args.tunix, ["google-tunix", "jax"])]))
  return f"""# Ratios of CPU time

Command: `python benchmarks/ratios.py --presets={args.presets} \
--goals={args.goals}`, at commit \
{commit}.

Pairs (DPO), prompts with 1 + 8 candidates (scoring, MC-PO) or new tokens \
(sampling, 8 prompts x 8 samples x 128) per second of the process's own CPU \
time; one core of a {platform.machine()} machine with {os.cpu_count()} cores \
that others used too, one thread, float32, batch 4 (tiny) or 2 (small). \
Medians of at least so many runs a side: {rounds}. {sides}.

| goal | what | ours | theirs | ratio | at least | met |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--presets", default="tiny,small")
  parser.add_argument("--goals", default="B1,B2,B3,B4,B5,B6",
                      help="B7 comes with B1, B8 with B1 and B3")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--fixtures", type=pathlib.Path, required=True,
                      help="folder of make_fixture.py's folders, by preset")
  parser.add_argument("--trl", help="python with trl; without it not run")
  parser.add_argument("--tunix", help="python with tunix; without it not run")
  parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
  parser.add_argument("--results", type=pathlib.Path,
                      default=pathlib.Path("ratios.json"))
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  args = parser.parse_args()
  found = measure(args, args.results.resolve().parent)
  rows = compare(chosen(args), found)
  if args.out:
    args.out.write_text(table(rows, found, args))
  for row in rows:
    print(*row, sep="\t")


if __name__ == "__main__":
  main()
