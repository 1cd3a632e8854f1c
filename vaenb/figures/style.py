"""The style of the paper: constants, empty and saved figures, tiles of pictures."""

import base64
import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from vaenb.claims import figures_folder
from vaenb.data import TITLES
from vaenb.runs import write_atomically

T = TypeVar("T")
WIDTH = 9.0  # inches: legible when a README shows it about 900 pixels wide
DPI = 130
PALETTE = sns.color_palette("colorblind")
# To the red-green blind its red is like its orange, and its purple like its blue: a dark brown and a light purple instead.
PALETTE[3:5] = (0.4, 0.2, 0.0), (0.85, 0.62, 0.95)
ARM_COLOURS = {"dense": PALETTE[0], "spatial": PALETTE[1], "mixed": PALETTE[2]}
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


@contextmanager
def styled(height: float, title: str) -> Iterator[Figure]:
    """An empty figure under a title, to be drawn on in the style of the paper."""
    with mpl.rc_context(STYLE):
        figure = new(height)
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        yield figure


def save(
    figure: Figure, name: str, dataset: str, numbers: Mapping[str, Any], alt: str, note: str = "", source: str = ""
) -> Image:
    """Write ``NAME.png`` and ``NAME.json`` to the figures folder and return the picture for display, with its alt text.

    Args:
        figure: what to save; a line with the data set and ``note`` is added below it.
        name: file name without suffix.
        dataset: one of ``data.TITLES``; decides the folder as well.
        numbers: what is plotted: numbers, lists, arrays. Decoded by ``read_numbers``.
        alt: what somebody who cannot see the picture should know.
        note: sample sizes, seeds.
        source: where the data are from, if not from ``dataset``.
    """
    caption = f"Data: {source or TITLES[dataset]}." + (f" {note}" if note else "")
    figure.supxlabel("\n".join(textwrap.wrap(caption, 145)), fontsize=7.5, color="0.35", x=0.01, ha="left")
    picture = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})  # the version would change the bytes
    content = {"alt": alt, "caption": caption, "numbers": {key: encode(value) for key, value in numbers.items()}}
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


def colour(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) with values in [0, 1] as uint8 (N, H, W, 3), the precision of a picture."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def pictures(images: Tensor) -> np.ndarray:
    """``grey`` or ``colour``, as the channels are."""
    return grey(images) if images.shape[1] == 1 else colour(images)


def signed(values: np.ndarray, limit: float) -> np.ndarray:
    """Numbers (H, W) as uint8 colours (H, W, 3), from blue at −limit through white to red at +limit."""
    return mpl.colormaps[DIVERGING]((values / limit + 1) / 2, bytes=True)[..., :3]


def mosaic(images: np.ndarray, columns: int, gap: int = 2, fill: float = 255) -> np.ndarray:
    """Tile (N, H, W), or (N, H, W, 3), row by row, with ``gap`` pixels of ``fill`` between tiles."""
    count, height, width, *channels = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, *channels), fill, dtype=np.float32)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def show_ink(axes: Axes, images: np.ndarray, columns: int, title: str = "") -> None:
    """A mosaic of uint8 grey pictures, white ink on black."""
    axes.imshow(mosaic(images, columns), cmap=INK, vmin=0, vmax=255)
    bare(axes, title)


def bare(axes: Axes, title: str = "", bold: bool = True) -> None:
    """A title and no ticks, grid or frame: axes that hold a picture."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(title, fontsize=9.5 if bold else 8, fontweight="bold" if bold else "normal", pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)


def side_by_side(figure: FigureBase, panels: Mapping[str, T]) -> Iterator[tuple[Axes, str, T]]:
    """One column of axes per entry, with the name and content of the entry."""
    for axes, (name, content) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        yield axes, name, content


def encode(value: Any) -> Any:
    """JSON-able: arrays as type, shape and base64; ``read_numbers`` undoes it."""
    if isinstance(value, np.ndarray):
        value = value.astype(np.float32) if value.dtype.kind == "f" else value
        return {"dtype": str(value.dtype), "shape": value.shape, "base64": base64.b64encode(value.tobytes()).decode()}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [encode(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"dtype", "shape", "base64"}:
            return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def spread(values: Sequence[float], pattern: str) -> str:
    """Standard deviation over seeds in a format such as ``{:.0%}``, with more digits if fewer would read as none."""
    deviation = float(np.std(values, ddof=1))
    text = pattern.format(deviation)
    for _ in range(4):
        if not deviation or any(digit in text for digit in "123456789"):
            break
        pattern = re.sub(r"\.(\d)", lambda digits: f".{int(digits[1]) + 1}", pattern)
        text = pattern.format(deviation)
    return text
