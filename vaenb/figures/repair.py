"""What learned priors buy: the plots of ``07_priors`` and ``07_trained_jointly``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vaenb.figures.style import PALETTE, show_ink, side_by_side, styled

MARKERS = "os^vDP*Xphd<>"  # those that look least alike first


def worth(
    models: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    colours: Mapping[str, Any],
    labels: tuple[str, str],
    title: str,
    floors: Mapping[str, float],
) -> Figure:
    """Nats gained against sample quality: a marker for each prior, a colour for each model, joined in the order of nats.

    Args:
        models: model -> prior -> values of both axes, one per seed; means are drawn.
        colours: model -> colour.
        labels: of the two axes, with units.
        title: of the figure.
        floors: model -> where reconstructions of other images are on the vertical axis.
    """
    with styled(4.4, title) as figure:
        axes = figure.subplots()
        names = list(dict.fromkeys(name for rungs in models.values() for name in rungs))
        markers = dict(zip(names, MARKERS, strict=False))
        for model, rungs in models.items():
            points = sorted((np.mean(x), np.mean(y), name) for name, (x, y) in rungs.items())
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "-", color=colours[model], alpha=0.35, zorder=1)
            for x, y, name in points:
                axes.plot(x, y, markers[name], color=colours[model], markersize=7, zorder=2)
            axes.plot([], [], "-", color=colours[model], linewidth=4, label=model)
        for name in names:
            axes.plot([], [], markers[name], color="0.4", label=name)
        for model, floor in floors.items():
            axes.axhline(floor, color=colours[model], linestyle=":", linewidth=1.3)
        axes.plot([], [], ":", color="0.4", label="reconstructions\nof other images")
        axes.set(xlabel=labels[0], ylabel=labels[1], yscale="log")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def neighbours(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], distances: Mapping[str, np.ndarray], title: str
) -> Figure:
    """Samples above their nearest training images, and how near those are.

    Args:
        pairs: panel -> pictures and their nearest images, uint8, (n, H, W) each.
        distances: what -> distances to the nearest training image.
        title: of the figure.
    """
    with styled(3.9, title) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=[0.9, 2.4])
        for axes, name, (pictures, images) in side_by_side(above, pairs):
            show_ink(axes, np.concatenate([pictures, images]), len(pictures), name)
        axes = below.subplots()
        edges = np.linspace(0, max(values.max() for values in distances.values()), 40)
        for (name, values), colour in zip(distances.items(), PALETTE, strict=False):
            axes.hist(values, bins=edges, density=True, histtype="step", linewidth=1.8, color=colour, label=name)
        label = "distance to the nearest training image (root mean square over pixels, white = 1)"
        axes.set(xlabel=label, ylabel="density", xlim=(0, None))
        axes.legend(fontsize=8, loc="upper left")
    return figure
