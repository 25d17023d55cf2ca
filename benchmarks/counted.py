"""What a step costs, counted: FLOPs over the ideal, the largest array, shapes.

  python benchmarks/counted.py --out=benchmarks/counted.md

No weights, no device, no clock: the step's host code runs as it is, on sets of
lognormal lengths, with functions that count what they would do (flop_counter)
and compute nothing. The ideal is models/flops.py: every prompt once, no
padding, the head on scored tokens, a backward pass of two forward ones.
"""

import argparse
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's code, whatever is installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import flop_counter, workload  # noqa: E402
from mcpo_jax import types  # noqa: E402
from mcpo_jax.models import flops  # noqa: E402
from mcpo_jax.training import stage as stage_lib  # noqa: E402
from mcpo_jax.training import update  # noqa: E402

COUNTED = ("score", "features", "from_loss", "from_cotangents")
# Sets of an update: of 1b such that a batch has 32k tokens or more.
PAIRS = {"tiny": 4, "1b": 52}
POOLS = {"tiny": 4, "1b": 16}
# Tokens of a stream: short ones for few pairs, and long enough for whole pools.
STREAMS = {("dpo", "tiny"): 2048, ("dpo", "1b"): 4096,
           ("mcpo", "tiny"): 8192, ("mcpo", "1b"): 8192}
# Of batches of 4 pairs padded to their longest, as TRL has them.
NAIVE_PADDING = 0.45


class Row(NamedTuple):
  """A goal and what was counted; small is good."""

  name: str
  figure: float
  goal: float


class CountedStep:
  """Steps of a job that count FLOPs instead of computing."""

  def __init__(self, job: workload.Job):
    self.job, self.flops = job, 0.0
    self._counters, self._largest = {}, []
    self._functions = job.functions._replace(
        **{name: self._stand_in(name) for name in COUNTED},
        **{name: self._unknown(name)
           for name in ("zeros", "cotangents", "update")})
    self._state = job.functions.state_shapes._replace(
        step=jnp.zeros((), jnp.int32))

  def _unknown(self, name):
    real = getattr(self.job.functions, name)
    return lambda *args: jax.eval_shape(real, *args)

  def _stand_in(self, name):
    real = getattr(self.job.functions, name)

    def run(*args):
      streams = next(x for x in args if isinstance(x, types.Streams))
      shape = streams.tokens.shape
      if (name, shape) not in self._counters:
        self._counters[name, shape] = (
            flop_counter.counter(real, *args), jax.eval_shape(real, *args))
        self._largest.append(flop_counter.largest_array(real, *args))
      count, out = self._counters[name, shape]
      self.flops += count(*args)
      if name == "score":
        return jnp.zeros(out.shape, out.dtype)
      return out

    return run

  def draw_sets(self, seed: int) -> list[types.CandidateSet]:
    """Those of one batch."""
    stage = self.job.stage
    return workload.lognormal_sets(
        seed, number=stage.batch_size, candidates=stage.num_slots - 1)

  def train(self, sets: list[types.CandidateSet]) -> None:
    """Counts `update.run_step` on one batch."""
    update.run_step(
        self.job.stage, self.job.model, self._functions, self._state,
        workload.make_batch(sets), stage_lib.Reference(
            lambda batch: np.zeros(batch.meta.role.shape, np.float32)))

  def score(self, sets: list[types.CandidateSet]) -> None:
    """Counts the scoring of one batch."""
    batch = workload.make_batch(sets)
    update.score_chunks(
        self.job.model, self._functions, self._state.params, batch,
        self.job.model.put_replicated(batch.meta),
        self.job.model.pack_all(batch))

  def largest_array(self) -> tuple[int, ...]:
    """Of the functions that were counted."""
    return max(self._largest, key=math.prod)


def open_step(objective: str, preset: str, *, candidates: int) -> CountedStep:
  """Of one device."""
  size = (PAIRS if objective == "dpo" else POOLS)[preset]
  return CountedStep(workload.open_job(
      objective, batch_size=size, num_examples=size, num_slots=1 + candidates,
      preset=preset, devices=jax.devices()[:1],
      overrides=[("data.stream_length", str(STREAMS[objective, preset]))]))


def dpo_ratio(preset: str, *, batches: int) -> float:
  """A1: FLOPs of DPO steps over the ideal."""
  step, ideal = open_step("dpo", preset, candidates=1), 0.0
  for seed in range(batches):
    sets = step.draw_sets(seed)
    step.train(sets)
    ideal += 3 * workload.ideal_flops(step.job, sets)
  return step.flops / ideal


def score_flops(
    preset: str, *, batches: int, candidates: int
) -> tuple[float, float]:
  """FLOPs of scoring 1 + L completions a prompt, and the ideal."""
  step, ideal = open_step("mcpo", preset, candidates=candidates), 0.0
  for seed in range(batches):
    sets = step.draw_sets(seed)
    step.score(sets)
    ideal += workload.ideal_flops(step.job, sets)
  return step.flops, ideal


