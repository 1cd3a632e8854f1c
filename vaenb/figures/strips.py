"""Pictures beside the numbers that belong to them: a row for each condition."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from vaenb.figures.style import INK, bare, mosaic, show_ink, spread, styled

TILE = 0.36  # inches per picture


def strips(
    pictures: Mapping[str, np.ndarray],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    colours: Mapping[str, Any],
    title: str,
    lines: int = 1,
    form: Mapping[str, str] | None = None,
    logarithmic: Collection[str] = (),
) -> Figure:
    """A row per condition: its name, a strip of pictures, and for each quantity a point per seed, mean ± s.d. in print.

    Args:
        pictures: row -> uint8, (n, H, W), shown in ``lines`` lines.
        panels: quantity -> row -> one value per seed; rows without values stay empty.
        colours: of each row.
        title: of the figure.
        lines: of pictures in each row.
        form: quantity -> format of what is printed, ``{:.0f}`` by default; a percent format goes for the axis as well.
        logarithmic: quantities, all positive, whose axis is.
    """
    form = form or {}
    columns = -(-len(next(iter(pictures.values()))) // lines)
    strip = TILE * columns
    widths = [strip, *[(7.4 - strip) / len(panels)] * len(panels)]  # inches, with room for the names
    with styled(0.75 + (0.2 + TILE * lines) * len(pictures), title) as figure:
        grid = figure.subplots(len(pictures), 1 + len(panels), squeeze=False, width_ratios=widths)
        for (row, images), axes in zip(pictures.items(), grid, strict=True):
            show_ink(axes[0], images, columns)
            axes[0].set_anchor("E")
            axes[0].set_ylabel(row, rotation=0, ha="right", va="center", fontsize=9, color=colours[row], fontweight="bold")
        for column, (quantity, rows) in enumerate(panels.items(), start=1):
            everything = [value for values in rows.values() for value in values]
            low, high = min(everything), max(everything)
            if quantity in logarithmic:
                factor = (high / low) ** 0.12
                limits = low / factor, high * factor**2.4
            else:
                low = 0 if 0 < low < 0.75 * high else low  # so that lengths can be compared
                margin = 0.12 * (high - low or 1)
                limits = low - margin, high + 2.4 * margin
            pattern = form.get(quantity, "{:.0f}")
            for index, (row, axes) in enumerate(zip(pictures, grid[:, column], strict=True)):
                axes.set(xlim=limits, ylim=(-1, 1), yticks=[], xscale="log" if quantity in logarithmic else "linear")
                axes.spines[["left", "bottom"]].set_visible(False)
                if quantity in logarithmic:
                    axes.xaxis.set(
                        major_locator=LogLocator(numticks=5),
                        major_formatter=StrMethodFormatter("{x:g}"),
                        minor_locator=NullLocator(),
                    )
                else:
                    axes.xaxis.set_major_locator(MaxNLocator(3))
                axes.tick_params(length=0, labelbottom=index == len(pictures) - 1, labelsize=8)
                if "%" in pattern:
                    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
                if index == 0:
                    axes.set_title(quantity, fontsize=9.5)
                if len(values := rows.get(row, [])):
                    axes.plot(values, [0] * len(values), "o", color=colours[row], alpha=0.55, markersize=5)
                    axes.plot([np.mean(values)] * 2, [-0.6, 0.6], color=colours[row], linewidth=2.5)
                    printed = [(pattern.format(np.mean(values)).replace("-", "−"), 8.5, rcParams["text.color"])]
                    if len(values) > 1:
                        printed += [("± " + spread(values, pattern), 7, "0.35")]
                    for line, (text, size, colour) in enumerate(printed):
                        offset = (7, 5 * (len(printed) - 1) - 10 * line)
                        axes.annotate(
                            text, (max(values), 0), xytext=offset, va="center", fontsize=size, color=colour,
                            textcoords="offset points",
                        )  # fmt: skip
    return figure


def rows(pictures: Mapping[str, np.ndarray], title: str) -> Figure:
    """Named rows of pictures, uint8, (n, H, W) or (n, H, W, 3), the same number in each."""
    with styled(0.6 + 0.6 * len(pictures), title) as figure:
        for axes, (name, images) in zip(figure.subplots(len(pictures), squeeze=False)[:, 0], pictures.items(), strict=True):
            axes.imshow(mosaic(images, len(images)).astype(np.uint8), cmap=INK, vmin=0, vmax=255)
            bare(axes)
            axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure
