"""The verb, from start to end."""

import math
import pathlib
from collections.abc import Sequence

from mcpo_jax import commit, errors
from mcpo_jax.compare import report, results, rows, runs


def compare(
    read: rows.Read, flags: Sequence[str], workdir: pathlib.Path
) -> None:
  """Runs what is missing, then writes compare.md, compare.json and figures.

  Args:
    read: overrides -> the resolved config of the command line with them.
    flags: of the command line, for every cell: --config and its overrides.
    workdir: of the comparison; cells, their logs and the cache lie in it.

  Raises:
    ConfigError or an ErrorGroup: anything wrong with a row, before any run.
    ResourceError: compare.failed, after the table is written.
  """
  options = read(())["compare"]
  planned = rows.plan(options, read, workdir)
  commit.lock(workdir)
  minutes = options["minutes"]
  failed = runs.run(
      planned, flags, workdir, metric=options["metric"], jobs=options["jobs"],
      seconds=math.inf if minutes is None else 60.0 * minutes)
  report.write(
      [results.outcome(row, options["metric"], failed) for row in planned],
      options["metric"], options["reference"] or planned[0].name, workdir,
      flags)
  if failed:
    raise errors.ResourceError(
        "compare.failed", "some runs failed; the table has the others",
        where=str(workdir / "compare.md"), got=len(failed), want=0,
        hint=f"logs such as {next(iter(failed))}.log; the same line tries "
        "them again")
