"""What devices send each other, as far as a compiled program's text names it.

The text of a partitioned program has the shapes of one device. A scanned body
stands in it once; here it counts as often as it runs. The TPU compiler turns
gathers and scatters beside a product into loops of permutes ("windowed"),
which are counted as what they are: permutes. What goes between its slices it
hands to the hosts, as sends and receives that name the collective.
"""

import math
import re
from typing import NamedTuple

import numpy as np

_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
          "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16}  # others end with their bits
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# Of another unit "}, execution_thread="; "}}, metadata=" ends an attribute.
_END = re.compile(r"^\}(,|\s*$)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BETWEEN = re.compile(
    r"_xla_megascale_target=\"\{([\d,:]+)\}.*_transfer_type=\"(\w+)\"")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
  """One instruction."""

  kind: str  # a name of _KINDS
  payload: int  # bytes of the whole array: gathered, or not yet scattered
  times: int  # that it runs
  groups: tuple[tuple[int, ...], ...]  # of devices; of a permute all its pairs,
  # of others the first, which the rest are like

  @property
  def group(self) -> int:
    """Devices that take part together."""
    return len(self.groups[0])

  def crosses(self, slice_size: int) -> bool:
    """Whether a group has devices of several slices."""
    return any(len({i // slice_size for i in group}) > 1
               for group in self.groups)

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
      between = _BETWEEN.search(line) if operation == "recv" else None
      if between:
        kind = between[2].lower().replace("_", "-")
        slices = sum(1 + int(part.split(":")[-1]) - int(part.split(":")[0])
                     for part in between[1].split(","))  # such as 1,2 or 1:4
        found.append(Collective(
            kind, _bytes(*_ARRAY.search(line).groups()), times,
            (tuple(range(0, num_devices, num_devices // slices)),)))
      for called in _CALLED.findall(line):
        walk(called, inner)
      for several in _BRANCHES.findall(line):
        for called in several.split(","):
          walk(called.strip().lstrip("%"), inner)

  walk(entry, 1)
  return found


def received(collectives: list[Collective]) -> dict[str, float]:
  """Bytes that a device receives, by kind, in all runs."""
  out: dict[str, float] = {}
  for one in collectives:
    out[one.kind] = out.get(one.kind, 0) + one.traffic
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
    elif _END.match(line):
      lines = None
    elif _INSTRUCTION.match(line):
      lines.append(line)
  return computations, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """How often what an instruction calls is run: of a loop as often as it says,
  or as its condition and its body count, from zero to a constant."""
  if found := _TRIPS.search(line):
    return int(found[1])
  called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", line))
  condition = _definitions(computations.get(called.get("condition"), ()))
  limit = re.search(
      r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT",
      condition.get("ROOT", ""))
  if not limit:
    return 1
  counter = re.search(r"index=(\d+)", condition.get(limit[1], ""))
  end = _constant(condition.get(limit[2], ""))
  if not counter or not end:
    return 1
  body = _definitions(computations.get(called.get("body"), ()))
  carried = re.findall(
      r"%([\w.\-]+)", body.get("ROOT", "").partition(" tuple(")[2])
  step = 1  # unless the body adds another constant
  if len(carried) > int(counter[1]):
    added = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)",
                      body.get(carried[int(counter[1])], ""))
    numbers = [_constant(body.get(name, "")) for name in (
        added.groups() if added else ())]
    step = max(filter(None, numbers), default=1)
  return -(-end // step)


def _definitions(lines: list[str]) -> dict[str, str]:
  """Name -> instruction; "ROOT" -> what the computation gives."""
  found = {}
  for line in lines:
    found[_INSTRUCTION.match(line)[1]] = line
    if line.lstrip().startswith("ROOT "):
      found["ROOT"] = line
  return found


def _constant(line: str) -> int | None:
  found = re.search(r" [su]32\[\]\S* constant\((\d+)\)", line)
  return int(found[1]) if found else None


def _collective(
    kind: str, line: str, num_devices: int, times: int
) -> Collective:
  result, _, rest = line.partition(f" {kind}")
  arrays = [_bytes(*array) for array in _ARRAY.findall(result)
            if array[1] or not rest.startswith("-start")]  # no context words
  groups = _groups(line, num_devices)
  if rest.startswith("-start") and kind != "all-reduce" and len(arrays) > 1:
    # (operands, results, ...): of both halves the larger one is whole.
    half = len(arrays) // 2
    whole = max(sum(arrays[:half]), sum(arrays[half:2 * half]))
  else:
    whole = sum(arrays)
    if kind == "reduce-scatter":
      whole *= len(groups[0])
  return Collective(kind, whole, times, groups)


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r"\d+", text)]


def _bytes(kind: str, sizes: str) -> int:
  bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
  return math.prod(_numbers(sizes)) * bits // 8


def _groups(line: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
  """All pairs of a permute, else the first group, in any of the ways to write
  them."""
  if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
    return tuple(tuple(_numbers(pair)) for pair in found[1].split("},"))
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return (tuple(_numbers(found[1])),)
  ids = np.arange(num_devices)
  # [groups, devices of each]<=[sizes]T(order)
  if found := re.search(
      r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    ids = ids.reshape(_numbers(found[2]))
    ids = ids.transpose(_numbers(found[3]) if found[3] else range(ids.ndim))
    ids = ids.reshape(_numbers(found[1]))[0]
  # mesh['name'=size, ...] {'name', ...}
  elif found := re.search(
      r"replica_groups=\w+\[([^\]]*)\]\s*\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    inside = re.findall(r"'(\w+)'", found[2])
    ids = ids.reshape([int(n) for n in sizes.values()])
    for axis, name in reversed(list(enumerate(sizes))):
      ids = ids if name in inside else ids.take(0, axis)
  return (tuple(map(int, ids.reshape(-1))),)
