"""A trained VAE and its prior in one folder that can be copied anywhere: what the command line works with.

bundle.json         what is needed to build them, and checksums
model.safetensors   weights of the VAE
prior.safetensors   of the prior
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vaenb import ladder, runs
from vaenb.checkpoints import contiguous
from vaenb.config import Config
from vaenb.models import VAE
from vaenb.priors import Prior

DESCRIPTION, MODEL, PRIOR = "bundle.json", "model.safetensors", "prior.safetensors"


class BundleError(ValueError):
    """A folder is no bundle, or not all of what it was."""


@dataclass(frozen=True)
class Bundle:
    """A trained VAE, its prior, and where they come from: ``config``, ``image_shape``, ``rung``, ``count``, ``data``."""

    model: VAE
    prior: Prior
    about: dict[str, Any]


def save(repaired: ladder.Repaired, folder: Path) -> None:
    """Write a bundle; the description last, so that a folder with one is complete.

    Raises:
        runs.DiskFull: no space left.
        OSError: the folder cannot be written to.
    """
    run = repaired.run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    sums = {}
    for name, module in ((MODEL, run.model), (PRIOR, repaired.prior)):
        content = safetensors.torch.save(contiguous(module.state_dict()))
        runs.write_atomically(folder / name, content)
        sums[name] = hashlib.sha256(content).hexdigest()
    about = {
        "config": dataclasses.asdict(run.config),
        "image_shape": run.images.image_shape,
        "rung": repaired.rung,
        "count": repaired.count,
        "data": f"{run.images.title}, fingerprint {run.images.fingerprint}",
        "torch": torch.__version__,
        "sha256": sums,
    }
    runs.write_atomically(folder / DESCRIPTION, json.dumps(about, ensure_ascii=False, indent=1) + "\n")


def load(folder: Path) -> Bundle:
    """Read a bundle; weights are never unpickled.

    Raises:
        BundleError: not a bundle, made by another version, incomplete, or damaged; the message says which.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{folder} is no trained model: it has no {DESCRIPTION}. Make one with python -m vaenb train")
    try:
        about = json.loads(path.read_text())
        config = Config(**about["config"])
        model = config.build(tuple(about["image_shape"]))
        prior = ladder.build(about["rung"], model, about["count"])
        for name, module in ((MODEL, model), (PRIOR, prior)):
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != about["sha256"][name]:
                raise BundleError(f"{folder / name} is damaged: its checksum is not the one in {DESCRIPTION}")
            module.load_state_dict(safetensors.torch.load(content))
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise BundleError(f"{folder} does not fit this version of vaenb, or is incomplete: {error}") from error
    return Bundle(model.eval().requires_grad_(False), prior.requires_grad_(False), about)
