"""Speed in one figure: ``figures/mnist/bench_speed.png`` and its JSON. Run it on an idle machine, by ``make bench``.

    python tests/bench/speed.py [PART ...]

Training throughput beside other trainers and the bound (``training.py``), on one thread and on all cores; time to a given
−ELBO; whether training, decoding and sampling are linear in images, pixels and samples, on one thread, too; and how long the
paper takes to rebuild (``rebuild.py``).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rebuild
import torch
import training
from training import ROUNDS, ours, pictures

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


def training_time() -> dict[str, list[float]]:
    """Microseconds per image of an epoch of each of ``IMAGES``, for each arm; medians of ``ROUNDS``, which take turns."""
    found = {}
    for arm, options in training.ARMS.items():
        config = Config("mnist", epochs=1, **options)
        rounds = [[1e6 * ours(config, pictures(count)) / count for count in IMAGES] for _ in range(ROUNDS)]
        found[arm] = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return found


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


@cpu.one_thread()
def time_to_bound() -> dict[str, Any]:
    """Seconds of the shortest training that reaches each of ``TARGETS``, evaluation after each epoch included."""
    images, found = data.load("mnist"), {}
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


@cpu.one_thread()
def scaling() -> dict[str, Any]:
    """Times per image, pixel and sample for growing numbers of them."""
    return {
        "images": IMAGES, "sides": SIDES, "samples": SAMPLES,
        "training": training_time(), "decoding": decoding_time(), "sampling": sampling_time(VAE()),
    }  # fmt: skip


def show(numbers: dict[str, Any]) -> None:
    """Save the figure and the numbers."""
    times = numbers["scaling"]
    across = {
        "training": [count / 1000 for count in times["images"]],
        "decoding": [side**2 / 1e6 for side in times["sides"]],
        "sampling": times["samples"],
    }
    other = [(colour, line) for colour in ("black", "0.6") for line in ("-", "--", ":")]
    looks = {panel: other for panel in across} | {
        "training": [(figures.ARM_COLOURS[arm], "-") for arm in ("spatial", "mixed", "dense")]
    }
    panels = {
        panel: {
            name: figures.Curve(x[: len(values)], [[value] for value in values], *look)
            for (name, values), look in zip(times[panel].items(), looks[panel], strict=False)
        }
        for panel, x in across.items()
    }
    labels = {
        "training": ("thousands of images", "µs per image and epoch"),
        "decoding": ("millions of pixels", "seconds per million pixels"),
        "sampling": ("samples", "ms per sample"),
    }
    options = {
        "training": {"xlim": (0, None), "ylim": (0, 400)},
        "decoding": {"xscale": "log", "ylim": (0, None)},
        "sampling": {"xscale": "log", "yscale": "log", "ylim": (1e-4, 1e4)},
    }
    growth = max(max(values) / values[0] for panel in across for values in times[panel].values())
    finding = "does not grow" if growth < 1.05 else f"grows by {100 * (growth - 1):.0f} % at most"
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
        note=f"One thread of a server without a GPU. Training: medians of {ROUNDS} epochs; sampling: latents of the 7×7 "
        "map; decoding: random weights, map in 64×64 tiles, one channel (trunks of 16 and 32) or three (32 and 64), "
        "medians where a picture is small.",
    )  # fmt: skip


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "throughput": training.benchmark,
    "time_to_bound": time_to_bound,
    "scaling": scaling,
    "rebuild": rebuild.measure,
}


def main() -> None:
    """Measure everything, or the parts that are named; save the figure and the numbers after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "plot"], help="what to measure anew; plot: nothing")
    kept = figures_folder("mnist") / "bench_speed.json"
    chosen = parser.parse_args().parts or list(PARTS)
    before = json.loads(kept.read_text())["numbers"] if kept.is_file() else {}
    numbers = {part: before[part] for part in PARTS if part in before}
    for part in chosen:
        if part != "plot":
            numbers[part] = PARTS[part]()
            print(part, json.dumps(numbers[part], indent=1, ensure_ascii=False), flush=True)
        if "scaling" in numbers:
            show(numbers)


if __name__ == "__main__":
    main()
