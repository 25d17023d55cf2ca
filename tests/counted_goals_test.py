"""What a step costs beside what the mathematics needs, counted exactly.

benchmarks/counted.py counts the same and more on more batches, beside the
goals; the bars of FLOPs here hold what is reached.
"""

import pytest

from benchmarks import counted


@pytest.mark.parametrize("preset,bar", [("tiny", 1.35), ("1b", 1.12)])
def test_a_dpo_step_wastes_few_flops(preset, bar):
  assert 1.0 <= counted.dpo_ratio(preset, batches=1) <= bar


@pytest.mark.parametrize("preset,bar", [("tiny", 0.15), ("1b", 0.05)])
def test_batches_have_few_shapes_and_little_padding(preset, bar):
  for objective in ("dpo", "mcpo"):
    shapes, padding = counted.packing(preset, objective=objective, batches=30)
    assert shapes <= 4
    assert padding <= bar
