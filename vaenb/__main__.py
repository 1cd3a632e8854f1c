"""The command line: ``python -m vaenb train|reconstruct|sample|info``. The notebooks call the same functions."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch

from vaenb import bundle, canvas, data, ladder, pictures, processes
from vaenb.config import Config
from vaenb.models import ImageSizeError
from vaenb.photographs import PRESETS
from vaenb.train import TrainingDiverged, fit

STRIDE = 4  # pixels per position of the map
MOST_LATENTS = 20_000_000  # numbers that a prior learns from: they are held in memory
FEWEST_LATENTS = 200  # maps: several draws of each image, where there are only a few
EXPECTED = (ValueError, data.DataError, TrainingDiverged, OSError, processes.ProcessLost, processes.ProcessesDiffer)
ABOUT = """\
Fully convolutional VAEs of photographs of any size: train one on 64×64 tiles, then send images of any size through it, or
draw new ones of any size from its learned prior.

  python -m vaenb train eurosat --out land            a VAE and its prior, into the folder land/
  python -m vaenb reconstruct land scene.jpg --out r   r/scene.png: the scene through encoder and decoder
  python -m vaenb sample land --size 1024x2048 --out new.png
  python -m vaenb info land

Your own pictures: folder:PATH instead of eurosat takes 64×64 crops of all images in a folder, folder-96:PATH of 96×96.
Several GPUs or machines: torchrun --nproc-per-node=4 -m vaenb train … (see the README).
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last complete epoch of training", file=sys.stderr)
        return 130
    except EXPECTED as error:  # the message says what to do
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(options: argparse.Namespace) -> None:
    """Train a VAE and fit its prior; both are kept in the run store, and copied to a folder."""
    images = data.load(options.data)
    if images.image_shape[0] != 3:
        raise ValueError(f"{options.data} is grey: choose one of {', '.join(data.PHOTOGRAPHS)}, folder:PATH")
    if images.image_shape[1] <= STRIDE:
        raise ValueError(
            f"{options.data}: pictures of {images.image_shape[1]} pixels leave a map of one position, which has no grain"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    _check_writable(options.out)  # before minutes of training
    first = processes.rank() == 0  # the others only train along
    if first:
        print(f"{images.title}: {len(images.train):,} training images")
    settings = {**PRESETS[options.preset], **({"epochs": options.epochs} if options.epochs else {})}
    run = fit(Config(options.data, latent_size=math.ceil(images.image_shape[1] / STRIDE), seed=options.seed, **settings))
    if first:
        affordable = MOST_LATENTS // math.prod(run.model.latent_shape)
        repaired = ladder.repair(run, "stationary flow", count=max(FEWEST_LATENTS, min(len(images.train), affordable)))
        bundle.save(repaired, options.out)
        print(f"{options.out}: a VAE and its prior, ready for reconstruct and sample")


def reconstruct(options: argparse.Namespace) -> None:
    """Send images through encoder and decoder; those that cannot be read are named and left out."""
    model = bundle.load(options.model).model
    jobs = [(path, options.out / f"{path.stem}.png") for path in pictures.files(options.images)]
    made = [out.resolve() for _, out in jobs]
    if len(set(made)) < len(made) or {path.resolve() for path, _ in jobs} & set(made):
        raise ValueError("two pictures would have one name, or one would replace its original: choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    _check_writable(options.out)
    failed = 0
    for path, out in jobs:
        try:
            image = torch.from_numpy(pictures.read(path).copy()).permute(2, 0, 1)
            pictures.write_png(out, canvas.reconstruct(model, image, options.tile), image.shape[1:], 3)
            print(out)
        except (pictures.PictureError, ImageSizeError) as error:
            failed += 1
            print(f"left out {path}: {error}", file=sys.stderr)
    if failed:
        raise ValueError(
            f"{failed} of {len(jobs)} pictures were left out, for the reasons above; the others are in {options.out}"
        )


def sample(options: argparse.Namespace) -> None:
    """Draw new images."""
    loaded = bundle.load(options.model)
    size = options.size or loaded.model.image_shape[1:]
    grid = loaded.model.grid(size)
    if options.out.suffix.lower() != ".png" or options.out.is_dir():
        raise ValueError(f"--out {options.out}: expected the name of a picture that ends in .png")
    _check_writable(options.out.parent)
    for index in range(options.count):
        z = loaded.prior.sample(1, grid, seed=options.seed + index)[0]
        out = options.out if options.count == 1 else options.out.with_stem(f"{options.out.stem}-{index}")
        pictures.write_png(out, canvas.render(loaded.model, z, size, options.tile), size, 3)
        print(out)


def info(options: argparse.Namespace) -> None:
    """Say what a folder holds, or what a data set has."""
    if options.what not in data.PHOTOGRAPHS and Path(options.what).is_dir():
        loaded = bundle.load(Path(options.what))
        halos, parameters = canvas.halos(loaded.model), sum(p.numel() for p in loaded.model.parameters())
        print(f"trained on {loaded.about['data']}\n{loaded.about['config']}")
        print(f"{parameters:,} parameters; prior: {loaded.about['rung']}, {loaded.prior.parameter_count():,} parameters")
        print(
            f"a latent position for every {loaded.model.stride}×{loaded.model.stride} pixels; tiles overlap by {halos[0]} "
            f"of them to encode and by {halos[1]} to decode"
        )
    else:
        images = data.load(options.what)
        print(
            f"{images.title}: {len(images.train):,} training and {len(images.test):,} test images of {images.image_shape}, "
            f"fingerprint {images.fingerprint}"
        )


def _check_writable(folder: Path) -> None:
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise PermissionError(f"cannot write to the folder {folder}: it is not there, or belongs to somebody else")


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH in pixels, such as 512x1024") from None
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least one pixel each way")
    return height, width


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2³² − 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m vaenb", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help=train.__doc__, description=train.__doc__)
    command.add_argument("data", metavar="DATA", help=f"{', '.join(data.PHOTOGRAPHS)}, or folder:PATH")
    command.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    command.add_argument("--preset", choices=PRESETS, default="small", help="small: minutes on two cores; large: for a GPU")
    command.add_argument("--epochs", type=_count, help="instead of the preset's")
    command.add_argument("--seed", type=_seed, default=0)
    command.set_defaults(run=train)

    tile = {"type": _count, "default": canvas.TILE, "help": "side of a tile in latent positions: memory against speed"}
    command = commands.add_parser("reconstruct", help=reconstruct.__doc__, description=reconstruct.__doc__)
    command.add_argument("model", type=Path, metavar="MODEL", help="folder that train wrote")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="files, or folders of files, of any size")
    command.add_argument("--out", type=Path, required=True, help="folder for the pictures, PNG")
    command.add_argument("--tile", **tile)
    command.set_defaults(run=reconstruct)

    command = commands.add_parser("sample", help=sample.__doc__, description=sample.__doc__)
    command.add_argument("model", type=Path, metavar="MODEL", help="folder that train wrote")
    command.add_argument(
        "--size", type=_size, metavar="HxW", help="in pixels (default: that of the images it was trained on)"
    )
    command.add_argument("--count", type=_count, default=1, help="how many; more than one are numbered")
    command.add_argument("--seed", type=_seed, default=0, help="from 0 to 2³² − 1; further pictures take the next ones")
    command.add_argument("--out", type=Path, required=True, help="the picture, ending in .png")
    command.add_argument("--tile", **tile)
    command.set_defaults(run=sample)

    command = commands.add_parser("info", help=info.__doc__, description=info.__doc__)
    command.add_argument("what", metavar="MODEL|DATA", help="a folder that train wrote, or a data set")
    command.set_defaults(run=info)
    return parser


if __name__ == "__main__":
    sys.exit(main())
