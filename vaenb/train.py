"""Training: one loop for every model of the paper, on Lightning Fabric, resumable at any moment.

A run is a pure function of its configuration and the data: every epoch draws its random numbers from a generator
seeded by (seed, epoch), so that an epoch can be taken up again from the checkpoint before it, bit for bit.
"""

import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from torch import Tensor

from vaenb import data, models, runs
from vaenb.progress import Progress

REDUCTIONS = ("sum", "mean")
WARM_UP = 0.05  # share of all steps
BETAS = (0.9, 0.99)  # of Adam; a shorter memory of the squared gradient suits a few thousand steps
HISTORY = ("epoch", "rate", "distortion", "test_rate", "test_distortion")
EXPLODED = 1e3  # times the loss of the first step


class ConfigError(ValueError):
    """A configuration that no run can have."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN, infinite, or a thousand times what it was at the first step."""


@dataclass(frozen=True)
class Config:
    """Everything that a training run depends on, besides data and code.

    Attributes:
        dataset: see ``vaenb.data``.
        arm: ``spatial``, ``dense`` or ``mixed``, see ``vaenb.models``.
        latent_size: side of the latent map in positions: 7, 14 or 28 for 28×28 images. Sets the stride of the trunks.
        latent_channels: channels of the map.
        latents: length of the latent vector of ``dense``; None: as many as the map has.
        distortion_reduction, rate_reduction: how the loss adds up pixels and latents. ``sum`` and ``sum`` is −ELBO in
            nats; the other three are the mistakes that experiment E3 examines.
        epochs, batch_size, learning_rate: of Adam, with a short linear warm-up and linear decay to zero.
        seed: of initialisation, order of the data, binarisation and latent noise.

    Raises:
        ConfigError: a value that no run can have.
    """

    dataset: str = "digits"
    arm: str = "spatial"
    latent_size: int = 7
    latent_channels: int = 1
    latents: int | None = None
    distortion_reduction: str = "sum"
    rate_reduction: str = "sum"
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 8e-3
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"arm": models.ARMS, "distortion_reduction": REDUCTIONS, "rate_reduction": REDUCTIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("latent_size", "latent_channels", "epochs", "batch_size", "latents"):
            value = getattr(self, name)
            if (value is not None or name != "latents") and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate!r}: expected a positive number")
        if self.latents is not None and self.arm != "dense":
            raise ConfigError(f"latents={self.latents} is for the dense arm; {self.arm} has latent_channels per position")

    @property
    def label(self) -> str:
        """A short name for progress lines and folders, such as ``mnist-spatial-7x7x1-s0``."""
        latent = self.latents or f"{self.latent_size}x{self.latent_size}x{self.latent_channels}"
        loss = f"{self.distortion_reduction}-{self.rate_reduction}-"
        return f"{self.dataset}-{self.arm}-{latent}-{'' if loss == 'sum-sum-' else loss}s{self.seed}"

    def stride(self, image_size: Sequence[int]) -> int:
        """Pixels per position of the map for images of this (height, width).

        Raises:
            ConfigError: no stride of ``models.STRIDES`` gives a map of ``latent_size``.
        """
        sizes = {math.ceil(min(image_size) / stride): stride for stride in models.STRIDES}
        if self.latent_size not in sizes:
            raise ConfigError(
                f"latent_size={self.latent_size}: {image_size[0]}×{image_size[1]} images have maps of side "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
        return sizes[self.latent_size]

    def build(self, image_shape: tuple[int, int, int]) -> models.VAE:
        """A newly initialised model for images of (C, H, W); the same one every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            stride = self.stride(image_shape[1:])
            model = models.VAE(self.arm, image_shape, stride, self.latent_channels, self.latents)
            return model.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and GPUs alike


@dataclass(frozen=True)
class Run:
    """A finished training run in the store."""

    config: Config
    folder: Path

    @functools.cached_property
    def model(self) -> models.VAE:
        """The trained model, in evaluation mode, on the CPU."""
        model = self.config.build(self.images.image_shape)
        model.load_state_dict(safetensors.torch.load_file(self.folder / "model.safetensors"))
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def images(self) -> data.ImageSet:
        """The data that the run was trained on."""
        return data.load(self.config.dataset)

    @functools.cached_property
    def history(self) -> dict[str, list[float]]:
        """One list per column of ``HISTORY``; nats per image, train values averaged over the epoch."""
        with (self.folder / "history.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {column: [float(row[column]) for row in rows] for column in HISTORY}

    def measure(self, function: Callable[..., dict[str, Any]], wait: bool = True, **arguments: Any) -> dict[str, Any]:
        """``function(model, images, **arguments)``, computed once and kept in the store.

        Args:
            function: of a module that takes models and tensors, such as ``quality.bounds``; returns a JSON-able dict.
                Measured anew when its module, an argument or the run changes.
            wait: for another process that measures the same, rather than raise ``runs.Busy``.
            arguments: passed on; JSON-able.
        """

        def compute(_: Path) -> dict[str, Any]:
            with Progress(f"{self.config.label}: {function.__name__}", 1) as progress, _one_thread():
                result = function(self.model, self.images, **arguments)
                progress.milestone("measured")
            return result

        spec = {"run": self.folder.name, "function": function.__qualname__, "arguments": arguments}
        label = f"{self.config.label}-{function.__name__}"
        return runs.read(runs.entry(label, spec, [inspect.getmodule(function)], compute, wait))["summary"]


def fit(config: Config, fabric: Fabric | None = None, wait: bool = True) -> Run:
    """The trained run of this configuration: from the store if it is there, else trained now and stored.

    Args:
        config: what to train.
        fabric: where to train; by default a GPU if there is one, else one CPU thread (two runs side by side on two cores
            beat one run on both, and the thread count is part of what makes a run repeat bit for bit).
        wait: for another process that trains the same run, rather than raise ``runs.Busy``.

    Raises:
        TrainingDiverged: NaN or exploding loss; the last good checkpoint stays.
        ConfigError: a map size that images of this data set do not have.
        data.DataError: unknown, missing or damaged data.
        runs.DiskFull: no space; the last complete checkpoint stays.
    """
    images = data.load(config.dataset)
    config.stride(images.image_shape[1:])  # a wrong map size must fail before anything is written
    spec = {"config": dataclasses.asdict(config), "data": images.fingerprint}
    code = [data, models, sys.modules[__name__]]
    return Run(config, runs.entry(config.label, spec, code, lambda folder: _train(config, images, folder, fabric), wait))


def fit_all(configs: Sequence[Config], measures: Sequence[Callable[..., dict[str, Any]]] = ()) -> list[Run]:
    """``fit`` for each configuration; what another process is busy with is left to it and collected at the end.

    So notebooks that run side by side and want the same runs share the work, with no more between them than the store.

    Args:
        configs: what to train.
        measures: functions for ``Run.measure``, so that the results are in the store when the caller asks for them.
    """
    finished: dict[Config, Run] = {}
    queue, passed_over = deque(configs), 0
    with Progress("training runs", len(configs)) as progress:
        while queue:
            config = queue.popleft()
            wait = passed_over > len(queue)  # others are busy with everything that is left
            try:
                run = fit(config, wait=wait)
                for function in measures:
                    run.measure(function, wait=wait)
            except runs.Busy:
                queue.append(config)
                passed_over += 1
                continue
            finished[config] = Run(config, run.folder)  # without the model, which measuring loaded
            passed_over = 0
            progress.step()
    return [finished[config] for config in configs]


def schedule(progress: float) -> float:
    """Learning-rate factor after a share ``progress`` of all steps: linearly up, then linearly down to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def loss_of(config: Config, rate: Tensor, distortion: Tensor, latents: int, pixels: int) -> Tensor:
    """The loss of a batch. Sum and sum: −ELBO in nats per image; a mean divides its term by its number of entries."""
    rate = rate.mean() / (latents if config.rate_reduction == "mean" else 1)
    return distortion.mean() / (pixels if config.distortion_reduction == "mean" else 1) + rate


def effective_beta(config: Config, latents: int, pixels: int) -> float:
    """The β of the β-VAE (Higgins et al. 2017) whose loss is proportional to ``loss_of``."""
    return (pixels if config.distortion_reduction == "mean" else 1) / (latents if config.rate_reduction == "mean" else 1)


def _train(config: Config, images: data.ImageSet, folder: Path, fabric: Fabric | None) -> dict[str, Any]:
    """Fill ``folder`` with model.safetensors and history.csv, going on from a checkpoint that is there."""
    started = time.perf_counter()
    fabric = fabric or Fabric(accelerator="auto", devices=1)
    model = config.build(images.image_shape)
    latents, pixels = math.prod(model.latent_shape), math.prod(images.image_shape)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=BETAS, fused=True)
    wrapped, optimiser = fabric.setup(model, adam)
    train = images.train.to(fabric.device)
    steps = math.ceil(len(train) / config.batch_size)
    history = _restore(folder, model, optimiser)
    first_loss = None
    with Progress(config.label, config.epochs * steps, len(history) * steps) as progress, _one_thread():
        for epoch in range(len(history), config.epochs):
            draw = torch.Generator(fabric.device).manual_seed(1_000_003 * config.seed + epoch)
            sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)
            order = torch.randperm(len(train), generator=draw, device=fabric.device)
            for step, batch in enumerate(order.split(config.batch_size)):
                uniform = torch.rand(len(batch), *images.image_shape, generator=draw, device=fabric.device)
                noise = torch.randn(len(batch), *model.latent_shape, generator=draw, device=fabric.device)
                for group in optimiser.param_groups:
                    group["lr"] = config.learning_rate * schedule((epoch * steps + step) / (config.epochs * steps))
                rate, distortion = wrapped(data.binarise(train[batch], uniform), noise)
                loss = loss_of(config, rate, distortion, latents, pixels)
                value = loss.item()
                first_loss = value if first_loss is None else first_loss
                if not value < EXPLODED * max(first_loss, 1.0):  # also true of NaN
                    kept = f"the checkpoint after epoch {epoch} is kept in {folder}" if epoch else "no epoch was completed"
                    raise TrainingDiverged(
                        f"loss {value:g} at step {step + 1} of epoch {epoch + 1} (it began at {first_loss:g}): lower "
                        f"learning_rate; {kept}. {config}"
                    )
                optimiser.zero_grad()
                fabric.backward(loss)
                optimiser.step()
                sums += torch.stack([rate.detach().sum(), distortion.detach().sum()])
                progress.step()
            test = [terms.double().mean().item() for terms in models.evaluate(model, images.test)]
            history.append([epoch + 1, *(sums / len(train)).tolist(), *test])
            _checkpoint(folder, model, optimiser, history)
            progress.milestone(f"epoch {epoch + 1}/{config.epochs}, test −ELBO {sum(test):.2f} nats")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([HISTORY, *history])
    runs.write_atomically(folder / "history.csv", table.getvalue())
    runs.write_atomically(folder / "model.safetensors", safetensors.torch.save(_contiguous(model.state_dict())))
    for path in folder.glob("checkpoint-*"):
        path.unlink()
    return {"seconds": time.perf_counter() - started, "parameters": sum(p.numel() for p in model.parameters())}


