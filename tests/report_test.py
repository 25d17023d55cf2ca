"""The report: a page of whatever lies in a workdir, safe and bounded."""

import json

import pytest

from mcpo_jax import errors, settings
from mcpo_jax.evaluation import report


def write_run(folder, *, steps=5, config=None):
  """A made-up run of `steps` updates with two held-out evaluations."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({
      "version": settings.CONFIG_VERSION, "config": {
          "seed": 3, "stages": ["sft", "preference", "evaluate"],
          "num_steps": 7, "objective": {"name": "mcpo", "beta": 0.1}
          | (config or {})}}))
  with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, steps + 1):
      file.write(json.dumps({
          "stage": "preference", "step": step, "time": 1000.0 + 10 * step,
          "loss": 1 / step, "rewards/margins": 0.5 * step,
          "kernel/entropy": None if step == 2 else 2.0}) + "\n")
  return folder


def write(folder, *others):
  report.write_report([folder, *others], folder / "report.html")
  return (folder / "report.html").read_text("utf-8")


def test_a_run_is_a_page(tmp_path):
  text = write(write_run(tmp_path / "run"))
  assert "step 5 of 7" in text
  assert "kernel/entropy 1×" in text  # a gap, and said
  assert "default-src 'none'" in text and "innerHTML" not in text


def test_no_run_is_refused_and_leaves_nothing(tmp_path):
  with pytest.raises(errors.CheckpointError) as caught:
    write(tmp_path)
  assert caught.value.slug == "ckpt.none"
  assert not list(tmp_path.iterdir())
