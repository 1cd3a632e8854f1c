"""Speed in one figure: ``figures/mnist/bench_speed.png`` and its JSON. Run it on an idle machine, by ``make bench``.

    python tests/bench/speed.py

Training throughput beside other trainers and the bound (``training.py``), on one core and with two runs side by side; time
to a given −ELBO; whether training, decoding and sampling are linear in images, pixels and samples; and how long each
notebook took when ``make figures`` last ran, with its peak memory. Everything on one thread.
"""

import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import training
from training import ROUNDS, multiplication_rate, operations, ours

from vaenb import canvas, cpu, data, figures, ladder, train
from vaenb.claims import figures_folder
from vaenb.config import Config
from vaenb.models import VAE

IMAGES = (4_800, 9_600, 19_200, 38_400)
SIDES = (256, 512, 1024, 2048, 4096)
SAMPLES = (1_000, 3_000, 10_000, 30_000)
PRIORS = ("per position", "mixture", "flow matching", "spline flow", "autoregressive")
# Nats: for the FC-VAE as it was set, for the map where two epochs leave it (114.0), and one more.
TARGETS = {"FC-VAE, 20": (105.0, {"arm": "dense", "latents": 20}), "FCNN-VAE, 7×7": (115.0, {})}
LONGEST = 2  # epochs


def part(images: data.ImageSet, count: int) -> data.ImageSet:
    """The first training images, and a few to evaluate on."""
    return dataclasses.replace(
        images, train=images.train[:count], train_labels=images.train_labels[:count], test=images.test[:64]
    )


def training_time(images: data.ImageSet) -> dict[str, list[float]]:
    """Microseconds per image of an epoch of each of ``IMAGES``, for each arm."""
    return {
        arm: [1e6 * ours(Config("mnist", epochs=1, **options), part(images, count)) / count for count in IMAGES]
        for arm, options in training.ARMS.items()
    }


