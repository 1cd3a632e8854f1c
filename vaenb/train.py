"""Training: one loop for every model of the paper, on Lightning Fabric, resumable at any moment.

A run is a pure function of its configuration and the data: every epoch draws its random numbers from a generator
seeded by (seed, epoch), so that an epoch can be taken up again from the checkpoint before it, bit for bit.
"""

import csv
import dataclasses
import functools
import inspect
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vaenb import checkpoints, cpu, data, folders, gpu, models, muon, pictures, pixels, processes, runs, shared
from vaenb.config import Config, ConfigError, loss_of
from vaenb.progress import Progress

WARM_UP = 0.05  # share of all steps
HISTORY = ("epoch", "rate", "distortion", "test_rate", "test_distortion")
EXPLODED = 1e3  # times the loss of guessing every pixel by tossing a coin
MODULES = (cpu, gpu, data, pixels, models, muon, checkpoints)
VERSIONS = {name: version(name) for name in ("torch", "zuko", "scikit-learn")}  # that fits and measurements depend on
CODE = [*MODULES, *(sys.modules[name] for name in (Config.__module__, __name__))]  # what a run depends on


class TrainingDiverged(RuntimeError):
    """The loss became NaN, infinite, or a thousand times that of guessing every pixel by tossing a coin."""


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
    def images(self) -> data.ImageSet | data.FolderSet:
        """The data that the run was trained on."""
        return data.load(self.config.dataset)

    @functools.cached_property
    def history(self) -> dict[str, list[float]]:
        """One list per column of ``HISTORY``; nats per image, train values averaged over the epoch."""
        with (self.folder / "history.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {column: [float(row[column]) for row in rows] for column in HISTORY}

    @property
    def bound(self) -> dict[str, float]:
        """``negative_elbo`` and its parts ``rate`` and ``distortion``: test means after the last epoch, nats per image."""
        parts = {name: self.history[f"test_{name}"][-1] for name in ("rate", "distortion")}
        return {**parts, "negative_elbo": sum(parts.values())}

    def measure(self, function: Callable[..., dict[str, Any]], wait: bool = True, **arguments: Any) -> dict[str, Any]:
        """``function(model, images, **arguments)``, computed once and kept in the store.

        Args:
            function: of a module that takes models and tensors, such as ``likelihood.bounds``; returns a JSON-able dict.
                Measured anew when its module, one that it imports, an argument or the run changes.
            wait: for another process that measures the same, rather than raise ``runs.Busy``.
            arguments: passed on; JSON-able.
        """

        def compute(_: Path) -> dict[str, Any]:
            with Progress(f"{self.config.label}: {function.__name__}", 1) as progress, cpu.one_thread():
                result = function(self.model, self.images, **arguments)
                progress.step()
                progress.milestone("measured")
            return result

        spec = {"run": self.folder.name, "function": function.__qualname__, "arguments": arguments, **VERSIONS}
        label = f"{self.config.label}-{function.__name__}"
        return runs.read(runs.entry(label, spec, runs.with_imports(inspect.getmodule(function)), compute, wait))["summary"]


def fit(config: Config, wait: bool = True) -> Run:
    """The trained run of this configuration: from the store if it is there, else trained now and stored.

    It trains on a GPU if there is one, else on one CPU thread: two runs side by side on two cores beat one run on both,
    and the number of threads is part of what makes a run repeat bit for bit. In a script that ``torchrun`` or ``fabric run``
    started in several processes, on one machine or many, they train each run together, to the same curve up to rounding,
    which grows where training is rough. ``batch_size`` is that of all of them together.

    Args:
        config: what to train.
        wait: for another process that trains the same run, rather than raise ``runs.Busy``.

    Raises:
        TrainingDiverged: NaN or exploding loss; the last good checkpoint stays.
        ConfigError: a map size that images of this data set do not have; more processes than images in a batch.
        data.DataError: unknown, missing or damaged data.
        runs.DiskFull: no space; the last complete checkpoint stays.
        processes.ProcessLost: another process of the job stopped or hangs; the last complete checkpoint stays.
    """
    images = data.load(config.dataset)
    config.stride(images.image_shape[1:])  # a wrong map size must fail before anything is written
    if config.batch_size < processes.count():
        raise ConfigError(
            f"{processes.count()} processes share batches of {config.batch_size}: start at most {config.batch_size}, or "
            "raise batch_size"
        )
    spec = {"config": dataclasses.asdict(config), "data": images.fingerprint, "torch": torch.__version__}
    code = [*CODE, folders, pictures] if isinstance(images, data.FolderSet) else CODE
    return Run(config, processes.entry(config.label, spec, code, functools.partial(_train, config, images), wait))


def fit_all(configs: Sequence[Config], measures: Sequence[Callable[..., dict[str, Any]]] = ()) -> list[Run]:
    """``fit`` for each configuration; what another process is busy with is left to it and collected at the end.

    Args:
        configs: what to train.
        measures: functions for ``Run.measure``, so that the results are in the store when the caller asks for them.
    """

    def job(config: Config, wait: bool) -> Run:
        run = fit(config, wait=wait)
        for function in measures:
            run.measure(function, wait=wait or processes.count() > 1)  # processes of a job must not part ways
        return Run(config, run.folder)  # without the model, which measuring loaded

    return shared.each([functools.partial(job, config) for config in configs], "training runs")


def schedule(progress: float) -> float:
    """Learning-rate factor after a share ``progress`` of all steps: linearly up, then linearly down to zero."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def _train(config: Config, images: data.ImageSet | data.FolderSet, folder: Path) -> dict[str, Any]:
    """Fill ``folder`` with model.safetensors and history.csv, going on from a checkpoint that is there.

    Of several processes each takes its share of every batch; the first one evaluates, and alone reads and writes ``folder``.
    """
    started = time.perf_counter()
    first = processes.rank() == 0
    fabric = processes.fabric(config.precision)
    if config.precision == "16-mixed" and fabric.device.type == "cpu":
        raise ConfigError("precision='16-mixed' needs a GPU, and there is none: choose 32-true or bf16-mixed")
    model = config.build(images.image_shape)
    latents, entries = math.prod(model.latent_shape), math.prod(images.image_shape)
    optimiser = muon.Muon(muon.groups(model.to(fabric.device)), config.learning_rate)
    # Steps of several processes, which talk and may have unequal shares, and in 16 bits, where losses are scaled and layers
    # keep copies of weights, are Fabric's and are not recorded. Otherwise its wrappers do nothing, in a sixtieth of a step.
    plain = processes.count() == 1 and config.precision == "32-true"
    wrapped, stepping = (model, optimiser) if plain else fabric.setup(model, optimiser)
    count = len(images.train)
    steps = math.ceil(count / config.batch_size)
    checkpoint = processes.broadcast(checkpoints.newest(folder) if first else b"")
    history = checkpoints.restore(checkpoint, model, optimiser, fabric.strategy.precision)
    limit = EXPLODED * loss_of(config, torch.zeros(1), torch.full((1,), entries * math.log(2)), latents, entries).item()

    def work(batch: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """A step of training; the loss, and the sums of rate and distortion over the batch, of all processes."""
        here = len(batch)
        if not here:  # of a last batch with fewer images than there are processes: one image without weight
            batch, uniform, noise = (x.new_zeros(1, *x.shape[1:]) for x in (batch, uniform, noise))
        rate, distortion = wrapped(model.observed(batch, uniform), noise)
        loss = loss_of(config, rate, distortion, latents, entries) * (here / size)  # this share's part
        terms = processes.total(torch.stack([loss, rate[:here].sum(), distortion[:here].sum()]).detach())
        stepping.zero_grad()
        if plain:
            loss.backward()
        else:
            fabric.backward(loss * processes.count())  # gradients are then averaged over the processes
        stepping.step()
        return terms

    take = gpu.Step(work, stepping, fabric.device, record=plain)

    def stop_if_diverged(loss: float, when: str) -> None:
        if not loss < limit:  # also true of NaN
            kept = f"the checkpoint after epoch {len(history)} is kept in {folder}" if history else "no epoch was completed"
            raise TrainingDiverged(f"loss {loss:g} {when}: lower learning_rate; {kept}. {config}")

    with Progress(config.label, config.epochs * steps, len(history) * steps) as progress, cpu.one_thread():
        for epoch in range(len(history), config.epochs):
            draw = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)  # on the CPU: the same for every device
            sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)
            # Every process draws the numbers of the whole batch and takes its share, so that they are those of one process.
            for step, batch in enumerate(images.batches(draw, config.batch_size, processes.share, fabric.device)):
                size = min(config.batch_size, count - step * config.batch_size)  # of the batch, over all processes
                uniform = processes.share(torch.rand(size, *images.image_shape, generator=draw))
                noise = processes.share(torch.randn(size, *model.latent_shape, generator=draw))
                learning_rate = config.learning_rate * schedule((epoch * steps + step) / (config.epochs * steps))
                for group in optimiser.param_groups:
                    gpu.set_learning_rate(group, learning_rate)
                terms = take(batch, uniform, noise)
                stop_if_diverged(terms[0].item(), f"at step {step + 1} of epoch {epoch + 1}")
                sums += terms[1:]
                progress.step()
            means = torch.zeros(2, dtype=torch.float64, device=fabric.device)  # of rate and distortion
            if first:
                means += torch.stack([terms.double().mean() for terms in models.evaluate(model, images.test)]).to(means)
            rate, distortion = processes.total(means).cpu()
            stop_if_diverged(
                loss_of(config, rate, distortion, latents, entries).item(), f"on the test images after epoch {epoch + 1}"
            )
            history.append([epoch + 1, *(sums / count).tolist(), rate.item(), distortion.item()])
            if first:
                checkpoints.save(folder, model, optimiser, fabric.strategy.precision, history)
            progress.milestone(f"epoch {epoch + 1}/{config.epochs}, test −ELBO {(rate + distortion).item():.2f} nats")
    if first:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([HISTORY, *([int(epoch), *terms] for epoch, *terms in history)])
        runs.write_atomically(folder / "history.csv", table.getvalue())
        content = safetensors.torch.save(checkpoints.contiguous(model.state_dict()))
        runs.write_atomically(folder / "model.safetensors", content)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "seconds": time.perf_counter() - started,
        "parameters": parameters,
        "device": str(fabric.device),
        "processes": processes.count(),
    }
