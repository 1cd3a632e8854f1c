"""How fast training is: ours, the same network fed by a DataLoader, pythae's trainer, and what the machine could do.

    python tests/bench/training.py

Each arm first on one thread, then on the whole machine: ours as ``make figures`` trains, a run on each core, the others as
they come, one run on all cores. In turn, several times over; medians, and ratios of what was measured in the same run. The
bound is the number of floating-point operations of a step over the rate of matrix multiplications, on one thread or on one
thread of each core. Run it on an idle machine. pythae (optional extra ``bench``) is left out where it is not installed.
"""

import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from vaenb import cpu, data, muon, runs, train
from vaenb.config import Config, loss_of
from vaenb.models import VAE, reparametrise

ARMS = {"FCNN-VAE, 7×7": {}, "mixed": {"arm": "mixed"}, "FC-VAE, 20": {"arm": "dense", "latents": 20}}
IMAGES, ROUNDS = 9_600, 5
MATRIX = 1024


def ours(config: Config, images: data.ImageSet) -> float:
    """Seconds of one epoch of ``train.fit``, with its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return train._train(config, images, Path(folder))["seconds"]


def dataloader(config: Config, images: data.ImageSet, workers: int = 0) -> float:
    """Seconds of one epoch of the same network and optimiser in the loop that tutorials show."""
    with tempfile.TemporaryDirectory() as root:
        dataset = datasets.MNIST.__new__(datasets.MNIST)  # its way to an image (PIL, ToTensor), without its files
        dataset.data, dataset.targets = images.train[:, 0], images.train_labels
        dataset.transform, dataset.target_transform, dataset.root = transforms.ToTensor(), None, root
        loader = DataLoader(dataset, config.batch_size, shuffle=True, num_workers=workers)
        model = config.build(images.image_shape)
        optimiser = muon.Muon(muon.groups(model), config.learning_rate)
        started = time.perf_counter()
        for x, _ in loader:
            step(model, optimiser, torch.bernoulli(x))
        return time.perf_counter() - started


def step(model: VAE, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
    """One step on −ELBO."""
    q = model.encode(x)
    rate = torch.distributions.kl_divergence(q, model.prior())
    loss = (rate - model.decode(reparametrise(q, torch.randn_like(q.mean))).log_prob(x)).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def pythae(config: Config, images: data.ImageSet) -> float:
    """Seconds of one epoch of pythae's trainer around the same network."""
    from samplers import Decoder, Encoder, trainer
    from pythae import models  # isort: skip
    from pythae.pipelines import TrainingPipeline

    model = config.build(images.image_shape)
    size = model.latent_shape[0] if len(model.latent_shape) == 1 else model.latent_shape[1] ** 2
    settings = models.VAEConfig(input_dim=images.image_shape, latent_dim=size, reconstruction_loss="bce")
    wrapped = models.VAE(settings, encoder=Encoder(model), decoder=Decoder(model))
    grey = images.train.float() / 255
    with tempfile.TemporaryDirectory() as folder:
        pipeline = TrainingPipeline(wrapped, trainer(Path(folder), 1, config.batch_size, config.learning_rate))
        started = time.perf_counter()
        pipeline(train_data=grey)
        return time.perf_counter() - started


def operations(config: Config, images: data.ImageSet) -> float:
    """Floating-point operations for an image, forward and backward: of layers, not of activations."""
    model = config.build(images.image_shape)
    x = images.train[: config.batch_size].float() / 255
    with FlopCounterMode(display=False) as counter:
        rate, distortion = model(x, torch.randn(len(x), *model.latent_shape))
        loss_of(config, rate, distortion, rate[0].numel(), x[0].numel()).backward()
    return counter.get_total_flops() / len(x)


