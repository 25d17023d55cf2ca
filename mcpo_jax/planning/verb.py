"""The verb plan: what a config needs of devices that are not here, and costs.

Lengths are the longest that the config allows. Times are a roofline's: products
at the devices' peak, memory at its bandwidth, collectives at the speed of all
links; at least the largest of the three, at most their sum.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mcpo_jax import commit, devices, errors, sharding
from mcpo_jax.generation import engine
from mcpo_jax.models import config as config_lib
from mcpo_jax.models import decoder, flops, hf, hub, lora
from mcpo_jax.planning import collectives, programs, sampler, topology
from mcpo_jax.training import architecture, setup
from mcpo_jax.training import stage as stage_lib

ROWS = 100_000  # prompts that costs are told for
DISK = 1e9  # bytes/s that one host writes of a checkpoint, assumed
_HOST = {"h100": 8, "h200": 8}  # devices of a host; others have 4 chips
# Candidates of a prompt in the known layouts; others are taken to have 8.
_CANDIDATES = {"nectar": 7, "ultrafeedback": 4, "pairs": 2, "hh": 2,
               "unpaired": 1, "sft": 1}


class Memory(NamedTuple):
  """Bytes of one device, by role."""

  weights: int
  optimizer: int
  gradients: int
  copies: int  # reference, moving weights, the sampler's own copy

  @property
  def resident(self) -> int:
    return sum(self)


class Time(NamedTuple):
  """Seconds of the parts of a roofline."""

  products: float
  memory: float
  links: float

  @property
  def least(self) -> float:
    return max(self)

  @property
  def most(self) -> float:
    return sum(self)

  def __str__(self) -> str:
    return (f"{self.least:.3g} to {self.most:.3g} s (products "
            f"{self.products:.3g}, memory {self.memory:.3g}, collectives "
            f"{self.links:.3g})")


def plan(
    config: dict[str, Any], name: str, price: float | None,
    workdir: pathlib.Path | None,
) -> None:
  """Prints the plan of a config's training on a topology; with a workdir also
  writes its numbers to summary.json.

  Args:
    config: resolved.
    name: of the topology, see `topology.parse`.
    price: of a chip for an hour, in any currency; None: no costs.
    workdir: or None.

  Raises:
    ResourceError: plan.memory, it does not fit; plan.compiler.
    ConfigError: plan.topology, config.mesh, config.divisible.
    ModelDirError: of model.path.
  """
  target = topology.parse(name)
  model = lay_out(config, open_shape(config), sharding.make_mesh(
      **config["mesh"], devices=topology.open_devices(target)))
  stage, batch = stage_and_batch(config)
  functions = stage_lib.make_functions(stage, model)
  parts = programs.training_programs(stage, model, functions, batch)
  memory = resident(config, model, functions)
  lines, values = _header(config, target, model, stage, batch)

  def show(*new: str) -> None:
    lines.extend(new)
    print("\n".join(lines), flush=True)
    lines.clear()

  values |= {f"plan/{name}_bytes": n for name, n in memory._asdict().items()}
  show(*_memory_lines(memory, target.device))
  if memory.resident >= target.device.memory:
    raise refuse(memory.resident, target, "weights, optimizer, gradients and "
                 "copies alone do not fit", _more_devices(memory, target))
  compiled = {}
  for part, found in parts.items():
    compiled[part] = programs.compile_program(part, *found, model.mesh)
    own = own_bytes(compiled[part], found[1], memory)
    show(f"  {part:9} {_gib(own):>9} of its own, peak "
         f"{_gib(own + memory.resident)}"
         f" of {_gib(target.device.memory)} (compiled in "
         f"{compiled[part].seconds:.0f} s)")
    if not compiled[part].fits or own + memory.resident > target.device.memory:
      raise refuse(
          own + memory.resident, target, f"the function {part} does not fit",
          _more_devices(memory, target) if part == "update"
          else _advice(part, target, model, stage, batch, memory))
    values[f"plan/{part}/peak_bytes"] = own + memory.resident
  show(*_cost_lines(config, target, model, stage, batch, functions, memory,
                    compiled, price, values))
  if _samples(config):
    _plan_sampling(config, target, model, memory, price, values, show)
  if workdir is not None:
    workdir.mkdir(parents=True, exist_ok=True)
    commit.write_file(workdir / "summary.json", json.dumps(values, indent=1))


# --- what is planned ----------------------------------------------------------


def open_shape(config: dict[str, Any]) -> config_lib.ModelConfig:
  """The architecture, of config.json or of the config; no weights are read."""
  options = config["model"]
  if options["path"] is not None:
    return hf.load_config(hub.resolve_config(
        options["path"], options["revision"]))
  return architecture.own_shape(options, config["tokenizer"]["vocab_size"])


def lay_out(
    config: dict[str, Any], shape: config_lib.ModelConfig,
    mesh: jax.sharding.Mesh,
) -> stage_lib.Model:
  """The model on the mesh, with LoRA its adapters as what is trained."""
  model = architecture.lay_out(config, shape, mesh, shape.pad_token_id or 0)
  options = config["lora"]
  if options["rank"] is None:
    return model
  trained = jax.eval_shape(
      lambda key: lora.init_adapters(
          key, model.param_shapes, rank=options["rank"],
          targets=options["targets"], dtype=jnp.float32), jax.random.key(0))
  scales = jax.eval_shape(lambda tree: lora.scales(tree, 1.0), trained)
  put = lambda tree: jax.tree.map(
      programs.place, tree,
      sharding.infer_shardings(tree, decoder.PARAM_RULES, mesh))
  return model._replace(
      param_shapes=put(trained),
      frozen=lora.join(model.param_shapes, put(scales)))


def stage_and_batch(
    config: dict[str, Any]
) -> tuple[stage_lib.Stage, programs.Batch]:
  """The stage that is planned, the preference stage if there is one."""
  data, supervised = config["data"], "preference" not in config["stages"]
  slots = 1 if supervised else _CANDIDATES.get(data["format"], 8)
  if config["online"]["enabled"]:
    slots = config["online"]["num_candidates"]
  stage = setup.stage_of(
      config, ROWS, supervised=supervised, num_slots=slots)
  return stage, programs.make_batch(
      batch_size=stage.batch_size, num_slots=slots,
      prompt_length=data["max_prompt_length"],
      completion_length=data["max_completion_length"])


def resident(
    config: dict[str, Any], model: stage_lib.Model, functions
) -> Memory:
  """What lies on a device throughout a step."""
  state, size = functions.state_shapes, programs.size_on_device
  policy = model.policy(model.param_shapes)
  gradients = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, jnp.promote_types(x.dtype, jnp.float32),
          sharding=x.sharding), state.params)
  copies = size(state.moving)
  if config["reference"]["source"] in ("resident", "previous_round", "ema"):
    copies += size(policy)
  if _samples(config):
    copies += size(jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, model.compute_dtype, sharding=x.sharding), policy))
  return Memory(size(policy) + size(state.params) * bool(model.frozen),
                size(state.opt_state), size(gradients), copies)


def _samples(config: dict[str, Any]) -> bool:
  """Whether the run samples, for rounds or for its evaluation."""
  data = config["data"]
  return bool(config["online"]["enabled"] or data["eval_path"]
              or data["eval_fraction"])


def own_bytes(
    program: programs.Program, arguments: tuple, memory: Memory
) -> int:
  """What a function needs beside what lies there anyway: its peak without
  those of its arguments that are counted as resident."""
  return max(
      0, program.peak - min(programs.held(arguments), memory.resident))


def _plan_sampling(
    config, target, model, memory, price, values, show) -> None:
  """Compiles the sampler's functions, says what they hold and how fast they
  can be.

  Raises:
    ResourceError: plan.memory.
  """
  device, data, online = target.device, config["data"], config["online"]
  if config["generation"]["num_devices"]:
    show("sampling: on devices of its own, which are not planned")
    return
  samples = config["generation"]["num_samples"]
  if online["enabled"]:
    samples = online["num_samples"] or online["num_candidates"]
  length = (config["generation"]["max_new_tokens"]
            or data["max_completion_length"])
  parts, cache, slots = sampler.sampling_programs(
      model, samples=samples, prompts=ROWS, num_slots=engine.NUM_SLOTS,
      prompt_length=data["max_prompt_length"], completion_length=length)
  show(f"sampling {samples} of a prompt, {slots} at a time, compiled at "
       f"{sampler.DEPTH} layers; keys and values of all are {_gib(cache)}:")
  for part, found in parts.items():
    program = programs.compile_program(part, *found, model.mesh)
    own = cache + max(0, program.peak - programs.size_on_device(found[1]))
    show(f"  {part:9} {_gib(own):>9} of its own, peak "
         f"{_gib(own + memory.resident)} of {_gib(device.memory)} (compiled "
         f"in {program.seconds:.0f} s)")
    if not program.fits or own + memory.resident > device.memory:
      raise refuse(own + memory.resident, target,
                   f"the function {part} does not fit",
                   "shorter data.max_completion_length, or a sampler on "
                   "devices of its own (generation.num_devices)")
    values[f"plan/{part}/peak_bytes"] = own + memory.resident
  count = sum(x.size for x in jax.tree.leaves(
      model.policy(model.param_shapes)))
  weights = count * jnp.dtype(model.compute_dtype).itemsize / (
      model.mesh.shape["tensor"])
  gathered = weights * (1 - 1 / model.mesh.shape["fsdp"])
  step = Time(2 * count * slots / target.num_devices / device.flops,
              (weights + cache) / device.bandwidth, gathered / device.links)
  fastest = slots / step.least
  held = config["evaluation"]["num_prompts"] or 1000
  hours = held * samples * length / fastest / 3600
  show(f"  a token of all {slots}: {step}; at most {fastest:.4g} tokens/s",
       f"  the samples of an evaluation of {held:,} prompts: at least "
       f"{_hours(hours, target, price)}")
  values |= {"plan/sampling_tokens_per_sec": fastest,
             "plan/evaluation_sampling_hours": hours}


# --- what is said -------------------------------------------------------------


def refuse(
    needed: int, target: topology.Topology, what: str, advice: str
) -> errors.ResourceError:
  return errors.ResourceError(
      "plan.memory", f"{what} a device of {target.name}",
      where="--topology", got=f"{_gib(needed)} a device",
      want=f"at most {_gib(target.device.memory)}", hint=advice)


def _gib(size: float) -> str:
  return f"{size / devices.GIB:.2f} GiB"


def _hours(hours: float, target: topology.Topology, price: float | None) -> str:
  money = "" if price is None else (
      f", {hours * target.num_chips * price:,.2f} at {price:g} a chip-hour")
  return f"{hours:.2f} hours{money}"


def _header(config, target, model, stage, batch):
  data, mesh = config["data"], dict(model.mesh.shape)
  count = sum(x.size for x in jax.tree.leaves(
      model.policy(model.param_shapes)))
  lines = [
      f"{target.name}: {target.num_chips} chips, {target.num_devices} devices "
      f"of {_gib(target.device.memory)}, mesh "
      + " x ".join(f"{name}={size}" for name, size in mesh.items()),
      f"{model.config.family}, {count / 1e9:.2f} B parameters, "
      f"{model.config.num_layers} layers, products in "
      f"{jnp.dtype(model.compute_dtype).name}, remat {model.remat}",
      f"{stage.objective}: {stage.batch_size} prompts an update, "
      f"{batch.meta.role.shape[1]} candidates each, all of the longest lengths "
      f"{data['max_prompt_length']} + {data['max_completion_length']}; chunks "
      f"of {model.num_streams} x {model.stream_length} tokens"]
  return lines, {"plan/devices": target.num_devices, "plan/params": count}


def _memory_lines(memory: Memory, device: devices.Device) -> list[str]:
  return [f"a device holds {_gib(memory.resident)} throughout: "
          + ", ".join(f"{name} {_gib(size)}" for name, size in zip(
              memory._fields, memory))]


def _more_devices(memory: Memory, target: topology.Topology) -> str:
  times = memory.resident / (0.6 * target.device.memory)
  return (f"about {int(np.ceil(times * target.num_devices))} devices with a "
          "larger mesh.fsdp hold it and leave room for activations; or LoRA "
          "(lora.rank), optimizer.offload, or bfloat16 weights")


def _advice(part, target, model, stage, batch, memory) -> str:
  """What fits instead, tried out: recomputation, then smaller chunks."""
  parts = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
  tries = [] if model.remat == "full" else [(model.num_streams, "full")]
  streams = model.num_streams // 2
  while streams >= parts and streams % parts == 0:
    tries.append((streams, "full"))
    streams //= 2
  for streams, remat in tries:
    less = model._replace(num_streams=streams, remat=remat)
    found = programs.training_programs(
        stage, less, stage_lib.make_functions(stage, less), batch)
    peaks = []
    for name in dict.fromkeys((part, "train")):
      program = programs.compile_program(name, *found[name], model.mesh)
      peaks.append(own_bytes(program, found[name][1], memory) + memory.resident)
      if not program.fits or peaks[-1] > target.device.memory:
        break
    else:
      return (f"it fits with --config.data.num_streams={streams} "
              f"--config.model.remat={remat} ({_gib(max(peaks))}), "
              "the batch in more and smaller chunks")
    logging.info("tried num_streams=%d remat=%s: %s", streams, remat,
                 _gib(peaks[-1]))
  return ("no smaller chunk fits either: a shorter data.stream_length, or "
          + _more_devices(memory, target))


def _cost_lines(config, target, model, stage, batch, functions, memory,
                compiled, price, values):
  """FLOPs, collectives, times, costs and checkpoints."""
  shape, device = model.config, target.device
  everything = [np.arange(len(o)) for o in batch.order]
  drawn = min(stage.kernel.get("num_negatives", 0), len(everything[0]) - 1)
  if stage.kernel["strategy"] in ("all", "pool"):
    drawn = len(everything[0]) - 1
  chosen = [np.arange(1 + drawn)] * stage.batch_size
  chunks = {"score": model.pack(batch.sets, everything, batch.order),
            "train": model.pack(batch.sets, chosen, batch.order)}
  work = {"score": flops.pass_flops(shape, batch.sets, everything),
          "train": 3 * flops.pass_flops(shape, batch.sets, chosen)}
  asked = {"score": work["score"],
           "train": work["train"] * (4 / 3 if model.remat == "full" else 1)}
  policy = programs.size(model.policy(model.param_shapes))
  whole = policy / model.mesh.shape["tensor"] * jnp.dtype(
      model.compute_dtype).itemsize / jax.tree.leaves(
          model.param_shapes)[0].dtype.itemsize
  lines, times = ["an update:"], {}
  for part, program in compiled.items():
    runs = sum(c.tokens.size for c in chunks[part]) / (
        model.num_streams * model.stream_length) if part in chunks else 1
    reads = {"score": 2, "train": 5}.get(part, 0) * whole
    moved = runs * (reads + 2 * own_bytes(program, (), Memory(0, 0, 0, 0)))
    if part == "update":
      moved = 2 * (memory.weights + memory.optimizer + memory.gradients)
    pad = 1 - sum(np.count_nonzero(c.prompt_slot >= 0) for c in chunks[
        part]) / sum(c.tokens.size for c in chunks[part]) if (
            part in chunks) else 0
    links = sum(
        one.traffic / (device.network if one.crosses(
            target.num_devices // target.slices) else device.links)
        for one in program.collectives)
    times[part] = Time(
        asked.get(part, 0) / (1 - pad) / target.num_devices / device.flops,
        moved / device.bandwidth, runs * links)
    kinds = collectives.received(program.collectives)
    told = ", ".join(f"{kind} {_gib(size)}" for kind, size in sorted(
        kinds.items()) if size > 2**20)
    values[f"plan/{part}/received_bytes"] = round(sum(kinds.values()))
    lines.append(f"  {part:9} {runs:6.1f} x, {work.get(part, 0) / 1e12:.4g} "
                 f"TFLOP, padding {pad:.1%}, {times[part]}")
    lines.append(f"  {'':9} a run brings a device {told or 'nothing'}")
  used = sum(np.count_nonzero(c.prompt_slot >= 0) for part in compiled
             if part in chunks for c in chunks[part])
  least = sum(t.least for t in times.values())
  most = sum(t.most for t in times.values())
  useful = sum(work[part] for part in compiled if part in work)
  share = useful / target.num_devices / device.flops
  lines += [
      f"an update takes {least:.3g} to {most:.3g} s: {used / most:.4g} to "
      f"{used / least:.4g} tokens/s, {share / most:.0%} to {share / least:.0%} "
      "of the peak",
      "  (a roofline: every part at its peak, overlapped or one after the "
      "other; prompts and completions of the longest lengths)"]
  values |= {
      "plan/step_seconds_least": least, "plan/step_seconds_most": most,
      "plan/tokens_per_sec": used / most, "plan/flops": useful}
  forward = times.get("score", times["train"])
  if "score" not in times:
    forward = Time(*(x / 3 for x in forward))
  held = config["evaluation"]["num_prompts"] or 1000
  costs = {
      "training": (f"training on {ROWS:,} prompts", ROWS, most),
      "reference": (f"the reference pass over {ROWS:,} prompts", ROWS,
                    forward.most),
      "evaluation": (f"the log-probs of an evaluation of {held:,} prompts",
                     held, forward.most)}
  if config["num_steps"] and stage.name == "preference":
    costs["training"] = (f"the {stage.num_steps} updates",
                         stage.num_steps * stage.batch_size, most)
  for name, (what, prompts, seconds) in costs.items():
    hours = prompts / stage.batch_size * seconds / 3600
    lines.append(f"{what}: {_hours(hours, target, price)}")
    values[f"plan/{name}_hours"] = hours
  state = programs.size(functions.state_shapes)
  hosts = max(1, target.num_chips // _HOST.get(target.chip, 4))
  lines.append(
      f"a checkpoint: {state / 1e9:.1f} GB, {state / hosts / DISK:.0f} s to "
      f"write at {DISK / 1e9:g} GB/s a host, {hosts} hosts")
  values |= {"plan/checkpoint_bytes": state,
             "plan/checkpoint_seconds": state / hosts / DISK}
  return lines
