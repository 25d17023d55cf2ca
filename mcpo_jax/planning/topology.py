"""Devices that are not here: names of topologies, and what compiles for them.

A name is "[N x]CHIP:SHAPE": "v5e:4x4" is 16 chips of TPU v5e, "2xv5e:4x4" two
such slices, "h200:8" a node of 8 GPUs, "2xh200:8" two of them. Importing this
module imports no JAX.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from mcpo_jax import devices, errors

_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_GPUS = ("h100", "h200")

# What XLA:GPU must know of a card to compile for it; of Hopper cards, from
# NVIDIA's public figures. Programs are compiled, never tuned, for it.
_GPU_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }} device_description_str: "{kind}"
"""


class Topology(NamedTuple):
  """What a name says."""

  name: str
  chip: str  # a key of devices.DEVICES
  slices: int  # or nodes, with a network between them
  shape: tuple[int, ...]  # chips of a slice along its axes

  @property
  def device(self) -> devices.Device:
    return devices.DEVICES[self.chip]

  @property
  def num_chips(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def num_devices(self) -> int:
    return self.num_chips * self.device.per_chip

  @property
  def is_tpu(self) -> bool:
    return self.chip in _TPUS


def parse(name: str) -> Topology:
  """Reads a name.

  Raises:
    ConfigError: plan.topology.
  """
  found = re.fullmatch(r"(?:(\d+)x)?([a-z]+\d\w*):(\d+(?:x\d+)*)", name)
  slices, chip, shape = found.groups() if found else ("1", "", "")
  shape = tuple(map(int, shape.split("x"))) if shape else ()
  axes = {"v5e": 2, "v6e": 2} | dict.fromkeys(_GPUS, 1)
  known = (*_TPUS, *_GPUS)
  if chip not in known or len(shape) != axes.get(chip, 3) or 0 in shape or (
      slices == "0"):
    raise errors.ConfigError(
        "plan.topology", "no such topology", where="--topology", got=name,
        want=f"[N x]CHIP:SHAPE, chips {', '.join(known)}; such as v5e:4x4, "
        "v5p:2x2x4, h200:8, or 2xv5e:4x4 of two slices",
        hint=errors.nearest(chip or name, known))
  return Topology(name, chip, int(slices or 1), shape)


def open_devices(topology: Topology) -> list[Any]:
  """The devices, for a mesh to compile on.

  Raises:
    ResourceError: plan.compiler, the compiler is not installed;
    ConfigError: plan.topology, the compiler does not know such a slice.
  """
  package, extra = ("libtpu", "tpu") if topology.is_tpu else (
      "jax_plugins.xla_cuda13", "plan-gpu")
  if not _installed(package):
    raise errors.ResourceError(
        "plan.compiler", f"the compiler for {topology.chip} is not installed",
        where="--topology", got=topology.name, want=package.split(".")[0],
        hint=f"pip install 'mcpo_jax[{extra}]'")
  from jax.experimental import topologies

  try:
    if topology.is_tpu:
      found = topologies.get_topology_desc(
          platform="tpu", num_slices=topology.slices, **_tpu_options(topology))
    else:
      found = topologies.get_topology_desc(
          platform="cuda", topology=f"1x{topology.slices}x{topology.shape[0]}",
          target_config=_GPU_TARGET.format(
              bandwidth=int(topology.device.bandwidth),
              memory=topology.device.memory, kind=topology.device.kind))
  except Exception as e:  # the compiler's own; what it says is all we know
    raise errors.ConfigError(
        "plan.topology", str(e).split("\n")[0], where="--topology",
        got=topology.name) from e
  return list(found.devices)


def prepare(environment: dict[str, str] = os.environ) -> None:
  """Sets what must stand in the environment before JAX is imported."""
  environment["JAX_PLATFORMS"] = "cpu"
  # What is kept for later runs cannot be read without a device (jax 0.10.2).
  environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  # A compiler looks for the host that it runs on; several of them may run.
  environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
  environment.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  environment.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  environment.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  flags = environment.get("XLA_FLAGS", "")
  if "xla_gpu_autotune_level" not in flags:  # tuning needs the card
    environment["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _tpu_options(topology: Topology) -> dict[str, Any]:
  options = {"topology_name":
             f"{topology.chip}:{'x'.join(map(str, topology.shape))}"}
  if topology.chip == "v4":
    options["chip_config_name"] = "megacore"
  if math.prod(topology.shape) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  return options
