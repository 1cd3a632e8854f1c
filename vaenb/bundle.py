"""A trained VAE and its prior in one folder that can be copied anywhere: what the command line works with.

bundle.json             what is needed to build them, and the checksums of their weights
model-….safetensors     weights of the VAE, named after their checksum
prior-….safetensors     of the prior
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from vaenb import ladder, runs
from vaenb.checkpoints import contiguous
from vaenb.config import Config
from vaenb.models import VAE
from vaenb.priors import Prior

DESCRIPTION = "bundle.json"
WEIGHTS = re.compile(r"(model|prior)-[0-9a-f]{16}\.safetensors")
# In the first, which named none, the phases of ``models.SubpixelUp`` came after the channels; in the second, positions of
# the vectors of ``models.ToVector`` did; in the third, ``gaussians.Mixture`` whitened by the transpose, and
# ``models.Residual`` had 1×1 convolutions for its linear layers.
FORMAT = 4


class BundleError(ValueError):
    """A folder is no bundle, or not all of what it was."""


@dataclass(frozen=True)
class Bundle:
    """A trained VAE, its prior, and where they come from: ``config``, ``image_shape``, ``rung``, ``count``, ``data``."""

    model: VAE
    prior: Prior
    about: dict[str, Any]


def save(repaired: ladder.Repaired, folder: Path) -> None:
    """Write a bundle. The description comes last: until then what the folder held before is whole.

    Raises:
        runs.DiskFull: no space left.
        OSError: the folder cannot be written to.
    """
    run = repaired.run
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for name, module in (("model", run.model), ("prior", repaired.prior)):
        content = safetensors.torch.save(contiguous(module.state_dict()))
        sums[name] = hashlib.sha256(content).hexdigest()
        runs.write_atomically(_weights(folder, name, sums[name]), content)
    about = {
        "format": FORMAT,
        "config": dataclasses.asdict(run.config),
        "image_shape": run.images.image_shape,
        "rung": repaired.rung,
        "count": repaired.count,
        "data": f"{run.images.title}, fingerprint {run.images.fingerprint}",
        "torch": torch.__version__,
        "sha256": sums,
    }
    runs.write_atomically(folder / DESCRIPTION, json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    kept = {_weights(folder, name, digest) for name, digest in sums.items()}
    for other in set(folder.glob("*.safetensors")) - kept:
        if WEIGHTS.fullmatch(other.name):  # weights of others, such as model-00001-of-00002, are none of ours
            other.unlink()


def load(folder: Path) -> Bundle:
    """Read a bundle; weights are never unpickled.

    Raises:
        BundleError: not a bundle, made by another version, incomplete, or damaged; the message says which.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{folder} is no trained model: it has no {DESCRIPTION}. Make one with python -m vaenb train")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if (found := about.get("format", 1)) != FORMAT:
            raise BundleError(f"{path} has format {found!r}, this version of vaenb reads {FORMAT}: train the model again")
        config = Config(**about["config"])
        shape = about["image_shape"]
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)):
            raise BundleError(f"{path}: image_shape is {shape!r}, expected three whole numbers: channels, height, width")
        model = config.build(tuple(shape))
        prior = ladder.build(about["rung"], model, about["count"])
        for name, module in (("model", model), ("prior", prior)):
            path = _weights(folder, name, about["sha256"][name])
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != about["sha256"][name]:
                raise BundleError(f"{path} is damaged: its checksum is not the one in {DESCRIPTION}")
            module.load_state_dict(safetensors.torch.load(content))
    except BundleError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise BundleError(f"{folder} does not fit this version of vaenb, or is incomplete: {error}") from error
    return Bundle(model.eval().requires_grad_(False), prior.requires_grad_(False), about)


def _weights(folder: Path, name: str, digest: str) -> Path:
    return folder / f"{name}-{digest[:16]}.safetensors"  # as in WEIGHTS
