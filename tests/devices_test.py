"""The table of accelerators."""

import pytest

from mcpo_jax import devices


@pytest.mark.parametrize("kind, name", [
    ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla T4", "t4"),
])
def test_a_device_is_found_by_the_kind_that_jax_tells(kind, name):
  assert devices.find(kind) == devices.DEVICES[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA GeForce RTX 4090"])
def test_of_an_unknown_kind_nothing_is_claimed(kind):
  assert devices.find(kind) is None


def test_figures_are_in_the_units_that_the_table_says():
  for device in devices.DEVICES.values():
    assert 1e13 < device.flops < 1e16
    assert 8 * devices.GIB < device.memory < 300 * devices.GIB
    assert device.network < device.links < device.bandwidth < device.flops
