"""Sampling beside transformers' generate: new tokens per CPU-second.

The same weights, prompts and numbers of tokens (no stop token), temperature 1.
Every side is a process of its own, pinned to one core with one thread; what is
compiled is compiled before the clock starts, and the clock counts the CPU time
of the process. The sides take turns, for the machine's speed drifts.

  python benchmarks/generate.py --presets=tiny,small \\
      --out=benchmarks/generate.md

The models have random weights, made by make_fixture.py of ../shared/perf.
transformers runs twice where `cc` is at hand: as installed, and with a preload
that lets its BLAS use AVX-512 on processors of other makers. The last line is
JSON with the ratios.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PERF = pathlib.Path(
    os.environ.get("MCPO_SHARED", ROOT.parent / "shared")) / "perf"
PROMPTS, SAMPLES, NEW = 8, 8, 128
# The tokens that every side draws greedily from the first prompt, compared.
GREEDY = 24


# --- the two sides ------------------------------------------------------------


def read_prompts(data: pathlib.Path, number: int) -> list[list[int]]:
  lines = data.read_text().splitlines()[:number]
  return [json.loads(line)["prompt_ids"] for line in lines]


def run_ours(
    model: pathlib.Path, data: pathlib.Path, *, prompts: int = PROMPTS,
    samples: int = SAMPLES, new: int = NEW, dtype: str = "float32"
) -> dict:
  """Of the engine: seconds of CPU time, wall seconds, greedy tokens, memory."""
  import numpy as np

  from mcpo_jax.generation import sampling, service
  from mcpo_jax.models import decoder, hf

  config = hf.load_config(model)
  served = service.GenerationService(
      config, hf.load_params(model, config, dtype=dtype), 0,
      max_completion_length=new, stop_ids=(), pad_id=0, compute_dtype=dtype,
      num_slots=prompts * samples)
  prompt_tokens = [np.array(ids) for ids in read_prompts(data, prompts)]
  prompt_ids = np.arange(2 * prompts, dtype=np.uint32).reshape(-1, 2)

  def sample(seed, **how):
    return served.generate(
        prompt_tokens, prompt_ids=prompt_ids, num_samples=samples,
        sampling=sampling.Sampling(**how), seed=seed)

  first = sample(0, temperature=0.0).tokens[0, 0, :GREEDY].tolist()
  sample(0)
  wall, start = time.perf_counter(), time.process_time()
  result = sample(1)
  seconds, wall = time.process_time() - start, time.perf_counter() - wall
  assert result.mask.all()
  cache = served._engine._memory.caches[0]
  size = lambda arrays: sum(x.nbytes for x in arrays)
  token = size(cache.page_keys + cache.page_values) / (
      cache.page_keys[0].shape[1] * decoder.PAGE)
  lengths = [len(ids) for ids in prompt_tokens]
  return {
      "mean": sum(lengths) / prompts, "longest": max(lengths),
      "first": first, "seconds": seconds, "wall": wall,
      "prompt_bytes": size(cache.page_keys + cache.page_values),
      "repeated_bytes": token * sum(lengths) * samples,
      "padded_bytes": token * max(lengths) * prompts * samples,
  }


def run_theirs(model: pathlib.Path, data: pathlib.Path) -> dict:
  import torch
  import transformers

  torch.set_num_threads(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      model, dtype=torch.float32).eval()
  prompts = [ids for ids in read_prompts(data, PROMPTS)
             for _ in range(SAMPLES)]
  longest = max(map(len, prompts))
  ids = torch.zeros((len(prompts), longest), dtype=torch.long)
  mask = torch.zeros_like(ids)
  for row, seen, prompt in zip(ids, mask, prompts):
    row[longest - len(prompt):] = torch.tensor(prompt)
    seen[longest - len(prompt):] = 1

  def sample(rows=slice(None), **how):
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW} | how
    with torch.inference_mode():
      return model.generate(
          input_ids=ids[rows], attention_mask=mask[rows], pad_token_id=0,
          disable_compile=True, **how)[:, longest:]

  first = sample(slice(1), do_sample=False, max_new_tokens=GREEDY,
                 min_new_tokens=GREEDY)[0].tolist()
  draw = dict(do_sample=True, temperature=1.0, top_k=0)
  sample(**draw | dict(max_new_tokens=8, min_new_tokens=8))
  start = time.process_time()
  result = sample(**draw)
  seconds = time.process_time() - start
  assert result.shape == (len(prompts), NEW)
  return {"first": first, "seconds": seconds}


# --- the comparison -----------------------------------------------------------


def run_side(side: str, fixture: pathlib.Path, preload: str | None) -> dict:
  """One process on the last core of this one."""
  env = os.environ | {
      "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
      # As launch/*.sh ask for.
      "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
      "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512",
      "PYTHONPATH": str(ROOT)}
  if preload:
    env["LD_PRELOAD"] = preload
  core = max(os.sched_getaffinity(0))
  done = subprocess.run(
      [sys.executable, __file__, "--side", side, "--fixture", str(fixture)],
      env=env, capture_output=True, text=True,
      preexec_fn=lambda: os.sched_setaffinity(0, {core}))
  if done.returncode:
    raise SystemExit(done.stderr[-3000:])
  return json.loads(done.stdout.splitlines()[-1])


def compare(preset: str, folder: pathlib.Path, rounds: int) -> dict:
  """Medians over the rounds of one model."""
  fixture = folder / preset
  subprocess.run(
      [sys.executable, PERF / "make_fixture.py", "--preset", preset, "--out",
       fixture, "--rows", str(PROMPTS), "--candidates", "1"],
      check=True, capture_output=True)
  sides = {"ours": ("ours", None), "installed": ("theirs", None)}
  library = folder / "blas.so"
  if shutil.which("cc"):
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, PERF / "intel_blas.c"],
        check=True)
    sides["avx512"] = ("theirs", str(library))
  runs = {name: [] for name in sides}
  for _ in range(rounds):
    for name, (side, preload) in sides.items():
      runs[name].append(run_side(side, fixture, preload))
  firsts = {str(run["first"]) for of_side in runs.values() for run in of_side}
  assert len(firsts) == 1, f"greedy tokens differ: {firsts}"
  number = PROMPTS * SAMPLES * NEW
  speeds = {
      name: [number / run["seconds"] for run in of_side]
      for name, of_side in runs.items()}
  ratios = {
      name: statistics.median(
          ours / theirs for ours, theirs in zip(speeds["ours"], speeds[name]))
      for name in sides if name != "ours"}
  last = runs["ours"][-1]
  return {
      "speed": {name: statistics.median(s) for name, s in speeds.items()},
      "range": {name: [min(s), max(s)] for name, s in speeds.items()},
      "ratio": ratios,
      **{name: last[name] for name in last.keys() - {
          "first", "seconds", "wall"}},
  }


NAMES = {
    "ours": "this project", "installed": "transformers, as installed",
    "avx512": "transformers, BLAS with AVX-512"}


def table(results: dict[str, dict], command: str) -> str:
  """Markdown."""
  import jax
  import torch
  import transformers

  speeds = [
      f"| {preset} | {NAMES[name]} | {speed:.0f} | "
      + " to ".join(f"{x:.0f}" for x in result["range"][name])
      + f" | {result['ratio'].get(name, 1.0):.1f} |"
      for preset, result in results.items()
      for name, speed in result["speed"].items()]
  memory = [
      f"| {preset} | {result['longest']} | {result['mean']:.0f} |"
      f" {result['prompt_bytes'] / 2**20:.1f} |"
      f" {result['repeated_bytes'] / 2**20:.1f} |"
      f" {result['padded_bytes'] / 2**20:.1f} |"
      for preset, result in results.items()]
  return f"""# Sampling speed and the memory of prompts

