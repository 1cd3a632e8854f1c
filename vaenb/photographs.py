"""Colour photographs, 64×64: EuroSAT, and crops of the two photographs that scikit-learn carries as its stand-in.

EuroSAT (Helber et al. 2019) is 27,000 satellite images of ten classes of land. Where only some of the tiles are, those
serve, and are called what they are: a part of EuroSAT.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaenb.pictures import PictureError, read
from vaenb.runs import exclusive

SIDE = 64  # pixels
FULL = 27_000  # tiles that EuroSAT has
HELD_OUT = 5  # every fifth tile of a class is a test image
CLASSES = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
           "Residential", "River", "SeaLake")  # fmt: skip
CROPS = 1_000  # of the two photographs together
PRESETS = {  # for photographs: small for minutes on two cores, large for a GPU
    "small": {"likelihood": "logistic", "hidden": (32, 64), "latent_channels": 4, "epochs": 4, "batch_size": 32},
    "large": {"likelihood": "logistic", "hidden": (128, 256), "latent_channels": 8, "epochs": 60, "precision": "bf16-mixed"},
}
Split = tuple[Tensor, Tensor, Tensor, Tensor]  # train, test: uint8, (N, 3, 64, 64); their labels: int64, (N,)


def find_eurosat(bases: Sequence[Path]) -> Path | None:
    """The first folder of EuroSAT tiles under these, in the layout of torchvision: a folder for each class with JPEGs."""
    for base in bases:
        for folder in (base / "eurosat" / "2750", base / "2750", base):
            if any((folder / name).is_dir() for name in CLASSES):
                return folder
    return None


def load_eurosat(folder: Path) -> Split:
    """All tiles of a folder in the order of their class and number; those whose number ends in 5 or 0 are test images.

    Raises:
        PictureError: a file that is no EuroSAT tile; fewer than two classes, or none to train or to test on.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    tiles, labels, held_out = [], [], []
    for label, name in enumerate(classes):
        numbers = {
            int(match[1]): path for path in (folder / name).glob("*.jpg") if (match := re.search(r"_(\d+)$", path.stem))
        }
        for number, path in sorted(numbers.items()):
            tile = read(path)
            if tile.shape != (SIDE, SIDE, 3):
                raise PictureError(f"{path} has {tile.shape[1]}×{tile.shape[0]} pixels: EuroSAT's tiles have {SIDE}×{SIDE}")
            tiles.append(torch.from_numpy(tile.copy()).permute(2, 0, 1))
            labels.append(label)
            held_out.append(number % HELD_OUT == 0)
    test = torch.tensor(held_out)
    if len(set(labels)) < 2 or not test.any() or test.all():
        raise PictureError(f"{folder} has {len(tiles)} tiles of {len(set(labels))} classes: too few to train and to test on")
    images, classes_of = torch.stack(tiles), torch.tensor(labels)
    return images[~test], images[test], classes_of[~test], classes_of[test]


def download_eurosat(base: Path) -> Path:
    """Download with torchvision, which verifies the archive, in a scratch folder; then move the tiles to ``base``/eurosat.

    One process at a time; another finds what the first has fetched.

    Raises:
        OSError, RuntimeError: no network, or a damaged archive.
    """
    from torchvision.datasets import EuroSAT

    tiles = base / "eurosat" / "2750"
    with exclusive(base / ".eurosat.lock"):
        if not tiles.is_dir():
            with tempfile.TemporaryDirectory(prefix=".download-", dir=base) as scratch:
                EuroSAT(scratch, download=True)
                tiles.parent.mkdir(exist_ok=True)
                os.replace(Path(scratch, "eurosat", "2750"), tiles)
    return tiles


def find_scene(bases: Sequence[Path], name: str = "auto") -> tuple[str, np.ndarray]:
    """A picture and what it is called: a file, the temple, or for ``auto`` NASA's Blue Marble if a folder has it.

    Args:
        bases: folders that may have it, as ``scenes/nasa_blue_marble_bmng.jpg``.
        name: a path, ``temple`` or ``auto``.

    Returns:
        Its name, and uint8, (H, W, 3).

    Raises:
        PictureError: the file is not a picture.
    """
    if name not in ("auto", "temple"):
        return Path(name).name, read(Path(name))
    for base in bases if name == "auto" else []:
        if (path := base / "scenes" / "nasa_blue_marble_bmng.jpg").is_file():
            return "NASA Blue Marble Next Generation (NASA Earth Observatory)", read(path)
    from sklearn.datasets import load_sample_image

    return "a temple, from scikit-learn's sample images", load_sample_image("china.jpg")


def load_photos() -> Split:
    """Crops of a temple (class 0) and a flower (class 1) at random places; test images from the right fifth of each."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    splits: list[list[Tensor]] = [[], []]
    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        border = width * 4 // 5
        for split, left, right in ((0, 0, border), (1, border, width)):
            count = CROPS // 2 * (4 - 3 * split) // 5
            tops = generator.integers(height - SIDE + 1, size=count)
            lefts = generator.integers(left, right - SIDE + 1, size=count)
            crops = [photograph[y : y + SIDE, x : x + SIDE] for y, x in zip(tops, lefts, strict=True)]
            splits[split].append(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous())
    train, test = (torch.cat(parts) for parts in splits)
    return train, test, *(torch.arange(2).repeat_interleave(len(images) // 2) for images in (train, test))
