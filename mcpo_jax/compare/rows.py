"""Rows of a comparison, from the lines of compare.rows.

A row is a name and the settings in which it differs from the config; with a
grid it has several trials. A cell is one run: a trial with a seed. This module
imports no JAX.
"""

import itertools
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mcpo_jax import errors

Overrides = tuple[tuple[str, str], ...]  # dotted key, text
Read = Callable[[Overrides], dict[str, Any]]

SYNTAX = "NAME | key=value ... | seeds=0,1 | grid: key=value,value ..."
# Metrics that are means over prompts -> where scores.json has them by prompt.
BY_PROMPT = {"score/aligned": "sampled", "greedy/score/aligned": "greedy"}


class Cell(NamedTuple):
  """One run."""

  seed: int
  overrides: Overrides
  config: dict[str, Any]  # resolved
  folder: pathlib.Path  # its workdir


class Row(NamedTuple):
  """One line of the table."""

  name: str
  slug: str
  trials: tuple[Overrides, ...]  # one without a grid
  seeds: tuple[int, ...]
  cells: tuple[tuple[Cell, ...], ...] = ()  # trial, seed


def plan(
    options: dict[str, Any], read: Read, workdir: pathlib.Path
) -> list[Row]:
  """The rows with their cells, every config of them resolved.

  Args:
    options: the config's group `compare`.
    read: overrides -> the resolved config of the command line with them.
    workdir: of the comparison.

  Raises:
    ConfigError or an ErrorGroup: all mistakes found.
  """
  seeds = _seeds(options["seeds"], "compare.seeds")
  rows, found = [], []
  for i, text in enumerate(options["rows"]):
    where = f"compare.rows[{i}]"
    try:
      row = parse_row(text, where, seeds)
      rows.append(row._replace(cells=tuple(
          tuple(_cell(row, trial, seed, read, workdir) for seed in row.seeds)
          for trial in range(len(row.trials)))))
    except errors.McpoError as e:
      for each in getattr(e, "errors", [e]):
        if each.where != where:
          each.where = f"{where}: {each.where}"
        found.append(each)
  if not found:
    found = _check_rows(rows, options)
  if found:
    raise found[0] if len(found) == 1 else errors.ErrorGroup(found)
  return rows


def parse_row(text: str, where: str, seeds: tuple[int, ...]) -> Row:
  """Reads one line of compare.rows.

  Args:
    text: as `SYNTAX` says.
    where: names it in errors.
    seeds: of a row that names none.

  Raises:
    ConfigError: config.type.
  """
  name, *parts = (part.strip() for part in text.split("|"))
  overrides, grid = [], []
  for part in parts:
    if part.startswith("grid:"):
      grid += _pairs(part.removeprefix("grid:"), where)
    elif part.startswith("seeds="):
      seeds = _seeds(part.removeprefix("seeds=").split(","), where)
    else:
      overrides += _pairs(part, where)
  slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
  if not slug:
    raise errors.ConfigError("config.type", "a row without a name",
                             where=where, got=text, want=SYNTAX)
  trials = itertools.product(*(
      [(key, value) for value in values.split(",")] for key, values in grid))
  return Row(name, slug, tuple((*overrides, *trial) for trial in trials), seeds)


def _pairs(text: str, where: str) -> list[tuple[str, str]]:
  """"a.b=1 c=2" -> [("a.b", "1"), ("c", "2")]; quotes as in a shell."""
  try:
    words = shlex.split(text)
  except ValueError as e:  # a quote that does not close
    raise errors.ConfigError("config.type", f"not a row: {e}", where=where,
                             got=text, want=SYNTAX) from e
  pairs = []
  for word in words:
    key, equals, value = word.partition("=")
    if not equals:
      raise errors.ConfigError("config.type", "not a row", where=where,
                               got=word, want=SYNTAX)
    if key == "seed" or key.startswith("compare."):
      raise errors.ConfigError(
          "config.conflict", "not a row's to set", where=where, got=word,
          hint="give a row seeds of its own by | seeds=0,1")
    pairs.append((key, value))
  return pairs


def _seeds(words: Sequence[Any], where: str) -> tuple[int, ...]:
  try:
    seeds = tuple(int(word) for word in words)
  except (TypeError, ValueError):
    seeds = ()
  if not seeds or len(set(seeds)) < len(seeds):
    raise errors.ConfigError("config.type", "not seeds", where=where,
                             got=words, want="whole numbers, each once")
  return seeds


def _cell(row: Row, trial: int, seed: int, read: Read, workdir) -> Cell:
  overrides = (*row.trials[trial], ("seed", str(seed)))
  folder = workdir / "cells" / row.slug
  if len(row.trials) > 1:
    folder /= f"trial_{trial}"
  return Cell(seed, overrides, read(overrides), folder / str(seed))


def _check_rows(rows: list[Row], options) -> list[errors.McpoError]:
  """What is wrong with rows that are right one by one."""
  if not rows:
    return [errors.ConfigError("config.missing", "nothing to compare",
                               where="compare.rows", want=SYNTAX)]
  found, names = [], [row.name for row in rows]
  first = {}
  for i, row in enumerate(rows):
    where = f"compare.rows[{i}]"
    if first.setdefault(row.slug, i) != i:
      found.append(errors.ConfigError(
          "config.conflict", "two rows with one name", where=where,
          got=row.name, want=f"another than compare.rows[{first[row.slug]}]"))
    if len(row.trials) != len(rows[0].trials):
      found.append(errors.ConfigError(
          "config.conflict", "rows need equal numbers of trials, or the one "
          "with more has the better chance", where=where, got=len(row.trials),
          want=len(rows[0].trials)))
    stages = row.cells[0][0].config["stages"]
    if "preference" not in stages or "evaluate" not in stages:
      found.append(errors.ConfigError(
          "config.conflict", "a comparison trains and evaluates",
          where=f"{where}: stages", got=stages,
          want="preference and evaluate among them"))
  reference = options["reference"]
  if reference is not None and reference not in names:
    found.append(errors.ConfigError(
        "config.range", "no such row", where="compare.reference",
        got=reference, hint=errors.nearest(reference, names)))
  if len(rows[0].trials) > 1 and options["metric"] not in BY_PROMPT:
    found.append(errors.ConfigError(
        "config.range", "trials are chosen on one half of the prompts and "
        "reported on the other", where="compare.metric", got=options["metric"],
        want=" | ".join(BY_PROMPT)))
  return found
