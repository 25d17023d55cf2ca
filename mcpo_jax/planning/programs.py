"""The compiled functions of a run, on devices that are not here.

The functions are those that training calls; their arguments are shapes with
shardings, so nothing is allocated.
"""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcpo_jax import sharding, types
from mcpo_jax.data import packing
from mcpo_jax.planning import collectives
from mcpo_jax.training import stage as stage_lib
from mcpo_jax.training import step as step_lib


class Program(NamedTuple):
  """One compiled function; bytes of one device."""

  name: str
  peak: int  # of all that it holds at a time, its arguments among them
  fits: bool  # whether the compiler found room for it alone
  collectives: list[collectives.Collective]
  seconds: float  # of compiling
  text: str  # of the partitioned program, "" of one that was not made


class Batch(NamedTuple):
  """A batch of the longest prompts and completions that a config allows."""

  sets: list[types.CandidateSet]
  order: list[list[int]]
  meta: types.SetBatch  # numpy


def make_batch(
    *, batch_size: int, num_slots: int, prompt_length: int,
    completion_length: int,
) -> Batch:
  """B sets of K candidates, all of one length."""
  mask = np.ones(completion_length, bool)
  completion = np.zeros(completion_length, np.int32)
  one = types.CandidateSet(
      example_id=np.zeros(2, np.uint32), prompt_id="0",
      prompt=np.zeros(prompt_length, np.int32),
      completions=[completion] * num_slots,
      completion_masks=[mask] * num_slots,
      candidate_ids=np.arange(num_slots, dtype=np.uint32),
      multiplicity=np.ones(num_slots, np.int32),
      scores=-np.arange(num_slots, dtype=np.float32), preferred=-1)
  sets, order = [one] * batch_size, [list(range(num_slots))] * batch_size
  return Batch(sets, order, packing.make_set_batch(
      sets, np.zeros(batch_size, np.int32), num_slots=num_slots, order=order))


def place(tree: Any, where: jax.sharding.Sharding) -> Any:
  """Shapes of arrays or of shapes, all with one sharding."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def size_on_device(tree: Any) -> int:
  """Bytes that one device holds of a tree of shapes with shardings; what waits
  in the host's memory is not there."""
  return sum(
      int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
      if x.sharding.memory_kind != "pinned_host")


def held(arguments: tuple) -> int:
  """Bytes that one device holds of a function's large arguments."""
  return sum(size_on_device(x) for x in jax.tree.leaves(arguments)
             if isinstance(x, jax.ShapeDtypeStruct) and x.size > 2**16)


def size(tree: Any) -> int:
  """Bytes of a tree of shapes, whole."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def training_streams(model: stage_lib.Model) -> types.Streams:
  """The shape of a chunk."""
  shape = model.num_streams, model.stream_length
  dtypes = types.Streams(*(np.int32,) * 4, np.bool_, np.int32)
  return place(types.Streams(*(jax.ShapeDtypeStruct(shape, t) for t in dtypes)),
               sharding.stream_sharding(model.mesh))


def training_programs(
    stage: stage_lib.Stage,
    model: stage_lib.Model,
    functions: step_lib.StepFunctions,
    batch: Batch,
) -> dict[str, tuple[Callable[..., Any], tuple]]:
  """Name -> (function, arguments) of the parts of `update.run_step`.

  The anchors of the batch are those that the objective and the kernel read of
  an offline run; a reference's weights are no argument, see `resident`.
  """
  whole = sharding.replicated(model.mesh)
  state = functions.state_shapes
  ref = np.zeros(batch.meta.role.shape, np.float32)
  sets = place(batch.meta._replace(
      anchors={name: ref for name in ("ref", *stage.entry.anchors)}), whole)
  streams = training_streams(model)
  wide = jnp.promote_types(model.compute_dtype, jnp.float32)
  logps = jax.ShapeDtypeStruct(ref.shape, wide, sharding=whole)
  values = types.Features(logps, {name: logps for name in stage.entry.terms})
  drawn, drawn_sets, _, _ = place(jax.eval_shape(
      functions.draw, stage.seed, state.step, state.memory, logps, sets), whole)
  inputs = step_lib.Inputs(
      drawn_sets, drawn, state.objective_state, state.step)
  total = jax.eval_shape(functions.zeros, state.params, values, inputs)
  total = place(total, whole)._replace(grads=jax.tree.map(
      lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
      total.grads, state.params))
  present = np.ones(stage.batch_size, bool)
  known = stage.scores_pool and not stage.entry.terms
  out = {"update": (functions.update, (state, total, inputs, state.memory))}
  if stage.scores_pool:
    out["score"] = functions.score, (
        model.policy(state.params), streams, sets)
  if not known and stage.entry.separable:
    out["train"] = functions.from_loss, (
        state.params, model.frozen, (), total, streams, inputs, present)
  else:
    out["train"] = functions.from_cotangents, (
        state.params, model.frozen, (), total, streams, inputs, values)
  return out


def compile_program(
    name: str, function: Callable[..., Any], arguments: tuple,
    mesh: jax.sharding.Mesh,
) -> Program:
  """Compiles one function for the devices of the mesh.

  A program that the compiler itself finds too large comes back with what it
  would have needed.
  """
  begin = time.perf_counter()
  try:
    with jax.set_mesh(mesh):
      compiled = function.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return Program(name, _needed(str(e), arguments), False, [],
                   time.perf_counter() - begin, "")
  text = compiled.as_text()
  return Program(
      name, compiled.memory_analysis().peak_memory_in_bytes, True,
      collectives.count(text, mesh.size), time.perf_counter() - begin, text)


def _needed(message: str, arguments: tuple) -> int:
  """Bytes that a program would have needed, of the compiler's message: of all,
  or of what it makes beside its arguments; 0 if it does not say."""
  found = re.search(r"(Used |temporaries \()([\d.]+)([KMGT]?)", message)
  if not found:
    return 0
  beside = held(arguments) if found[1] != "Used " else 0
  return beside + int(
      float(found[2]) * 1024 ** " KMGT".index(found[3] or " "))
