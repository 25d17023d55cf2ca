"""Every id of the catalogue of bad inputs has a row or a test.

An id is found where a row of a table begins with it ("D4", "C1 typed"), or in
the name of a test (`test_l11_a_closed_pipe_...`). What is neither stands in
LEFT_OUT with its reason.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

TESTS = pathlib.Path(__file__).parent
# Data, configs, checkpoints, Hugging Face folders, generation requests,
# rewards, the command line.
LAST = {"D": 36, "C": 17, "K": 17, "H": 17, "G": 17, "R": 6, "L": 11}
LEFT_OUT: dict[str, str] = {}


def ids_of(path: pathlib.Path) -> Iterator[str]:
  """The ids that the rows and tests of a file name."""
  for node in ast.walk(ast.parse(path.read_text())):
    first = None
    if isinstance(node, ast.Tuple):
      first = next(iter(node.elts), None)
    elif isinstance(node, ast.Call):
      first = next(iter(node.args), None)
    elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
      yield from (name.upper() for name in re.findall(
          "(?:^test|_and|(?<=[0-9]))_([dckhgrl][0-9]+)(?=_)", node.name))
    if isinstance(first, ast.JoinedStr):
      first = next(iter(first.values), None)
    if isinstance(first, ast.Constant) and isinstance(first.value, str) and (
        found := re.fullmatch("([DCKHGRL][0-9]+)( .*)?", first.value)):
      yield found[1]


def test_every_id_of_the_catalogue_has_a_row_or_a_reason():
  found = {name for path in TESTS.glob("*.py") for name in ids_of(path)}
  wanted = {f"{table}{i}" for table, last in LAST.items()
            for i in range(1, last + 1)}
  assert sorted(wanted - found - LEFT_OUT.keys()) == []
  assert not LEFT_OUT.keys() & found, "it has a row: strike it out"
  assert LEFT_OUT.keys() <= wanted
