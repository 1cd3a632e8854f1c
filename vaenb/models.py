"""Variational autoencoders that share their trunks and differ only in the bottleneck.

    spatial   the latent is a map (C, h, w); convolutions alone lead to it and from it (the post's FCNN-VAE)
    dense     the latent is a vector (d,); fully connected layers lead to it and from it (the post's FC-VAE)
    mixed     the map of ``spatial`` with one linear layer across its positions on each side

``encode`` and ``decode`` return torch distributions, so the bound on log p(x) is one line:
``model.decode(z).log_prob(x) - kl_divergence(model.encode(x), model.prior())`` (Kingma & Welling 2014).
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from vaenb import pixels

ARMS = ("spatial", "dense", "mixed")
STRIDES = (1, 2, 4)
SIDES = ("both", "encoder", "decoder")
PADDINGS = ("zeros", "circular")
LOG_SCALE = -3.0  # of photographs' grey values around their means, in units of their range, before training
BATCH = 125  # images through a model at once when nothing is trained: what fits into a cache is faster


class ImageSizeError(ValueError):
    """An image is smaller than the stride, or not of the one size that a model with global layers was made for."""


class _Interleaved(torch.autograd.Function):
    """(N, 4·C, H + 1, W + 1) -> (N, C, 2H, 2W): the shuffle of ``SubpixelUp``, without the border of one pixel.

    Whole pixels of C numbers move, where channels come last in memory, and each once, in both directions. Autograd would
    add up gradients in an array full of zeros. Not for ``torch.func``.
    """

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        """Channels come last in the memory of what it returns."""
        n, channels, height, width = phases.shape
        sources = _sources(height - 1, width - 1, phases.device)
        moved = phases.permute(0, 2, 3, 1).reshape(n, -1, channels // 4).index_select(1, sources)
        return moved.view(n, 2 * height - 2, 2 * width - 2, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Zero for what lies on the border."""
        n, channels, height, width = gradient.shape
        targets, border = _targets(height // 2, width // 2, gradient.device)
        moved = gradient.permute(0, 2, 3, 1).reshape(n, -1, channels).index_select(1, targets).index_fill_(1, border, 0)
        return moved.view(n, height // 2 + 1, width // 2 + 1, -1).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=8)  # two for each size of picture; few, since those of large canvases are large
def _sources(height: int, width: int, device: torch.device) -> Tensor:
    """Where each pixel of (2H, 2W) comes from in (H + 1, W + 1, 4), both row by row, (4·H·W,).

    Pixel (2i + s, 2j + t) is phase 2 (1 − s) + 1 − t at position (i + s, j + t).
    """
    y, x = torch.meshgrid(*(torch.arange(2 * side, dtype=torch.int32) for side in (height, width)), indexing="ij")
    position = (y + 1) // 2 * (width + 1) + (x + 1) // 2
    return (4 * position + 2 * (1 - y % 2) + 1 - x % 2).flatten().to(device)


@functools.lru_cache(maxsize=8)
def _targets(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Undoes ``_sources``: the pixel that each phase of each position becomes, 0 for the border; and where the border is."""
    sources = _sources(height, width, device).long()
    targets = sources.new_full((4 * (height + 1) * (width + 1),), -1)
    targets[sources] = torch.arange(len(sources), device=device)
    return targets.clamp_min(0).int(), (targets < 0).nonzero().flatten()


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, but circular padding leaves channels last in memory, where PyTorch's would put them first and back."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        if self.padding_mode != "circular" or not any(self.padding):
            return super().forward(x)
        for dim, pad in zip((2, 3), self.padding, strict=True):
            x = torch.cat([x.narrow(dim, x.shape[dim] - pad, pad), x, x.narrow(dim, 0, pad)], dim)
        return F.conv2d(x, self.weight, self.bias, self.stride, dilation=self.dilation, groups=self.groups)


class SubpixelUp(nn.Module):
    """Doubles height and width; the same linear maps as ``ConvTranspose2d(kernel_size=4, stride=2, padding=1)``.

    Each output pixel sees 2×2 inputs, with another kernel for each of the four phases: a 2×2 convolution to 4·C channels
    and a shuffle (Shi et al. 2016). CPUs have faster kernels for that than for transposed convolutions to few channels.
    The phase comes before the channel in the 4·C (``F.pixel_shuffle`` has it the other way round), so that in memory where
    channels come last whole pixels move and not single numbers.
    """

    def __init__(self, channels_in: int, channels_out: int, padding_mode: str = "zeros"):
        super().__init__()
        self.phases = Conv2d(channels_in, 4 * channels_out, kernel_size=2, padding=1, padding_mode=padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, 2H, 2W)."""
        return _Interleaved.apply(self.phases(x))


class Residual(nn.Module):
    """x + W₂ GELU(W₁ D x): D a convolution of each channel alone, W at each position across channels; C, 2C, C channels.

    The block of ConvNeXt (Liu et al. 2022) without its normalisation, and with 3×3 instead of 7×7 kernels, since CPUs are
    slow at D. As there, W₁ and W₂ are linear layers on channels that come last in memory, which is faster than 1×1
    convolutions. W₁ has no bias beside that of D, and does no worse without. W₂ begins at zero: a new block changes nothing.
    """

    def __init__(self, channels: int, padding_mode: str = "zeros"):
        super().__init__()
        self.within = Conv2d(channels, channels, kernel_size=3, padding=1, padding_mode=padding_mode, groups=channels)
        widen, narrow = nn.Linear(channels, 2 * channels, bias=False), nn.Linear(2 * channels, channels)
        self.across = nn.Sequential(widen, nn.GELU(), narrow)
        nn.init.zeros_(narrow.weight)
        nn.init.zeros_(narrow.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        return x + self.across(self.within(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AcrossPositions(nn.Linear):
    """One linear layer across the positions of a map, the same for every channel: the smallest global layer.

    With a ``reach`` it is no longer global: a position sees those at most that many rows and columns away, each with a
    weight of its own (a locally connected layer). It then starts as the identity, at which the model is that without the
    layer: one random number in the place of many is a bad start. Without a reach it starts from random numbers.
    """

    def __init__(self, height: int, width: int, reach: int | None = None):
        super().__init__(height * width, height * width)
        self.reach = reach
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        distance = torch.maximum(*((axis.flatten()[:, None] - axis.flatten()).abs() for axis in (y, x)))
        near = (distance <= (max(height, width) if reach is None else reach)).float()
        self.register_buffer("near", near, persistent=False)
        if reach is not None:
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        return F.linear(x.flatten(2), self.weight * self.near, self.bias).view_as(x)


class ToVector(nn.Module):
    """Map to vector, position by position, with the channels of a position together: as they lie where channels come last.

    ``nn.Flatten`` goes channel by channel: it copies, and the gradients that come back make the layers before it slow.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, h · w · C)."""
        return x.permute(0, 2, 3, 1).flatten(1)


class ToMap(nn.Module):
    """Undoes ``ToVector``."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.last = (height, width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, h · w · C) -> (N, C, h, w)."""
        return x.unflatten(1, self.last).permute(0, 3, 1, 2)


class WithCoordinates(nn.Module):
    """Appends two channels that say where a position lies: row and column, from −1 to 1 (Liu et al. 2018, CoordConv)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C + 2, h, w)."""
        axes = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[-2:])
        return torch.cat([x, torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, -1, -1)], dim=1)


class VAE(nn.Module):
    """Encoder trunk, bottleneck, decoder trunk, distribution of pixels.

    Args:
        arm: ``spatial``, ``dense`` or ``mixed``.
        image_shape: (C, H, W) of the training images. ``spatial`` takes images of any other size as well.
        stride: pixels per position of the map along each axis: 4, 2 or 1 (7×7, 14×14 or 28×28 for a 28×28 image).
        latent_channels: channels of the map.
        latents: length of the vector of ``dense``; by default as many as the map would have.
        hidden: channels of the two stages of the trunks, the outer one first.
        blocks: residual blocks of each trunk, where it meets the bottleneck.
        kernel_size: side of the kernels of the two convolutions next to the map, odd; sets the receptive field.
        padding: ``zeros``, or ``circular``: the image is a torus, and nothing tells a position from another.
        coordinates: whether those two convolutions are told where each position lies.
        reach: of the linear layers of ``mixed``, in positions along each axis; None: across the whole map.
        sides: where ``mixed`` has them: in ``encoder``, ``decoder`` or ``both``.
        likelihood: of the pixels given the latents, see ``pixels``.

    Raises:
        ValueError: unknown arm, stride or padding; an even kernel; fewer than 0 blocks; ``latents`` for a map;
            ``kernel_size`` or ``coordinates`` for ``dense``, which has no convolution next to the latent; ``reach`` or
            ``sides`` for another arm than ``mixed``; an unknown likelihood.
        ImageSizeError: the images are smaller than the stride.
    """

    def __init__(
        self,
        arm: str = "spatial",
        image_shape: tuple[int, int, int] = (1, 28, 28),
        stride: int = 4,
        latent_channels: int = 1,
        latents: int | None = None,
        hidden: tuple[int, int] = (16, 32),
        blocks: int = 0,
        kernel_size: int = 3,
        padding: str = "zeros",
        coordinates: bool = False,
        reach: int | None = None,
        sides: str = "both",
        likelihood: str = "bernoulli",
    ):
        super().__init__()
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
        if stride not in STRIDES:
            raise ValueError(f"unknown stride {stride}: choose one of {STRIDES}")
        if latents is not None and arm != "dense":
            raise ValueError(f"latents={latents} is for the dense arm; {arm} has latent_channels per position of its map")
        if padding not in PADDINGS:
            raise ValueError(f"unknown padding {padding!r}: choose one of {', '.join(PADDINGS)}")
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size}: expected an odd number, so that a position is in the middle of its field"
            )
        if blocks < 0:
            raise ValueError(f"blocks={blocks}: expected a number of at least 0")
        if arm == "dense" and (kernel_size != 3 or coordinates):
            raise ValueError("kernel_size and coordinates are of the convolutions next to a map: the dense arm has none")
        if reach is not None and arm != "mixed":
            raise ValueError(f"reach={reach} is of the layers across positions: only the mixed arm has them, not {arm}")
        if sides not in SIDES:
            raise ValueError(f"unknown sides {sides!r}: choose one of {', '.join(SIDES)}")
        if sides != "both" and arm != "mixed":
            raise ValueError(f"sides={sides!r} is of the layers across positions: only the mixed arm has them, not {arm}")
        if likelihood not in pixels.LIKELIHOODS:
            raise ValueError(f"unknown likelihood {likelihood!r}: choose one of {', '.join(pixels.LIKELIHOODS)}")
        self.arm, self.image_shape, self.stride, self.latent_channels = arm, tuple(image_shape), stride, latent_channels
        self.padding, self.coordinates, self.likelihood, self.hidden = padding, coordinates, likelihood, tuple(hidden)
        channels, outer, inner = image_shape[0], *hidden
        height, width = self.grid(image_shape[1:])
        self.encoder = nn.Sequential(
            *(_down(channels, outer, stride == 4, padding), nn.GELU(), _down(outer, inner, stride >= 2, padding), nn.GELU()),
            *(Residual(inner, padding) for _ in range(blocks)),
        )
        self.decoder = nn.Sequential(
            *(Residual(inner, padding) for _ in range(blocks)),
            *(nn.GELU(), _up(inner, outer, stride >= 2, padding), nn.GELU(), _up(outer, channels, stride == 4, padding)),
        )
        self.log_scale = None if likelihood == "bernoulli" else nn.Parameter(torch.full((channels,), LOG_SCALE))
        if arm == "dense":
            self.latent_shape = (latents or latent_channels * height * width,)
            flat = inner * height * width
            self.to_latent = nn.Sequential(ToVector(), nn.Linear(flat, 2 * self.latent_shape[0]))
            self.from_latent = nn.Sequential(nn.Linear(self.latent_shape[0], flat), ToMap(inner, height, width))
        else:
            self.latent_shape = (latent_channels, height, width)
            across = [
                [AcrossPositions(height, width, reach)] if arm == "mixed" and sides in ("both", side) else []
                for side in ("encoder", "decoder")
            ]
            where = [WithCoordinates()] if coordinates else []
            same = {"kernel_size": kernel_size, "padding": kernel_size // 2, "padding_mode": padding}
            more = 2 * len(where)
            self.to_latent = nn.Sequential(*where, Conv2d(inner + more, 2 * latent_channels, **same), *across[0])
            self.from_latent = nn.Sequential(*across[1], *where, Conv2d(latent_channels + more, inner, **same))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the map of an image of this size, rounded up to whole positions.

        Raises:
            ImageSizeError: the image is smaller than the stride.
        """
        if min(size) < self.stride:
            raise ImageSizeError(f"an image of {size[0]}×{size[1]} pixels is smaller than the stride of {self.stride}")
        return math.ceil(size[0] / self.stride), math.ceil(size[1] / self.stride)

    def encode(self, x: Tensor) -> Independent:
        """q(z|x): a Gaussian with diagonal covariance over (N, *latent shape).

        Args:
            x: images with values in [0, 1], (N, C, H, W); padded by their edge pixels to a multiple of the stride.

        Raises:
            ImageSizeError: smaller than the stride, or another size than ``dense`` and ``mixed`` were made for.
        """
        height, width = self.grid(tuple(x.shape[-2:]))
        self._check_grid((height, width))
        padding = (0, width * self.stride - x.shape[-1], 0, height * self.stride - x.shape[-2])
        if any(padding):
            x = F.pad(x, padding, mode="replicate")
        mean, log_variance = _at_least_single(self.to_latent(self.encoder(x))).chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_variance).exp(), validate_args=False), mean.ndim - 1, validate_args=False)

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Independent:
        """p(x|z): pixels independent given z, over (N, C, H, W), with the distribution of ``likelihood``.

        Args:
            z: latents, (N, C, h, w), or (N, d) for ``dense``.
            size: height and width to crop to; by default the training size for the training grid, else the whole canvas.

        Raises:
            ValueError: latents of the wrong shape.
        """
        if z.ndim != 1 + len(self.latent_shape) or z.shape[1] != self.latent_shape[0]:
            raise ValueError(f"latents of shape {tuple(z.shape)}: expected (N, {', '.join(map(str, self.latent_shape))})")
        if self.arm != "dense":
            self._check_grid(tuple(z.shape[-2:]))
        if size is None and tuple(z.shape[1:]) == self.latent_shape:
            size = self.image_shape[1:]
        output = _at_least_single(self.decoder(self.from_latent(z)))
        if size is not None:
            output = output[..., : size[0], : size[1]]
        return pixels.distribution(self.likelihood, output, self.log_scale)

    def prior(self, size: tuple[int, int] | None = None) -> Independent:
        """p(z) = N(0, I) over the latent shape of one image of the given size (default: the training size)."""
        shape = self.latent_shape
        if size is not None and self.arm != "dense":
            shape = (self.latent_channels, *self.grid(size))
        reference = next(self.parameters())
        zeros = torch.zeros(shape, device=reference.device, dtype=reference.dtype)
        return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), len(shape), validate_args=False)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Rate KL(q(z|x) ‖ p(z)) and distortion −log p(x|z) of each image, (N,) each, in nats: −ELBO is their sum.

        Args:
            x: what ``observed`` returned, (N, C, H, W).
            noise: standard normal, (N, *latent shape).
        """
        q, size = self.encode(x), (x.shape[-2], x.shape[-1])
        rate = kl_divergence(q, self.prior(size))
        return rate, -self.decode(reparametrise(q, noise), size).log_prob(x)

    def observed(self, images: Tensor, uniform: Tensor) -> Tensor:
        """``pixels.observed`` for the likelihood of this model."""
        return pixels.observed(self.likelihood, images, uniform)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        expected = self.grid(self.image_shape[1:])
        if self.arm != "spatial" and grid != expected:
            raise ImageSizeError(
                f"the {self.arm} arm was made for images of {self.image_shape[1:]} (a grid of {expected}), "
                f"not for a grid of {grid}: its layers across positions have one size; use the spatial arm"
            )


def _down(channels_in: int, channels_out: int, halve: bool, padding: str) -> nn.Module:
    if halve:
        return Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1, padding_mode=padding)
    return Conv2d(channels_in, channels_out, kernel_size=3, padding=1, padding_mode=padding)


def _up(channels_in: int, channels_out: int, double: bool, padding: str) -> nn.Module:
    if double:
        return SubpixelUp(channels_in, channels_out, padding)
    return Conv2d(channels_in, channels_out, kernel_size=3, padding=1, padding_mode=padding)


def _at_least_single(x: Tensor) -> Tensor:
    """Single precision where layers compute in 16 bits, whose steps are as wide as those of grey values."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reparametrise(q: Independent, noise: Tensor) -> Tensor:
    """Z = μ + σ·ε, differentiable in μ and σ (Kingma & Welling 2014); ``noise``: standard normal, the shape of z."""
    return q.mean + q.base_dist.scale * noise


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rate KL(q(z|x) ‖ p(z)) and distortion −log p(x|z), shown once (``pixels.observed``), one latent draw per image.

    Args:
        model: on any device.
        images: uint8, (N, C, H, W).
        seed: of binarisation and latent noise; the same seed shows every model the same binary images.

    Returns:
        Two tensors (N,), nats per image, on the CPU. Their sum is −ELBO.
    """
    device = next(model.parameters()).device
    shown, noise = noise_sources(seed)
    parts = []
    for batch in images.cpu().split(BATCH):
        x = model.observed(batch, torch.rand(batch.shape, generator=shown)).to(device)
        parts.append(model(x, torch.randn(len(x), *model.latent_shape, generator=noise).to(device)))
    rates, distortions = zip(*parts, strict=True)
    return torch.cat(rates).cpu(), torch.cat(distortions).cpu()


def noise_sources(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """Random numbers for pixels and for latents, apart, so that models with other latents see the same binary images."""
    return torch.Generator().manual_seed(2 * seed + 1), torch.Generator().manual_seed(2 * seed + 2)
