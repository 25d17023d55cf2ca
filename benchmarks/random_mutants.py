"""Test power: random mistakes in the mathematics, and the share that is caught.

A mutant changes one operator, comparison, constant or NumPy name of a file.
Drawn evenly from all that there are, each runs that file's own tests, which
catch it if one of them fails, if they cannot run or if they hang. At the end
the tests that have caught one must pass without any.

  python benchmarks/random_mutants.py --count=200 --seed=0

Exits with 1 if fewer than 90 % of those that change anything are caught.
"""

import argparse
import ast
import concurrent.futures
import copy
import pathlib
import queue
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from benchmarks import mutants  # noqa: E402

GOAL = 0.9
# File in mcpo_jax/ -> those of tests/ that are its own; of objectives/x.py and
# kernels/x.py objectives_x_test.py and kernels_x_test.py where they are.
TESTS = {
    "commit.py": ["commit_test.py", "checkpoints_test.py"],
    "data/packing.py": ["data_packing_test.py", "data_mismatched_test.py"],
    "kernels/exact.py": ["facts_test.py", "kernels_chains_test.py"],
    "kernels/sets.py": ["kernels_mc_test.py", "api_test.py"],
    "kernels/weights.py": ["kernels_mc_test.py", "objectives_losses_test.py",
                           "facts_test.py", "kernels_chains_test.py"],
    "models/scoring.py": ["models_scoring_test.py", "models_decoder_test.py",
                          "scoring_ways_test.py"],
    "objectives/implicit.py": ["objectives_pairwise_test.py",
                               "objectives_losses_test.py"],
    "objectives/levels.py": ["objectives_pairwise_test.py"],
    "objectives/pairs.py": ["objectives_pairwise_test.py",
                            "objectives_losses_test.py"],
    "objectives/softmax.py": ["objectives_losses_test.py", "facts_test.py"],
    "objectives/supervised.py": ["objectives_losses_test.py"],
    "objectives/transport.py": ["objectives_pairwise_test.py"],
    "training/step.py": ["training_step_test.py", "training_memory_test.py",
                         "training_kernel_settings_test.py"],
}
SWAPS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div],
    ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult],
    ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In],
    ast.And: [ast.Or], ast.Or: [ast.And],
}
NAMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min",
         "logical_and": "logical_or", "logical_or": "logical_and",
         "sum": "mean", "mean": "sum"}
# Neither values nor shapes: annotations, messages, checks of the inputs.
SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr)


class Mutant(NamedTuple):
  """One mistake."""

  file: str  # in mcpo_jax/
  line: int
  old: str
  new: str
  code: str  # the line as it was
  text: str  # of the whole file, with the mistake

  @property
  def name(self) -> str:
    return f"{self.file}:{self.line}: {self.old} -> {self.new}"

  @property
  def same(self) -> str:
    """Why it changes nothing; empty if it does."""
    return EQUIVALENT.get((self.code, self.old, self.new), "")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--count", type=int, default=200, help="mutants")
  parser.add_argument("--seed", type=int, default=0, help="of the draw")
  parser.add_argument("--seconds", type=float, help="no new one after these")
  parser.add_argument("--rooms", default="", help="files that begin so, a,b")
  parser.add_argument("--jobs", type=int, default=1, help="tests at a time")
  parser.add_argument("--out", type=pathlib.Path, help="Markdown file")
  args = parser.parse_args()
  chosen_files = [file for file in files() if file.startswith(
      tuple(args.rooms.split(",")))]
  every = [m for file in chosen_files for m in mutants_of(file)]
  random.Random(args.seed).shuffle(every)
  chosen = every[:args.count]
  end = time.monotonic() + (args.seconds or float("inf"))

  with tempfile.TemporaryDirectory() as folder:
    copies = queue.SimpleQueue()
    for i in range(args.jobs):
      copies.put(mutants.copy_tree(pathlib.Path(folder) / str(i)))
    def try_one(mutant):
      if time.monotonic() > end:
        return None
      tree = copies.get()
      path = tree / "mcpo_jax" / mutant.file
      text = path.read_text()
      try:
        path.write_text(mutant.text)
        caught = mutants.run_tests(
            tree, tests_of(mutant.file), any_end=True)
      finally:
        path.write_text(text)
        copies.put(tree)
      print(f"{mutant.name}: {caught or 'SURVIVES'}", file=sys.stderr)
      return mutant, caught

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      results = [x for x in pool.map(try_one, chosen) if x]
    seen = sorted({f"tests/{by}" for _, by in results if by and "::" in by})
    failed = mutants.run_tests(copies.get(), seen)
    if failed:
      raise SystemExit(f"fails without any mutant: {failed}")

  command = f"--count={len(results)} --seed={args.seed}" + (
      f" --rooms={args.rooms}" if args.rooms else "")
  text, share = table(results, command, len(every), len(chosen_files))
  if args.out:
    args.out.write_text(text)
  sys.stdout.write(text)
  return int(share < GOAL)


