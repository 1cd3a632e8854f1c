"""How fast training is: ours, the same network fed by a DataLoader, pythae's trainer, and what the machine could do.

    python tests/bench/training.py

Each arm on one thread, in turn, several times over; medians, and ratios of what was measured in the same run. The bound is
the number of floating-point operations of a step over the rate of a matrix multiplication on one thread. Run it on an idle
machine. pythae (optional extra ``bench``) is left out where it is not installed.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from vaenb import cpu, data, muon, train
from vaenb.config import Config, loss_of
from vaenb.models import VAE, reparametrise

ARMS = {"FCNN-VAE, 7×7": {}, "mixed": {"arm": "mixed"}, "FC-VAE, 20": {"arm": "dense", "latents": 20}}
IMAGES, ROUNDS = 9_600, 5
MATRIX = 1024


def ours(config: Config, images: data.ImageSet) -> float:
    """Seconds of one epoch of ``train.fit``, with its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return train._train(config, images, Path(folder))["seconds"]


def dataloader(config: Config, images: data.ImageSet) -> float:
    """Seconds of one epoch of the same network and optimiser in the loop that tutorials show."""
    with tempfile.TemporaryDirectory() as root:
        dataset = datasets.MNIST.__new__(datasets.MNIST)  # its way to an image (PIL, ToTensor), without its files
        dataset.data, dataset.targets = images.train[:, 0], images.train_labels
        dataset.transform, dataset.target_transform, dataset.root = transforms.ToTensor(), None, root
        loader = DataLoader(dataset, config.batch_size, shuffle=True)
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


def benchmark() -> dict[str, dict[str, float]]:
    """Measure, print a table and return the numbers."""
    images = data.load("mnist")
    images = dataclasses.replace(images, train=images.train[:IMAGES], test=images.test[:64],
                                 train_labels=images.train_labels[:IMAGES])  # fmt: skip
    ways: dict[str, Callable[[Config, data.ImageSet], float]] = {"ours": ours, "DataLoader": dataloader}
    try:
        import pythae as _

        ways["pythae"] = pythae
    except ImportError:
        print("pythae is not installed: left out", file=sys.stderr)
    found = {}
    with cpu.one_thread():
        for arm, options in ARMS.items():
            config = Config("mnist", epochs=1, **options)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            rates = []
            for _ in range(ROUNDS):
                rates.append(multiplication_rate())
                for way, function in ways.items():
                    seconds[way].append(function(config, images))
            medians = {way: statistics.median(values) for way, values in seconds.items()}
            work = operations(config, images)
            found[arm] = {
                **{f"{way}, images a second": IMAGES / median for way, median in medians.items()},
                **{f"{way} over ours, time": median / medians["ours"] for way, median in medians.items() if way != "ours"},
                "share of the bound": work * IMAGES / medians["ours"] / statistics.median(rates),
                "operations an image": work,
                "matrix products, operations a second": statistics.median(rates),
            }
            print(arm, json.dumps(found[arm], indent=1), flush=True)
    return found


if __name__ == "__main__":
    benchmark()
