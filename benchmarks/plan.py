"""Plans of the 8B MC-PO step on accelerators that are not here, as a table.

For each topology one `python -m mcpo_jax plan` of configs/llama3_8b_nectar_mcpo
with Llama 3 8B's shape; its numbers go to plan.json, and the table of plan.md
is written anew from there, as is that of launch/README.md:

  python benchmarks/plan.py [--only=v5e:4x4,h100:8] [--quick]

TPUs need the extra `tpu`, GPUs `plan-gpu`. Minutes and 4 GB for each topology;
--quick compiles with the compiler's least effort.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = pathlib.Path(__file__).with_suffix(".json")
PAGE = pathlib.Path(__file__).with_suffix(".md")
LAUNCH = ROOT / "launch" / "README.md"
GIB = 2**30

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "bos_token_id": 128000,
    "eos_token_id": 128001}
COMMON = ["data.max_prompt_length=512"]
# Topology -> an assumed price of a chip-hour, and what differs: a stream for
# each device.
TOPOLOGIES = {
    "v5e:4x4": (1.2, ["data.num_streams=16"]),
    "2xv5e:4x4": (1.2, ["data.num_streams=32", "mesh.data=2"]),
    "v6e:4x4": (2.7, ["data.num_streams=16"]),
    "v5p:2x4x4": (4.2, ["data.num_streams=32"]),
    "tpu7x:2x2x2": (12.0, ["data.num_streams=16"]),
    "h100:8": (3.0, ["data.num_streams=8"]),
    "h200:8": (3.5, ["data.num_streams=8"]),
}

HEAD = """# Plans of devices that are not here

`python -m mcpo_jax plan` compiles a config's functions for a topology. Needed:
`bash launch/setup.sh tpu` (libtpu, no TPU), for GPUs the extra `plan-gpu`. A
model without weights is a folder with its `config.json`. Every plan takes the
longest prompts and completions, so it is an upper bound.
"""

TAIL = """## What is sent

