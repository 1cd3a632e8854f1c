"""Flows: invertible maps from noise to latents, as a chain of layers or as the solution of a differential equation.

Flow matching (Lipman et al. 2023, Liu et al. 2023): on the straight line z_t = (1 − t) ε + t z a network learns the velocity
z − ε, and following its mean from noise ε at t = 0 arrives at z at t = 1. With a VAE around it this is latent diffusion at a
small scale (Rombach et al. 2022). The noise need not be N(0, I): from a mixture fitted to the latents the way is shorter.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import zuko
from torch import Tensor, nn

from vaenb import gpu
from vaenb.canvas import tiled
from vaenb.cpu import keep_memory
from vaenb.gaussians import Mixture
from vaenb.priors import Convolutional, Learned, StandardNormal

TILE = 256  # patches along each side of what the velocity is computed of at once: so large that halos cost little


class Flow(Learned):
    """Masked autoregressive flow of rational-quadratic splines (Durkan et al. 2019; Papamakarios et al. 2017), from zuko.

    Args:
        shape, training: see ``Learned``.
        transforms, hidden: of the flow, and of the network in each.
        passes: through each network that a sample takes: latents are drawn in at most as many groups, one after the other.
            Those of a group do not see each other in a transform. None: one by one.
    """

    differentiable = True

    def __init__(
        self, shape: Sequence[int], transforms: int = 2, hidden: int = 256, passes: int | None = None, **training: float
    ):
        super().__init__(shape, **training)
        options = {"transforms": transforms, "hidden_features": (hidden, hidden), "bins": 4, "passes": passes}
        self.flow = zuko.flows.NSF(self.size, **options)

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.flow().transform.inv(self._noise((n, self.size), generator)).view(n, *shape)

    def _log_prob(self, z: Tensor) -> Tensor:
        return self.flow().log_prob(z.flatten(1))


class Block(nn.Module):
    """Residual block whose first activations are scaled and shifted by what the time says."""

    def __init__(self, hidden: int, dilation: int = 1):
        super().__init__()
        self.see = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation)
        self.mix, self.time = nn.Conv2d(hidden, hidden, 1), nn.Linear(hidden, 2 * hidden)
        for layer in (self.mix, self.time):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """(N, hidden, h, w) and (N, hidden) -> (N, hidden, h, w)."""
        scale, shift = self.time(time)[..., None, None].chunk(2, dim=1)
        return h + self.mix(F.gelu(self.see(F.gelu(h)) * (1 + scale) + shift))


class FlowMatching(Convolutional):
    """The velocity is a residual convolutional network.

    Args:
        shape, patch, position_aware, training: see ``priors.Convolutional``.
        hidden: width.
        dilations: of the blocks, one after the other; it sees one position farther than their sum.
        steps: of the midpoint rule, two evaluations of the network each.
        components: of a mixture of Gaussians to start from, which has one shape only; 0: from N(0, I), on any grid.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: int = 64,
        dilations: Sequence[int] = (1, 1, 1, 1),
        steps: int = 12,
        components: int = 0,
        **options: float,
    ):
        super().__init__(shape, hidden, **options)
        self.steps, self.any_grid, self.halo = steps, not components, 1 + sum(dilations)
        self.start = Mixture(shape, components, sweeps=(8, 0)) if components else StandardNormal(shape)
        self.start.requires_grad_(False)
        self.first = nn.Conv2d(self.channels, hidden, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(16, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.blocks = nn.ModuleList(Block(hidden, dilation) for dilation in dilations)
        self.last = nn.Conv2d(hidden, self.channels, 1)
        nn.init.zeros_(self.last.weight)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 7) / 2, persistent=False)

    def least(self) -> int:
        """As many as what it starts from."""
        return self.start.least()

    def parameter_count(self) -> int:
        """Those of the network and of what it starts from."""
        return super().parameter_count() - sum(p.numel() for p in self.start.parameters()) + self.start.parameter_count()

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """dz/dt at (N, C, h, w) in patches and times (N,)."""
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        h = self.first(z) + self.where(z.shape[-2:])
        for block in self.blocks:
            h = block(h, time)
        return self.last(F.gelu(h))

    def _fit(self, z: Tensor) -> None:
        self.start._fit(z)
        noise = self.start.sample(len(z), seed=int(torch.randint(2**62, ())))
        super()._fit(torch.stack([noise, z], dim=1))

    def loss(self, pairs: Tensor) -> Tensor:
        """Mean square error of the velocity, summed over latents; of noise and latents, (N, 2, *shape)."""
        noise, z = (self.to_patches(part) for part in pairs.unbind(dim=1))
        count = len(z)
        t = gpu.drawn(lambda: torch.rand(count), z.device)
        along = t[:, None, None, None]
        error = self.velocity((1 - along) * noise + along * z, t) - (z - noise)
        return error.square().flatten(1).sum(dim=1).mean()

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        z = self.to_patches(self.start._sample(n, shape, generator))
        if max(z.shape[-2:]) > TILE // 2:  # whose blocks are as large as the C library gives back
            keep_memory()
        for step in range(self.steps):
            start, middle = (z.new_full((n,), (step + part) / self.steps) for part in (0, 0.5))
            halfway = z + self._tiled_velocity(z, start) / (2 * self.steps)
            z = z + self._tiled_velocity(halfway, middle) / self.steps
        return self.from_patches(z)

    def _tiled_velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """The same as ``velocity``, on large grids in the memory of a tile."""
        if self.position is not None:  # it has to know where in the whole it is
            return self.velocity(z, t)
        return tiled(lambda part: self.velocity(part, t), z, self.halo, TILE)

    def _log_prob(self, z: Tensor) -> Tensor:
        """Unbiased up to the steps: the divergence along the way back to noise is estimated with a random direction.

        Chen et al. 2018 (instantaneous change of variables), Grathwohl et al. 2019 (Hutchinson's estimator).
        """
        z, change = self.to_patches(z), 0
        for step in reversed(range(self.steps)):
            end, middle = (z.new_full((len(z),), (step + part) / self.steps) for part in (1, 0.5))
            halfway = z - self.velocity(z, end) / (2 * self.steps)
            direction = torch.randint(2, z.shape).to(z) * 2 - 1
            with torch.enable_grad():
                halfway = halfway.detach().requires_grad_()
                speed = self.velocity(halfway, middle)
                (along,) = torch.autograd.grad(speed, halfway, direction)
            change = change + (along * direction).flatten(1).sum(dim=1) / self.steps
            z = z - speed.detach() / self.steps
        return self.start._log_prob(self.from_patches(z)) - change
