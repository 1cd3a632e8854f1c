"""The repair: a prior learned for a trained VAE, whose encoder and decoder stay as they are, rung by rung.

A *rung* is a kind of prior with its settings. Fitted priors are kept in the run store, and so is what is measured of them.
"""

import copy
import functools
import inspect
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vaenb import checkpoints, dependence, gpu, joint, models, runs
from vaenb.autoregressive import Autoregressive
from vaenb.cpu import one_thread
from vaenb.flows import Flow, FlowMatching
from vaenb.folders import Crops
from vaenb.gaussians import FullGaussian, Mixture, PositionGaussian
from vaenb.models import VAE
from vaenb.priors import Convolutional, Prior, StandardNormal
from vaenb.progress import Progress
from vaenb.stationary import StationaryFlow
from vaenb.train import VERSIONS, Run
from vaenb.two_stage import TwoStage, Vamp

RUNGS: dict[str, tuple[type[Prior], dict[str, Any]]] = {
    "N(0, I)": (StandardNormal, {}),
    "per position": (PositionGaussian, {}),
    "full Gaussian": (FullGaussian, {}),
    "VampPrior": (Vamp, {"components": 500, "epochs": 3, "batch_size": 512, "learning_rate": 0.1}),
    "two-stage VAE": (TwoStage, {"epochs": 3}),
    "spline flow": (Flow, {"epochs": 2, "hidden": 128, "passes": 7}),  # rows of a 7×7 map
    "autoregressive": (Autoregressive, {"position_aware": True, "learning_rate": 4e-3}),
    "mixture": (Mixture, {"components": 150}),
    "flow matching": (FlowMatching, {"position_aware": True, "hidden": 48, "components": 100, "steps": 4}),
}
ANY_SIZE: dict[str, tuple[type[Prior], dict[str, Any]]] = {  # translation-equivariant, for maps of any size
    "stationary flow": (StationaryFlow, {"patch": 2}),
}
FINE = "fine mixture"  # what replaces a mixture that was trained jointly, see ``tune``
FINAL: dict[str, tuple[type[Prior], dict[str, Any]]] = {
    FINE: (Mixture, {"components": 600, "sweeps": (3, 2), "ridge": 1e-3, "shrinkage": 30.0})
}
SIDE = 7  # positions of a map, along each axis, that convolutional priors work on: larger maps come in patches
PART = 2_000  # images that are encoded at once
COUNT = 90_000  # latents that a prior learns from: several draws of each image
AT_A_POSITION = 8  # components of the autoregressive prior where a patch is one latent; fewer where it is more
EACH = 8  # times as many draws of z teach the fine mixture
WORTH = 2  # times as many components it may have for that: the draws are of no more images
PER_COMPONENT = 6  # latents for each entry of the mean of a component of a mixture, at least


@dataclass(frozen=True)
class Repaired:
    """A trained VAE and a prior that was fitted to its latents, in the store."""

    run: Run
    rung: str
    count: int
    folder: Path

    @functools.cached_property
    def prior(self) -> Prior:
        """The fitted prior, on the CPU, without gradients."""
        prior = build(self.rung, self.run.model, self.count)
        prior.load_state_dict(safetensors.torch.load_file(self.folder / "prior.safetensors"))
        return prior.requires_grad_(False)

    @property
    def cost(self) -> dict[str, Any]:
        """``seconds`` of fitting and ``parameters``."""
        return runs.read(self.folder)["summary"]

    def measure(self, function: Callable[..., dict[str, Any]], wait: bool = True, **arguments: Any) -> dict[str, Any]:
        """``function(self, **arguments)``, computed once and kept in the store, as ``train.Run.measure`` does."""

        def compute(_: Path) -> dict[str, Any]:
            with Progress(f"{self.run.config.label}, {self.rung}: {function.__name__}", 1) as progress, one_thread():
                result = function(self, **arguments)
                progress.step()
                progress.milestone("measured")
            return result

        spec = {"prior": self.folder.name, "function": function.__qualname__, "arguments": arguments, **VERSIONS}
        label = f"{self.run.config.label}-{_slug(self.rung)}-{function.__name__}"
        return runs.read(runs.entry(label, spec, runs.with_imports(inspect.getmodule(function)), compute, wait))["summary"]


