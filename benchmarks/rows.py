"""MC-PO beside its controls at equal updates, over seeds: runs and a table.

Every row starts from the same SFT weights, sees the same prompts in the same
order, and differs in the named settings only. Runs are resumable: the same
line again goes on. Command of the committed tables:

  python benchmarks/rows.py --config=configs/quickstart.py --seeds=0,1,2 \\
      --workdir=runs/rows_quickstart --out=benchmarks/quickstart.md
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = {
    "MC-PO": [],
    "SFT continued on the preferred": [
        "--config.objective.name=sft", "--config.objective.beta=None",
        "--config.kernel.temperature=None"],
    "DPO, random negative": [
        "--config.objective.name=dpo", "--config.kernel.strategy=random",
        "--config.kernel.temperature=None"],
    "DPO, best against worst": [
        "--config.objective.name=dpo", "--config.kernel.temperature=None"],
}


def run(args, workdir: pathlib.Path, seed: int, flags: list[str], core: int):
  """One training run on one core; raises with the log's end if it fails."""
  workdir.parent.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "mcpo_jax", "train",
             f"--config={args.config}", f"--workdir={workdir}",
             f"--config.seed={seed}", *flags, *args.flag]
  if args.jobs > 1:
    command = ["taskset", "-c", str(core % os.cpu_count()), *command]
  with open(workdir.parent / f"{workdir.name}.log", "w") as log:
    done = subprocess.run(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT),
                          "MCPO_CACHE": str(args.workdir / "cache")})
  if done.returncode:
    raise SystemExit(f"{' '.join(command)}\nfailed, see {log.name}")


def interval(values: list[float]) -> str:
  """Mean and, over seeds, the half width of its 95 % t interval."""
  t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values))
  mean = statistics.mean(values)
  if t is None:
    return f"{mean:.3f}"
  half = t * statistics.stdev(values) / math.sqrt(len(values))
  return f"{mean:.3f} ± {half:.3f}"


def table(args, seeds, results) -> str:
  """Markdown."""
  commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                          capture_output=True, text=True).stdout.strip()
  import jax

  prompts = next(iter(results.values()))[0]["score/num_prompts"]
  lines = [
      f"# {args.config}: MC-PO beside its controls", "",
      f"Command: `python benchmarks/rows.py --config={args.config}"
      f" --seeds={args.seeds}" + "".join(f" --flag={f}" for f in args.flag)
      + "`", "",
      f"Commit {commit}, jax {jax.__version__}, {platform.machine()} CPU, one "
      f"core a run; {prompts} held-out prompts; seeds {args.seeds}. Score of "
      "sampled completions (temperature 1) and greedy ones; difference to the "
      "SFT start of the same seed, in brackets the seeds whose 95 % bootstrap "
      "interval over prompts excludes 0 on the upper side; ± is a 95 % t "
      "interval over seeds.", "",
      "| row | sampled | difference | greedy | difference |",
      "|---|---|---|---|---|"]
  start = {law: [r[f"{law}score/sft"] for r in results["MC-PO"]]
           for law in ("", "greedy/")}
  lines.append(f"| SFT start | {interval(start[''])} | – | "
               f"{interval(start['greedy/'])} | – |")
  for name, runs in results.items():
    cells = []
    for law in ("", "greedy/"):
      above = sum(r[f"{law}score/difference_ci95_low"] > 0 for r in runs)
      cells += [interval([r[f"{law}score/aligned"] for r in runs]),
                interval([r[f"{law}score/difference"] for r in runs])
                + f" ({above} of {len(runs)})"]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  lines += ["", "Seed by seed, sampled difference with its interval:", "",
            "| row | " + " | ".join(f"seed {s}" for s in seeds) + " |",
            "|---|" + "---|" * len(seeds)]
  for name, runs in results.items():
    lines.append(f"| {name} | " + " | ".join(
        f"{r['score/difference']:+.3f} [{r['score/difference_ci95_low']:+.3f}, "
        f"{r['score/difference_ci95_high']:+.3f}]" for r in runs) + " |")
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--config", required=True)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--flag", action="append", default=[],
                      help="a further --config.a.b=v for every run")
  args = parser.parse_args()
  args.workdir = args.workdir.resolve()
  seeds = [int(s) for s in args.seeds.split(",")]
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    # First one run a seed, which leaves the SFT start and the reference
    # log-probs in the cache for the others.
    for names in (list(ROWS)[:1], list(ROWS)[1:]):
      cells = [(n, s) for s in seeds for n in names]
      list(pool.map(
          lambda job: run(args, folder(args, *job[1]), job[1][1],
                          ROWS[job[1][0]], job[0]), enumerate(cells)))
  results = {
      name: [json.loads((folder(args, name, s) / "summary.json").read_text())
             for s in seeds] for name in ROWS}
  for run_of_seed in sum(results.values(), []):
    run_of_seed.pop("export/path", None)  # a path of this machine
  args.out.write_text(table(args, seeds, results))
  args.out.with_suffix(".json").write_text(json.dumps(results, indent=1))
  print(args.out.read_text())


def folder(args, name: str, seed: int) -> pathlib.Path:
  slug = "".join(c if c.isalnum() else "_" for c in name.lower())
  return args.workdir / f"{slug}-{seed}"


if __name__ == "__main__":
  main()
