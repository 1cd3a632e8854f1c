"""What the models sample and what it costs: the plots of ``01_symptom``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vaenb.figures.style import show_ink, side_by_side, spread, styled


def gallery(pictures: Mapping[str, np.ndarray], columns: int, title: str) -> Figure:
    """Mosaics of samples, reconstructions and data side by side: uint8 (N, H, W), named as in ``quality.pictures``."""
    titles = {
        "samples": "samples: decoded z ~ N(0, I)",
        "reconstructions": "reconstructions: z ~ q(z|x)",
        "data": "test images x",
    }
    with styled(3.9, title) as figure:
        for axes, name, images in side_by_side(figure, pictures):
            show_ink(axes, images, columns, titles[name])
    return figure


def seed_points(
    panels: Mapping[str, Mapping[str, Sequence[float]]], colours: Mapping[str, Any], title: str, unit: str = "nats per image"
) -> Figure:
    """One panel per quantity, one row per arm: a point per seed, the mean as a bar, mean ± standard deviation in print."""
    with styled(1.2 + 0.42 * len(next(iter(panels.values()))), title) as figure:
        for index, (axes, quantity, rows) in enumerate(side_by_side(figure, panels)):
            for position, (row, values) in enumerate(rows.items()):
                axes.plot(values, [position] * len(values), "o", color=colours[row], alpha=0.55, markersize=5)
                axes.plot([np.mean(values)] * 2, [position - 0.3, position + 0.3], color=colours[row], linewidth=2.5)
                printed = f" ± {spread(values, '{:.1f}')}" if len(values) > 1 else ""
                text = f"{np.mean(values):.1f}{printed}"
                axes.annotate(text, (np.mean(values), position - 0.32), ha="center", va="bottom", fontsize=8.5)
            axes.set(ylim=(len(rows) - 0.5, -0.75), xlabel=unit, title=quantity)
            axes.set_yticks(range(len(rows)), list(rows) if index == 0 else [""] * len(rows))
            axes.margins(x=0.3)  # for the numbers
            axes.grid(axis="y", visible=False)
    return figure
