"""Room in the host's memory, and errors where it was not enough."""

import pathlib
import resource

from mcpo_jax import errors

_CGROUP = pathlib.Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
  """What this process can still take: of the machine, of its control group, of
  its own limit. None where nobody tells."""
  found = []
  info = _read(pathlib.Path("/proc/meminfo"))
  if "MemAvailable" in info:
    found.append(1024 * int(info.split("MemAvailable:")[1].split()[0]))
  limit, used = (_read(_CGROUP / f"memory.{x}").strip()
                 for x in ("max", "current"))
  if limit.isdecimal() and used.isdecimal():
    found.append(int(limit) - int(used))
  limit, _ = resource.getrlimit(resource.RLIMIT_AS)
  pages = _read(pathlib.Path("/proc/self/statm")).split()
  if limit != resource.RLIM_INFINITY and pages:
    found.append(limit - int(pages[0]) * resource.getpagesize())
  return min(found, default=None)


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError:  # another system
    return ""


def check_host(want: int, what: str) -> None:
  """Refuses what will not fit.

  Args:
    want: bytes that will be needed at least.
    what: needs them.

  Raises:
    ResourceError: memory.host.
  """
  free = free_bytes()
  if free is not None and free < want:
    raise errors.ResourceError(
        "memory.host", "the host's memory does not hold what is needed",
        where=what, got=f"{free} bytes free", want=f"{want} bytes",
        hint="a smaller model, more hosts, or adapters (lora.rank); the verb "
        "plan tells what a run takes")


def as_ours(error: BaseException) -> errors.ResourceError | None:
  """The error of a user for one of missing memory, None for any other."""
  if isinstance(error, MemoryError):
    return errors.ResourceError(
        "memory.host", "the host's memory is full",
        hint="the same line goes on from the last checkpoint; the verb plan "
        "tells what a run takes")
  if "RESOURCE_EXHAUSTED" in str(error):
    return errors.ResourceError(
        "memory.device", str(error).split("\n")[0],
        hint="lower data.stream_length or data.num_streams, or set "
        "model.remat; the verb plan tells what a run takes")
  return None
