"""Every mutant still applies, and the test that must catch it exists."""

import ast
import pathlib

import pytest

from benchmarks import mutants, random_mutants

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


def test_random_mutants_are_other_programs_and_have_tests():
  for file in random_mutants.files():
    for test in random_mutants.tests_of(file):
      assert (ROOT / test).exists(), (file, test)
  source = (ROOT / "mcpo_jax/kernels/sets.py").read_text()
  made = random_mutants.mutants_of("kernels/sets.py")
  assert len({ast.dump(ast.parse(m.text)) for m in made}) == len(made) > 9
  assert all(ast.dump(ast.parse(m.text)) != ast.dump(ast.parse(source))
             for m in made)
