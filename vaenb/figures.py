"""Every plot of the paper, in one style; each is saved as a PNG with its plotted numbers in a JSON file beside it.

Functions take results (arrays, lists of numbers) and know nothing of models.
"""

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vaenb.claims import figures_folder
from vaenb.data import TITLES
from vaenb.runs import write_atomically

WIDTH = 9.0  # inches: legible when a README shows it about 900 pixels wide
DPI = 130
_PALETTE = sns.color_palette("colorblind")
ARM_COLOURS = {"dense": _PALETTE[0], "spatial": _PALETTE[1], "mixed": _PALETTE[2]}
ARM_TITLES = {"dense": "FC-VAE (dense)", "spatial": "FCNN-VAE (spatial)", "mixed": "FCNN-VAE + one linear layer (mixed)"}
DIVERGING, SEQUENTIAL, INK = "RdBu_r", "cividis", "gray"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "image.interpolation": "nearest",
}


def new(height: float, width: float = WIDTH) -> Figure:
    """An empty figure in the style of the paper, size in inches; needs no display and no pyplot."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, name: str, dataset: str, numbers: Mapping[str, Any], alt: str, note: str = "") -> Image:
    """Write ``NAME.png`` and ``NAME.json`` to the figures folder and return the picture for display, with its alt text.

    Args:
        figure: what to save; a line with the data set and ``note`` is added below it.
        name: file name without suffix.
        dataset: one of ``data.TITLES``; decides the folder as well.
        numbers: what is plotted: numbers, lists, arrays. Decoded by ``read_numbers``.
        alt: what somebody who cannot see the picture should know.
        note: sample sizes, seeds.
    """
    caption = f"Data: {TITLES[dataset]}." + (f" {note}" if note else "")
    figure.supxlabel("\n".join(textwrap.wrap(caption, 145)), fontsize=7.5, color="0.35", x=0.01, ha="left")
    picture = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})  # the version would change the bytes
    content = {"alt": alt, "caption": caption, "numbers": {key: _encode(value) for key, value in numbers.items()}}
    folder = figures_folder(dataset)
    write_atomically(folder / f"{name}.png", picture.getvalue())
    write_atomically(folder / f"{name}.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return Image(picture.getvalue(), alt=alt, width=int(figure.get_figwidth() * 100))


def read_numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    """The plotted numbers of a figure's JSON file, arrays as arrays."""
    return {key: _decode(value) for key, value in content["numbers"].items()}


def grey(images: Tensor) -> np.ndarray:
    """Images (N, 1, H, W) with values in [0, 1] as uint8 (N, H, W), the precision of a picture."""
    return (images[:, 0].detach().cpu().clamp(0, 1) * 255).round().byte().numpy()


def mosaic(images: np.ndarray, columns: int, gap: int = 2, fill: float = 255) -> np.ndarray:
    """Tile (N, H, W) row by row, with ``gap`` pixels of ``fill`` between tiles."""
    count, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), fill, dtype=np.float32)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def show_ink(axes: Axes, images: np.ndarray, columns: int, title: str = "") -> None:
    """A mosaic of uint8 grey pictures, white ink on black."""
    axes.imshow(mosaic(images, columns), cmap=INK, vmin=0, vmax=255)
    _bare(axes, title)


def gallery(pictures: Mapping[str, np.ndarray], columns: int, title: str) -> Figure:
    """Mosaics of samples, reconstructions and data side by side: uint8 (N, H, W), named as in ``quality.pictures``."""
    titles = {
        "samples": "samples: decoded z ~ N(0, I)",
        "reconstructions": "reconstructions: z ~ q(z|x)",
        "data": "test images x",
    }
    with mpl.rc_context(STYLE):
        figure = new(height=3.9)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        for axes, (name, images) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
            show_ink(axes, images, columns, titles[name])
    return figure


