"""The file of an evaluation: whole, without NaN, and known as its own."""

import pytest

from mcpo_jax import errors
from mcpo_jax.evaluation import statistics, tables


def test_what_is_written_is_read(tmp_path):
  interval = tables.interval(
      statistics.Interval(1.5, float("nan"), float("inf")))
  assert interval == {"mean": 1.5, "ci95_low": None, "ci95_high": None}
  assert tables.read(tmp_path) is None
  tables.write(tmp_path, {"models": [interval]})
  assert tables.read(tmp_path) == {"version": 1, "models": [interval]}


def test_nan_is_refused_and_what_stood_there_stays(tmp_path):
  tables.write(tmp_path, {"seed": 3})
  with pytest.raises(errors.NonFiniteError) as e:
    tables.write(tmp_path, {"seed": float("nan")})
  assert e.value.slug == "evaluate.non_finite"
  assert tables.read(tmp_path)["seed"] == 3
  assert [p.name for p in tmp_path.iterdir()] == [tables.FILE]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"version": 0}', '{"version": "1"}'])
def test_a_foreign_file_is_refused(tmp_path, text):
  (tmp_path / tables.FILE).write_text(text)
  with pytest.raises(errors.CheckpointError) as e:
    tables.read(tmp_path)
  assert e.value.slug == "evaluate.foreign" and tables.FILE in e.value.where
