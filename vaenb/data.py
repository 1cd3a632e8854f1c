"""Image data sets, verified by checksum and held as one uint8 tensor per split.

``mnist`` and ``fashion`` come through torchvision; their files are looked for in ``$VAENB_DATA``, ``../shared/data`` and
``build/data``, and downloaded if they are in none of them. ``digits`` (the handwritten digits that scikit-learn carries)
needs no network, nor do the ``texture-*`` sets, which are drawn here. ``eurosat`` and ``photos`` are of ``photographs``,
``folder:PATH`` of ``folders``. The folder ``$VAENB_DATA`` is only read: verified files are copied to ``build/data``.
"""

import functools
import hashlib
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import fft, special
from torch import Tensor

from vaenb import folders, photographs
from vaenb.folders import DataError, FolderSet
from vaenb.runs import ROOT, build_folder, write_atomically

TITLES = {
    "mnist": "MNIST",
    "fashion": "Fashion-MNIST",
    "digits": "scikit-learn digits (8×8 scans enlarged to 28×28), the embedded stand-in for MNIST",
}
TEXTURE_LENGTHS = (1, 2, 4, 8)  # pixels
TEXTURES = {f"texture-{length}": f"stationary texture, correlation length {length} px" for length in TEXTURE_LENGTHS}
PHOTOGRAPHS = {
    "eurosat": "EuroSAT",
    "photos": "crops of the two photographs that scikit-learn carries, the embedded stand-in for satellite images",
}
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


@dataclass(frozen=True)
class ImageSet:
    """A labelled image data set.

    Attributes:
        name: one of ``TITLES``, ``TEXTURES`` or ``PHOTOGRAPHS``.
        train, test: images, uint8, (N, C, H, W).
        train_labels, test_labels: classes, int64, (N,).
        fingerprint: hash of all pixels and labels; two sets with the same fingerprint are the same data.
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    fingerprint: str

    @property
    def title(self) -> str:
        """How captions call the data set."""
        count = len(self.train) + len(self.test)
        if self.name == "eurosat" and count < photographs.FULL:
            return f"a part of EuroSAT ({count:,} of its {photographs.FULL:,} tiles)"
        return (TITLES | TEXTURES | PHOTOGRAPHS)[self.name]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.shape[1:])

    def batches(
        self, draw: torch.Generator, batch_size: int, share: Callable[[Tensor], Tensor], device: torch.device
    ) -> Iterator[Tensor]:
        """One epoch of training images in a random order.

        Args:
            draw: where the order is from; it is drawn when the first batch is asked for.
            batch_size: of the last batch at most.
            share: the part of a batch that is wanted, such as ``processes.share``; takes and returns indices, (N,).
            device: where the images shall be.

        Yields:
            That part of each batch: uint8, (n, C, H, W).
        """
        train = self.train.to(device)
        for batch in torch.randperm(len(train), generator=draw).split(batch_size):
            yield train.index_select(0, share(batch).to(device))  # faster than train[…]


@functools.lru_cache(maxsize=8)  # the textures of a notebook take turns
def load(name: str) -> ImageSet | FolderSet:
    """Load a data set by name.

    Raises:
        DataError: unknown name; no copy found and none downloadable; a file that does not match its checksum; a folder
            without images that can be used, see ``folders.load``.
    """
    if name.startswith("folder"):
        return folders.load(name)
    known = TITLES | TEXTURES | PHOTOGRAPHS
    if name not in known:
        raise DataError(f"unknown data set {name!r}: choose one of {', '.join(known)}, folder:PATH")
    if name in PHOTOGRAPHS:
        tensors = _load_photographs(name)
    elif name in TEXTURES:
        tensors = _draw_textures(float(name.removeprefix("texture-")))
    else:
        tensors = _load_digits() if name == "digits" else _load_torchvision(name)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.numpy().tobytes())
    return ImageSet(name, *tensors, fingerprint=digest.hexdigest()[:16])


def slug(name: str) -> str:
    """The name of a data set as a part of file names."""
    return folders.slug(name) if folders.NAME.fullmatch(name) else name


def resolve(name: str) -> str:
    """The data set that ``auto`` means on this machine: MNIST if it is here or can be fetched, else the embedded digits.

    Any other name stands for itself and never falls back. The choice of ``digits`` is announced on standard error.

    Raises:
        DataError: unknown name; MNIST is here but damaged (a damaged file is never a reason to use other data).
    """
    if name != "auto":
        if name not in TITLES and not folders.NAME.fullmatch(name):
            raise DataError(f"unknown data set {name!r}: choose auto or one of {', '.join(TITLES)}, folder:PATH")
        return name
    try:
        _raw_folder("mnist")
    except _Unreachable as error:
        print(
            "=" * 100 + f"\nMNIST is not here and could not be fetched ({error}).\n"
            f"FALLING BACK to {TITLES['digits']}.\nEvery figure says so. To insist on MNIST: make figures DATASET=mnist\n"
            + "="
            * 100,
            file=sys.stderr,
            flush=True,
        )
        return "digits"
    return "mnist"


def bases() -> list[Path]:
    """Folders that data are looked for in, the first first."""
    return [*_given(), ROOT.parent / "shared" / "data", build_folder() / "data"]


def resolve_photographs(name: str = "auto") -> str:
    """What ``auto`` means here: EuroSAT if it is here, in part or whole, or can be fetched; else the embedded ones.

    Any other name stands for itself and never falls back. The choice of ``photos`` is announced on standard output.

    Raises:
        DataError: unknown name, or a damaged tile.
    """
    if name != "auto":
        if name not in PHOTOGRAPHS:
            raise DataError(f"unknown photographs {name!r}: choose auto or one of {', '.join(PHOTOGRAPHS)}")
        return name
    try:
        load("eurosat")
    except _Unreachable as error:
        print(f"No EuroSAT here ({error}).\nFALLING BACK to {PHOTOGRAPHS['photos']}. Every figure says so.")
        return "photos"
    return "eurosat"


def binarise(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Binary images: each pixel is one with probability grey value / 255 (Salakhutdinov & Murray 2008).

    Args:
        pixels: uint8, (N, C, H, W).
        uniform: uniform on [0, 1), the same shape.
    """
    return (pixels / 255).gt_(uniform)  # in place: zeros and ones, without a pass for Booleans