def seed_points(panels: Mapping[str, Mapping[str, Sequence[float]]], colours: Mapping[str, Any], title: str) -> Figure:
    """One panel per quantity in nats, one row per arm: a point per seed, the mean as a bar, its value in print."""
    with mpl.rc_context(STYLE):
        figure = new(height=1.2 + 0.42 * len(next(iter(panels.values()))))
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        for index, (axes, (quantity, rows)) in enumerate(
            zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True)
        ):
            for position, (row, values) in enumerate(rows.items()):
                axes.plot(values, [position] * len(values), "o", color=colours[row], alpha=0.55, markersize=5)
                axes.plot([np.mean(values)] * 2, [position - 0.3, position + 0.3], color=colours[row], linewidth=2.5)
                axes.annotate(
                    f"{np.mean(values):.1f}", (np.mean(values), position - 0.32), ha="center", va="bottom", fontsize=8.5
                )
            axes.set(ylim=(len(rows) - 0.5, -0.75), xlabel="nats per image", title=quantity)
            axes.set_yticks(range(len(rows)), list(rows) if index == 0 else [""] * len(rows))
            axes.margins(x=0.18)
            axes.grid(axis="y", visible=False)
    return figure


def latent_maps(images: np.ndarray, means: np.ndarray, scales: np.ndarray, samples: np.ndarray, title: str) -> Figure:
    """The post's comparison: each digit beside its latent map, and samples from the prior beneath.

    Args:
        images: uint8, (10, n, H, W): n test images of each class.
        means, scales: posterior mean and standard deviation, (10, n, h, w).
        samples: decoded prior draws, uint8, (m, H, W).
        title: of the figure.
    """
    classes, count = images.shape[:2]
    limit = float(np.quantile(np.abs(means), 0.995))
    with mpl.rc_context(STYLE):
        figure = new(height=9.6)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        top, bottom = figure.subfigures(2, 1, height_ratios=[7.6, 2.0])
        grid = top.subplots(classes, 3 * count, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
        for digit in range(classes):
            for example in range(count):
                picture, mean, scale = grid[digit, 3 * example : 3 * example + 3]
                picture.imshow(images[digit, example], cmap=INK, vmin=0, vmax=255)
                centre = mean.imshow(means[digit, example], cmap=DIVERGING, vmin=-limit, vmax=limit)
                spread = scale.imshow(scales[digit, example], cmap=SEQUENTIAL, vmin=0, vmax=1)
                for axes, name in ((picture, "image"), (mean, "mean μ"), (scale, "scale σ")):
                    _bare(axes, name if digit == 0 else "", bold=False)
        bars = {"extend": "both", "fraction": 0.04, "pad": 0.01, "aspect": 40}
        top.colorbar(centre, ax=grid, location="right", label="posterior mean μ", **bars)
        top.colorbar(
            spread, ax=grid, location="right", label="posterior scale σ (the prior's is 1)", **{**bars, "extend": "max"}
        )
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
    with mpl.rc_context(STYLE):
        figure = new(height=7.6)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        above, below = figure.subfigures(2, 1, height_ratios=[4.9, 2.5])
        grid = above.subplots(3, len(sizes), height_ratios=[0.34, 0.66, 3.0], squeeze=False)
        for column, size in enumerate(sizes):
            show_ink(grid[0, column], images, len(images), f"{size}×{size} map: {size * size} latents")
            limit = float(np.quantile(np.abs(means[column]), 0.995))
            tiles = mosaic(means[column], len(images), gap=1, fill=np.nan)
            shown = grid[1, column].imshow(tiles, cmap=DIVERGING, vmin=-limit, vmax=limit)
            _bare(grid[1, column])
            bar = above.colorbar(shown, ax=grid[1, column], location="bottom", fraction=0.1, aspect=45, pad=0.04)
            bar.ax.tick_params(labelsize=7.5, length=2)
            bar.set_label("posterior mean μ of each position", fontsize=8)
            show_ink(grid[2, column], samples[column], 8, "samples: decoded z ~ N(0, I)")
        for axes, (quantity, values) in zip(below.subplots(1, len(curves), squeeze=False).flat, curves.items(), strict=True):
            for position, seeds in enumerate(values):
                axes.plot([position] * len(seeds), seeds, "o", color=ARM_COLOURS["spatial"], alpha=0.5)
            averages = [np.mean(seeds) for seeds in values]
            axes.plot(averages, "-", color=ARM_COLOURS["spatial"], linewidth=2)
            for position, average in enumerate(averages):
                axes.annotate(
                    f"{average:.0f}", (position, average), xytext=(7, -9), textcoords="offset points", fontsize=8.5
                )
            axes.set_xticks(range(len(sizes)), [f"{size}×{size}" for size in sizes])
            axes.set(xlabel="latent map", ylabel="nats per image", title=quantity)
            axes.margins(x=0.15, y=0.15)
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
    with mpl.rc_context(STYLE):
        figure = new(height=7.4)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        above, below = figure.subfigures(2, 1, height_ratios=[4.9, 2.3])
        rows = above.subplots(1 + len(maps), 1)
        show_ink(rows[0], images, len(images), "test images")
        for axes, (name, values) in zip(rows[1:], maps.items(), strict=True):
            limit = float(np.quantile(np.abs(values), 0.995))
            shown = axes.imshow(mosaic(values, len(images), gap=1, fill=np.nan), cmap=DIVERGING, vmin=-limit, vmax=limit)
            _bare(axes, name)
            above.colorbar(shown, ax=axes, location="right", fraction=0.02, aspect=9, pad=0.01, label="mean μ")
        panels = below.subplots(1, len(statistics), squeeze=False).flat
        for axes, (name, (observed, null)) in zip(panels, statistics.items(), strict=True):
            axes.hist(null, bins=30, color="0.7", label="positions shuffled")
            axes.axvline(observed, color="black", linewidth=2, label="as they lie")
            axes.locator_params(axis="x", nbins=6)
            axes.set(title=name, xlabel="mean squared correlation (r²) of neighbours", ylabel="shuffles")
            axes.legend(fontsize=8)
    return figure


def quantiles(panels: Mapping[str, np.ndarray], title: str) -> Figure:
    """Standardised errors against the quantiles of N(0, 1): a correct estimator lies on the diagonal."""
    from scipy.stats import norm

    with mpl.rc_context(STYLE):
        figure = new(height=3.0)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        for axes, (name, scores) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
            expected = norm.ppf((np.arange(scores.size) + 0.5) / scores.size)
            axes.plot([-4, 4], [-4, 4], color="0.6", linewidth=1.5, zorder=1)
            axes.plot(expected, np.sort(scores.ravel()), ".", markersize=3.5, color=_PALETTE[0])
            axes.set(title=name, xlabel="quantile of N(0, 1)", ylabel="standardised error", xlim=(-4, 4), ylim=(-4, 4))
    return figure


def learning_curves(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], title: str) -> Figure:
    """−ELBO against epoch on training (dashed) and test images (solid); arm -> split -> one list per seed."""
    with mpl.rc_context(STYLE):
        figure = new(height=3.3)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        axes = figure.subplots()
        for arm, splits in curves.items():
            for split, line in (("train", "--"), ("test", "-")):
                for index, values in enumerate(splits[split]):
                    label = f"{ARM_TITLES[arm]}, {split}" if index == 0 else None
                    axes.plot(range(1, len(values) + 1), values, line, color=ARM_COLOURS[arm], label=label, linewidth=1.4)
        settled = [values[len(values) // 5] for splits in curves.values() for line in splits.values() for values in line]
        lowest = min(min(values) for splits in curves.values() for line in splits.values() for values in line)
        axes.set(
            xlabel="epoch", ylabel="−ELBO, nats per image", ylim=(lowest - 2, max(settled) + 2)
        )  # not the first descent
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8.5)
    return figure


def loss_scaling(
    pictures: Mapping[str, Mapping[str, np.ndarray]], captions: Mapping[str, Mapping[str, str]], title: str
) -> Figure:
    """Prior samples of every way to scale the loss: a row per arm, a column per scaling (arm -> scaling -> pictures)."""
    with mpl.rc_context(STYLE):
        figure = new(height=6.5)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        grid = figure.subplots(len(pictures), len(next(iter(pictures.values()))), squeeze=False)
        for row, (arm, scalings) in enumerate(pictures.items()):
            for column, (scaling, images) in enumerate(scalings.items()):
                show_ink(grid[row, column], images, 6, scaling if row == 0 else "")
                grid[row, column].set_xlabel(captions[arm][scaling], fontsize=8)
            grid[row, 0].set_ylabel(ARM_TITLES[arm], color=ARM_COLOURS[arm], fontweight="bold")
    return figure


def _bare(axes: Axes, title: str = "", bold: bool = True) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(title, fontsize=9.5 if bold else 8, fontweight="bold" if bold else "normal", pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.astype(np.float32) if value.dtype.kind == "f" else value
        return {"dtype": str(value.dtype), "shape": value.shape, "base64": base64.b64encode(value.tobytes()).decode()}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"dtype", "shape", "base64"}:
            return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value
