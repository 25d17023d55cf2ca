"""What devices send each other, as far as a compiled program's text names it.

The text of a partitioned program has the shapes of one device. A scanned body
stands in it once; here it counts as often as it runs. What the TPU compiler
has put into kernels of its own is not seen, so there this is a lower bound.
"""

import math
import re
from typing import NamedTuple

import numpy as np

_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
          "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16}  # others end with their bits
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
  """One instruction."""

  kind: str  # a name of _KINDS
  payload: int  # bytes of the whole array: gathered, or not yet scattered
  times: int  # that it runs
  members: tuple[int, ...]  # devices of its first group

  @property
  def group(self) -> int:
    """Devices that take part together."""
    return len(self.members)

  def crosses(self, slice_size: int) -> bool:
    """Whether a group has devices of several slices."""
    return len({i // slice_size for i in self.members}) > 1

  @property
  def traffic(self) -> float:
    """Bytes that a device receives in all its runs, sent around rings."""
    share = (self.group - 1) / self.group
    if self.kind == "collective-permute":
      share = 1.0
    elif self.kind == "all-reduce":  # scattered, then gathered
      share *= 2
    return self.times * self.payload * share


def count(text: str, num_devices: int) -> list[Collective]:
  """The collectives of a program.

  Args:
    text: `compiled.as_text()`.
    num_devices: that the program runs on.

  Returns:
    One entry for each collective: what a program splits over several
    asynchronous computations has one channel. Of the branches of a conditional
    all are counted, of a loop of unknown length one run.
  """
  computations, entry = _split(text)
  found: list[Collective] = []
  channels = set()

  def walk(name: str, times: int) -> None:
    for line in computations.get(name, ()):
      operation = _OPERATION.search(_INSTRUCTION.match(line)[2])
      operation = operation[1] if operation else ""
      inner = times * _trips(line, computations)
      kind = operation.removesuffix("-start")
      if kind in _KINDS:
        channel = _CHANNEL.search(line)
        if channel is None or channel[1] not in channels:
          found.append(_collective(kind, line, num_devices, times))
          channels.add(channel and channel[1])
        continue  # what it applies is a sum
      for called in _CALLED.findall(line):
        walk(called, inner)
      for several in _BRANCHES.findall(line):
        for called in several.split(","):
          walk(called.strip().lstrip("%"), inner)

  walk(entry, 1)
  return found


def payloads(collectives: list[Collective]) -> dict[str, int]:
  """Bytes of each kind, in all runs."""
  out: dict[str, int] = {}
  for one in collectives:
    out[one.kind] = out.get(one.kind, 0) + one.times * one.payload
  return out


def _split(text: str) -> tuple[dict[str, list[str]], str]:
  """Computation -> its instructions, and the entry's name."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", None
  for line in text.splitlines():
    if lines is None:
      head = _COMPUTATION.match(line)
      if head and not line.startswith("HloModule"):
        lines = computations[head[2]] = []
        entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      lines = None
    elif _INSTRUCTION.match(line):
      lines.append(line)
  return computations, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """How often what an instruction calls is run: of a loop as often as it says,
  or as its condition counts up to a constant."""
  if found := _TRIPS.search(line):
    return int(found[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  lines = "\n".join(computations.get(condition[1], ())) if condition else ""
  limits = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", lines)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in lines else 1


def _collective(
    kind: str, line: str, num_devices: int, times: int
) -> Collective:
  result, _, rest = line.partition(f" {kind}")
  arrays = [_bytes(*array) for array in _ARRAY.findall(result)
            if array[1] or not rest.startswith("-start")]  # no context words
  members = _members(line, num_devices)
  if rest.startswith("-start") and kind != "all-reduce" and len(arrays) > 1:
    # (operands, results, ...): of both halves the larger one is whole.
    half = len(arrays) // 2
    whole = max(sum(arrays[:half]), sum(arrays[half:2 * half]))
  else:
    whole = sum(arrays)
    if kind == "reduce-scatter":
      whole *= len(members)
  return Collective(kind, whole, times, members)


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", text)]


def _bytes(kind: str, sizes: str) -> int:
  bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
  return math.prod(_numbers(sizes)) * bits // 8


def _members(line: str, num_devices: int) -> tuple[int, ...]:
  """Devices of the first replica group, in any of the ways to write them."""
  if found := re.search(r"(?:replica_groups|pairs)=\{\{([\d,]*)\}", line):
    return tuple(_numbers(found[1]))
  # [groups, devices of each]<=[sizes]T(order)
  if found := re.search(
      r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    ids = np.arange(num_devices).reshape(_numbers(found[2]))
    ids = ids.transpose(_numbers(found[3]) if found[3] else range(ids.ndim))
    return tuple(map(int, ids.reshape(_numbers(found[1]))[0]))
  # mesh['name'=size, ...] {'name', ...}
  if found := re.search(r"replica_groups=\w+\[([^\]]*)\]\s*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    inside = re.findall(r"'(\w+)'", found[2])
    ids = np.arange(num_devices).reshape([int(n) for n in sizes.values()])
    for axis, name in reversed(list(enumerate(sizes))):
      ids = ids if name in inside else ids.take(0, axis)
    return tuple(map(int, ids.reshape(-1)))
  return tuple(range(num_devices))