Command: `{command}`

{PROMPTS} prompts, {SAMPLES} samples of each, {NEW} new tokens, temperature 1, \
float32, random weights. One core of an x86-64 machine that others used too, \
one thread; new tokens per CPU-second of the process, medians and ranges of \
runs that took turns; the ratio is the median of those of a turn. The first \
{GREEDY} greedy tokens are the same on all sides. jax {jax.__version__}, \
transformers {transformers.__version__}, torch {torch.__version__}. Tunix is \
not in this run: its sampler (0.1.7) was measured on the task of `tiny` at \
0.72 times the speed of transformers with AVX-512. transformers pads prompts \
to the longest, so the ratio hangs on their lengths: in single runs with other \
prompts it was 4.3 on `small` (longest 293, 1207 against 283 with AVX-512) and \
7.4 on `tiny` (longest 415, 7386 against 998).

| model | side | tokens per CPU-second | range | ours is times |
|---|---|---|---|---|
{chr(10).join(speeds)}

Keys and values of the prompts, MiB: as stored (once, in pages), for every \
sample without padding, and for every sample padded to the longest, as \
transformers has them.

| model | longest prompt | mean | stored | repeated | repeated and padded |
|---|---|---|---|---|---|
{chr(10).join(memory)}
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--presets", default="tiny", help="of make_fixture.py")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  parser.add_argument("--side", choices=("ours", "theirs"),
                      help="run one side here; the program calls itself so")
  parser.add_argument("--fixture", type=pathlib.Path, help="of that side")
  args = parser.parse_args()
  if args.side:
    run = run_ours if args.side == "ours" else run_theirs
    fixture = args.fixture
    print(json.dumps(run(fixture / "model", fixture / "data.jsonl")))
    return
  with tempfile.TemporaryDirectory() as folder:
    results = {
        preset: compare(preset, pathlib.Path(folder), args.rounds)
        for preset in args.presets.split(",")}
  command = "python benchmarks/generate.py --presets=" + args.presets
  if args.out:
    args.out.write_text(table(results, f"{command} --out={args.out}"))
  print(json.dumps(results))


if __name__ == "__main__":
  main()