def _checkpoint(folder: Path, model: models.VAE, optimiser: torch.optim.Optimizer, history: list[list[float]]) -> None:
    """Keep what the next epoch needs in one file whose name carries its own checksum; drop the one before."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{index}.{name}": tensor for name, tensor in moments.items()}
    state["history"] = torch.tensor(history, dtype=torch.float64)
    content = safetensors.torch.save(_contiguous(state))
    older = list(folder.glob("checkpoint-*"))
    digest = hashlib.sha256(content).hexdigest()[:16]
    runs.write_atomically(folder / f"checkpoint-{len(history):05d}-{digest}.safetensors", content)
    for path in older:
        path.unlink()


def _restore(folder: Path, model: models.VAE, optimiser: torch.optim.Optimizer) -> list[list[float]]:
    """Load the newest intact checkpoint into model and optimiser; its history, [] if there is none."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        content = path.read_bytes()
        try:
            if hashlib.sha256(content).hexdigest()[:16] != path.stem.rsplit("-", 1)[-1]:
                raise ValueError("does not match its checksum")
            state = safetensors.torch.load(content)
        except (ValueError, SafetensorError) as error:
            warnings.warn(f"ignoring the damaged checkpoint {path}: {error}", stacklevel=2)
            path.unlink()
            continue
        history = state.pop("history").tolist()
        model.load_state_dict({name[6:]: tensor for name, tensor in state.items() if name.startswith("model.")})
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(model.parameters())
        for name, tensor in state.items():
            if name.startswith("optimiser."):
                _, index, moment = name.split(".")
                like = parameters[int(index)]
                if tensor.shape == like.shape:  # the fused optimiser needs the parameter's memory layout
                    tensor = torch.empty_like(like).copy_(tensor)
                moments.setdefault(int(index), {})[moment] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        return history
    return []


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread: see ``fit``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
