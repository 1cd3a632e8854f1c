"""What a training run is: a configuration, and the loss that it asks for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaenb import data, models
from vaenb.pixels import LIKELIHOODS

REDUCTIONS = ("sum", "mean")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class ConfigError(ValueError):
    """A configuration that no run can have."""


@dataclass(frozen=True)
class Config:
    """Everything that a training run depends on, besides data and code.

    Attributes:
        dataset: see ``vaenb.data``.
        arm: ``spatial``, ``dense`` or ``mixed``, see ``vaenb.models``.
        latent_size: side of the latent map in positions: 7, 14 or 28 for 28×28 images. Sets the stride of the trunks.
        latent_channels: channels of the map.
        latents: length of the latent vector of ``dense``; None: as many as the map has.
        kernel_size, padding, coordinates, reach, sides: of the layers next to the map; see ``models.VAE``.
        hidden: channels of the two stages of the trunks, the outer one first.
        blocks: residual blocks of each trunk, where it meets the bottleneck.
        likelihood: of the pixels; see ``pixels``.
        distortion_reduction, rate_reduction: how the loss adds up pixels and latents. ``sum`` and ``sum`` is −ELBO in
            nats; the other three are the mistakes that experiment E3 examines.
        epochs, batch_size, learning_rate: of ``muon.Muon``, with a short linear warm-up and linear decay to zero.
        precision: ``32-true``, or ``bf16-mixed`` or ``16-mixed``, for large models on GPUs (steps are not recorded then, see
            ``gpu.Step``): layers compute in 16 bits, weights and losses stay in 32, and so does evaluation.
        seed: of initialisation, order of the data, binarisation and latent noise.

    Raises:
        ConfigError: a value that no run can have.
    """

    dataset: str = "digits"
    arm: str = "spatial"
    latent_size: int = 7
    latent_channels: int = 1
    latents: int | None = None
    kernel_size: int = 3
    padding: str = "zeros"
    coordinates: bool = False
    reach: int | None = None
    sides: str = "both"
    hidden: tuple[int, int] = (16, 32)
    blocks: int = 0
    likelihood: str = "bernoulli"
    distortion_reduction: str = "sum"
    rate_reduction: str = "sum"
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 8e-3
    precision: str = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "arm": models.ARMS,
            "padding": models.PADDINGS,
            "coordinates": (False, True),
            "sides": models.SIDES,
            "likelihood": LIKELIHOODS,
            "distortion_reduction": REDUCTIONS,
            "rate_reduction": REDUCTIONS,
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        for name in ("latent_size", "latent_channels", "kernel_size", "epochs", "batch_size", "latents"):
            value = getattr(self, name)
            if (value is not None or name != "latents") and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1")
        if isinstance(self.hidden, list):  # from a parameter file
            object.__setattr__(self, "hidden", tuple(self.hidden))
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed!r}: expected a whole number from 0 to 2³² − 1")
        if (
            not isinstance(self.hidden, tuple)
            or len(self.hidden) != 2
            or not all(isinstance(width, int) and width > 0 for width in self.hidden)
        ):
            raise ConfigError(
                f"hidden={self.hidden!r}: expected two whole numbers of at least 1, the channels of the two stages"
            )
        if not isinstance(self.blocks, int) or self.blocks < 0:
            raise ConfigError(f"blocks={self.blocks!r}: expected a whole number of at least 0")
        if not isinstance(self.learning_rate, (int, float)) or not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate!r}: expected a positive number")
        if self.latents is not None and self.arm != "dense":
            raise ConfigError(f"latents={self.latents} is for the dense arm; {self.arm} has latent_channels per position")
        if self.reach is not None and (self.arm != "mixed" or not isinstance(self.reach, int) or self.reach < 0):
            raise ConfigError(
                f"reach={self.reach!r}: expected a whole number of positions for the mixed arm, not {self.arm}"
            )
        if self.sides != "both" and self.arm != "mixed":
            raise ConfigError(f"sides={self.sides!r} is for the mixed arm; {self.arm} has no layers across positions")
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={self.kernel_size}: expected an odd number")
        if self.padding == "circular" and self.kernel_size // 2 > self.latent_size:
            raise ConfigError(
                f"kernel_size={self.kernel_size}: with circular padding at most {2 * self.latent_size + 1}, which goes once "
                f"around a map of side {self.latent_size}"
            )
        if self.arm == "dense" and (self.kernel_size != 3 or self.coordinates):
            raise ConfigError("kernel_size and coordinates are of the convolutions next to a map: the dense arm has none")

    @property
    def label(self) -> str:
        """A short name for progress lines and folders, such as ``mnist-spatial-7x7x1-s0``."""
        latent = self.latents or f"{self.latent_size}x{self.latent_size}x{self.latent_channels}"
        loss = f"{self.distortion_reduction}-{self.rate_reduction}"
        parts = [data.slug(self.dataset), self.arm, latent]
        parts += [f"kernel{self.kernel_size}"] * (self.kernel_size != 3) + [self.padding] * (self.padding != "zeros")
        parts += (
            [f"reach{self.reach}"] * (self.reach is not None)
            + [f"{self.sides}-only"] * (self.sides != "both")
            + ["coordinates"] * self.coordinates
            + ["hidden{}-{}".format(*self.hidden)] * (tuple(self.hidden) != (16, 32))
            + [f"blocks{self.blocks}"] * (self.blocks > 0)
            + [self.likelihood] * (self.likelihood != "bernoulli")
            + [loss] * (loss != "sum-sum")
            + [self.precision] * (self.precision != "32-true")
        )
        return "-".join(map(str, [*parts, f"s{self.seed}"]))

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
            same = ("hidden", "blocks", "kernel_size", "padding", "coordinates", "reach", "sides", "likelihood")
            options = {name: getattr(self, name) for name in same}
            model = models.VAE(self.arm, image_shape, stride, self.latent_channels, self.latents, **options)
            return model.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and GPUs alike


def loss_of(config: Config, rate: Tensor, distortion: Tensor, latents: int, pixels: int) -> Tensor:
    """The loss of a batch. Sum and sum: −ELBO in nats per image; a mean divides its term by its number of entries."""
    rate = rate.mean() / (latents if config.rate_reduction == "mean" else 1)
    return distortion.mean() / (pixels if config.distortion_reduction == "mean" else 1) + rate


def effective_beta(config: Config, latents: int, pixels: int) -> float:
    """The β of the β-VAE (Higgins et al. 2017) whose loss is proportional to ``loss_of``."""
    return (pixels if config.distortion_reduction == "mean" else 1) / (latents if config.rate_reduction == "mean" else 1)
