"""Whether a bug explains the samples: the plots of ``03_bug_hunt``."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vaenb.figures.style import ARM_COLOURS, ARM_TITLES, PALETTE, show_ink, side_by_side, styled


def quantiles(panels: Mapping[str, np.ndarray], title: str) -> Figure:
    """Standardised errors against the quantiles of N(0, 1): a correct estimator lies on the diagonal."""
    from scipy.stats import norm

    with styled(3.0, title) as figure:
        for axes, name, scores in side_by_side(figure, panels):
            expected = norm.ppf((np.arange(scores.size) + 0.5) / scores.size)
            axes.plot([-4, 4], [-4, 4], color="0.6", linewidth=1.5, zorder=1)
            axes.plot(expected, np.sort(scores.ravel()), ".", markersize=3.5, color=PALETTE[0])
            axes.set(title=name, xlabel="quantile of N(0, 1)", ylabel="standardised error", xlim=(-4, 4), ylim=(-4, 4))
    return figure


def loss_scaling(
    pictures: Mapping[str, Mapping[str, np.ndarray]], captions: Mapping[str, Mapping[str, str]], title: str
) -> Figure:
    """Prior samples of every way to scale the loss: a row per arm, a column per scaling (arm -> scaling -> pictures)."""
    with styled(6.5, title) as figure:
        grid = figure.subplots(len(pictures), len(next(iter(pictures.values()))), squeeze=False)
        for row, (arm, scalings) in enumerate(pictures.items()):
            for column, (scaling, images) in enumerate(scalings.items()):
                show_ink(grid[row, column], images, 6, scaling if row == 0 else "")
                grid[row, column].set_xlabel(captions[arm][scaling], fontsize=8)
            grid[row, 0].set_ylabel(ARM_TITLES[arm], color=ARM_COLOURS[arm], fontweight="bold")
    return figure
