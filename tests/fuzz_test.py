"""Every reader of what others wrote, on inputs made up at random.

Whatever comes in is understood or refused; see `fuzz_cases`. Here each target
gets as many inputs as there is time for; `benchmarks/fuzz.py` gives it more.
"""

import logging
import random

import fuzz_cases
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcpo_jax.data import templates

EXAMPLES = {
    "record_line": 200, "record_file": 60, "config_typed": 150,
    "config_saved": 200, "model_folder": 100, "model_in_store": 25,
    "model_config": 300, "adapter_folder": 200, "tokenizer_folder": 100,
    "chat_template": 80, "manifest": 150, "http_body": 300}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
  """No warnings, and little time for templates that would take it all."""
  templates.stop()
  monkeypatch.setattr(templates, "SECONDS", 0.2)
  logging.disable(logging.WARNING)
  yield
  logging.disable(logging.NOTSET)
  templates.stop()


@pytest.mark.parametrize("name", fuzz_cases.TARGETS)
def test_whatever_comes_in_is_understood_or_refused(name):
  slugs = {fuzz_cases.run(name, random.Random(seed))
           for seed in range(EXAMPLES[name])}
  assert None in slugs and len(slugs) > 1, "all inputs are of one kind"


@pytest.mark.parametrize("name", fuzz_cases.TARGETS)
def test_hypothesis_finds_no_input_that_is_neither(name):

  @settings(max_examples=25, deadline=None, database=None,
            suppress_health_check=list(HealthCheck))
  @given(rng=st.randoms(use_true_random=False))
  def whatever_comes_in(rng):
    fuzz_cases.run(name, rng)

  whatever_comes_in()


def test_a_fault_of_a_reader_would_be_found(monkeypatch):
  def breaks(row, where):
    return row["prompt"].strip() and None

  monkeypatch.setitem(fuzz_cases.readers.READERS, "native", breaks)
  with pytest.raises((AttributeError, KeyError, TypeError)):
    for seed in range(500):
      fuzz_cases.run("record_line", random.Random(seed))
