"""Colour pictures of any size."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vaenb.figures.style import WIDTH, bare, mosaic, styled


def land(rows: Mapping[str, Mapping[str, np.ndarray]], title: str, columns: int = 5) -> Figure:
    """Colour pictures in a grid, each under its name.

    Args:
        rows: name of a row -> name of a picture -> uint8, (H, W, 3), or (N, H, W, 3), shown ``columns`` abreast. As many
            pictures in each row.
        title: of the figure.
        columns: of those that are many.
    """
    shown = {
        row: {name: p if p.ndim == 3 else mosaic(p, columns).astype(np.uint8) for name, p in pictures.items()}
        for row, pictures in rows.items()
    }
    across = max(len(pictures) for pictures in shown.values())
    heights = [(WIDTH - 0.5) / across * max(p.shape[0] / p.shape[1] for p in row.values()) + 0.25 for row in shown.values()]
    with styled(0.7 + sum(heights), title) as figure:
        grid = figure.subplots(len(shown), across, squeeze=False, height_ratios=heights)
        for line, (row, pictures) in zip(grid, shown.items(), strict=True):
            for axes in line[len(pictures) :]:
                axes.set_visible(False)
            for axes, (name, picture) in zip(line, pictures.items(), strict=False):
                axes.imshow(picture)
                bare(axes, name, bold=False)
            line[0].set_ylabel(row, fontsize=9, fontweight="bold")
    return figure
