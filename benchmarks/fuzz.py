"""Random inputs for every reader of what others wrote, for as long as wanted.

The targets are those of `tests/fuzz_cases.py`, which the tests run for some
seconds. Inputs have numbers: a fault is made again by

  python benchmarks/fuzz.py --target=NAME --first=NUMBER --count=1

and a table of a longer run by

  python benchmarks/fuzz.py --seconds=600 --out=benchmarks/fuzz.md

Exits with 1 if anything was raised that is no refusal, or took too long.
"""

import argparse
import collections
import itertools
import logging
import pathlib
import platform
import random
import resource
import sys
import time
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fuzz_cases  # noqa: E402

from mcpo_jax.data import templates  # noqa: E402

MOST_SECONDS = 1.0  # of processor time for one input


class Outcome(NamedTuple):
  """What a target's inputs came to."""

  inputs: int
  taken: int
  slugs: collections.Counter
  slowest: float  # seconds of processor time
  faults: list[str]


def run(name: str, numbers, until: float) -> Outcome:
  """Feeds a target with inputs, by their numbers, until some processor time."""
  slugs: collections.Counter = collections.Counter()
  slowest, faults = 0.0, []
  for number in numbers:
    start = time.process_time()
    if start > until:
      break
    try:
      slugs[fuzz_cases.run(name, random.Random(number))] += 1
    except KeyboardInterrupt:
      raise
    except BaseException as e:  # panics of libraries in Rust are no Exception
      slugs["fault"] += 1
      faults.append(f"{name} {number}: {type(e).__name__}: {e}")
      traceback.print_exc()
    seconds = time.process_time() - start
    slowest = max(slowest, seconds)
    if seconds > MOST_SECONDS:
      faults.append(f"{name} {number}: {seconds:.1f} s")
  taken = slugs.pop(None, 0)
  return Outcome(taken + slugs.total(), taken, slugs, slowest, faults)


def table(outcomes: dict[str, Outcome], words: str, memory: int) -> str:
  """The Markdown page."""
  rows = [f"| `{name}` | {x.inputs:,} | {x.taken:,} | {len(x.slugs)} | "
          f"{x.slowest:.2f} | {len(x.faults)} |"
          for name, x in outcomes.items()]
  total = sum(x.inputs for x in outcomes.values())
  return "\n".join([
      "# Random inputs", "", "Each target of `tests/fuzz_cases.py` takes an "
      "input made up at random, from a good one with a", "few changes to "
      "noise, and must understand it or refuse it with an error of ours. A "
      "fault is", f"anything else that is raised, or more than {MOST_SECONDS:g}"
      " s of processor time.", "",
      f"    python benchmarks/fuzz.py {words}", "",
      f"{platform.machine()}, Python {platform.python_version()}: {total:,} "
      f"inputs, peak memory {memory / 2**20:,.0f} MiB.", "",
      "| target | inputs | understood | kinds of refusal | slowest, s | faults "
      "|", "|---|---:|---:|---:|---:|---:|", *rows, ""])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seconds", type=float, default=60.0,
                      help="of processor time, shared by the targets")
  parser.add_argument("--target", choices=fuzz_cases.TARGETS)
  parser.add_argument("--first", type=int, default=0)
  parser.add_argument("--count", type=int)
  parser.add_argument("--out", type=pathlib.Path)
  options = parser.parse_args()
  logging.disable(logging.WARNING)
  templates.SECONDS = 0.2
  names = [options.target] if options.target else list(fuzz_cases.TARGETS)
  outcomes = {}
  for name in names:
    run(name, range(9), float("inf"))  # what is made once is made now
    until = time.process_time() + options.seconds / len(names)
    numbers = itertools.islice(itertools.count(options.first), options.count)
    outcomes[name] = run(name, numbers, until)
    print(name, outcomes[name].inputs, dict(outcomes[name].slugs), flush=True)
  memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  page = table(outcomes, " ".join(
      w for w in sys.argv[1:] if not w.startswith("--out")), memory)
  print(page)
  if options.out:
    options.out.write_text(page)
  faults = [fault for x in outcomes.values() for fault in x.faults]
  if faults:
    sys.exit("\n".join(faults))


if __name__ == "__main__":
  main()
