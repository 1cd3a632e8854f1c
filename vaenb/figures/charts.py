"""Curves and matrices, with what the reader needs to judge them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from vaenb.figures.style import DIVERGING, SEQUENTIAL, bare, side_by_side, styled


@dataclass(frozen=True)
class Matrix:
    """A matrix to be shown in colours.

    Attributes:
        values: (rows, columns).
        label: of the colour bar: quantity and unit.
        limits: of the colours; symmetric ones give a diverging scale, others a sequential one.
        x, y: names of the axes; without them the matrix is bare.
        extent: of the axes, as ``imshow`` takes it; by default row and column numbers.
    """

    values: np.ndarray
    label: str
    limits: tuple[float, float]
    x: str = ""
    y: str = ""
    extent: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A line through means, with a point for each seed, or without points.

    Attributes:
        x: (n,), positions.
        seeds: (n,) sequences of one value per seed.
        colour: of line and points.
        line: style.
        points: whether the values of seeds are drawn.
    """

    x: Sequence[float]
    seeds: Sequence[Sequence[float]]
    colour: Any
    line: Any = "-"
    points: bool = True


def matrices(panels: Mapping[str, Matrix], title: str, height: float = 3.4) -> Figure:
    """Matrices side by side, each with its colour bar."""
    with styled(height, title) as figure:
        draw_matrices(figure, panels)
    return figure


def draw_matrices(figure: FigureBase, panels: Mapping[str, Matrix]) -> None:
    """Matrices side by side on a figure or a part of one."""
    for axes, name, matrix in side_by_side(figure, panels):
        low, high = matrix.limits
        colours = DIVERGING if low == -high else SEQUENTIAL
        shown = axes.imshow(matrix.values, cmap=colours, vmin=low, vmax=high, extent=matrix.extent)
        outside = matrix.values.min() < low, matrix.values.max() > high
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[outside]
        figure.colorbar(shown, ax=axes, location="bottom", fraction=0.06, aspect=30, pad=0.03, extend=extend).set_label(
            matrix.label, fontsize=8.5
        )
        if matrix.x:
            axes.set(xlabel=matrix.x, ylabel=matrix.y)
            axes.grid(False)
            axes.set_title(name, fontsize=9.5)
        else:
            bare(axes, name)


def draw_curves(axes: Axes, lines: Mapping[str, Curve], legend: str = "best") -> None:
    """Curves with their points, on axes; name in the legend -> curve. ``legend``: its place, "" for none."""
    for name, curve in lines.items():
        for x, values in zip(curve.x, curve.seeds if curve.points else [[]] * len(curve.x), strict=True):
            axes.plot([x] * len(values), values, "o", color=curve.colour, alpha=0.45, markersize=3.5)
        means = [np.mean(values) for values in curve.seeds]
        axes.plot(curve.x, means, linestyle=curve.line, color=curve.colour, linewidth=2, label=name)
    if len(lines) > 1 and legend:
        axes.legend(fontsize=8, loc=legend)


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    labels: Mapping[str, tuple[str, str]],
    title: str,
    height: float = 3.2,
    marks: Mapping[str, Sequence[tuple[float, Any, str]]] | None = None,
    axes_options: Mapping[str, Mapping[str, Any]] | None = None,
    symlog: float | None = None,
    legend: str = "best",
) -> Figure:
    """Curves in panels side by side.

    Args:
        panels: panel -> name in the legend -> curve.
        labels: panel -> names of its two axes, with units.
        title: of the figure.
        height: inches.
        marks: panel -> (x, colour, text) of vertical lines.
        axes_options: panel -> what ``Axes.set`` takes besides.
        legend: its place in every panel; one that begins with "outside" is outside of them, for all.
        symlog: the vertical axis is linear up to this value and logarithmic beyond.
    """
    with styled(height, title) as figure:
        for axes, panel, lines in side_by_side(figure, panels):
            draw_curves(axes, lines, "" if legend.startswith("outside") else legend)
            for x, colour, text in (marks or {}).get(panel, ()):
                axes.axvline(x, color=colour, linewidth=1.2, linestyle=":")
                axes.annotate(
                    text, (x, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                    va="top", fontsize=7.5, color="0.25", rotation=90,
                )  # fmt: skip
            axes.set(xlabel=labels[panel][0], ylabel=labels[panel][1], title=panel)
            if symlog:
                axes.set_yscale("symlog", linthresh=symlog)
            axes.set(**(axes_options or {}).get(panel, {}))
        if legend.startswith("outside"):
            entries = {
                name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
            }
            figure.legend(entries.values(), entries.keys(), loc=legend, fontsize=8)
    return figure