def naive_flops(job: workload.Job, sets: list[types.CandidateSet]) -> float:
  """An MC-PO step with prompts repeated, padding, policy and reference scored,
  and full remat; the head on completion tokens alone."""
  def forward(slots):
    rows = [(len(one.prompt), len(one.completions[k]))
            for one in sets for k in slots]
    lengths = np.array(rows).sum(axis=1)
    return flops.forward_flops(
        job.model.config, tokens=int(lengths.sum()),
        pairs=int((lengths * (lengths + 1) // 2).sum()),
        scored=sum(completion for _, completion in rows))

  whole = 2 * forward(range(job.stage.num_slots)) + 4 * forward((0, 1))
  return whole / (1 - NAIVE_PADDING)


def mcpo_share(preset: str, *, batches: int) -> float:
  """A3: FLOPs of MC-PO steps of 16 candidates over the naive step's."""
  step, naive = open_step("mcpo", preset, candidates=16), 0.0
  for seed in range(batches):
    sets = step.draw_sets(seed)
    step.train(sets)
    naive += naive_flops(step.job, sets)
  return step.flops / naive


def candidate_cost(preset: str, *, batches: int) -> float:
  """A4: FLOPs of eight more candidates over those of their own tokens."""
  few, ideal_few = score_flops(preset, batches=batches, candidates=8)
  many, ideal_many = score_flops(preset, batches=batches, candidates=16)
  return (many - few) / (ideal_many - ideal_few)


def packing(
    preset: str, *, objective: str, batches: int
) -> tuple[int, float]:
  """A6: the shapes of chunks over many batches, and the share of padding."""
  step = open_step(
      objective, preset, candidates=1 if objective == "dpo" else 16)
  shapes, places, used = set(), 0, 0
  for seed in range(batches):
    batch = workload.make_batch(step.draw_sets(seed))
    everything = [range(len(slots)) for slots in batch.order]
    for chunk in step.job.model.pack(
        batch.sets, everything, batch.order, whole=objective == "dpo"):
      shapes.add(chunk.tokens.shape)
      places += chunk.tokens.size
      used += np.count_nonzero(chunk.prompt_slot >= 0)
  return len(shapes), 1 - used / places


def count_all(presets: list[str], *, batches: int, packed: int) -> list[Row]:
  """The rows of the table."""
  bars = {"tiny": (1.35, 1.15, 0.15), "1b": (1.12, 1.06, 0.05)}
  rows = []

  def add(name, figure, goal):
    rows.append(Row(name, float(figure), goal))
    print(f"{name}: {figure:.4g} (goal {goal:g})", flush=True)

  for preset in presets:
    train, score, padding = bars[preset]
    add(f"A1 DPO step, {preset}: FLOPs over ideal",
        dpo_ratio(preset, batches=batches), train)
    spent, ideal = score_flops(preset, batches=batches, candidates=16)
    add(f"A2 scoring 1 + 16, {preset}: FLOPs over ideal", spent / ideal, score)
    if preset == "1b":
      add(f"A3 MC-PO step of 16, {preset}: share of the naive step's FLOPs",
          mcpo_share(preset, batches=batches), 1 / 4.5)
    add(f"A4 a further candidate, {preset}: FLOPs over its own",
        candidate_cost(preset, batches=batches), 1.08)
    step = open_step("dpo", preset, candidates=1)
    vocab = step.job.model.config.vocab_size
    step.train(step.draw_sets(0))
    largest = step.largest_array()
    add(f"A5 DPO step, {preset}: largest array {largest}, over V",
        math.prod(largest) / vocab, 8192)
    for objective in ("dpo", "mcpo"):
      count, share = packing(preset, objective=objective, batches=packed)
      add(f"A6 {objective}, {preset}: shapes over {packed} batches", count, 4)
      add(f"A6 {objective}, {preset}: share of padding", share, padding)
  return rows


def table(rows: list[Row], args: Any, seconds: float) -> str:
  """Markdown."""
  lines = [
      f"| {row.name} | {row.figure:.4g} | {row.goal:.4g} | "
      f"{'yes' if row.figure <= row.goal else 'no'} |" for row in rows]
  return f"""# Counted goals

Command: `python benchmarks/counted.py --presets={args.presets} \
--batches={args.batches} --packed={args.packed} --out={args.out}`

FLOPs of the matrix products that the step's own functions ask for, on CPU's \
path of attention, over those that the mathematics needs; lognormal lengths, \
{args.batches} batches, of {PAIRS['tiny']} (tiny) and {PAIRS['1b']} (1b) pairs \
or {POOLS['tiny']} and {POOLS['1b']} pools, in streams of \
{sorted(set(STREAMS.values()))} tokens at most. The naive step repeats \
prompts, has {NAIVE_PADDING:.0%} of padding, scores policy and reference and \
trains with full remat. jax {jax.__version__}; {seconds:.0f} s.

| what | counted | at most | met |
|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--presets", default="tiny,1b", help="tiny, 1b")
  parser.add_argument("--batches", type=int, default=8)
  parser.add_argument("--packed", type=int, default=1000)
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  args = parser.parse_args()
  start = time.perf_counter()
  rows = count_all(
      args.presets.split(","), batches=args.batches, packed=args.packed)
  if args.out:
    args.out.write_text(table(rows, args, time.perf_counter() - start))


if __name__ == "__main__":
  main()
