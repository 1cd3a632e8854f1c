"""The plots of ``06_controls``: textures, and the linear model."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vaenb.figures.charts import Curve, Matrix, draw_curves, draw_matrices
from vaenb.figures.style import PALETTE, show_ink, styled


def textures(rows: Mapping[str, Mapping[str, np.ndarray]], lines: Mapping[str, Curve], title: str) -> Figure:
    """Data, reconstructions and samples of textures, and the error of samples beneath.

    Args:
        rows: what is shown -> correlation length -> uint8, (n, H, W).
        lines: map -> error against correlation length divided by range.
        title: of the figure.
    """
    with styled(2.9 + 0.68 * len(rows), title) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=[0.68 * len(rows), 2.4])
        grid = above.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False, gridspec_kw={"hspace": 0})
        for line, (name, columns) in enumerate(rows.items()):
            for axes, (length, images) in zip(grid[line], columns.items(), strict=True):
                show_ink(axes, images, len(images), length if line == 0 else "")
            grid[line, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5)
        axes = below.subplots()
        draw_curves(axes, lines)
        axes.set(xlabel="correlation length ÷ range", ylabel="relative error of\ntwo-point correlation", ylim=(0, None))
    return figure


def linear_model(panels: Mapping[str, Matrix], entries: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Matrices, and measured against predicted entries: model -> (predicted, measured), (d, d) each."""
    with styled(3.7, title) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[2, 1.15])
        draw_matrices(left, panels)
        axes = right.subplots()
        for order, ((name, (predicted, measured)), colour) in enumerate(zip(entries.items(), PALETTE, strict=False)):
            # the first on top and smallest, so that none is hidden
            axes.plot(
                predicted.ravel(), measured.ravel(), ".", markersize=2 + order, color=colour, label=name, zorder=9 - order
            )
        axes.axline((0, 0), slope=1, color="0.6", linewidth=1, zorder=2)
        axes.set(xlabel="Δ, predicted", ylabel="Δ, measured", title="every entry of Δ")
        axes.legend(fontsize=7, markerscale=3)
    return figure