def multiplication_rate() -> float:
    """Floating-point operations a second of a matrix product on one thread, the best of several."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * MATRIX**3 / min(times)


def pictures(count: int = IMAGES) -> data.ImageSet:
    """The first training images of MNIST, and a few to evaluate on."""
    images = data.load("mnist")
    return dataclasses.replace(
        images, train=images.train[:count], test=images.test[:64], train_labels=images.train_labels[:count]
    )


def ways(cores: int = 1) -> dict[str, Callable[[Config, data.ImageSet], float]]:
    """What ours is compared with; on several cores also with a process on each that prepares batches."""
    found: dict[str, Callable[[Config, data.ImageSet], float]] = {"DataLoader": dataloader}
    if cores > 1:
        found[f"DataLoader, {cores} workers"] = functools.partial(dataloader, workers=cores)
    if importlib.util.find_spec("pythae"):
        found["pythae"] = pythae
    return found


def summary(config: Config, seconds: dict[str, list[float]], runs: int, rates: list[float]) -> dict[str, float]:
    """Images a second and ratios, from the seconds of each round: ``runs`` of ours side by side, one of the others.

    The first round does not count: a process's first epoch is slower.
    """
    speeds = {way: IMAGES / statistics.median(values[1:]) for way, values in seconds.items()}
    speeds["ours"] *= runs
    work = operations(config, pictures())
    return {
        **{f"{way}, images a second": speed for way, speed in speeds.items()},
        **{f"ours over {way}": speeds["ours"] / speed for way, speed in speeds.items() if way != "ours"},
        "share of the bound": work * speeds["ours"] / statistics.median(rates),
        "operations an image": work,
        "matrix products, operations a second": statistics.median(rates),
    }


def on_one_thread() -> dict[str, dict[str, float]]:
    """Everything on one thread of one process, for each arm."""
    others, found = ways(), {}
    with cpu.one_thread():
        for arm, options in ARMS.items():
            config, rates = Config("mnist", epochs=1, **options), []
            seconds: dict[str, list[float]] = {way: [] for way in ("ours", *others)}
            for _ in range(ROUNDS + 1):
                rates.append(multiplication_rate())
                for way, function in {"ours": ours, **others}.items():
                    seconds[way].append(function(config, pictures()))
            found[arm] = summary(config, seconds, 1, rates)
    return found


def meet(barrier: Any) -> None:
    """Remember, in a process of a pool, where it waits for the others."""
    global BARRIER
    BARRIER = barrier


def side_by_side(options: dict[str, Any] | None) -> float:
    """Seconds of an epoch of ours, or without options the rate of matrix products, while the other processes do the same."""
    pictures()
    with cpu.one_thread():
        BARRIER.wait()
        return multiplication_rate() if options is None else ours(Config("mnist", epochs=1, **options), pictures())


def as_it_comes(way: str, cores: int, options: dict[str, Any]) -> float:
    """Seconds of an epoch of another way, on all cores: in a process that nothing of ours has set up."""
    torch.set_num_threads(cores)
    return ways(cores)[way](Config("mnist", epochs=1, **options), pictures())


def on_all_cores() -> dict[str, dict[str, float]]:
    """Ours with a run on each core, the others as they come, for each arm."""
    cores = runs.cores()
    found = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(cores, context, meet, (context.Barrier(cores),)) as pool,
        ProcessPoolExecutor(1, context) as other,
    ):
        for arm, options in ARMS.items():
            rates, seconds = [], {way: [] for way in ("ours", *ways(cores))}
            for _ in range(ROUNDS + 1):
                rates.append(sum(pool.map(side_by_side, [None] * cores)))
                seconds["ours"].append(statistics.mean(pool.map(side_by_side, [options] * cores)))
                for way in ways(cores):
                    seconds[way].append(other.submit(as_it_comes, way, cores, options).result())
            found[arm] = {"cores": cores, **summary(Config("mnist", **options), seconds, cores, rates)}
    return found


def benchmark() -> dict[str, dict[str, dict[str, float]]]:
    """Both, one after the other."""
    if not importlib.util.find_spec("pythae"):
        print("pythae is not installed: left out", file=sys.stderr)
    return {"one thread": on_one_thread(), "all cores": on_all_cores()}


if __name__ == "__main__":
    print(json.dumps(benchmark(), indent=1, ensure_ascii=False))
