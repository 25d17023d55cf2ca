"""Damages checkpoints, model folders and reference caches at random.

    python benchmarks/corruption.py --trials 1000 --out benchmarks/corruption.md

Each trial takes a copy of a folder that training wrote, does one thing to one
of its files (a flipped bit, a cut, a deletion, or the content of another file
of the same kind) and opens it as training does. Damage counts as seen if that
is refused; of checkpoints the step before must come back, to the bit.
A model folder from elsewhere has no manifest: of it only structure and values
that are not finite are checked, and a flipped bit goes unseen.
"""

import argparse
import contextlib
import hashlib
import os
import pathlib
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mcpo_jax import checkpoints, commit, errors
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, hf
from mcpo_jax.training import reference

KINDS = ("flip", "cut", "delete", "swap")
CONFIG = config_lib.from_hf({
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1})


class Target(NamedTuple):
  """What is damaged.

  Attributes:
    name: for the table.
    make: folder -> None; what training would have written.
    damaged: folder -> where the damage is done, inside of it.
    other: folder -> where a swap takes other content from.
    open: folder -> whether what was damaged has been left out; refuses.
  """

  name: str
  make: Callable[[pathlib.Path], None]
  damaged: Callable[[pathlib.Path], pathlib.Path]
  other: Callable[[pathlib.Path], pathlib.Path]
  open: Callable[[pathlib.Path], bool]


def _state(step: int):
  params = decoder.init_params(jax.random.key(step), CONFIG)
  return {"params": params, "step": jnp.int32(step)}


def _save_steps(folder: pathlib.Path) -> None:
  keeper = checkpoints.Checkpointer(folder, keep=2)
  for step in (1, 2):
    keeper.save(step, _state(step), {})
  keeper.close()


def _falls_back(folder: pathlib.Path) -> bool:
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), _state(0))
  keeper = checkpoints.Checkpointer(folder, keep=2)
  with contextlib.closing(keeper):
    state, meta = keeper.restore_latest(shapes)
  same = jax.tree.map(np.array_equal, state, _state(1))
  return meta["step"] == 1 and all(jax.tree.leaves(same))


def _save_models(folder: pathlib.Path) -> None:
  for number, name in enumerate(("model", "other")):
    hf.save_params(
        folder / name, decoder.init_params(jax.random.key(number), CONFIG),
        CONFIG, max_shard_bytes=8_000)


def _load_model(folder: pathlib.Path) -> bool:
  commit.verify(folder / "model")  # as `results.finished` does
  hf.load_params(folder / "model", hf.load_config(folder / "model"))
  return False


def _save_cache(folder: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  for number in range(2):

    def write(to: pathlib.Path) -> None:
      starts = np.cumsum(rng.integers(1, 9, (257, 2)), axis=0)
      for name, array in (
          ("token_logps", -rng.random(starts[-1, 1], np.float32)),
          ("sums", -rng.random(starts[-1, 0], np.float32)),
          ("starts", starts.astype(np.int64))):
        np.save(to / f"{name}.npy", array)

    commit.write_folder(
        folder / f"{number * reference.ROWS_PER_SHARD:08d}", write, {})


def _open_cache(folder: pathlib.Path) -> bool:
  reference.ReferenceCache(folder, 2 * reference.ROWS_PER_SHARD)
  return False


TARGETS = (
    Target("checkpoint", _save_steps, lambda f: f / "2", lambda f: f / "1",
           _falls_back),
    Target("model folder", _save_models, lambda f: f / "model",
           lambda f: f / "other", _load_model),
    Target("reference cache", _save_cache, lambda f: f / "00000000",
           lambda f: f / "00000256", _open_cache),
)


def damage(
    place: pathlib.Path, other: pathlib.Path, kind: str, rng: random.Random
) -> str:
  """Does one thing to a random file below `place`; gives the file's name."""
  files = sorted(p for p in place.rglob("*") if p.is_file())
  if kind == "swap":  # with a file whose content differs
    files = [p for p in files if (other / p.relative_to(place)).exists()
             and (other / p.relative_to(place)).read_bytes()
             != p.read_bytes()]
  else:
    files = [p for p in files if p.stat().st_size]
  path = rng.choice(files)
  content = bytearray(path.read_bytes())
  if kind == "flip":
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
  elif kind == "cut":
    path.write_bytes(content[:rng.randrange(len(content))])
  elif kind == "delete":
    path.unlink()
  else:
    shutil.copyfile(other / path.relative_to(place), path)
  return str(path.relative_to(place))


def run(trials: int, seed: int = 0) -> dict[tuple[str, str], list[str]]:
  """(target, kind) -> of each trial "refused", "left out", or the name of the
  file whose damage was not seen."""
  rng, results = random.Random(seed), {}
  with tempfile.TemporaryDirectory() as base:
    base = pathlib.Path(base)
    for target in TARGETS:
      target.make(base / target.name)
    for trial in range(trials):
      target = TARGETS[trial % len(TARGETS)]
      kind = KINDS[trial // len(TARGETS) % len(KINDS)]
      folder = base / str(trial)
      shutil.copytree(base / target.name, folder)
      name = damage(target.damaged(folder), target.other(folder), kind, rng)
      try:
        outcome = "left out" if target.open(folder) else name
      except errors.McpoError:
        outcome = "refused"
      results.setdefault((target.name, kind), []).append(outcome)
      shutil.rmtree(folder)
  return results


def seconds_per_gigabyte() -> float:
  """Of SHA-256, of a processor's time."""
  data = os.urandom(2**28)
  began = time.process_time()
  hashlib.sha256(data).hexdigest()
  return (time.process_time() - began) * 1e9 / len(data)


def table(results: dict[tuple[str, str], list[str]], seconds: float) -> str:
  """Markdown."""
  lines = ["| what | damage | trials | refused | step before came back | "
           "not seen |", "|---|---|---|---|---|---|"]
  for (name, kind), outcomes in sorted(results.items()):
    refused, left = outcomes.count("refused"), outcomes.count("left out")
    lines.append(f"| {name} | {kind} | {len(outcomes)} | {refused} | {left} | "
                 f"{len(outcomes) - refused - left} |")
  every = [x for outcomes in results.values() for x in outcomes]
  missed = [x for x in every if x not in ("refused", "left out")]
  lines += ["", f"{len(every)} trials in {seconds:.0f} s, {len(missed)} not "
            f"seen.", "", f"SHA-256: {seconds_per_gigabyte():.2f} s of a core "
            f"per GB ({platform.machine()}).",
            *(f"Not seen: {name}" for name in missed)]
  return "\n".join(lines) + "\n"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--trials", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  args = parser.parse_args()
  logging.set_verbosity(logging.FATAL)
  began = time.perf_counter()
  results = run(args.trials, args.seed)
  text = table(results, time.perf_counter() - began)
  print(text)
  if args.out:
    command = f"python benchmarks/corruption.py --trials {args.trials}"
    args.out.write_text(
        f"# Damaged files\n\n`{command}`\n\n{__doc__.split(chr(10) * 2)[2]}\n\n"
        + text)
  return int("Not seen" in text)


if __name__ == "__main__":
  raise SystemExit(main())
