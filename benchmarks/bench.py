"""Speed of the project's own functions; the last line is JSON.

  python benchmarks/bench.py dpo --model=fx/tiny/model \\
      --data=fx/tiny/data.jsonl --batch=4 --steps=6 --warmup=2

dpo: DPO steps. score: log-probs of 1 + L completions, no gradient. mcpo: MC-PO
steps with L candidates. generate: --samples of --new tokens for each of
--prompts. Model and data are made by make_fixture.py of ../shared/perf.

All steps run twice, from the same weights: the first time compiles every
shape, the second is timed from step --warmup on, and must compile nothing. The
figures: rows (of dpo: pairs; of generate: new tokens) per second of CPU time of
this process and of wall time; `first`, sum-logps of the first four completions
of the first row, and `logps_chosen_first`, the mean of the first batch's
preferred ones, both before any update; ideal_gflops, FLOPs that the mathematics
needs, per second; compile_s, CPU time that the first pass took more; shapes
(the most that a function has seen), recompiles of the timed part, peak_rss_mb,
and own_cores.
"""

import argparse
import json
import pathlib
import resource
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's code, whatever is installed

import jax  # noqa: E402

from benchmarks import generate, workload  # noqa: E402
from mcpo_jax import types  # noqa: E402
from mcpo_jax.stages import references  # noqa: E402
from mcpo_jax.training import batch as batch_lib  # noqa: E402
from mcpo_jax.training import stage as stage_lib  # noqa: E402
from mcpo_jax.training import update  # noqa: E402