def files() -> list[str]:
  """Of losses, masks, kernels and commits, in mcpo_jax/."""
  root = mutants.ROOT / "mcpo_jax"
  found = [*TESTS, *(str(path.relative_to(root)) for room in (
      "objectives", "kernels") for path in (root / room).glob("[!_]*.py"))]
  return sorted({*found} - {"objectives/check.py"})  # it is a test itself


def tests_of(file: str) -> list[str]:
  """Files of tests, as pytest takes them."""
  name = file.replace("/", "_").removesuffix(".py") + "_test.py"
  return [f"tests/{test}" for test in TESTS.get(file, [name])]


def mutants_of(file: str) -> list[Mutant]:
  """All mutants of a file in mcpo_jax/."""
  text = (mutants.ROOT / "mcpo_jax" / file).read_text()
  data, starts = text.encode(), [0]
  for line in data.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))
  out = []
  for node, new in changes(ast.parse(text)):
    first = starts[node.lineno - 1] + node.col_offset
    last = starts[node.end_lineno - 1] + node.end_col_offset
    new = ast.unparse(new)
    changed = data[:first] + f"({new})".encode() + data[last:]
    out.append(Mutant(
        file, node.lineno, ast.unparse(node), new,
        text.splitlines()[node.lineno - 1].strip(), changed.decode()))
  return out


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
  """(an expression, what stands there instead), in the order of the text."""
  for field, value in ast.iter_fields(tree):
    for node in value if isinstance(value, list) else [value]:
      if (not isinstance(node, ast.AST) or isinstance(node, SKIPPED)
          or field in ("annotation", "returns", "decorator_list")
          or isinstance(node, ast.Expr) and "chex." in ast.unparse(node)):
        continue
      yield from ((node, new) for new in instead(node))
      yield from changes(node)


def instead(node: ast.AST) -> Iterator[ast.AST]:
  """What else may stand in the place of an expression."""

  def other(**fields):
    new = copy.copy(node)
    for name, value in fields.items():
      setattr(new, name, value)
    return new

  if isinstance(node, ast.BinOp | ast.BoolOp):
    for op in SWAPS.get(type(node.op), []):
      yield other(op=op())
  elif isinstance(node, ast.Compare):
    for op in SWAPS[type(node.ops[0])]:
      yield other(ops=[op(), *node.ops[1:]])
  elif isinstance(node, ast.UnaryOp):
    yield node.operand
  elif isinstance(node, ast.Attribute) and node.attr in NAMES:
    yield other(attr=NAMES[node.attr])
  elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
    yield other(value=not node.value)
  elif isinstance(node, ast.Constant) and isinstance(node.value, int):
    yield other(value=node.value + 1)
  elif isinstance(node, ast.Constant) and isinstance(node.value, float):
    yield other(value=2 * node.value or 1.0)


def table(
    results: list[tuple[Mutant, str | None]], command: str, total: int,
    num_files: int,
) -> tuple[str, float]:
  """Markdown with those that survive, and the share that is caught."""
  caught = sum(bool(by) for _, by in results)
  left = [m for m, by in results if not by]
  same = [m for m in left if m.same]
  count = len(results) - len(same)
  low, high = stats.binomtest(caught, count).proportion_ci(method="wilson")
  lines = [f"| `{m.name}` | {m.same} |" for m in left]
  return f"""# Random mutants

Command: `python benchmarks/random_mutants.py {command}`

{len(results)} of the {total} mutants of {num_files} files. \
{len(same)} change nothing that can be seen; of the {count} others {caught} \
are caught, {caught / count:.1%} (95 %: {low:.1%} to {high:.1%}).

| survives | why it changes nothing |
|---|---|
{chr(10).join(lines)}
""", caught / count


# (line, old, new) of mutants that compute the same, and why.
EQUIVALENT = {
    ("of_chunk = np.arange(len(free)).reshape(-1, num_streams)", "1", "2"):
        "NumPy takes any negative size for the one that is not given",
}


if __name__ == "__main__":
  sys.exit(main())
