"""Real runs of the command line on a tiny config, for end-to-end tests."""

import json
import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

TINY = [
    "--config=configs/quickstart.py",
    "--config.data.eval_path=None", "--config.data.eval_fraction=0.2",
    "--config.num_epochs=None", "--config.num_steps=8",
    "--config.batch_size=5", "--config.tokenizer.vocab_size=300",
    "--config.model.hidden_size=16", "--config.model.num_layers=2",
    "--config.model.num_heads=4", "--config.model.num_kv_heads=2",
    "--config.model.intermediate_size=24",
    "--config.data.max_prompt_length=48",
    "--config.data.max_completion_length=24",
    "--config.data.stream_length=96", "--config.data.num_streams=1",
    "--config.sft.num_steps=5", "--config.sft.batch_size=7",
    "--config.generation.num_samples=2",
    "--config.evaluation.every_steps=4", "--config.checkpoint.every_steps=2",
    "--config.log.every_steps=1",
    "--config.reward.name=None", "--config.reward.patterns_path=None",
]
COLOURS = ("red", "blue", "green", "white", "black", "grey")
THINGS = ("cup", "door", "boat", "hat", "lamp", "coin", "kite")


def write_data(folder: pathlib.Path, rows: int = 30) -> list[str]:
  """K-wise and sft records in `folder`; the flags that name them."""
  rng = random.Random(1)
  kwise, sft = [], []
  for i in range(rows):
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    prompt = f"colour {colour} thing {thing} {i}"
    right = f"the {thing} is {colour}"
    others = rng.sample([c for c in COLOURS if c != colour], 3)
    kwise.append({
        "prompt_id": f"row-{i}", "prompt": prompt,
        "completions": [right, *(f"the {thing} is {c}" for c in others)],
        "scores": [1.0, 0.5, 0.25, 0.0]})
    sft.append({"prompt_id": f"row-{i}", "prompt": prompt,
                "completion": right})
  folder.mkdir(parents=True, exist_ok=True)
  for name, records in (("kwise", kwise), ("sft", sft)):
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records))
  return [f"--config.data.path={folder / 'kwise.jsonl'}",
          f"--config.sft.data_path={folder / 'sft.jsonl'}"]


def command(verb: str, workdir, *flags: str) -> list[str]:
  """The command line of a tiny run."""
  return [sys.executable, "-m", "mcpo_jax", verb, *TINY,
          f"--workdir={workdir}", *flags]


def environment(cache, **extra: str) -> dict[str, str]:
  """One device, caches of its own; compiled programs are shared."""
  env = dict(os.environ, MCPO_CACHE=str(cache), JAX_PLATFORMS="cpu",
             HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
  env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  return env | extra


def run(verb, workdir, cache, *flags, **extra) -> subprocess.CompletedProcess:
  """Runs to the end, whatever the exit code."""
  return subprocess.run(
      command(verb, workdir, *flags), env=environment(cache, **extra),
      cwd=ROOT, capture_output=True, text=True, timeout=600)


def summary(workdir) -> dict:
  return json.loads((pathlib.Path(workdir) / "summary.json").read_text())


def metrics(workdir) -> list[dict]:
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]
