"""Priors: what latents z can be drawn from. One interface for all, from N(0, I) to what is learned from the latents.

A prior is fitted to draws from the aggregate posterior q(z), one or more for each training image, while encoder and decoder
stay as they are. Replacing N(0, I) by a prior r then raises the bound on log p(x) by exactly E_q[log r(z) − log N(z; 0, I)]
nats: the price of what N(0, I) leaves out (Hoffman & Johnson 2016). Here are N(0, I) and what other priors have in common;
they are in ``gaussians``, ``autoregressive``, ``flows`` and ``two_stage``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from vaenb import gpu
from vaenb.muon import Muon
from vaenb.progress import Progress

BATCH = 500  # latents through a prior at once: what fits into a cache is faster


class Prior(nn.Module):
    """A distribution over latents of one shape; those with ``any_grid`` also over maps of any height and width.

    Parameters and buffers are all that a fitted prior consists of: ``state_dict`` keeps it, ``to`` moves it to a device.

    Args:
        shape: of the latents of one image: (C, h, w), or (d,).
    """

    any_grid = False
    differentiable = False  # whether a VAE can be trained through ``negative_log_prob``
    at_once = BATCH  # how many ``sample`` draws at once

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.size = math.prod(self.shape)  # latents per image
        self.register_buffer("device_of", torch.zeros(()), persistent=False)

    def fit(self, z: Tensor, seed: int = 0) -> Self:
        """Fit to draws from the aggregate posterior.

        Args:
            z: (N, *shape), in random order.
            seed: of everything random in the fit.

        Returns:
            Itself.

        Raises:
            ValueError: latents of another shape, NaN, or too few of them; the message says how many it needs.
        """
        self._check(z)
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"latents of shape {tuple(z.shape)}: fitted to (N, {', '.join(map(str, self.shape))}) only")
        if len(z) < (least := self.least()):
            raise ValueError(f"{len(z)} latents: {type(self).__name__} over {self.shape} needs at least {least} of them")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self._fit(z.detach().to(self.device_of))
        return self

    def least(self) -> int:
        """How many latents ``fit`` needs at least."""
        return 2

    def parameter_count(self) -> int:
        """How many numbers a fit decides on."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def sample(self, n: int, grid: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
        """``n`` draws, (n, *shape), or (n, C, *grid).

        Args:
            n: how many.
            grid: height and width of the map; by default those of the latents it was fitted to.
            seed: random numbers are drawn on the CPU, so that they are the same on every device.

        Raises:
            ValueError: another grid, of a prior that has only one or of a vector; or a negative number.
        """
        if n < 0:
            raise ValueError(f"{n} samples: expected a number of at least 0")
        if grid is not None and tuple(grid) != self.shape[1:] and not (self.any_grid and len(self.shape) == 3):
            raise ValueError(f"{type(self).__name__} has latents of {self.shape} only and none on a grid of {tuple(grid)}")
        shape = self.shape if grid is None else (self.shape[0], *grid)
        generator = torch.Generator().manual_seed(seed)
        parts = [self._sample(min(self.at_once, n - i), shape, generator) for i in range(0, n, self.at_once)]
        return torch.cat(parts) if parts else self.device_of.new_zeros(0, *shape)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of each, (N,), nats; where it is an estimate, with the same random numbers every time.

        Raises:
            ValueError: latents of another shape, or NaN.
        """
        self._check(z)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # once a call: errors of its latents must not go together
            return torch.cat([self._log_prob(part.to(self.device_of)) for part in z.split(BATCH)])

    def negative_log_prob(self, z: Tensor) -> Tensor:
        """−log r(z) of each, (N,), nats, differentiable in z and in the parameters."""
        return -self._log_prob(z)

    def _check(self, z: Tensor) -> None:
        one = tuple(z.shape[1:])
        if one != self.shape and not (self.any_grid and len(one) == 3 == len(self.shape) and one[0] == self.shape[0]):
            raise ValueError(f"latents of shape {tuple(z.shape)}: expected (N, {', '.join(map(str, self.shape))})")
        if not torch.isfinite(z).all():
            raise ValueError("latents that are NaN or infinite: did the training of the VAE diverge?")

    def _fit(self, z: Tensor) -> None:
        raise NotImplementedError

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _log_prob(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator).to(self.device_of.device)


class StandardNormal(Prior):
    """N(0, I): the prior that the VAE was trained with."""

    any_grid = True
    differentiable = True

    def _fit(self, z: Tensor) -> None:
        pass

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self._noise((n, *shape), generator)

    def _log_prob(self, z: Tensor) -> Tensor:
        return standard_normal(z)


class Learned(Prior):
    """A prior with parameters learned by Adam. Subclasses say what its loss is.

    Args:
        shape: of the latents.
        epochs: passes over the latents that ``fit`` is given.
        batch_size, learning_rate: of Adam; a short warm-up, then linear decay to zero.
    """

    def __init__(self, shape: Sequence[int], epochs: int = 1, batch_size: int = 128, learning_rate: float = 2e-3):
        super().__init__(shape)
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate

    def loss(self, z: Tensor) -> Tensor:
        """What ``fit`` minimises, for a batch: its negative log density, or a stand-in for it."""
        return self.negative_log_prob(z).mean()

    def _fit(self, z: Tensor) -> None:
        minimise(self.loss, self, z, type(self).__name__, self.epochs, self.batch_size, self.learning_rate)


class Convolutional(Learned):
    """A prior whose network is convolutional, so that it can be drawn on maps of any size; base of two.

    Latents are taken in patches, so that large maps cost no more than small ones. Without ``position_aware`` the network is
    told nothing of positions, but for the zeros that it finds beyond the border.

    Args:
        shape: of the latents; a vector (d,) is a map of one position with d channels.
        hidden: channels of the network.
        patch: side of the patches in positions; their latents become the channels of one position of the network.
        position_aware: whether the network is told where in the map a position lies, for data that are centred.
        training: see ``Learned``.

    Raises:
        ValueError: a map that the patches do not divide.
    """

    any_grid = True

    def __init__(self, shape: Sequence[int], hidden: int, patch: int = 1, position_aware: bool = False, **training: float):
        super().__init__(shape, **training)
        self.patch, self.channels = patch, self.shape[0] * patch**2
        self.patches(self.shape[1:] or (1, 1))
        layers = (nn.Conv2d(16, hidden, 1), nn.GELU(), nn.Conv2d(hidden, hidden, 1))
        self.position = nn.Sequential(*layers) if position_aware else None

    def patches(self, grid: Sequence[int]) -> tuple[int, int]:
        """Height and width in patches of a map of this height and width."""
        if any(side % self.patch for side in grid):
            raise ValueError(f"a map of {tuple(grid)} cannot be divided into patches of {self.patch}×{self.patch} positions")
        return grid[0] // self.patch, grid[1] // self.patch

    def where(self, grid: Sequence[int]) -> Tensor | float:
        """What the network is told of each position of a grid of patches, (1, hidden, h, w): 0 if it is told nothing."""
        if self.position is None:
            return 0.0
        like = {"device": self.device_of.device, "dtype": self.device_of.dtype}
        axes = (torch.linspace(-1, 1, side, **like) for side in grid)
        frequencies = math.pi / 2 * torch.arange(1, 5, **like)
        angles = torch.stack(torch.meshgrid(*axes, indexing="ij"))[:, None] * frequencies[:, None, None]
        return self.position(torch.cat([angles.sin(), angles.cos()]).flatten(0, 1)[None])

    def to_patches(self, z: Tensor) -> Tensor:
        """(N, C, H, W), or (N, d) -> (N, channels, h, w)."""
        self.patches(z.shape[2:] or (1, 1))
        return nn.functional.pixel_unshuffle(z if z.ndim == 4 else z[..., None, None], self.patch)

    def from_patches(self, z: Tensor) -> Tensor:
        """The inverse of ``to_patches``."""
        z = nn.functional.pixel_shuffle(z, self.patch)
        return z if len(self.shape) == 3 else z.flatten(1)


def minimise(
    loss: Callable[[Tensor], Tensor],
    module: nn.Module,
    data: Tensor,
    name: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    groups: list[dict[str, Any]] | None = None,
) -> None:
    """Minimise the mean of a loss over data, with a short warm-up and linear decay of the learning rate to zero.

    Args:
        loss: of a batch, see ``gpu.Step``.
        module: whose parameters are learned.
        data: (N, ...), batched along the first axis in random order.
        name: for the progress line.
        epochs, batch_size, learning_rate: as their names say.
        groups: of parameters, for ``muon.Muon``; by default those of the module, by Adam.

    Raises:
        ValueError: the loss became NaN or infinite.
    """
    steps = math.ceil(len(data) / batch_size)
    optimiser, place = Muon(groups or module.parameters(), learning_rate), next(module.parameters()).device
    data, latents = data.to(place), math.prod(data.shape[1:])

    def work(batch: Tensor) -> Tensor:
        value = loss(batch)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10 * math.sqrt(latents))
        optimiser.step()
        return value.detach()

    take = gpu.Step(work, optimiser, place)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        learning_rate,
        total_steps=epochs * steps + 1,
        pct_start=0.05 if epochs * steps != 19 else 0.1,  # it would divide by the number of steps of the warm-up, less one
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    with torch.enable_grad(), Progress(name, epochs * steps) as progress:
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(data)).split(batch_size):
                value = take(data[batch.to(place)]).item()
                schedule.step()
                total += value * len(batch)
                progress.step()
            progress.milestone(f"epoch {epoch + 1}/{epochs}, loss {total / len(data):.3f}")
            if not math.isfinite(total):
                raise ValueError(f"the loss of {name} became {total}: lower its learning_rate")
    optimiser.zero_grad()  # gradients that lie in the memory of a recorded step


def standard_normal(z: Tensor, first: int = 1) -> Tensor:
    """Log N(z; 0, I), nats, summed over the dimensions from ``first`` on."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(first).sum(dim=first)
