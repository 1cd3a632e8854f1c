"""A prior for pictures of land, on maps of any size: flow matching from noise that already correlates as the latents do.

Most of what varies between tiles of land is the same all over a tile: is it sea, wood or desert? Convolutions that start
from white noise would have to agree on it across the tile, and hardly do; of diffusion models of pictures the same is known,
and mended by *offset noise*, the same for a whole picture. Here it is noise of many widths, fitted to the latents.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vaenb.flows import FlowMatching
from vaenb.priors import Prior

WIDTHS = (0, 1, 2, 4, 8, 16)  # of the smoothing, in positions; the last ones are as wide as a tile
LARGEST = 4096  # latents of a map whose density is computed: it takes a matrix


class GaussianField(Prior):
    """The stationary Gaussian field whose correlations are nearest to those of the latents, on maps of any size.

    A sum of white noises, each smoothed by a Gaussian of another width and mixed over the channels by a matrix of its own:
    Cov(z(p), z(p + r)) = Σ_w A_w A_wᵀ ρ_w(r_y) ρ_w(r_x), where ρ_w is the correlation of noise smoothed to the width w. The
    matrices minimise the squared error of the covariances along rows and columns, averaged over positions and images.

    Args:
        shape: of the latents, (C, h, w).
    """

    any_grid = True

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape)
        channels = self.shape[0]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("mixing", torch.eye(channels).repeat(len(WIDTHS), 1, 1) / len(WIDTHS) ** 0.5)
        for width in WIDTHS:
            self.register_buffer(f"kernel_{width}", _kernel(width), persistent=False)

    def parameter_count(self) -> int:
        """Means and symmetric covariances."""
        channels = self.shape[0]
        return channels + len(WIDTHS) * channels * (channels + 1) // 2

    def correlation(self, count: int) -> Tensor:
        """ρ_w(r) for each width and r = 0 … count − 1 along an axis, (widths, count)."""
        rows = []
        for width in WIDTHS:
            kernel = getattr(self, f"kernel_{width}")
            padded = F.pad(kernel, (0, count))
            rows.append(torch.stack([(kernel * padded[r : r + len(kernel)]).sum() for r in range(count)]))
        return torch.stack(rows)

    def covariance(self, grid: tuple[int, int]) -> Tensor:
        """Of all latents of a map of this height and width, flattened: (C·h·w, C·h·w)."""
        sides = [self.correlation(side) for side in grid]
        index = [(torch.arange(side)[:, None] - torch.arange(side)).abs() for side in grid]
        total = 0
        for matrix, rows, columns in zip(self.mixing, *sides, strict=True):
            total = total + torch.kron(matrix @ matrix.T, torch.kron(rows[index[0]], columns[index[1]]))
        return total

    def _fit(self, z: Tensor) -> None:
        self.mean = z.mean(dim=(0, 2, 3))
        z, count = z - self.mean[:, None, None], min(z.shape[2:])
        measured = torch.stack([_at_distance(z, r) for r in range(count)])
        correlation, weight = self.correlation(count), torch.arange(count, 0, -1).to(z)  # pairs at each distance
        factors = torch.linalg.cholesky(measured[0] + 1e-4 * torch.eye(len(self.mean)).to(z)) / len(WIDTHS) ** 0.5
        factors = factors.repeat(len(WIDTHS), 1, 1).requires_grad_()
        solver = torch.optim.LBFGS([factors], max_iter=300, line_search_fn="strong_wolfe")

        def error() -> Tensor:
            solver.zero_grad()
            expected = torch.einsum("wr,wij->rij", correlation, factors @ factors.mT)
            loss = (weight * (expected - measured).square().sum(dim=(1, 2))).sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(error)
        self.mixing = factors.detach()

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        channels, height, width = shape
        total = self.mean[:, None, None].expand(n, -1, height, width)
        for smoothing, matrix in zip(WIDTHS, self.mixing, strict=True):
            kernel = getattr(self, f"kernel_{smoothing}")
            more = len(kernel) - 1  # noise beyond the border is smoothed into the map
            noise = self._noise((n * channels, 1, height + more, width + more), generator)
            smooth = F.conv2d(F.conv2d(noise, kernel[None, None, None]), kernel[None, None, :, None])
            total = total + torch.einsum("ij,njyx->niyx", matrix, smooth.view(n, channels, height, width))
        return total

    def _log_prob(self, z: Tensor) -> Tensor:
        if z[0].numel() > LARGEST:
            raise ValueError(f"a map of {tuple(z.shape[1:])} latents: the density is computed of at most {LARGEST} at once")
        mean = self.mean.repeat_interleave(z.shape[2] * z.shape[3])
        covariance = self.covariance((z.shape[2], z.shape[3]))
        covariance = covariance + 1e-5 * torch.eye(len(covariance)).to(covariance)  # smooth noise alone is singular
        return MultivariateNormal(mean, covariance, validate_args=False).log_prob(z.flatten(1))


class StationaryFlow(FlowMatching):
    """``flows.FlowMatching`` from a ``GaussianField`` fitted to the latents, on maps of any size.

    At the borders its convolutions repeat what is there: zeros, which only the borders of tiles have, would teach it to
    tell tiles by their borders, and a large map has few.

    Args:
        shape: of the latents, (C, h, w).
        hidden, dilations, steps, patch, options: see ``flows.FlowMatching``.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: int = 96,
        dilations: Sequence[int] = (1, 2, 1, 2),
        steps: int = 8,
        patch: int = 2,
        epochs: int = 8,
        batch_size: int = 32,
        **options: float,
    ):
        super().__init__(shape, hidden, dilations, steps, patch=patch, epochs=epochs, batch_size=batch_size, **options)
        self.start = GaussianField(shape)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "replicate"

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        whole = [-(-side // self.patch) * self.patch for side in shape[1:]]  # in whole patches, of which some is cut off
        return super()._sample(n, (shape[0], *whole), generator)[..., : shape[1], : shape[2]]


def _kernel(width: int) -> Tensor:
    """Gaussian of this standard deviation, cut off at three of them, such that smoothed white noise has variance 1."""
    taps = torch.arange(-3 * width, 3 * width + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / max(width, 1)) ** 2)
    return kernel / kernel.square().sum().sqrt()


def _at_distance(z: Tensor, r: int) -> Tensor:
    """Covariance of the channels of z, (N, C, h, w) of mean 0, with those r positions away along an axis, (C, C)."""
    along = z[..., r:], z[..., : z.shape[3] - r]
    down = z[..., r:, :], z[..., : z.shape[2] - r, :]
    products = [torch.einsum("nixy,njxy->ij", a, b) / (a.numel() / a.shape[1]) for a, b in (along, down)]
    return (sum(products) + sum(products).T) / 4
