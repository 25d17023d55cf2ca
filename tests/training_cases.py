"""A tiny model and random candidate sets for tests of the training room."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import objective_names, sharding, types
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder
from mcpo_jax.training import batch as batch_lib
from mcpo_jax.training import loop, metrics
from mcpo_jax.training import stage as stage_lib

VOCAB = 37
OPTIMIZER = {
    "name": "adamw", "learning_rate": 1e-2, "schedule": "constant",
    "warmup_ratio": 0.0, "weight_decay": 0.0, "b1": 0.9, "b2": 0.999,
    "eps": 1e-8, "max_grad_norm": 1e9,
}


def make_model(*, num_streams=8, stream_length=48, devices=1, data=-1, fsdp=1,
               tensor=1, dtype=jnp.float32) -> stage_lib.Model:
  """Two layers of width 16 on the first `devices` simulated devices."""
  config = config_lib.ModelConfig(
      family="llama", vocab_size=VOCAB + 3, hidden_size=16, num_layers=2,
      num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24,
      max_positions=64)
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor,
                            devices=jax.devices()[:devices])
  shapes = decoder.param_shapes(config, dtype=dtype)
  shardings = sharding.infer_shardings(shapes, decoder.PARAM_RULES, mesh)
  shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  return stage_lib.Model(config, mesh, shapes, dtype, "none", num_streams,
                    stream_length, 0)


def init(model: stage_lib.Model, seed: int = 0) -> types.Params:
  """Random weights, larger than usual so that candidates differ."""
  dtype = jax.tree.leaves(model.param_shapes)[0].dtype

  def make():
    params = decoder.init_params(
        jax.random.key(seed), model.config, dtype=dtype)
    return jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, params)

  return jax.jit(make, out_shardings=model.param_shardings)()


def candidate_set(rng: np.random.Generator, name: int, count: int
                  ) -> types.CandidateSet:
  """`count` candidates of 3..9 tokens after a prompt of 2..7."""
  lengths = rng.integers(3, 10, count)
  return types.CandidateSet(
      example_id=np.array([name, 7 * name + 1], np.uint32),
      prompt_id=f"p{name}",
      prompt=rng.integers(1, VOCAB, rng.integers(2, 8)).astype(np.int32),
      completions=[rng.integers(1, VOCAB, n).astype(np.int32) for n in lengths],
      completion_masks=[np.ones(n, bool) for n in lengths],
      candidate_ids=np.arange(count, dtype=np.uint32),
      multiplicity=np.ones(count, np.int32),
      scores=rng.permutation(count).astype(np.float32),
      preferred=-1)


def host_batch(sets: list[types.CandidateSet], num_slots: int
               ) -> batch_lib.HostBatch:
  """The sets as one batch at their first visit."""
  from mcpo_jax.data import packing

  order = [packing.order_candidates(s, preferred="best")[0] for s in sets]
  meta = packing.make_set_batch(
      sets, np.zeros(len(sets), np.int32), num_slots=num_slots, order=order)
  return batch_lib.HostBatch(np.arange(len(sets)), sets, order, meta)


def stage(objective="mcpo", *, num_steps=4, batch_size=5, beta=0.3,
          optimizer=None, **kernel) -> stage_lib.Stage:
  """Settings of a small run."""
  settings = {} if objective == "sft" else {"beta": beta}
  return stage_lib.Stage(
      "preference", objective, objective_names.find_objective(objective),
      settings,
      {"strategy": "mc", "score": "reward", "temperature": 1.0,
       "num_negatives": 1, "include_preferred": False} | kernel,
      optimizer or OPTIMIZER, num_steps, batch_size, 11)


def train_on(folder: pathlib.Path, num_steps: int, **model
             ) -> list[tuple[float, list[list[int]]]]:
  """Trains to `num_steps` from the newest checkpoint in the folder, as a run
  that was stopped and goes on elsewhere.

  Args:
    folder: of the run.
    num_steps: updates, of which the last is saved.
    **model: of `make_model`.

  Returns:
    (loss, drawn slots) of each update that was made.
  """
  rng = np.random.default_rng(3)
  sets = [candidate_set(rng, i + 1, 3 + i) for i in range(9)]
  batch = host_batch(sets, 12)
  ref = rng.normal(size=batch.meta.role.shape).astype(np.float32) - 20
  made = make_model(num_streams=8, stream_length=20, **model)
  seen = []
  loop.train(
      stage(num_negatives=2, batch_size=9, num_steps=num_steps), made,
      lambda step: batch, functools.partial(init, made), folder,
      metrics.Writer(folder), loop.Schedule(
          log_every=1, save_every=100, keep=2, evaluate_every=100,
          patience=None, keep_best=False), meta={},
      reference=stage_lib.Reference(lambda batch: ref),
      show=lambda step, batch, metrics: seen.append(
          (float(metrics["loss"]), metrics["kernel/selected"].tolist())))
  return seen
