"""Runs whose model lies in an object store: real command lines, against the
same run from folders."""

import shutil

import pytest
import run_cases
import safetensors.numpy
from disks_test import finish, said, start

FLAGS = [
    "--config.stages=sft", "--config.sft.num_steps=2",
    "--config.data.eval_fraction=0.0", "--config.data.num_streams=4",
    "--config.checkpoint.every_steps=1", "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with a model and data, and the run `local` from them."""
  folder = tmp_path_factory.mktemp("remote")
  data = run_cases.write_data(folder / "data")
  made = folder / "made"
  finish(made, start(made, [*data, *FLAGS, "--config.model.num_layers=3"],
                     processes=1), 0)
  shutil.copytree(made / "0/sft/model", folder / "model")
  flags = [*FLAGS, f"--config.model.path={folder / 'model'}"]
  finish(folder / "local", start(folder / "local", [*data, *flags],
                                 processes=1, devices=2), 0)
  return folder


def weights(place, process=0):
  return safetensors.numpy.load_file(
      place / f"{process}/sft/model/model.safetensors")


def test_a_run_from_a_bucket_is_the_run_from_folders(runs):
  place = runs / "remote"
  shutil.copytree(runs / "model", place / "bucket/models/one")
  flags = [*FLAGS, "--config.model.path=pail://models/one"]
  data = run_cases.write_data(runs / "data")
  finish(place, start(place, [*data, *flags], processes=1, devices=2), 0)
  want, got = weights(runs / "local"), weights(place)
  assert want.keys() == got.keys()
  for name, array in want.items():
    assert (got[name] == array).all(), name
  assert said(place, 0)
