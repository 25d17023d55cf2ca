"""Memory that is not there is refused at the start, or told as what it is."""

import resource
import subprocess
import sys

import jax
import pytest
import run_cases
import training_cases as cases

from mcpo_jax import errors, memory
from mcpo_jax.training import loop
from mcpo_jax.training import stage as stage_lib


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")
def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch):
  free = memory.free_bytes()
  assert 0 < free < 2**50
  for name, value in (("max", free), ("current", free - 4096)):
    (tmp_path / f"memory.{name}").write_text(f"{value}\n")
  monkeypatch.setattr(memory, "_CGROUP", tmp_path)
  assert memory.free_bytes() == 4096
  (tmp_path / "memory.max").write_text("max\n")
  assert memory.free_bytes() > 4096
  code = ("from mcpo_jax import memory; x = memory.free_bytes();"
          "assert 0 < x < 2**28, x; memory.check_host(2**28, 'it')")
  done = subprocess.run(
      [sys.executable, "-c", code], cwd=run_cases.ROOT, capture_output=True,
      text=True, preexec_fn=lambda: resource.setrlimit(
          resource.RLIMIT_AS, (2**28, 2**28)))
  assert "error[memory.host]" in done.stderr


def test_a_state_that_does_not_fit_is_refused(monkeypatch):
  model = cases.make_model(devices=4, fsdp=2)
  functions = stage_lib.make_functions(cases.stage("dpo"), model)
  state = functions.init(cases.init(model))
  held = lambda tree: sum(
      shard.data.nbytes for x in jax.tree.leaves(tree)
      for shard in x.addressable_shards)
  want = loop.host_bytes(functions.state_shapes)
  # The state and gradients, on 2 x 2 devices, and a copy for a save.
  once = sum(x.nbytes for x in jax.tree.leaves(state))
  assert held(state) == pytest.approx(2 * once, rel=0.1)
  assert want == once + held(state) + held(state.params)
  monkeypatch.setattr(memory, "free_bytes", lambda: want)
  memory.check_host(want, "the state")
  monkeypatch.setattr(memory, "free_bytes", lambda: want - 1)
  with pytest.raises(errors.ResourceError) as caught:
    memory.check_host(want, "the state")
  assert caught.value.slug == "memory.host" and str(want) in caught.value.want


@pytest.mark.parametrize("error, slug", [
    (MemoryError(), "memory.host"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nfor 5 bytes"),
     "memory.device"),
])
def test_running_out_of_memory_is_no_bug(error, slug):
  assert memory.as_ours(error).slug == slug
  assert memory.as_ours(error).exit_code == 6
  assert memory.as_ours(RuntimeError("other")) is None
