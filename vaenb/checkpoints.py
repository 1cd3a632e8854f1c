"""Checkpoints of a training run: everything that the next epoch needs, in one file, without pickle."""

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

from vaenb.runs import write_atomically

if TYPE_CHECKING:
    from lightning_fabric.plugins.precision import Precision


def save(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, precision: "Precision", history: list[list[float]]
) -> None:
    """Keep what the next epoch needs in one file whose name carries its own checksum; drop the one before."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{index}.{name}": tensor for name, tensor in moments.items()}
    for name, value in precision.state_dict().items():  # the scale of losses in 16 bits, none otherwise
        state[f"precision.{name}"] = torch.tensor(value, dtype=torch.float64)
    state["history"] = torch.tensor(history, dtype=torch.float64)
    content = safetensors.torch.save(contiguous(state))
    older = list(folder.glob("checkpoint-*"))
    digest = hashlib.sha256(content).hexdigest()[:16]
    write_atomically(folder / f"checkpoint-{len(history):05d}-{digest}.safetensors", content)
    for path in older:
        path.unlink()


def newest(folder: Path) -> bytes:
    """The content of the newest intact checkpoint, for ``restore``; nothing if there is none."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] == path.stem.rsplit("-", 1)[-1]:
            return content
        warnings.warn(f"ignoring the damaged checkpoint {path}: does not match its checksum", stacklevel=2)
        path.unlink()
    return b""


def restore(content: bytes, model: nn.Module, optimiser: torch.optim.Optimizer, precision: "Precision") -> list[list[float]]:
    """Load what ``newest`` returned into model, optimiser and precision; its history, [] if there is none."""
    if not content:
        return []
    state = safetensors.torch.load(content)
    history = state.pop("history").tolist()
    model.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for name, tensor in state.items():
        if name.startswith("optimiser."):
            _, index, moment = name.split(".")
            like = parameters[int(index)]
            if tensor.shape == like.shape:  # the fused optimiser needs the parameter's memory layout
                tensor = torch.empty_like(like).copy_(tensor)
            moments.setdefault(int(index), {})[moment] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    fresh = precision.state_dict()
    precision.load_state_dict({name: type(value)(state[f"precision.{name}"].item()) for name, value in fresh.items()})
    return history


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and in the plain memory layout, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
