"""Speed on one GPU beside TRL, torch and transformers, in one call.

  python benchmarks/gpu.py --trl=trl/bin/python --fixtures=fx \\
      --out=benchmarks/gpu.md

Random weights of the shapes of Llama 3.2 1B and, with LoRA, Llama 3.1 8B, in
bfloat16; sets of lognormal lengths. Both sides run on the same GPU one after
the other, each a process of its own. Useful FLOP/s are those that the
mathematics needs, as a share of what a bfloat16 product of random matrices
reaches on an H200: 790 TFLOP/s. The on-policy step (C6) is not here: it needs
a run with rounds and its profile. Without a GPU the table says "not run".
"""

import argparse
import os
import pathlib
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's code, whatever is installed

from benchmarks import ratios  # noqa: E402

PEAK = 790e3  # GFLOP/s
SEE = """
import json, jax
device = jax.devices()[0]
print(json.dumps(dict(platform=device.platform, kind=device.device_kind,
                      version=jax.__version__)))
"""
BF16 = ("--config=model.param_dtype=bfloat16 "
        "--config=model.compute_dtype=bfloat16 "
        "--config=data.stream_length=16384")
LONG = "--steps=14 --warmup=4"
POOLS = "--batch=16 --steps=6 --warmup=2 --candidates=16"
TORCH = "bench_torch_mc.py --batch=4 --steps=6 --warmup=2 --L=16 --micro=34"
SAMPLED = "--prompts=16 --samples=16 --new=128"

# Side -> preset, ours or theirs, command line.
SIDES = {
    "DPO": ("1b", True, f"dpo --batch=64 {LONG} {BF16}"),
    "scoring": ("1b", True, f"score {POOLS} {BF16}"),
    "MC-PO step": ("1b", True, f"mcpo {POOLS} {BF16}"),
    "sampling": ("1b", True, f"generate {SAMPLED} {BF16}"),
    "DPO, 8B, LoRA": (
        "8b", True, f"dpo --batch=32 --steps=6 --warmup=2 {BF16} "
        "--config=model.remat=dots --config=lora.rank=16"),
    "TRL, defaults": (
        "1b", False, f"bench_trl_dpo.py --batch=8 --bf16 --checkpointing "
        f"{LONG}"),
    "TRL, best": (
        "1b", False, f"bench_trl_dpo.py --batch=16 --bf16 --precompute-ref "
        f"--group-by-length {LONG}"),
    "torch scoring, padded": ("1b", False, f"{TORCH} --mode=score "
                              "--precomputed-ref"),
    "torch MC-PO step, naive": ("1b", False, TORCH),
    "transformers": ("1b", False, f"bench_hf_generate.py {SAMPLED} --runs=1"),
}


class Goal(NamedTuple):
  """A figure of ours, or with `theirs` a ratio; large is good."""

  name: str
  ours: str
  field: str
  bar: float
  theirs: str | None = None


USEFUL = "ideal_gflops_per_s"
GOALS = [
    Goal("C1", "DPO", USEFUL, 0.5),
    Goal("C2", "DPO", "pairs_per_s", 4.5, "TRL, defaults"),
    Goal("C2", "DPO", "pairs_per_s", 2.0, "TRL, best"),
    Goal("C3", "scoring", USEFUL, 0.6),
    Goal("C3", "scoring", "rows_per_s", 4.0, "torch scoring, padded"),
    Goal("C4", "MC-PO step", "rows_per_s", 24.0),
    Goal("C4", "MC-PO step", "rows_per_s", 5.0, "torch MC-PO step, naive"),
    Goal("C5", "sampling", "new_tokens_per_s", 78e3),
    Goal("C5", "sampling", "new_tokens_per_s", 8.0, "transformers"),
    Goal("C7", "DPO, 8B, LoRA", USEFUL, 0.55),
]


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
  """One process: the JSON of its last line."""
  preset, is_ours, line = SIDES[side]
  fixture = (args.fixtures / preset).resolve()
  if not fixture.exists():
    ratios.last_json(
        ["sh", "-c", '"$@" >&2 && echo "{}"', "-", args.trl,
         ratios.PERF / "make_fixture.py", f"--preset={preset}",
         f"--out={fixture}", "--rows=1024", "--candidates=16",
         "--dtype=bfloat16"])
  what, *flags = line.split()
  if is_ours:
    command = [sys.executable, ROOT / "benchmarks" / "bench.py", what,
               f"--model={fixture / 'model'}",
               f"--data={fixture / 'data.jsonl'}"]
  else:
    command = [args.trl, ratios.PERF / what, f"--fixture={fixture}",
               f"--preset={preset}"]
  return ratios.last_json(
      [*command, *flags], env=os.environ | {"HF_HUB_OFFLINE": "1"})


def compare(found: dict[str, dict[str, Any]]) -> list[str]:
  """Rows of the table; without a figure "not run"."""
  lines = []
  for goal in GOALS:
    ours, theirs = found.get(goal.ours), found.get(goal.theirs)
    name = f"{goal.ours}: {goal.field}"
    if goal.field == USEFUL:
      name = f"{goal.ours}: useful share of {PEAK / 1e3:g} TFLOP/s"
    if goal.theirs:
      name = f"{goal.ours} / {goal.theirs}"
    cells = "not run | "
    if ours and (theirs or not goal.theirs):
      figure = ours[goal.field]
      figure /= theirs[goal.field] if goal.theirs else (
          PEAK if goal.field == USEFUL else 1)
      cells = f"{figure:.3g} | {'yes' if figure >= goal.bar else 'no'}"
    lines.append(f"| {goal.name} | {name} | {goal.bar:g} | {cells} |")
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--fixtures", type=pathlib.Path,
                      default=pathlib.Path("fx"))
  parser.add_argument("--trl", default=sys.executable,
                      help="python with torch, transformers and trl")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  # In a process of its own: this one must not hold the GPU's memory.
  seen = ratios.last_json([sys.executable, "-c", SEE])
  found, shown = {}, "no GPU"
  if seen["platform"] == "gpu":
    shown = seen["kind"]
  if shown != "no GPU":
    for side in SIDES:
      try:
        found[side] = run_side(side, args)
      except SystemExit as e:  # the others still run
        print(f"{side}: {e}", file=sys.stderr)
      else:
        print(side, found[side], flush=True)
  args.out.write_text("\n".join([
      "# One GPU", "",
      f"Command: `python benchmarks/gpu.py --out={args.out}`; {shown}; "
      f"jax {seen['version']}.", "", __doc__.split("\n\n")[2], "",
      "| goal | what | at least | figure | met |", "|---|---|---|---|---|",
      *compare(found), ""]))


if __name__ == "__main__":
  main()
