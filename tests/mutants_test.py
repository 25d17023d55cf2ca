"""Every mutant still applies, and the test that must catch it exists."""

import pathlib

import pytest

from benchmarks import mutants

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_applies_once_and_its_test_exists(mutant):
  source = (ROOT / "mcpo_jax" / mutant.file).read_text()
  assert mutants.mutate(mutant, source) != source
  text = (ROOT / "tests" / mutant.test_file).read_text()
  assert f"\ndef {mutant.test.split('[')[0]}(" in text


def test_names_are_unique():
  names = [mutant.name for mutant in mutants.MUTANTS]
  assert len(set(names)) == len(names)