class _Unreachable(DataError):
    """No copy here, and none could be downloaded."""


def _load_digits() -> tuple[Tensor, ...]:
    """1,797 digits of 8×8 pixels (0..16), enlarged to 28×28; every ninth is a test image (200), the rest train (1,597)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bicubic", align_corners=False)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    test = torch.arange(len(images)) % 9 == 4
    return images[~test], images[test], labels[~test], labels[test]


def _draw_textures(length: float, count: int = 10_000, side: int = 28, contrast: float = 3.0) -> tuple[Tensor, ...]:
    """Stationary grey textures: a Gaussian random field through a sigmoid; 8,000 training and 2,000 test images.

    The field is white noise smoothed on a torus so large that a crop does not feel it wrap around; its correlation at
    distance r is exp(−r² / 2 length²). The law of a crop is the same wherever it is cut, as no handwritten digit's is.
    """
    torus = side + math.ceil(6 * length)
    rows, columns = fft.fftfreq(torus), fft.rfftfreq(torus)
    smooth = np.exp(-((np.pi * length) ** 2) * (rows[:, None] ** 2 + columns**2))  # the root of the spectrum
    deviation = np.exp(-2 * (np.pi * length * rows) ** 2).mean()  # of the smoothed noise
    generator = np.random.default_rng(0)
    crops = []
    for _ in range(count // 100):
        noise = generator.standard_normal((100, 1, torus, torus), dtype=np.float32)
        field = fft.irfft2(fft.rfft2(noise) * smooth, s=(torus, torus))[..., :side, :side] / deviation
        crops.append(torch.from_numpy((255 * special.expit(contrast * field)).round().astype(np.uint8)))
    images, labels = torch.cat(crops), torch.zeros(count, dtype=torch.int64)
    train = count * 4 // 5
    return images[:train], images[train:], labels[:train], labels[train:]


def _load_photographs(name: str) -> tuple[Tensor, ...]:
    if name == "photos":
        return photographs.load_photos()
    own = build_folder() / "data"
    folder = photographs.find_eurosat(bases())
    try:
        if folder is None:
            with _patience():
                folder = photographs.download_eurosat(own)
    except (OSError, RuntimeError) as error:
        raise _unreachable("eurosat", error) from error
    try:
        return photographs.load_eurosat(folder)
    except photographs.PictureError as error:
        raise DataError(f"{error}. Replace it by a good copy; nothing was trained on it") from error


def _torchvision_class(name: str) -> type:
    from torchvision import datasets

    return {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[name]


def _load_torchvision(name: str) -> tuple[Tensor, ...]:
    cls = _torchvision_class(name)
    raw = _raw_folder(name)
    # torchvision trusts unpacked files that it finds, so it is shown nothing but links to the verified archives.
    with tempfile.TemporaryDirectory(prefix="vaenb-") as scratch:
        view = Path(scratch, cls.__name__, "raw")
        view.mkdir(parents=True)
        for archive, _ in cls.resources:
            os.symlink((raw / archive).resolve(), view / archive)  # of an absolute path: $VAENB_DATA may be relative
        train, test = (cls(scratch, train=split, download=True) for split in (True, False))
    return train.data[:, None], test.data[:, None], train.targets, test.targets


def _raw_folder(name: str) -> Path:
    """The folder with verified archives of a torchvision data set; copied or downloaded there if need be.

    Raises:
        DataError: a file does not match its checksum.
    """
    cls = _torchvision_class(name)
    own = build_folder() / "data" / cls.__name__ / "raw"
    others = {md5 for other in ("mnist", "fashion") if other != name for _, md5 in _torchvision_class(other).resources}
    for base in bases():
        for folder in (base / cls.__name__ / "raw", base / cls.__name__, base):
            if all((folder / archive).is_file() for archive, _ in cls.resources):
                if folder == base and _md5((folder / cls.resources[0][0]).read_bytes()) in others:
                    continue  # the other set, whose files have the same names
                for archive, md5 in cls.resources:
                    content = _verified(folder / archive, md5)
                    if folder != own and not (own / archive).is_file():
                        write_atomically(own / archive, content)
                return folder
    for given in _given():
        print(f"{given} holds no complete {cls.__name__} (four .gz files): looked for it elsewhere", file=sys.stderr)
    _download(cls, own)
    return own


def _verified(path: Path, md5: str) -> bytes:
    content = path.read_bytes()
    if (actual := _md5(content)) != md5:
        raise DataError(
            f"{path} is damaged: its MD5 checksum is {actual}, expected {md5}. Delete the file or replace it by a good "
            "copy, then run the same command again; nothing was trained on it"
        )
    return content


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _download(cls: type, own: Path) -> None:
    """Download and verify with torchvision in a scratch folder, then move the archives to ``own``."""
    own.mkdir(parents=True, exist_ok=True)
    try:
        with _patience(), tempfile.TemporaryDirectory(prefix=".download-", dir=own.parents[1]) as scratch:
            cls(scratch, download=True)
            for archive, _ in cls.resources:
                os.replace(Path(scratch, cls.__name__, "raw", archive), own / archive)
    except (OSError, RuntimeError) as error:
        raise _unreachable(cls.__name__, error) from error


def _unreachable(name: str, error: Exception) -> _Unreachable:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    embedded = "photos or folder:PATH" if name == "eurosat" else "digits"
    return _Unreachable(
        f"{name} is in none of $VAENB_DATA, ../shared/data, build/data, and the download failed: {reason}. "
        f"Put its files in one of them, or take what needs no network: {embedded}"
    )


@contextmanager
def _patience() -> Iterator[None]:
    """Give up on a server that does not answer."""
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(default)


def _given() -> list[Path]:
    return [Path(os.environ["VAENB_DATA"])] if os.environ.get("VAENB_DATA") else []