class Compilations:
  """Counts the programs that XLA compiles."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def _hear(self, event, *_, **__):
    self.count += event == "/jax/core/compile/backend_compile_duration"


class Clock:
  """CPU time of this process and wall time since it was made."""

  def __init__(self):
    self._cpu, self._wall = time.process_time(), time.perf_counter()

  def read(self) -> tuple[float, float]:
    return (time.process_time() - self._cpu, time.perf_counter() - self._wall)


def forget_peak_memory() -> None:
  """Lets the peak begin anew, where the kernel allows it."""
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    pass


def peak_memory() -> dict[str, float]:
  """The peak of this process, MB, and of the device where it knows, GiB."""
  kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # VmHWM is what forget_peak_memory resets
    kb = int(status.read_text().split("VmHWM:")[1].split()[0])
  seen = jax.devices()[0].memory_stats() or {}
  peak = {"peak_rss_mb": round(kb / 1024, 1)}
  if "peak_bytes_in_use" in seen:
    peak["device_peak_gib"] = round(seen["peak_bytes_in_use"] / 2**30, 2)
  return peak


def rates(name: str, count: float, cpu: float, wall: float) -> dict[str, float]:
  return {f"{name}_per_cpu_s": round(count / cpu, 4),
          f"{name}_per_s": round(count / wall, 4),
          "own_cores": round(cpu / wall, 2)}


def open_job(
    args: argparse.Namespace
) -> tuple[workload.Job, list[batch_lib.HostBatch]]:
  """The job of the command line, and its batches."""
  candidates = 1 if args.what == "dpo" else args.candidates
  number = args.batch * args.steps
  sets = workload.read_sets(args.data, number=number, candidates=candidates)
  if len(sets) < number:
    raise SystemExit(f"{args.data} has {len(sets)} rows, not {number}")
  job = workload.open_job(
      "dpo" if args.what == "dpo" else "mcpo", batch_size=args.batch,
      num_examples=number, num_slots=1 + candidates, folder=args.model,
      overrides=args.config)
  return job, [workload.make_batch(sets[row:row + args.batch], row)
               for row in range(0, number, args.batch)]


def time_training(
    job: workload.Job, batches: list[batch_lib.HostBatch],
    reference: stage_lib.Reference, warmup: int
) -> tuple[float, float, float]:
  """CPU and wall seconds of updates after the first `warmup`, from the first
  weights on, and the FLOPs that the mathematics needs for them."""
  state = job.functions.init(job.start())
  for i, batch in enumerate(batches):
    if i == warmup:
      jax.block_until_ready(state)
      clock, flops = Clock(), 0.0
    state, metrics = update.run_step(
        job.stage, job.model, job.functions, state, batch, reference)
    float(metrics["loss"])  # the loop waits for its metrics too
    if i >= warmup:
      flops += metrics["flops"]
  jax.block_until_ready(state)
  return *clock.read(), flops


def time_scoring(
    job: workload.Job, batches: list[batch_lib.HostBatch],
    params: types.Params, warmup: int
) -> tuple[float, float, float]:
  """The same of scoring."""
  flops = 0.0
  for i, batch in enumerate(batches):
    if i == warmup:
      clock = Clock()
    jax.block_until_ready(update.score_chunks(
        job.model, job.functions, params, batch,
        job.model.put_replicated(batch.meta), job.model.pack_all(batch)))
    if i >= warmup:
      flops += workload.ideal_flops(job, batch.sets)
  return *clock.read(), flops


def run_steps(args: argparse.Namespace) -> dict:
  """dpo, mcpo and score."""
  compiled = Compilations()
  job, batches = open_job(args)
  policy = job.start_policy()
  sequence_logps = references.host_sequence_logps(job.model, policy)
  first = sequence_logps(batches[0])
  reference = stage_lib.Reference(sequence_logps)
  if args.what != "score" and args.reference == "given":
    known = {batch.rows[0]: sequence_logps(batch) for batch in batches}
    reference = stage_lib.Reference(lambda batch: known[batch.rows[0]])
    policy = sequence_logps = None  # as in runs, which read them from a file

  def run():
    if args.what == "score":
      return time_scoring(job, batches, policy, args.warmup)
    return time_training(job, batches, reference, args.warmup)

  whole = Clock()
  run()
  first_pass, before = whole.read()[0], compiled.count
  forget_peak_memory()
  whole = Clock()
  cpu, wall, flops = run()
  memory, compile_s = peak_memory(), first_pass - whole.read()[0]
  timed = batches[args.warmup:]
  if args.what != "score" and args.reference == "resident":
    flops += sum(workload.ideal_flops(job, batch.sets) for batch in timed)
  return {
      **rates("pairs" if args.what == "dpo" else "rows",
              args.batch * len(timed), cpu, wall),
      **rates("ideal_gflops", flops / 1e9, cpu, wall),
      "first": first[0, :4].tolist(),
      "logps_chosen_first": float(first[:, 0].mean()),
      "compile_s": round(compile_s, 1),
      "shapes": max(f._cache_size() for f in job.functions
                    if hasattr(f, "_cache_size")),
      "recompiles": compiled.count - before, **memory}


def run_generate(args: argparse.Namespace) -> dict:
  """generate: every prompt's samples, no stop token, temperature 1."""
  sampled = generate.run_ours(
      args.model, args.data, prompts=args.prompts, samples=args.samples,
      new=args.new, dtype=dict(args.config).get("model.param_dtype", "float32"))
  count = args.prompts * args.samples * args.new
  return {**rates("new_tokens", count, sampled["seconds"], sampled["wall"]),
          "first": sampled["first"], **peak_memory()}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("what", choices=("dpo", "score", "mcpo", "generate"))
  parser.add_argument("--model", type=pathlib.Path, required=True)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--steps", type=int, default=6)
  parser.add_argument("--warmup", type=int, default=2)
  parser.add_argument("--candidates", type=int, default=8,
                      help="of score and mcpo, beside the preferred one")
  parser.add_argument("--reference", choices=("given", "resident"),
                      default="given", help="log-probs given, or in the step")
  parser.add_argument("--prompts", type=int, default=generate.PROMPTS)
  parser.add_argument("--samples", type=int, default=generate.SAMPLES)
  parser.add_argument("--new", type=int, default=generate.NEW)
  parser.add_argument(
      "--config", action="append", default=[], metavar="KEY=VALUE",
      type=lambda text: text.split("=", 1), help="a key of configs/default.py")
  args = parser.parse_args()
  run = run_generate if args.what == "generate" else run_steps
  print(json.dumps({"what": args.what, **run(args)}))


if __name__ == "__main__":
  main()
