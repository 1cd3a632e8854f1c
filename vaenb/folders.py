"""Random crops from a folder of images of any sizes and formats, decoded while they are needed and never held as a whole.

``folder:PATH`` are crops of 64×64 pixels, ``folder-96:PATH`` of 96×96, from all images in the folder and those below it. A
fifth of the files, chosen by a hash of their paths, is held out for the test. Crops are always RGB in 8 bits: grey is
repeated, transparency is put on black, 16 bits are scaled to 8; of an animation the first picture is taken.
"""

import functools
import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vaenb.pictures import EXTENSIONS, Unreadable, opened, rgb
from vaenb.runs import cores

SIDE = 64  # pixels of a crop along each axis, if the name of the set says nothing else
CAP = 16  # crops of one file in an epoch, at most
VISIT = 4  # of them that are cut from one decoding: decoding is what takes time
TEST_CROPS = 2_000  # at most
HELD_OUT = 5  # one file in so many
BROKEN = 0.1  # share of broken files that is put up with
NAMED = 5  # broken files that a message names
NAME = re.compile(r"folder(?:-(?P<side>[1-9]\d*))?:(?P<path>.+)", re.DOTALL)


class DataError(Exception):
    """The data set cannot be had, or a file of it is not what it should be."""


class Broken:
    """The files of a folder that cannot be decoded: collected, named and counted, refused when they are too many.

    Args:
        root: the folder.
        count: image files in it, good and bad.
    """

    def __init__(self, root: Path, count: int):
        self.root, self.count = root, count
        self.reasons: dict[str, str] = {}  # by path
        self.told = 0

    def add(self, reasons: dict[str, str]) -> None:
        """Note files and what is wrong with them; those that are known already count once.

        Raises:
            DataError: more than a share ``BROKEN`` of the files is broken.
        """
        self.reasons |= reasons
        if len(self.reasons) > BROKEN * self.count:
            raise DataError(f"{self}: more than {BROKEN:.0%}, so nothing is trained on them; repair or remove them")

    def warn(self) -> None:
        """Say which files were skipped, if there are more of them than last time."""
        if len(self.reasons) > self.told:
            self.told = len(self.reasons)
            warnings.warn(f"{self}: they are skipped", stacklevel=2)

    def __str__(self):
        named = [f"{path} ({reason})" for path, reason in sorted(self.reasons.items())[:NAMED]]
        more = f" and {len(self.reasons) - NAMED} more" if len(self.reasons) > NAMED else ""
        return f"{len(self.reasons)} of {self.count} image files in {self.root} cannot be read: {', '.join(named)}{more}"


@dataclass(frozen=True, eq=False)
class Crops:
    """Square crops of image files, as many of each as its area has room for, but no more than ``CAP``.

    Stands for a tensor (N, 3, side, side) that is too large to hold: it has ``len``, ``shape``, and indices that give a
    tensor. Which file a crop is of is fixed; where it is cut depends on a seed, and under an index the seed is 0.

    Attributes:
        root: the folder.
        files: paths from there, in an order that has nothing to do with what is in them.
        owners: of each crop, the index of its file; ascending, int64, (N,).
        side: height and width in pixels.
        broken: where files are noted that turn out to be unreadable.
    """

    root: Path
    files: tuple[str, ...]
    owners: np.ndarray
    side: int
    broken: Broken

    def __len__(self):
        return len(self.owners)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the tensor that this stands for."""
        return len(self), 3, self.side, self.side

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Crops as uint8, (3, side, side) for a number, else (n, 3, side, side); decodes them now, all at once."""
        chosen = torch.arange(len(self))[index]
        crops, broken = self.cut(chosen.reshape(-1).tolist(), seed=0)
        self.broken.add(broken)
        return crops.reshape(*chosen.shape, *self.shape[1:])

    def order(self, draw: torch.Generator) -> Tensor:
        """All crops in a random order, int64, (N,), but up to ``VISIT`` of one file one after the other."""
        first = np.searchsorted(self.owners, self.owners)  # crop of the same file
        visits = np.flatnonzero((np.arange(len(self)) - first) % VISIT == 0)
        ends = np.append(visits[1:], len(self))
        chosen = torch.randperm(len(visits), generator=draw).tolist()
        return torch.from_numpy(np.concatenate([np.arange(visits[visit], ends[visit]) for visit in chosen]))

    def cut(self, crops: Sequence[int], seed: int) -> tuple[Tensor, dict[str, str]]:
        """Cut these crops; neighbours of the same file from one decoding.

        In the place of a file that cannot be decoded stands the next one that can, so that the result depends on the
        files and the seed alone.

        Returns:
            uint8, (n, 3, side, side), and the reason for each broken file that was met, by path; no crops if these are
            so many that ``Broken.add`` refuses the folder.
        """
        result, broken = [], {}
        for owner, group in itertools.groupby(crops, key=lambda crop: int(self.owners[crop])):
            places = [np.random.default_rng((seed, crop)).random(2) for crop in group]
            for candidate in itertools.chain(range(owner, len(self.files)), range(owner)):
                path = self.files[candidate]
                if path in broken:
                    continue
                try:
                    result += cut(self.root / path, places, self.side)
                    break
                except Unreadable as error:
                    broken[path] = error.reason
                    if len(broken) > BROKEN * self.broken.count:  # more than ``Broken.add`` puts up with
                        return torch.empty(0, *self.shape[1:], dtype=torch.uint8), broken
        return torch.stack(result) if result else torch.empty(0, *self.shape[1:], dtype=torch.uint8), broken


