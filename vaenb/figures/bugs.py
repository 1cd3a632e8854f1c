"""Whether a bug explains the samples: the plots of ``03_bug_hunt``."""

from collections.abc import Mapping, Sequence

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


def learning_curves(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], title: str) -> Figure:
    """−ELBO against epoch on training (dashed) and test images (solid); arm -> split -> one list per seed."""
    with styled(3.3, title) as figure:
        axes = figure.subplots()
        for arm, splits in curves.items():
            for split, line in (("train", "--"), ("test", "-")):
                for index, values in enumerate(splits[split]):
                    label = f"{ARM_TITLES[arm]}, {split}" if index == 0 else None
                    axes.plot(range(1, len(values) + 1), values, line, color=ARM_COLOURS[arm], label=label, linewidth=1.4)
        settled = [values[len(values) // 5] for splits in curves.values() for line in splits.values() for values in line]
        lowest = min(min(values) for splits in curves.values() for line in splits.values() for values in line)
        axes.set(xlabel="epoch", ylabel="−ELBO, nats per image")
        axes.set_ylim(lowest - 2, max(settled) + 2)  # not the first descent
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8.5)
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