Of two slices the gradients are added up between them, 1.1 GiB a chunk (counted
with the compiler's least effort); the rest stays inside a slice.

tpu7x: libtpu 0.0.42.1, the one that jax 0.10.2 asks for, ends the process at
the train function with a failed check of its own
(offload_collective_strategies.cc). A newer one, in a folder of its own,
compiles it: `pip install --no-deps --target=DIR libtpu==0.0.45`, then
`PYTHONPATH=DIR`.

FSDP gathers every weight for the forward pass and again for the backward pass,
and scatters the gradients: three times the weights' bytes. The TPU compiler
turns most of that into loops of permutes around a ring, which overlap with the
products; a ring sends 17 sixteenths where a gather sends 15, and the table's
numbers have the embeddings of a chunk in them, which are added up over the
devices. In the step at 1B shapes on 8 simulated devices it is at most 1.1 x 3
times, and no array with a whole vocabulary is in a gather or a sum
(`tests/plan_test.py` for both).
"""


def run(name: str, quick: bool = False) -> dict:
  """The numbers of one topology, with its command and what made them."""
  price, overrides = TOPOLOGIES[name]
  commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                          text=True, stdout=subprocess.PIPE).stdout.strip()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    told = subprocess.run(
        [sys.executable, "-m", "mcpo_jax", "plan",
         "--config=configs/llama3_8b_nectar_mcpo.py", f"--topology={name}",
         f"--price-per-chip-hour={price}", f"--workdir={folder / 'out'}",
         *(f"--config.{text}" for text in (
             f"model.path={folder}", *COMMON, *overrides))],
        cwd=ROOT, env=os.environ | {
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0" if quick else "0.0"},
        text=True, stdout=subprocess.PIPE)
    print(told.stdout, flush=True)
    if told.returncode:
      sys.exit(f"the plan of {name} ended with {told.returncode}")
    found = json.loads((folder / "out" / "summary.json").read_text())
  compiler = "jax-cuda13-plugin" if name.startswith("h") else "libtpu"
  return {"made_by": f"commit {commit}, jax {metadata.version('jax')}, "
          f"{compiler} {metadata.version(compiler)}, Python "
          f"{platform.python_version()}{', quick' if quick else ''}",
          "text": told.stdout.splitlines(),
          **{key.removeprefix("plan/"): n for key, n in found.items()}}


def table(head: list[str], rows: list[list[str]]) -> str:
  return "\n".join(f"| {' | '.join(row)} |" for row in (
      head, ["---"] * len(head), *rows)) + "\n"


def page(plans: dict[str, dict]) -> str:
  """plan.md."""
  gib = lambda n: f"{n / GIB:.2f}"
  parts = ("score", "train", "update", "prefill", "decode")
  memory, times, costs, settings = [], [], [], []
  for name, (price, overrides) in TOPOLOGIES.items():
    if name not in plans:
      settings.append([name, f"{price:g}", "not run", ""])
      continue
    one = plans[name]
    chips, limit = facts(one)
    fsdp = int(re.search(r"fsdp=(\d+)", one["text"][0])[1])
    sent = 2 * one["params"] * (1 - 1 / fsdp)
    memory.append([name, str(one["devices"]), *(gib(one[f"{role}_bytes"])
                   for role in ("weights", "optimizer", "gradients", "copies")),
                   *(gib(one[f"{part}/peak_bytes"]) for part in parts), limit])
    times.append([
        name, f"{one['step_seconds_least']:.1f} to "
        f"{one['step_seconds_most']:.1f}", f"{one['tokens_per_sec']:,.0f}",
        *(f"{one[f'{part}/received_bytes'] / GIB:.1f} "
          f"({one[f'{part}/received_bytes'] / sent:.2f})"
          for part in ("score", "train")),
        f"{one['sampling_tokens_per_sec']:,.0f}"])
    costs.append([
        name, *(f"{hours:.2f} h, {hours * chips * price:,.0f}" for hours in (
            one["training_hours"], one["reference_hours"],
            one["evaluation_hours"] + one["evaluation_sampling_hours"])),
        f"{one['checkpoint_bytes'] / 1e9:.1f} GB",
        f"{one['checkpoint_seconds']:.0f} s"])
    settings.append([name, f"{price:g}", " ".join(overrides), one["made_by"]])
  return f"""{HEAD}
## The 8B MC-PO step

Llama 3 8B's shape, `configs/llama3_8b_nectar_mcpo.py`: 128 prompts an update
of seven candidates each, prompts of 512 tokens and completions of 1024, weights
and AdamW in float32, products in bfloat16, remat full. Command:
`python benchmarks/plan.py`.

Memory, GiB of a device. The first four lie there throughout; the functions'
peaks have them in. Copies are the sampler's.

{table(["topology", "devices", "weights", "AdamW", "gradients", "copies",
        *(f"peak: {part}" if part == "score" else part for part in parts),
        "of"], memory)}
Time of an update by a roofline: parts overlapped to one after the other. No
such device was at hand to compare it with. Tokens/s are those of the slower
end. Received: GiB that the links bring a device in one chunk of the function,
counted in the compiled program, and how many times what a gather of all weights
in bfloat16 brings. Sampling: an upper bound.

{table(["topology", "s an update", "tokens/s", "received: score", "train",
        "sampled tokens/s"], times)}
Hours and money for 100,000 prompts, their reference pass, and an evaluation
(512 prompts, scored and sampled); the bytes of a checkpoint, and the seconds to
write it at an assumed 1 GB/s of each host.

{table(["topology", "100,000 prompts", "reference pass", "evaluation",
        "checkpoint", "to write"], costs)}
Prices of a chip-hour are assumptions of this table, no quotes. All with the
compiler's full effort. `--quick` asks for its least: of v6e:4x4 it sent 2 %
more and held 12.30 GiB in training instead of 12.83; of two slices, 65 % more
in training and 12.49 GiB instead of 14.08.

{table(["topology", "a chip-hour", "beside the common settings", "made by"],
       settings)}
{TAIL}"""


def expected(plans: dict[str, dict]) -> str:
  """The table of launch/README.md."""
  rows = []
  for name, topology in (
      ("v5e-16", "v5e:4x4"), ("v5p-64", "v5p:2x4x4"), ("8xH100", "h100:8")):
    if topology not in plans:
      rows.append([name, topology, "not run", *[""] * 6])
      continue
    one, (price, _) = plans[topology], TOPOLOGIES[topology]
    chips, limit = facts(one)
    peak = max(n for key, n in one.items() if key.endswith("peak_bytes"))
    rows.append([
        name, topology, f"{peak / GIB:.1f} of {limit} GiB",
        f"{one['step_seconds_least']:.1f} to {one['step_seconds_most']:.1f}",
        f"{one['tokens_per_sec']:,.0f}", f"{one['training_hours']:.1f}",
        f"{one['training_hours'] * chips * price:,.0f} ({price:g})",
        f"{one['checkpoint_bytes'] / 1e9:.1f} GB",
        f"{one['checkpoint_seconds']:.0f} s"])
  return table(
      ["slice", "`--topology`", "peak memory", "s an update", "tokens/s",
       "hours for 100,000 prompts", "dollars (of a chip-hour)", "checkpoint",
       "to write"], rows)


def facts(plan: dict) -> tuple[int, str]:
  """Chips, and GiB of a device."""
  found = re.search(r"(\d+) chips, .* of ([\d.]+) GiB, mesh", plan["text"][0])
  return int(found[1]), found[2]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--only", default=",".join(TOPOLOGIES))
  parser.add_argument("--quick", action="store_true")
  arguments = parser.parse_args()
  plans = json.loads(OUT.read_text()) if OUT.exists() else {}
  for name in filter(None, arguments.only.split(",")):  # none: the page alone
    plans[name] = run(name, arguments.quick)
    OUT.write_text(json.dumps(plans, indent=1) + "\n")
  PAGE.write_text(page(plans))
  text = LAUNCH.read_text()
  before, after = text.split("<!-- of benchmarks/plan.py -->\n")[::2]
  LAUNCH.write_text("<!-- of benchmarks/plan.py -->\n".join(
      (before, expected(plans), after)))


if __name__ == "__main__":
  main()