@dataclass(frozen=True, eq=False)
class FolderSet:
    """What ``data.ImageSet`` is, for a folder of images.

    Attributes:
        name: as it was asked for.
        train: of four fifths of the files; not a tensor but crops that are cut while they are needed.
        held_out: the crops that ``test`` is a part of.
        fingerprint: hash of the paths and the sizes of all files, in bytes, and of the side of a crop. Not of what is in
            them: to read a large archive takes as long as to train on it. So change a file's name or size along with its
            content, or clear the run store.
    """

    name: str
    train: Crops
    held_out: Crops
    fingerprint: str

    @functools.cached_property
    def test(self) -> Tensor:
        """At most ``TEST_CROPS`` crops that never change, uint8, (N, 3, side, side): the middle of each image, then others.

        Raises:
            DataError: too many broken files, or no good one.
        """
        crops = self.held_out
        nth = np.arange(len(crops)) - np.searchsorted(crops.owners, crops.owners)  # crop of its file
        chosen = np.sort(np.argsort(nth, kind="stable")[:TEST_CROPS])
        result, broken = [], {}
        for owner, group in itertools.groupby(chosen, key=crops.owners.__getitem__):
            path = crops.files[owner]
            places = [(0.5, 0.5) if nth[crop] == 0 else np.random.default_rng((0, crop)).random(2) for crop in group]
            try:
                result += cut(crops.root / path, places, crops.side)
            except Unreadable as error:
                broken[path] = error.reason
        crops.broken.add(broken)
        crops.broken.warn()
        if not result:
            raise DataError(f"none of the {len(crops.files)} held-out files in {crops.root} can be decoded: {crops.broken}")
        return torch.stack(result)

    @property
    def train_labels(self) -> Tensor:
        """One class for all: zeros, int64, (N,)."""
        return torch.zeros(len(self.train), dtype=torch.int64)

    @property
    def test_labels(self) -> Tensor:
        """One class for all: zeros, int64, (N,)."""
        return torch.zeros(len(self.test), dtype=torch.int64)

    @property
    def title(self) -> str:
        """How captions call the data set."""
        return f"{self.train.side}×{self.train.side} crops of the images in {self.train.root.name}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one crop."""
        return self.train.shape[1:]

    def batches(
        self, draw: torch.Generator, batch_size: int, share: Callable[[Tensor], Tensor], device: torch.device
    ) -> Iterator[Tensor]:
        """See ``data.ImageSet.batches``. Every epoch cuts elsewhere; ``$VAENB_WORKERS`` processes decode, see ``workers``.

        Raises:
            DataError: too many broken files.
        """
        seed = int(torch.randint(2**62, (), generator=draw))
        parts = (share(batch).tolist() for batch in self.train.order(draw).split(batch_size))
        loader = DataLoader(
            _Epoch(self.train, seed),
            batch_size=None,  # a part is one item
            sampler=parts,
            num_workers=workers(),
            generator=torch.Generator(),  # else the loader would draw from the caller's random numbers
        )
        try:
            for crops, broken in loader:
                self.train.broken.add(broken)
                yield crops.to(device)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that decodes images was killed ({error}): is there enough memory?") from error
        self.train.broken.warn()


@dataclass(frozen=True, eq=False)
class _Epoch(Dataset):
    crops: Crops
    seed: int

    def __getitem__(self, part: list[int]) -> tuple[Tensor, dict[str, str]]:
        return self.crops.cut(part, self.seed)


def workers() -> int:
    """Processes that decode for one that trains: ``$VAENB_WORKERS``, else its part of the cores, but 1 to 4.

    The crops are the same for any number, also for 0, with which the process that trains decodes as well.

    Raises:
        DataError: the variable is no such number.
    """
    here = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    given = os.environ.get("VAENB_WORKERS") or str(min(max(here - 1, 1), 4))
    if not given.isdecimal():
        raise DataError(f"VAENB_WORKERS={given}: expected a number of processes, at least 0")
    return int(given)


