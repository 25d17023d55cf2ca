"""Rates by hand, compilations counted, a warning when a shape changes."""

import contextlib
import pathlib
import random
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_cases as cases
from jax import monitoring
from jax._src import compilation_cache
from jax.experimental.compilation_cache import compilation_cache as cache

from mcpo_jax import devices
from mcpo_jax.training import performance, setup, update
from mcpo_jax.training import stage as stage_lib


def make_batch(step, num_slots=8):
  rng = np.random.default_rng(step)
  return cases.host_batch(
      [cases.candidate_set(rng, i, 2 + (i + step) % 6) for i in range(5)],
      num_slots)


REFERENCE = stage_lib.Reference(
    lambda batch: np.zeros(batch.meta.role.shape, np.float32))


def test_changing_batches_compile_once_and_another_shape_is_told(caplog):
  model = cases.make_model(num_streams=2)
  stage = cases.stage("dpo", strategy="random", score=None, temperature=None)
  functions = stage_lib.make_functions(stage, model)
  state = functions.init(cases.init(model))
  with contextlib.closing(
      performance.Meter(functions, model.mesh)) as meter:
    for step in range(performance.WARM_UP + 3):
      # The last batch has one more slot.
      slots = 9 if step == performance.WARM_UP + 2 else 8
      with meter.step(step):
        state, metrics = update.run_step(
            stage, model, functions, state, make_batch(step, slots), REFERENCE)
      meter.add(step, **{
          name: metrics[name] for name in ("tokens", "flops", "shapes")})
      if step in (0, performance.WARM_UP + 1):
        row = meter.row()
        assert row["perf/compiles"] == 4
        assert row["perf/compile_seconds"] > 0
        assert not [r for r in caplog.records if "again" in r.message]
    assert meter.row()["perf/compiles"] == 8
  told = [r.getMessage() for r in caplog.records if "again" in r.getMessage()]
  assert {x.split(" was ")[0] for x in told} == {
      f"step {step}: {name}" for name in (
          "draw", "zeros", "from_loss", "update")}


def test_nobody_listens_after_the_end():
  meter = performance.Meter(stage_lib.make_functions(
      cases.stage(), cases.make_model()), cases.make_model().mesh)
  meter.close()

  @jax.jit
  def update(x):
    return x + 1

  update(jnp.ones(3))
  assert meter.row()["perf/compiles"] == 0


def test_rates_are_per_second_and_the_share_is_of_all_devices(monkeypatch):
  mesh = cases.make_model(devices=4).mesh
  monkeypatch.setattr(devices, "find", lambda kind: devices.DEVICES["v5e"])
  clock = iter([10.0, 12.0, 12.5, 13.0])
  monkeypatch.setattr(performance.time, "perf_counter", lambda: next(clock))
  with contextlib.closing(performance.Meter((), mesh)) as meter:
    for tokens, flops_done in ((30, 4e14), (10, 1e14)):
      with meter.step(0):
        pass
      meter.add(0, tokens=tokens, flops=flops_done, shapes={("drawn", 2, 48)})
    row = meter.row()  # 2 seconds later
  assert row["perf/tokens_per_sec"] == 20
  assert row["perf/flops_per_sec"] == 2.5e14
  np.testing.assert_allclose(row["perf/mfu"], 2.5e14 / (4 * 197e12))


def test_a_length_of_chunks_that_was_not_met_before_is_no_news(caplog):
  model = cases.make_model()
  compiles = performance._COMPILED
  with contextlib.closing(performance.Meter(
      stage_lib.make_functions(cases.stage(), model), model.mesh)) as meter:
    for step, (compiled, length) in enumerate([
        (True, 48), (False, 48), (False, 48), (True, 24), (True, 24)]):
      with meter.step(step):
        if compiled:
          monitoring.record_event_duration_secs(
              compiles, 1.5, fun_name="jit(from_loss)")
      meter.add(step, tokens=0, flops=0.0, shapes={("drawn", 8, length)})
  (told,) = (r.getMessage() for r in caplog.records)
  assert told.startswith("step 4: from_loss was compiled again, program 3")


@pytest.mark.parametrize("own", [None, "/tmp/of_the_user"])
def test_programs_are_kept_where_the_user_says_or_in_the_cache(own):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", own)
    setup.keep_programs(pathlib.Path("/cache"))
    assert jax.config.jax_compilation_cache_dir == (own or "/cache/programs")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_f28_a_damaged_program_is_compiled_again_with_a_warning(
    tmp_path, monkeypatch):
  """Also where zstandard is installed, whose frames would have no checksum."""
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(compilation_cache, "zstandard", None)
  monkeypatch.setattr(compilation_cache, "zstd", mock.Mock(
      compress=lambda data: data, decompress=lambda data: data))
  x = np.arange(6.0).reshape(2, 3)
  want, rng = np.tanh(x @ x.T), random.Random(0)
  damages = [lambda data: b"", lambda data: data[:-9]]
  for _ in range(12):
    at, bit = rng.random(), 1 << rng.randrange(8)
    damages.append(lambda data, at=int(at * 3000), bit=bit: (
        data[:at] + bytes([data[at] ^ bit]) + data[at + 1:]))
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    setup.keep_programs(tmp_path)
    cache.reset_cache()
    run = lambda: np.asarray(jax.jit(lambda x: jax.numpy.tanh(x @ x.T))(x))
    np.testing.assert_allclose(run(), want, rtol=1e-5)
    [file] = (tmp_path / "programs").glob("*lambda*-cache")
    whole = file.read_bytes()
    assert len(whole) > 3000
    for damage in damages:
      file.write_bytes(damage(whole))
      jax.clear_caches()
      with pytest.warns(UserWarning, match="persistent compilation cache"):
        np.testing.assert_allclose(run(), want, rtol=1e-5)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    cache.reset_cache()
