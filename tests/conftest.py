"""Test set-up: CPU, eight simulated devices, where the shared files lie."""

import gc
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs here run for milliseconds: compile fast, and each of them once. On a
# loaded machine a simulated device may be late for the others, which abort.
for flag in ("--xla_force_host_platform_device_count=8",
             "--xla_backend_optimization_level=0",
             "--xla_cpu_collective_call_terminate_timeout_seconds=600"):
  if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / "mcpo_jax_test_programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(
    os.environ.get("MCPO_SHARED", ROOT.parent / "shared")
).resolve()

# Words; a test that skips with one of them in its reason fails instead.
REQUIRED = tuple(filter(None, os.environ.get("MCPO_REQUIRE", "").split(",")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
  return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
  return _refuse_skip((yield))


def _refuse_skip(report):
  """A skip that MCPO_REQUIRE forbids becomes a failure, with its reason."""
  if report.skipped and isinstance(report.longrepr, tuple):
    reason = report.longrepr[2]
    if any(word in reason for word in REQUIRED):
      report.outcome = "failed"
      report.longrepr = f"MCPO_REQUIRE={','.join(REQUIRED)}: {reason}"
  return report


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real data and tokenizers; a skip with a reason without it."""
  if not (SHARED / "data").is_dir():
    pytest.skip(f"needs the shared data folder, not found at {SHARED}")
  return SHARED


@pytest.fixture(scope="module", autouse=True)
def few_programs():
  """Forgets compiled programs before their memory maps reach Linux's limit.

  Each holds some seven of 65,530; a process that needs one more is aborted.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
  """Runs a test in float64."""
  with jax.enable_x64(True):
    yield