def load(name: str) -> FolderSet:
    """The set of this name, ``folder:PATH`` or ``folder-SIDE:PATH``. Reads the headers of all files and decodes none.

    Raises:
        DataError: no such name or folder; no image in it; only images smaller than a crop; more than a share ``BROKEN`` of
            them broken; fewer than two images.
    """
    if not (match := NAME.fullmatch(name)):
        raise DataError(f"unknown data set {name!r}: expected folder:PATH, or folder-96:PATH for crops of 96×96 pixels")
    root, side = Path(match["path"]).expanduser(), int(match["side"] or SIDE)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one with images, in it or below it (seen from {Path.cwd()})")
    found = _find(root)
    if not found:
        raise DataError(f"no image in {root} or below it: looked for files ending in {' '.join(sorted(EXTENSIONS))}")
    broken, sizes = Broken(root, len(found)), {}
    reasons = {}
    for path in found:
        try:
            with opened(root / path) as image:
                sizes[path] = image.size
        except Unreadable as error:
            reasons[path] = error.reason
    broken.add(reasons)
    broken.warn()
    large = {path: size for path, size in sizes.items() if min(size) >= side}
    if not large:
        width, height = max(sizes.values(), key=min)
        raise DataError(
            f"none of the {len(sizes)} images in {root} has room for a crop of {side}×{side} pixels, the largest has "
            f"{height}×{width}: ask for smaller crops, such as folder-{min(width, height)}:{match['path']}"
        )
    if len(large) < len(sizes):
        warnings.warn(
            f"skipping {len(sizes) - len(large)} of {len(sizes)} images in {root}, smaller than crops of {side}×{side}",
            stacklevel=2,
        )
    if len(large) < 2:
        raise DataError(f"{root} has one image of at least {side}×{side} pixels: expected two or more, to train and to test")
    hashes = {path: hashlib.sha256(os.fsencode(path)).digest() for path in large}
    files = sorted(large, key=hashes.__getitem__)
    held_out = sum(int.from_bytes(hashes[path]) * HELD_OUT < 1 << 256 for path in files)
    held_out = min(max(held_out, 1), len(files) - 1)  # of a few files chance may hold out none or all
    train, test = (
        Crops(root, tuple(part), _owners([large[path] for path in part], side), side, broken)
        for part in (files[held_out:], files[:held_out])
    )
    digest = hashlib.sha256(f"{side}".encode())
    for path, size in found.items():
        digest.update(b"\0" + os.fsencode(path) + f"\0{size}".encode())
    return FolderSet(name, train, test, digest.hexdigest()[:16])


def slug(name: str) -> str:
    """The name of a set as a part of file names, such as ``folder-holiday-photos`` for ``folder:/data/Holiday photos``."""
    side, path = NAME.fullmatch(name).group("side", "path")
    last = re.sub(r"[^a-z0-9]+", "-", Path(path).expanduser().resolve().name.lower())[:40].strip("-")
    return "-".join(["folder", *([side] if side else []), last or "images"])


def cut(path: Path, places: Sequence[Sequence[float]], side: int) -> list[Tensor]:
    """Square crops of an image file, uint8, (3, side, side) each; decodes it once.

    Args:
        path: the file.
        places: (vertical, horizontal) place of each crop: 0 is the upper or left edge of the image, 1 the other one.
        side: height and width of a crop in pixels.

    Raises:
        Unreadable: the file cannot be decoded, or is smaller than a crop.
    """
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        room = [length - side + 1 for length in (image.height, image.width)]  # places for a crop along each axis
        if min(room) < 1:
            raise Unreadable(path, f"{image.height}×{image.width} pixels, smaller than a crop")
        result = []
        for place in places:
            top, left = (min(int(share * count), count - 1) for share, count in zip(place, room, strict=True))
            box = (left, top, left + side, top + side)
            result.append(torch.from_numpy(rgb(image.crop(box)).transpose(2, 0, 1).copy()))
        return result


def _find(root: Path) -> dict[str, int]:
    """Image files in a folder and those below it, in the order of their paths from there, with their sizes in bytes.

    What is hidden (its name starts with a dot) is left alone, and links to folders are not followed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}")

    found = {}
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path.stat().st_size if path.exists() else -1
    return dict(sorted(found.items()))


def _owners(sizes: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """Of each crop the index of its file: as many crops as fit into the image side by side in area, 1 to ``CAP``."""
    counts = [min(width * height // side**2, CAP) for width, height in sizes]
    return np.repeat(np.arange(len(sizes)), counts)
