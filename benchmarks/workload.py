"""What the benchmarks run: the project's own functions on sets of known length.

Prompts and completions are of lognormal lengths, as make_fixture.py of
../shared/perf draws them: prompts of mean 200, completions of mean 231 after
the cut, sigma 0.7, both cut at 512. `open_job` turns a config into the objects
that a run is made of, as the preference stage does; weights of a shape of
PRESETS need not exist.
"""

import json
import math
import pathlib
import types as std_types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from configs import default
from mcpo_jax import config_file, settings, sharding, types
from mcpo_jax.models import flops
from mcpo_jax.training import architecture, setup, step
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import stage as stage_lib

LONGEST = 512  # prompt tokens, and completion tokens
# Of the one stream of a chunk; what a batch leaves is packed into shorter ones.
STREAM_LENGTH = 4096

# Llama shapes; the last two are those of Llama 3.2 1B and Llama 3.1 8B.
PRESETS = {
    "tiny": dict(hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4,
                 head_dim=32, intermediate_size=704, vocab_size=8192,
                 tie_embeddings=False),
    "small": dict(hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4,
                  head_dim=64, intermediate_size=1408, vocab_size=32000,
                  tie_embeddings=False),
    "1b": dict(hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8,
               head_dim=64, intermediate_size=8192, vocab_size=128256,
               tie_embeddings=True),
    "8b": dict(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
               head_dim=128, intermediate_size=14336, vocab_size=128256,
               tie_embeddings=False),
}


class Job(NamedTuple):
  """The objects of one run."""

  stage: stage_lib.Stage
  model: stage_lib.Model
  functions: step.StepFunctions
  start: Callable[[], types.Params]  # fresh arrays of what is trained
  start_policy: Callable[[], types.Params]


def make_set(
    row: int, prompt: np.ndarray, completions: list[np.ndarray]
) -> types.CandidateSet:
  """A set whose first completion is the preferred one."""
  count = len(completions)
  return types.CandidateSet(
      example_id=np.array([row, 7 * row + 1], np.uint32),
      prompt_id=str(row), prompt=np.asarray(prompt, np.int32),
      completions=[np.asarray(ids, np.int32) for ids in completions],
      completion_masks=[np.ones(len(ids), bool) for ids in completions],
      candidate_ids=np.arange(count, dtype=np.uint32),
      multiplicity=np.ones(count, np.int32),
      scores=np.eye(1, count, dtype=np.float32)[0], preferred=0)


def read_sets(
    path: pathlib.Path, *, number: int, candidates: int
) -> list[types.CandidateSet]:
  """The first sets of a make_fixture.py file, with so many candidates beside
  the preferred completion."""
  sets = []
  with open(path) as file:
    for row, line in zip(range(number), file):
      one = json.loads(line)
      sets.append(make_set(row, one["prompt_ids"], [
          one["chosen_ids"], *one["candidates_ids"][:candidates]]))
  return sets


def lognormal_sets(
    seed: int, *, number: int, candidates: int, vocab_size: int = 4,
    prompt: float = 200, completion: float = 250
) -> list[types.CandidateSet]:
  """Random tokens of lognormal lengths, of these means before the cut."""
  rng = np.random.default_rng(seed)

  def lengths(mean, least, count):
    drawn = rng.lognormal(math.log(mean) - 0.245, 0.7, count)
    return np.clip(np.rint(drawn), least, LONGEST).astype(int)

  draw = lambda size: rng.integers(0, vocab_size, size, np.int32)
  return [
      make_set(row, draw(size), [
          draw(n) for n in lengths(completion, 4, 1 + candidates)])
      for row, size in enumerate(lengths(prompt, 8, number))]


def make_batch(
    sets: list[types.CandidateSet], row: int = 0
) -> batch_lib.HostBatch:
  """The sets as one batch; they are rows `row` and on of the data."""
  return batch_lib.arrange(
      sets, np.arange(row, row + len(sets)), np.zeros(len(sets), np.int32),
      seed=0, num_slots=max(len(one.completions) for one in sets),
      preferred="index", top_k=None)


def open_job(
    objective: str, *, batch_size: int, num_examples: int, num_slots: int,
    preset: str | None = None, folder: pathlib.Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Job:
  """The preference stage of the default config with some keys changed.

  Args:
    objective: `objective.name`.
    batch_size: sets of an update.
    num_examples: sets of the data.
    num_slots: K.
    preset: the shape of the model; or
    folder: Hugging Face weights.
    overrides: (dotted config key, text), as on the command line.
    devices: the mesh's; all of them by default.
  """
  config = default.get_config()
  config.update_from_flattened_dict({
      "stages": ("preference",), "num_epochs": 1.0, "batch_size": batch_size,
      "objective.name": objective, "objective.beta": 0.1,
      "optimizer.learning_rate": 1e-5, "optimizer.schedule": "constant",
      "optimizer.warmup_ratio": 0.0, "data.path": "data.jsonl",
      "data.max_prompt_length": LONGEST,
      "data.max_completion_length": LONGEST,
      "data.num_streams": 1, "data.stream_length": STREAM_LENGTH,
      "model.max_position_embeddings": 4 * LONGEST})
  vocab_size = 0
  if preset is not None:
    shape = dict(PRESETS[preset])
    vocab_size = shape.pop("vocab_size")
    config.model.update(shape)
  for key, text in overrides:
    config_file.override(config, key, text)
  config = settings.resolve(config.to_dict())
  tokenizer = std_types.SimpleNamespace(
      vocab_size=vocab_size, pad_id=0, bos_id=1, stop_ids=(2,))
  mesh = sharding.make_mesh(**config["mesh"], devices=devices)
  here = pathlib.Path()
  run = setup.Run(config, here, here, mesh, folder, tokenizer, {})
  model, start, start_policy = architecture.open_trained(
      run, *architecture.open_model(run, folder))
  stage = setup.stage_of(
      config, num_examples, supervised=False, num_slots=num_slots)
  functions = stage_lib.make_functions(stage, model)
  return Job(stage, model, functions, start, start_policy)


def ideal_flops(job: Job, sets: list[types.CandidateSet]) -> float:
  """Of one forward pass over the sets."""
  return flops.pass_flops(
      job.model.config, sets,
      [np.arange(len(one.completions)) for one in sets])
