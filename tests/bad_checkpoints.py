"""The rows of bad checkpoints, table K; bad_input_test.py runs them.

Each damages a copy of the steps 2 and 4, or makes one of its own, and restores
a step by name, which falls back to no other.
"""

import contextlib
import functools
import pathlib
import pickle
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from bad_configs import Case

from mcpo_jax import checkpoints, commit, errors, sharding
from mcpo_jax.training import loop

_STATE = {"params": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3),
                     "b": np.ones(5, np.float32)},
          "opt_state": {"mu": np.zeros(7, np.float32)}, "step": np.int32(4)}


def _arrays(**changes: Any) -> dict[str, Any]:
  """A state of step 4 on one device, with changes; ... drops a part."""
  state = {k: v for k, v in (_STATE | changes).items() if v is not ...}
  return jax.tree.map(jax.numpy.asarray, state)


def _shapes(state: dict[str, Any], sharding_=None) -> dict[str, Any]:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding_ or x.sharding), state)


def _keeper(folder: pathlib.Path, **settings_: Any):
  return contextlib.closing(
      checkpoints.Checkpointer(folder / "steps", keep=2, **settings_))


def _restore(folder: pathlib.Path, step: int, shapes: Any) -> Any:
  with _keeper(folder) as keeper:
    return keeper.restore(step, shapes)


def _save(folder: pathlib.Path, step: int, state: Any, **settings_) -> None:
  with _keeper(folder, **settings_) as keeper:
    keeper.save(step, state, {"run": "a", "cursor": {"step": step}})


@functools.cache
def _saved() -> pathlib.Path:
  """A folder with the steps 2 and 4."""
  held = tempfile.TemporaryDirectory()
  _held.append(held)
  folder = pathlib.Path(held.name)
  _save(folder, 2, _arrays(step=np.int32(2), params=jax.tree.map(
      lambda x: x + 1, _STATE["params"])))
  _save(folder, 4, _arrays())
  return folder


_held: list[Any] = []  # what a test process keeps until it ends


def _damaged(damage, wanted=None, latest: bool = False):
  """A row that damages step 4 and restores it, or the newest."""

  def make(folder):
    shutil.copytree(_saved(), folder, dirs_exist_ok=True)
    damage(folder / "steps" / "4")

    def use():
      shapes = _shapes(wanted or _arrays())
      if not latest:
        return _restore(folder, 4, shapes)
      with _keeper(folder) as keeper:
        return keeper.restore_latest(shapes)

    return use

  return make


def _file(name: str, change: Callable[[bytes], bytes]):
  def damage(step):
    path = step / name
    path.write_bytes(change(path.read_bytes()))

  return damage


def _lost(*names: str):
  return lambda step: [(step / name).unlink() for name in names]


def _only_begun(step):
  for path in step.parent.glob("[24]"):
    path.rename(path.with_name(f"{path.name}.orbax-checkpoint-tmp"))


def _committed_again(change):
  """The manifest's parts, changed and hashed anew."""
  def damage(step):
    body = commit.read_manifest(step)
    change(body)
    commit.write_manifest(
        step, body["meta"], files=body["files"], leaves=body["leaves"])

  return damage


def _of_run(folder):
  saved = {"run": "a", "data": "x"}
  return lambda: loop.check_same_run(saved, saved | {"run": "b"}, folder)


def _of_another_step(folder):
  _save(folder, 5, _arrays())
  return lambda: _restore(folder, 5, _shapes(_arrays()))


def _link(step):
  outside = step.parents[2] / "elsewhere"
  (step / "default/params.w/0.0").rename(outside)
  (step / "default/params.w/0.0").symlink_to(outside)


def _other_mesh(folder):
  shutil.copytree(_saved(), folder, dirs_exist_ok=True)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  wanted = _shapes(_arrays(), spec)
  w = wanted["params"]["w"]
  wanted["params"]["w"] = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=split)

  def use():
    got = _restore(folder, 4, wanted)
    assert got["params"]["w"].sharding == split
    return all(jax.tree.leaves(jax.tree.map(
        lambda a, b: np.array_equal(a, b), got, _STATE)))

  return use


def _not_finite(at_save: bool):
  bad = _arrays(params={"w": np.full((2, 3), np.nan, np.float32),
                        "b": np.ones(5, np.float32)})

  def make(folder):
    (folder / "steps").mkdir()
    if at_save:
      return lambda: _save(folder, 4, bad)
    _save(folder, 4, bad, finite=())
    return lambda: _restore(folder, 4, _shapes(bad))

  return make


def _no_folder(folder):
  (folder / "steps").write_text("a file")
  return lambda: _keeper(folder)


