"""Figures of a comparison, as PNG.

Colours are those of Okabe and Ito, which people who do not see all colours
tell apart; past seven rows dashes and markers change.
"""

import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
            "#000000")
_LINES = (("-", "o"), ((0, (4, 1.5)), "s"), ((0, (1, 1.2)), "^"),
          ((0, (6, 1.5, 1, 1.5)), "D"))  # dashes, marker
_ACROSS = 4  # panels beside each other
_BLUE, _VERMILION, _GREY = _COLOURS[0], _COLOURS[5], "#777777"


class Dot(NamedTuple):
  """One line of the score figure."""

  name: str
  mean: float  # NaN: nothing to show, `note` says why
  half_width: float  # NaN: one seed
  values: Sequence[float]  # seed by seed
  note: str = ""


def scores(
    path: pathlib.Path,
    dots: Sequence[Dot],
    *,
    metric: str,
    reference: str,
    start: Dot | None = None,
) -> None:
  """A dot and its interval per row, top to bottom as given."""
  every = ([start] if start else []) + list(dots)
  figure = Figure(figsize=(7.5, 1.3 + 0.32 * len(every)), layout="constrained")
  axes = figure.subplots()
  for y, dot in enumerate(every):
    colour = _GREY if dot is start else (
        _VERMILION if dot.name == reference else _BLUE)
    if math.isnan(dot.mean):
      axes.text(0.5, y, dot.note, color=_GREY, fontsize=9, va="center",
                ha="center", transform=axes.get_yaxis_transform())
      continue
    axes.plot(dot.values, [y] * len(dot.values), "|", color=colour, alpha=0.55,
              markersize=9)
    axes.errorbar(
        dot.mean, y, fmt="o", color=colour, markersize=6, capsize=3,
        xerr=None if math.isnan(dot.half_width) else dot.half_width)
    if dot.name == reference:
      axes.axvline(dot.mean, color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
  axes.set_yticks(range(len(every)), [dot.name for dot in every])
  axes.set_ylim(len(every) - 0.4, -0.6)
  axes.set_xlabel(f"{metric}: mean and 95 % t interval over seeds; each seed "
                  "as a stroke", fontsize=9)
  _tidy(axes, "x")
  figure.savefig(path, dpi=150)


def curves(
    path: pathlib.Path,
    rows: Mapping[str, Mapping[str, Mapping[int, float]]],
    titles: Mapping[str, str],
    *,
    symlog: Collection[str] = (),
) -> None:
  """Metrics over updates, a panel each, a line per row.

  Args:
    path: of the PNG.
    rows: row -> metric -> update -> value.
    titles: metric -> what stands above its panel.
    symlog: metrics whose scale differs from row to row, drawn linearly between
      -1 and 1 and logarithmically beyond.
  """
  across = min(len(titles), _ACROSS)
  down = math.ceil(len(titles) / across)
  height = max(3.2 * down, 0.4 + 0.19 * len(rows))
  figure = Figure(figsize=(4.0 * across + 2.4, height), layout="constrained")
  panels = figure.subplots(down, across, squeeze=False).flat
  for axes in panels[len(titles):]:
    axes.remove()
  for axes, (metric, title) in zip(panels, titles.items()):
    for i, metrics in enumerate(rows.values()):
      dashes, marker = _LINES[i // len(_COLOURS) % len(_LINES)]
      points = sorted(metrics.get(metric, {}).items())
      axes.plot([step for step, _ in points], [value for _, value in points],
                color=_COLOURS[i % len(_COLOURS)], linestyle=dashes,
                linewidth=1.5, marker=marker if len(points) <= 50 else None,
                markersize=3)
    if metric in symlog:
      axes.set_yscale("symlog", linthresh=1.0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("update", fontsize=9)
    _tidy(axes, "both")
  figure.legend(panels[0].get_lines(), list(rows), loc="outside right upper",
                frameon=False, fontsize=9, handlelength=3.2)
  figure.savefig(path, dpi=150)


def _tidy(axes, grid: str) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=9)
  axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
  axes.set_axisbelow(True)