def decoding_time() -> dict[str, list[float]]:
    """Seconds per million pixels of decoding a map to a square picture of each of ``SIDES``, band by band."""
    found = {}
    wider = {"image_shape": (3, 64, 64), "hidden": (32, 64)}
    for name, options in {"one channel": {}, "three channels, wider": wider}.items():
        model = VAE(**options)
        found[name] = []
        for side in SIDES:
            z = torch.randn(1, side // model.stride, side // model.stride)
            times = []
            for _ in range(max(1, 2 * 1024**2 // side**2)):
                started = time.perf_counter()
                for _ in canvas.render(model, z):
                    pass
                times.append(time.perf_counter() - started)
            found[name].append(statistics.median(times) / (side**2 / 1e6))
    return found


def sampling_time(model: VAE) -> dict[str, list[float]]:
    """Milliseconds per sample of each of ``SAMPLES``, for each prior."""
    found = {}
    z = torch.randn(20_000, *model.latent_shape)
    for rung in PRIORS:
        prior = ladder.build(rung, model)
        start = prior.start if rung == "flow matching" else prior
        if rung in ("mixture", "per position", "flow matching"):  # the time of the others does not depend on the weights
            start.fit(z)
        found[rung] = []
        for count in SAMPLES:
            started = time.perf_counter()
            prior.sample(count, seed=0)
            found[rung].append(1e3 * (time.perf_counter() - started) / count)
    return found


def time_to(images: data.ImageSet) -> dict[str, Any]:
    """Seconds of the shortest training that reaches each of ``TARGETS``, evaluation after each epoch included."""
    found = {}
    for name, (target, options) in TARGETS.items():
        for epochs in range(1, LONGEST + 1):
            with tempfile.TemporaryDirectory() as folder:
                seconds = train._train(Config("mnist", epochs=epochs, **options), images, Path(folder))["seconds"]
                last = (Path(folder) / "history.csv").read_text().splitlines()[-1].split(",")
            bound = sum(map(float, last[3:]))
            if bound <= target:
                found[name] = {"target": target, "reached": bound, "epochs": epochs, "seconds": seconds}
                break
        else:
            found[name] = {"target": target, "reached": None, "last": bound, "epochs": LONGEST, "seconds": seconds}
    return found


def together(barrier: multiprocessing.Barrier) -> None:
    """Remember, in a process of a pool, what it waits at for the other."""
    global BARRIER
    BARRIER = barrier


def alone(what: str) -> float:
    """Seconds of an epoch of the 7×7 arm, or the rate of matrix products, while the other process does the same."""
    with cpu.one_thread():
        BARRIER.wait()
        if what == "rate":
            return statistics.median(multiplication_rate() for _ in range(3))
        images, seconds = part(data.load("mnist"), IMAGES[1]), []
        for _ in range(ROUNDS + 1):  # a process's first one is slower
            BARRIER.wait()
            seconds.append(ours(Config("mnist", epochs=1), images))
        return statistics.median(seconds[1:])


def two_busy(images: data.ImageSet) -> dict[str, float]:
    """Two runs side by side, and two matrix products: the share of the bound with both cores busy."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, together, (context.Barrier(2),)) as pool:
        rates = pool.map(alone, ["rate"] * 2, chunksize=1)
        seconds = pool.map(alone, ["epoch"] * 2, chunksize=1)
    work = operations(Config("mnist"), images) * IMAGES[1]
    return {
        "images a second, both together": sum(IMAGES[1] / each for each in seconds),
        "share of the bound": sum(work / each for each in seconds) / sum(rates),
    }


def notebooks() -> dict[str, dict[str, float]]:
    """Seconds and peak memory in GiB of each notebook when it last ran on MNIST, with what the run store then had."""
    stamps = sorted(Path(train.runs.build_folder(), "stamps", "mnist").glob("*.json"))
    return {stamp.stem: {k: v for k, v in json.loads(stamp.read_text()).items() if k in ("seconds", "memory")}
            for stamp in stamps}  # fmt: skip


def measure() -> dict[str, Any]:
    """Everything but the notebooks, which ``make figures`` has timed."""
    images = data.load("mnist")
    throughput = training.benchmark()
    with cpu.one_thread():
        scaling = {
            "training": training_time(images),
            "decoding": decoding_time(),
            "sampling": sampling_time(VAE()),
        }
        reached = time_to(images)
    return {
        "throughput": throughput,
        "both_cores_busy": two_busy(images),
        "time_to_bound": reached,
        "scaling": {"images": IMAGES, "sides": SIDES, "samples": SAMPLES, **scaling},
    }


def show(numbers: dict[str, Any]) -> None:
    """Save the figure and the numbers."""
    scaling = numbers["scaling"]
    across = {
        "training": [count / 1000 for count in scaling["images"]],
        "decoding": [side**2 / 1e6 for side in scaling["sides"]],
        "sampling": scaling["samples"],
    }
    other = [(colour, line) for colour in ("black", "0.6") for line in ("-", "--", ":")]
    looks = {panel: other for panel in across} | {
        "training": [(figures.ARM_COLOURS[arm], "-") for arm in ("spatial", "mixed", "dense")]
    }
    panels = {
        panel: {
            name: figures.Curve(x[: len(values)], [[value] for value in values], *look)
            for (name, values), look in zip(scaling[panel].items(), looks[panel], strict=False)
        }
        for panel, x in across.items()
    }
    labels = {
        "training": ("thousands of images", "µs per image and epoch"),
        "decoding": ("millions of pixels", "seconds per million pixels"),
        "sampling": ("samples", "ms per sample"),
    }
    options = {
        "training": {"xlim": (0, None), "ylim": (0, 650)},
        "decoding": {"xscale": "log", "ylim": (0, None)},
        "sampling": {"xscale": "log", "yscale": "log", "ylim": (1e-4, 1e5)},
    }
    growth = max(max(values) / values[0] for panel in across for values in scaling[panel].values())
    finding = "does not grow" if growth < 1.05 else f"grows to {growth:.1f} times at most"
    figures.save(
        figures.curves(
            panels, labels, f"Time per image, pixel and sample {finding} with their number",
            axes_options=options, legend="upper right",
        ),
        "bench_speed",
        "mnist",
        numbers=numbers,
        alt="Time per image against the number of images, per million pixels against the size of the canvas, and per sample "
        f"against the number of samples: it {finding}.",
        note="One thread of a server without a GPU, measured once; medians where a picture is small. Sampling: latents of "
        "the 7×7 map; decoding: random weights, map in 64×64 tiles, one channel (trunks of 16 "
        "and 32) or three (32 and 64).",
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measure, print and save; with ``--plot`` draw what was measured again, beside the notebooks' latest times."""
    kept = figures_folder("mnist") / "bench_speed.json"
    numbers = json.loads(kept.read_text())["numbers"] if arguments == ["--plot"] else measure()
    numbers["notebooks_as_last_executed"] = notebooks()
    print(json.dumps(numbers, indent=1, ensure_ascii=False))
    show(numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