def _locked(folder):
  commit.lock(folder)
  _held.append(commit._locks.pop(folder.resolve()))  # as of another process
  return lambda: commit.lock(folder)


class _Poison:
  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path("opened"),)


def _ckpt(case_id, make, slug, where="4", error=errors.CheckpointError, code=5):
  return Case(case_id, make, error, slug, where, code)


_HALF = lambda data: data[:len(data) // 2]
_flipped = lambda data: data[:12] + bytes([data[12] ^ 4]) + data[13:]
_W = "default/params.w/0.0"

# K10 with other values than asked for would be K8. What falls back to an older
# step by itself is in checkpoints_test.py.
ROWS = [
    _ckpt("K1", _damaged(_only_begun, latest=True), "ckpt.none_complete",
          "steps"),
    _ckpt("K2", _damaged(_file(_W, _flipped)), "ckpt.hash", _W),
    _ckpt("K2 manifest", _damaged(_file("manifest.json", _flipped)),
          "ckpt.metadata", "manifest.json"),
    _ckpt("K3 cut", _damaged(_file(_W, _HALF)), "ckpt.missing_data", _W),
    _ckpt("K3 empty", _damaged(_file(_W, lambda data: b"")),
          "ckpt.missing_data", _W),
    _ckpt("K3 deleted", _damaged(_lost(_W)), "ckpt.missing_data", _W),
    *(_ckpt(f"K4 {name}", _damaged(_file(name, _HALF)), "ckpt.metadata", name)
      for name in ("default/_METADATA", "default/array_metadatas/process_0",
                   "default/params.w/.zarray", "manifest.json")),
    _ckpt("K5", _damaged(_lost("manifest.json")), "ckpt.uncommitted"),
    _ckpt("K6", _damaged(_lost(_W, "default/params.b/0")), "ckpt.incomplete"),
    _ckpt("K7 step", _damaged(lambda step: shutil.copy(
        step.with_name("2") / _W, step / _W)), "ckpt.hash", _W),
    _ckpt("K7 run", _of_run, "ckpt.run_id", ""),
    _ckpt("K8 shape", _damaged(lambda step: None, _arrays(
        params={"w": np.ones((3, 2), np.float32),
                "b": np.ones(5, np.float32)})), "ckpt.tree"),
    _ckpt("K8 missing", _damaged(lambda step: None, _arrays(
        moving=np.ones(3, np.float32))), "ckpt.tree"),
    _ckpt("K8 extra", _damaged(lambda step: None, _arrays(params={
        "w": _STATE["params"]["w"]})), "ckpt.tree"),
    _ckpt("K9", _damaged(lambda step: None, jax.tree.map(
        lambda x: x.astype("bfloat16") if x.ndim else x, _arrays())),
          "ckpt.dtype"),
    Case("K10", _other_mesh, None, None, "", 0),
    _ckpt("K11", _damaged(lambda step: None, _arrays(
        opt_state={"nu": np.zeros(7, np.float32)})), "ckpt.optimizer"),
    _ckpt("K12 name", _damaged(lambda step: (
        step.rename(step.with_name("6")), step.with_name("2").rename(step))),
          "ckpt.step_mismatch"),
    _ckpt("K12 cursor", _damaged(_committed_again(
        lambda body: body["meta"].update(cursor={"step": 3}))),
          "ckpt.step_mismatch"),
    _ckpt("K12 inside", _of_another_step, "ckpt.step_mismatch", "5"),
    _ckpt("K13 save", _not_finite(True), "ckpt.non_finite", "params.w",
          errors.NonFiniteError, 8),
    _ckpt("K13 load", _not_finite(False), "ckpt.non_finite", "params.w",
          errors.NonFiniteError, 8),
    _ckpt("K14", _no_folder, "ckpt.path", "steps", errors.ResourceError, 6),
    _ckpt("K15", _locked, "ckpt.locked", ""),
    _ckpt("K16 link", _damaged(_link), "ckpt.unsafe_path"),
    _ckpt("K16 absolute", _damaged(_committed_again(
        lambda body: body["files"].update({"/etc/hostname": {}}))),
          "ckpt.unsafe_path"),
    _ckpt("K16 up", _damaged(_committed_again(
        lambda body: body["files"].update({"../2/manifest.json": {}}))),
          "ckpt.unsafe_path"),
    *(_ckpt(f"K17 {name}", _damaged(lambda step, name=name: (
        step / "default" / name).write_bytes(pickle.dumps(_Poison()))),
        "ckpt.unsafe_format", name) for name in (
            "x.pkl", "x.pt", "x.pth", "pytorch_model.bin", "x.npy")),
    _ckpt("K17 other", _damaged(lambda step: (step / "notes.txt").touch()),
          "ckpt.unexpected", "notes.txt"),
]
