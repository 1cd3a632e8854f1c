"""What latent maps look like: the plots of ``02_latent_maps`` and ``02_map_sizes``."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from vaenb.figures.style import (
    ARM_COLOURS,
    DIVERGING,
    INK,
    PALETTE,
    SEQUENTIAL,
    bare,
    mosaic,
    show_ink,
    side_by_side,
    styled,
)


def latent_maps(images: np.ndarray, means: np.ndarray, scales: np.ndarray, samples: np.ndarray, title: str) -> Figure:
    """The post's comparison: each digit beside its latent map, and samples from the prior beneath.

    Args:
        images: uint8, (10, n, H, W): n test images of each class.
        means, scales: posterior mean and standard deviation, (10, n, h, w).
        samples: decoded prior draws, uint8, (m, H, W).
        title: of the figure.
    """
    columns = [
        ("image", images, {"cmap": INK, "vmin": 0, "vmax": 255}),
        ("mean μ", means, {"cmap": DIVERGING, "vmin": -_limit(means), "vmax": _limit(means)}),
        ("scale σ", scales, {"cmap": SEQUENTIAL, "vmin": 0, "vmax": 1}),
    ] * images.shape[1]
    with styled(8.8, title) as figure:
        top, bottom = figure.subfigures(2, 1, height_ratios=[6.8, 2.0])
        grid = top.subplots(1, len(columns), gridspec_kw={"wspace": 0.03})
        shown = []
        for index, (axes, (name, values, colours)) in enumerate(zip(grid, columns, strict=True)):
            # A picture for each column, its tiles as large as the images: many axes take long to lay out.
            side = images.shape[-1] // values.shape[-1]
            tiles = np.kron(values[:, index // 3], np.ones((1, side, side)))
            shown.append(axes.imshow(mosaic(tiles, 1, fill=np.nan), **colours))
            bare(axes, name, bold=False)
        bars = {"location": "right", "fraction": 0.04, "pad": 0.01, "aspect": 40}
        top.colorbar(shown[1], ax=grid, label="posterior mean μ", extend="both", **bars)
        top.colorbar(shown[2], ax=grid, label="posterior scale σ (the prior's is 1)", extend="max", **bars)
        show_ink(bottom.subplots(), samples, 20, "Decoded prior samples, z ~ N(0, I), of the same model")
    return figure


def map_sizes(
    sizes: Sequence[int],
    images: np.ndarray,
    means: Sequence[np.ndarray],
    samples: Sequence[np.ndarray],
    curves: Mapping[str, Sequence[Sequence[float]]],
    title: str,
) -> Figure:
    """Maps, samples and nats against map size.

    Args:
        sizes: side of the map of each column.
        images: uint8, (n, H, W): the encoded images.
        means: per size, (n, h, w).
        samples: per size, uint8, (m, H, W).
        curves: quantity -> per size, one value per seed, nats per image.
        title: of the figure.
    """
    with styled(7.2, title) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=[4.6, 2.5])
        grid = above.subplots(3, len(sizes), height_ratios=[0.34, 0.5, 3.0], squeeze=False)
        for column, size in enumerate(sizes):
            show_ink(grid[0, column], images, len(images), f"{size}×{size} map: {size * size} latents")
            shown = _show_means(grid[1, column], means[column])
            bar = above.colorbar(shown, ax=grid[1, column], location="bottom", fraction=0.1, aspect=45, pad=0.04)
            bar.ax.tick_params(labelsize=7.5, length=2)
            bar.set_label("posterior mean μ of each position", fontsize=8)
            show_ink(grid[2, column], samples[column], 8, "samples: decoded z ~ N(0, I)")
        for axes, quantity, values in side_by_side(below, curves):
            for position, seeds in enumerate(values):
                axes.plot([position] * len(seeds), seeds, "o", color=ARM_COLOURS["spatial"], alpha=0.5)
            averages = [np.mean(seeds) for seeds in values]
            axes.plot(averages, "-", color=ARM_COLOURS["spatial"], linewidth=2)
            for position, average in enumerate(averages):
                falls = averages[position + 1 :] and averages[position + 1] < average  # the number stays clear of the line
                axes.annotate(
                    f"{average:.0f}", (position, average), xytext=(7, 4 if falls else -9), textcoords="offset points",
                    fontsize=8.5,
                )  # fmt: skip
            axes.set_xticks(range(len(sizes)), [f"{size}×{size}" for size in sizes])
            axes.set(xlabel="latent map", ylabel="nats per image", title=quantity)
            axes.margins(x=0.15, y=0.15)
    return figure


def dependence_fields(panels: Mapping[str, np.ndarray], image: np.ndarray, pixel: tuple[int, int], title: str) -> Figure:
    """An image, and in a frame the pixels that can depend on one of them: name -> boolean (H, W); image uint8 (H, W)."""
    with styled(3.5, title) as figure:
        for axes, name, field in side_by_side(figure, panels):
            axes.imshow(image, cmap=INK, vmin=0, vmax=255)
            axes.imshow(np.where(field, np.nan, 1.0), cmap="gray_r", alpha=0.55, vmin=0, vmax=2)
            rows, columns = (np.nonzero(field.any(axis=axis))[0] for axis in (1, 0))
            corner = (columns.min() - 0.5, rows.min() - 0.5)
            axes.add_patch(
                Rectangle(corner, np.ptp(columns) + 1, np.ptp(rows) + 1, fill=False, color=PALETTE[1], linewidth=2)
            )
            axes.plot(pixel[1], pixel[0], "s", color=PALETTE[1], markersize=5)
            bare(axes, name)
    return figure


def reshaped_latents(
    images: np.ndarray, maps: Mapping[str, np.ndarray], statistics: Mapping[str, tuple[float, np.ndarray]], title: str
) -> Figure:
    """Vectors reshaped to maps beside true maps, and the neighbour statistic of each against its permutation null.

    Args:
        images: uint8, (n, H, W).
        maps: name -> posterior means, (n, h, w).
        statistics: name -> (observed, null values) of ``dependence.neighbour_test``.
        title: of the figure.
    """
    with styled(6.2, title) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=[3.8, 2.2])
        rows = above.subplots(1 + len(maps), 1)
        show_ink(rows[0], images, len(images), "test images")
        for axes, (name, values) in zip(rows[1:], maps.items(), strict=True):
            shown = _show_means(axes, values, name)
            above.colorbar(shown, ax=axes, location="right", fraction=0.02, aspect=9, pad=0.01, label="mean μ")
        for axes, name, (observed, null) in side_by_side(below, statistics):
            axes.hist(null, bins=30, color="0.7", label="positions shuffled")
            axes.axvline(observed, color="black", linewidth=2, label="as they lie")
            axes.locator_params(axis="x", nbins=6)
            axes.set(title=name, xlabel="mean squared correlation (r²) of neighbours", ylabel="shuffles")
            axes.legend(fontsize=8)
    return figure


def _show_means(axes: Axes, means: np.ndarray, title: str = "") -> AxesImage:
    """A row of maps (n, h, w) in colours symmetric about zero."""
    limit = _limit(means)
    shown = axes.imshow(mosaic(means, len(means), gap=1, fill=np.nan), cmap=DIVERGING, vmin=-limit, vmax=limit)
    bare(axes, title)
    return shown


def _limit(means: np.ndarray) -> float:
    return float(np.quantile(np.abs(means), 0.995))  # a few extremes would pale the rest