def build(rung: str, model: VAE, count: int = COUNT) -> Prior:
    """A newly initialised prior for the latents of a model; the same one every time.

    Args:
        rung: of ``RUNGS``, ``ANY_SIZE`` or ``FINAL``.
        model: whose latents; the VampPrior has its encoder, too.
        count: latents to learn from: mixtures get no more components than these can tell apart, the fine one twice as many.

    Raises:
        ValueError: unknown rung.
    """
    kind, options = _kind(rung)
    options = dict(options)
    if issubclass(kind, Mixture | FlowMatching) and "components" in options:
        affordable = count * (WORTH if rung == FINE else 1) // (PER_COMPONENT * math.prod(model.latent_shape))
        options["components"] = max(1, min(options["components"], affordable))
    if issubclass(kind, Convolutional) and model.arm != "dense":
        patch = options.get("patch", max(1, model.latent_shape[1] // SIDE))
        options["patch"] = next(side for side in range(patch, 0, -1) if not any(n % side for n in model.latent_shape[1:]))
        if kind is Autoregressive:  # a component has a covariance of all latents of a patch
            options["components"] = max(1, AT_A_POSITION // (model.latent_shape[0] * options["patch"] ** 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = kind(model if kind is Vamp else model.latent_shape, **options)
    return prior.to(memory_format=torch.channels_last)  # CPUs are faster in this layout


def repair(run: Run, rung: str, count: int = COUNT, wait: bool = True) -> Repaired:
    """The prior of this rung for a trained VAE: from the store if it is there, else fitted now and stored.

    Args:
        run: the VAE.
        rung: of ``RUNGS``, ``ANY_SIZE`` or ``FINAL``.
        count: latents to learn from: as many draws of each training image as it takes.
        wait: for another process that fits the same, rather than raise ``runs.Busy``.
    """
    prior = build(rung, run.model, count)
    kind, options = _kind(rung)

    def fit(folder: Path) -> dict[str, Any]:
        prior.to(gpu.device())
        with one_thread():
            z = _kept_draws(run, count)
            started = time.perf_counter()
            prior.fit(z, seed=run.config.seed)
        _save(folder / "prior.safetensors", prior)
        return {"seconds": time.perf_counter() - started, "parameters": prior.parameter_count()}

    spec = {"run": run.folder.name, "prior": [kind.__name__, options], "count": count, **VERSIONS}
    code = [*runs.with_imports(inspect.getmodule(kind)), dependence, models, sys.modules[__name__]]
    entry = runs.entry(f"{run.config.label}-{_slug(rung)}", spec, _once(code), fit, wait)
    return Repaired(run, rung, count, entry)


def tune(repaired: Repaired, epochs: int = 3, learning_rate: float = 8e-3, wait: bool = True) -> Repaired:
    """Encoder, decoder and prior trained on together from where they are; see ``joint.train_jointly``.

    The latents of a model that no longer moves deserve a better mixture than one that has followed them by gradients: in
    place of one that was trained jointly comes ``FINE``, fitted to ``EACH`` times as many draws.

    Args:
        repaired: a VAE and a prior with a density to train through.
        epochs, learning_rate: of the joint training.
        wait: see ``repair``.

    Returns:
        The prior, for a mixture its replacement, on another run, whose latents other priors may in turn be fitted to.

    Raises:
        ValueError: see ``joint.train_jointly``.
    """
    run = repaired.run
    rung = FINE if _kind(repaired.rung)[0] is Mixture else repaired.rung

    def train(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        model, prior = copy.deepcopy(run.model), copy.deepcopy(repaired.prior)
        with one_thread():
            joint.train_jointly(model, prior, run.images.train, epochs, learning_rate, run.config.seed)
            if rung == FINE:
                prior = build(rung, model, repaired.count).to(prior.device_of.device)
                prior.fit(_draws(model, run.images.train, repaired.count, EACH), seed=run.config.seed)
        _save(folder / "model.safetensors", model)
        _save(folder / "prior.safetensors", prior)
        return {"parameters": prior.parameter_count(), "seconds": time.perf_counter() - started}

    kind, options = _kind(rung)
    after = [kind.__name__, options]
    spec = {"prior": repaired.folder.name, "after": after, "epochs": epochs, "learning_rate": learning_rate, **VERSIONS}
    code = [*runs.with_imports(inspect.getmodule(kind)), *runs.with_imports(joint), sys.modules[__name__]]
    entry = runs.entry(f"{run.config.label}-{_slug(repaired.rung)}-jointly", spec, _once(code), train, wait)
    return Repaired(Run(run.config, entry), rung, repaired.count, entry)


@functools.lru_cache(maxsize=3)  # the rungs of a ladder, one after the other, want those of the same few runs
def _kept_draws(run: Run, count: int) -> Tensor:
    return _draws(run.model, run.images.train, count)


def _kind(rung: str) -> tuple[type[Prior], dict[str, Any]]:
    rungs = RUNGS | ANY_SIZE | FINAL
    if rung not in rungs:
        raise ValueError(f"unknown rung {rung!r}: choose one of {', '.join(rungs)}")
    return rungs[rung]


def _draws(model: VAE, images: Tensor | Crops, count: int, each: int = 1) -> Tensor:
    """``count`` times ``each`` draws of z: each image is encoded as often as that takes, or some of them once."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values
    parts, drawn = [], 0  # those of a folder are decoded part by part
    for part in chosen.split(PART) * math.ceil(count / len(images)):
        if drawn < count:  # the last pass may end early
            parts.append(dependence.aggregate(model, images[part], 1 + len(parts), each))
            drawn += len(part)
    z = torch.cat(parts)[: count * each]
    del parts  # of many draws each copy counts
    return z if each == 1 else z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]


def _save(path: Path, module: torch.nn.Module) -> None:
    runs.write_atomically(path, safetensors.torch.save(checkpoints.contiguous(module.state_dict())))


def _once(modules: list[ModuleType]) -> list[ModuleType]:
    return list(dict.fromkeys(modules))


def _slug(rung: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in rung.lower()).split())
