"""How the time of an MC-PO step grows, beside what its FLOPs say.

  python benchmarks/growth.py --out=benchmarks/growth

One thing is varied at a time: candidates, the lengths of completions and
prompts, the width of the model; the rest is as in the middle. A point is the
CPU time of an update (reference log-probs given), compiled before; the line is
the FLOPs that the mathematics needs, at the rate that the middle reaches. Run
it on one core:  taskset -c 1 python benchmarks/growth.py ...
"""

import argparse
import json
import pathlib
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's code, whatever is installed

import jax  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import bench, workload  # noqa: E402
from mcpo_jax.training import stage as stage_lib  # noqa: E402

STEPS, BATCH = 3, 4


class Case(NamedTuple):
  """A shape of the work; lengths are means before the cut."""

  candidates: int = 8
  completion: int = 250
  prompt: int = 200
  width: int = 256  # of the shape `tiny`, all else in proportion


VARIED = {
    "candidates": (1, 2, 4, 8, 16, 32, 64),
    "completion": (32, 64, 125, 250, 400),
    "prompt": (25, 100, 200, 400),
    "width": (128, 256, 512),
}


def time_case(case: Case) -> dict[str, float]:
  """CPU seconds and ideal FLOPs of an update."""
  ratio = case.width / workload.PRESETS["tiny"]["hidden_size"]
  wider = [(f"model.{key}", str(int(ratio * workload.PRESETS["tiny"][key])))
           for key in ("hidden_size", "intermediate_size", "head_dim")]
  sets = workload.lognormal_sets(
      0, number=STEPS * BATCH, candidates=case.candidates,
      prompt=case.prompt, completion=case.completion)
  job = workload.open_job(
      "mcpo", batch_size=BATCH, num_examples=len(sets),
      num_slots=1 + case.candidates, preset="tiny", overrides=wider)
  batches = [workload.make_batch(sets[row:row + BATCH], row)
             for row in range(0, len(sets), BATCH)]
  reference = stage_lib.Reference(
      lambda batch: np.zeros(batch.meta.role.shape, np.float32))
  run = lambda: bench.time_training(job, batches, reference, 0)
  run()
  cpu, _, flops = run()
  jax.clear_caches()
  return {"seconds": cpu / STEPS, "flops": flops / STEPS}


def measure(found: pathlib.Path) -> dict[str, dict[str, float]]:
  """Case -> figures; what stands in the file is not run again."""
  figures = json.loads(found.read_text()) if found.exists() else {}
  for what, values in VARIED.items():
    for value in values:
      case = Case()._replace(**{what: value})
      if str(case) not in figures:
        figures[str(case)] = time_case(case)
        print(case, figures[str(case)], flush=True)
        found.write_text(json.dumps(figures))
  return figures


def draw(figures: dict[str, dict[str, float]], path: pathlib.Path) -> list[str]:
  """The plot, and the table's rows."""
  middle = figures[str(Case())]
  rate = middle["flops"] / middle["seconds"]
  figure, panels = plt.subplots(1, len(VARIED), figsize=(14, 3.5))
  lines = []
  for panel, (what, values) in zip(panels, VARIED.items()):
    points = [figures[str(Case()._replace(**{what: x}))] for x in values]
    seconds = [point["seconds"] for point in points]
    line = [point["flops"] / rate for point in points]
    panel.loglog(values, seconds, "o", label="measured")
    panel.loglog(values, line, "-", label="by FLOPs")
    panel.set_xlabel(what)
    panel.minorticks_off()
    panel.set_xticks(values, [str(x) for x in values])
    lines += [f"| {what} {x} | {s:.2f} | {l:.2f} | {s / l:.2f} |"
              for x, s, l in zip(values, seconds, line)]
  panels[0].set_ylabel("CPU seconds of an update")
  panels[0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  return [f"Rate in the middle: {rate / 1e9:.0f} GFLOP/s a core.", "",
          "| varied | measured, s | by FLOPs, s | ratio |",
          "|---|---|---|---|", *lines]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, required=True,
                      help="path without suffix, of .json, .png and .md")
  args = parser.parse_args()
  figures = measure(args.out.with_suffix(".json"))
  lines = draw(figures, args.out.with_suffix(".png"))
  args.out.with_suffix(".md").write_text("\n".join([
      "# Growth of a step", "",
      f"Command: `python benchmarks/growth.py --out={args.out}`, on one core. "
      f"MC-PO updates of {BATCH} prompts, float32; the middle is {Case()}. "
      f"jax {jax.__version__}.", "",
      f"![growth]({args.out.name}.png)", "", *lines, ""]))


if __name__ == "__main__":
  main()
