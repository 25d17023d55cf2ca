"""Random damage to what training wrote is seen before a value is used."""

import collections

from benchmarks import corruption


def test_random_damage_is_seen_and_the_step_before_comes_back():
  results = corruption.run(60, seed=1)
  assert len(results) == len(corruption.TARGETS) * len(corruption.KINDS)
  for (name, kind), outcomes in results.items():
    want = "left out" if name == "checkpoint" else "refused"
    assert collections.Counter(outcomes) == {want: 5}, (name, kind)
