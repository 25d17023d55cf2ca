"""What accelerators can do, as a table of their makers' public figures.

A device is what JAX counts: a chip, of TPU v7 half a chip. The figures are
those of one device. This module imports no JAX.
"""

from typing import NamedTuple

GIB = 2**30


class Device(NamedTuple):
  """Peaks of one device, which no program reaches all at once."""

  kind: str  # how `jax.Device.device_kind` begins
  flops: float  # FLOP/s of dense products in bfloat16; float16 where noted
  memory: int  # bytes that programs can use
  bandwidth: float  # bytes/s of that memory
  links: float  # bytes/s that all its links to its neighbours bring in
  network: float  # bytes/s of its share of the network between slices or nodes
  per_chip: int = 1  # devices of a chip, the unit that is paid for


DEVICES = {
    "v4": Device("TPU v4", 275e12, int(30.75 * GIB), 1.2e12, 300e9, 6.25e9),
    "v5e": Device(
        "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9),
    "v5p": Device("TPU v5", 459e12, int(95.74 * GIB), 2.765e12, 600e9, 6.25e9),
    "v6e": Device(
        "TPU v6 lite", 918e12, int(31.25 * GIB), 1.64e12, 448e9, 12.5e9),
    "tpu7x": Device(
        "TPU7x", 1153.5e12, int(94.75 * GIB), 3.69e12, 600e9, 12.5e9,
        per_chip=2),
    # Without bfloat16 units: the peak is that of float16.
    "t4": Device("Tesla T4", 65e12, int(14.56 * GIB), 320e9, 16e9, 3e9),
    "a100": Device(
        "NVIDIA A100", 312e12, int(79.1 * GIB), 2.04e12, 300e9, 25e9),
    "h100": Device(
        "NVIDIA H100", 989e12, int(79.1 * GIB), 3.35e12, 450e9, 50e9),
    "h200": Device(
        "NVIDIA H200", 989e12, int(139.8 * GIB), 4.8e12, 450e9, 50e9),
}


def find(kind: str) -> Device | None:
  """The device of a `jax.Device.device_kind`, None for one not in the table.

  The longest beginning decides: "TPU v5 lite" is no "TPU v5".
  """
  found = [d for d in DEVICES.values() if kind.startswith(d.kind)]
  return max(found, key=lambda d: len(d.kind), default=None)
