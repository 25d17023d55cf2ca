"""The sampler's compiled functions, on devices that are not here.

Decoding runs its layers one after the other in the program's text, which takes
the compilers of accelerators minutes at full depth: a model of `DEPTH` layers
is compiled, and the cache of the others added.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mcpo_jax import sharding
from mcpo_jax.generation import engine, sampler
from mcpo_jax.models import decoder
from mcpo_jax.planning import programs
from mcpo_jax.training import stage as stage_lib

DEPTH = 2


def sampling_programs(
    model: stage_lib.Model, *, samples: int, prompts: int, num_slots: int,
    prompt_length: int, completion_length: int,
) -> tuple[dict[str, tuple[Callable[..., Any], tuple]], int, int]:
  """The functions that draw completions of the longest prompts, at `DEPTH`.

  Args:
    model: the policy, all of its layers.
    samples: of a prompt.
    prompts: that wait together.
    num_slots: samples decoded together, about.
    prompt_length, completion_length: tokens.

  Returns:
    name -> (function, arguments), bytes of one device for the cache of all
    layers, of which the arguments hold `DEPTH` layers' share, and how many
    samples are decoded together.
  """
  mesh = model.mesh
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  pages = engine.num_pages(prompt_length)
  groups, width, held = engine.arrange(
      [samples] * prompts, [pages] * prompts, num_slots=num_slots, parts=parts)
  config = dataclasses.replace(
      model.config, num_layers=DEPTH,
      local_layers=model.config.local_layers[:DEPTH])
  kernels = sampler.make_kernels(
      config, compute_dtype=model.compute_dtype, mesh=mesh)
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  place = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=split if x.ndim else whole), tree)
  memory = _place_memory(jax.eval_shape(
      lambda: kernels.init(groups, width, engine.ring(completion_length), parts,
                           held, 1)), config, mesh)
  params = _unstacked(model)
  slots = place(engine.empty_slots(
      groups, width, 1 + engine.MAX_STOP_IDS, parts, held))
  number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
  tokens = np.zeros((parts, pages * decoder.PAGE), np.int32)
  cache = sum(programs.size_on_device(x) for x in memory.caches)
  return {
      "prefill": (kernels.prefill, ((params,), memory, *place(
          (tokens, np.zeros(parts, np.int32),
           np.zeros((parts, pages), np.int32))))),
      "decode": (kernels.decode, (
          (params,), jax.ShapeDtypeStruct((1,), np.float32, sharding=whole),
          memory, slots, number(np.int32), number(np.int32))),
  }, cache * model.config.num_layers // DEPTH, groups * width


def _unstacked(model: stage_lib.Model) -> Any:
  """Shapes of the weights as the sampler holds them, `DEPTH` layers deep."""
  def cut(path, x):
    spec = tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    dtype = x.dtype if path[-1].key == "scale" else model.compute_dtype
    stacked = path[0].key == "layers"
    return jax.ShapeDtypeStruct(
        x.shape[1:] if stacked else x.shape, dtype, sharding=NamedSharding(
            model.mesh, PartitionSpec(*(spec[1:] if stacked else spec))))

  params = jax.tree_util.tree_map_with_path(
      cut, model.policy(model.param_shapes))
  return params | {"layers": (params["layers"],) * DEPTH}


def _place_memory(memory: sampler.Memory, config, mesh) -> sampler.Memory:
  """Where `sampler.make_kernels` keeps the memory: parts over the batch axes,
  heads over "tensor" where it divides them."""
  batch = sharding.BATCH_SPEC[0]
  divides = config.num_kv_heads % mesh.shape["tensor"] == 0
  heads = PartitionSpec(batch, None, "tensor" if divides else None)
  put = lambda tree, spec: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree)
  return sampler.Memory(
      put(memory.caches, heads), put(memory.prompts, PartitionSpec(batch)),
      put(memory.own, PartitionSpec(batch)))
