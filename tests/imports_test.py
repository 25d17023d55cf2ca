"""The floors of the house: a room imports only from below, or from itself."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "mcpo_jax"
FLOORS = [
    {"types", "errors", "commit", "faults", "registry", "config_keys",
     "config_file", "settings", "user_code", "objective_names", "devices",
     "hosts", "memory", "preempt", "watch", "patience",
     "storage", "chunks"},
    {"objectives", "kernels"},
    {"sharding"},
    {"data", "models"},
    {"generation", "rewards", "checkpoints"},
    {"training", "evaluation"},
    {"stages"},
    {"verbs", "compare", "planning", "replay"},
    {"main", "api", "supervise"},
    {"__main__"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE
               or p.name != "__init__.py")


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] == "mcpo_jax":
        rooms |= {parts[1]} if len(parts) > 1 else {
            alias.name for alias in node.names}
  return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.name))
def test_a_room_imports_from_below_only(path):
  room = room_of(path)
  for other in imported_rooms(path) - {room}:
    lower = FLOOR[other] < FLOOR[room]
    same = FLOOR[other] == FLOOR[room] and FLOOR[room] in (0, 1)
    assert lower or same, f"{room} imports {other}"


def test_settings_are_checked_without_jax():
  code = ("import sys, mcpo_jax.main, mcpo_jax.settings, mcpo_jax.errors;"
          "assert 'jax' not in sys.modules and 'numpy' not in sys.modules")
  subprocess.run([sys.executable, "-c", code], check=True,
                 cwd=PACKAGE.parent)
