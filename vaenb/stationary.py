"""A prior for pictures of land, on maps of any size: flow matching from a patchwork of Gaussian fields.

Most of what varies between tiles of land is the same all over a tile: is it sea, wood or town? Convolutions that start from
white noise would have to agree on it across the tile, and hardly do; of diffusion models of pictures the same is known, and
mended by *offset noise*, the same for a whole picture. Here the noise has the correlations of the latents over all distances
(``GaussianField``), other ones for each kind of land (``Patchwork``), and the flow moves each kind to latents of its kind.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vaenb.flows import FlowMatching
from vaenb.priors import BATCH, Learned, Prior

WIDTHS = (0, 1, 2, 4, 8, 16)  # of the smoothing, in positions; the last ones are as wide as a tile
KIND_WIDTH, COARSE = 5, 8  # kinds change over 5 × 8 positions, wider than a tile is
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
        total = self.mean[:, None, None].expand(n, *shape)
        for smoothing, matrix in zip(WIDTHS, self.mixing, strict=True):
            smooth = self.smooth_noise(smoothing, n, shape, generator)
            total = total + torch.einsum("ij,njyx->niyx", matrix, smooth)
        return total

    def smooth_noise(self, smoothing: int, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """White noise smoothed to one of ``WIDTHS``, of variance 1, (n, *shape)."""
        return _smoothed(getattr(self, f"kernel_{smoothing}"), n, shape, self._noise, generator)

    def _log_prob(self, z: Tensor) -> Tensor:
        if z[0].numel() > LARGEST:
            raise ValueError(f"a map of {tuple(z.shape[1:])} latents: the density is computed of at most {LARGEST} at once")
        mean = self.mean.repeat_interleave(z.shape[2] * z.shape[3])
        covariance = self.covariance((z.shape[2], z.shape[3]))
        covariance = covariance + 1e-5 * torch.eye(len(covariance)).to(covariance)  # smooth noise alone is singular
        return MultivariateNormal(mean, covariance, validate_args=False).log_prob(z.flatten(1))


class Patchwork(Prior):
    """Several kinds of Gaussian fields, side by side: which one holds where is the largest of as many smooth noises.

    Kinds are clusters (k-means) of the latents of tiles by their means and log variances; to each a ``GaussianField`` is
    fitted. The noises that decide between them have offsets by which each kind is as frequent as among tiles, and vary over
    distances wider than a tile, of which the tiles say nothing: how large a wood is, is a choice made here. All that is
    drawn comes from white noises by convolutions and functions of one position, so it is stationary (but for a lattice of
    ``COARSE`` positions, between which the deciding noises are interpolated).

    Args:
        shape: of the latents, (C, h, w).
        kinds: how many, at most.
    """

    any_grid = True

    def __init__(self, shape: Sequence[int], kinds: int = 16):
        super().__init__(shape)
        channels = self.shape[0]
        self.field = GaussianField(shape)
        self.register_buffer("mean", torch.zeros(kinds, channels))
        self.register_buffer("mixing", self.field.mixing.repeat(kinds, 1, 1, 1))
        self.register_buffer("offset", torch.zeros(kinds))
        self.register_buffer("centres", torch.zeros(kinds, 2 * channels))
        self.register_buffer("spread", torch.ones(2 * channels))
        self.register_buffer("deciding", _kernel(KIND_WIDTH), persistent=False)

    def least(self) -> int:
        """A few tiles of each kind."""
        return 2 * len(self.mean)

    def parameter_count(self) -> int:
        """Those of the fields, and how frequent each kind is."""
        return len(self.mean) * (self.field.parameter_count() + 1)

    def kinds_of(self, z: Tensor) -> Tensor:
        """The kind of each map, int64, (N,)."""
        return torch.cdist(_appearance(z) / self.spread, self.centres).argmin(dim=1)

    def draw(self, blend: Tensor, generator: torch.Generator) -> Tensor:
        """Fields of kinds that are given, (n, C, h, w).

        Args:
            blend: share of each kind at each position, (n, kinds, h, w), of sum 1.
            generator: of the noise.
        """
        shape = (self.shape[0], *blend.shape[2:])
        total = torch.einsum("nkyx,kc->ncyx", blend, self.mean)
        for index, smoothing in enumerate(WIDTHS):
            smooth = self.field.smooth_noise(smoothing, len(blend), shape, generator)
            matrix = torch.einsum("nkyx,kij->nijyx", blend, self.mixing[:, index])
            total = total + torch.einsum("nijyx,njyx->niyx", matrix, smooth)
        return total

    def draw_kinds(self, n: int, grid: Sequence[int], generator: torch.Generator) -> Tensor:
        """Which kind holds where, int64, (n, h, w)."""
        coarse = [math.ceil((side - 1) / COARSE) + 1 for side in grid]
        noise = _smoothed(self.deciding, n, (len(self.mean), *coarse), self._noise, generator)
        size = [COARSE * (side - 1) + 1 for side in coarse]
        fine = F.interpolate(noise, size=size, mode="bilinear", align_corners=True)[..., : grid[0], : grid[1]]
        return (fine + self.offset[:, None, None]).argmax(dim=1)

    def one_hot(self, kinds: Tensor) -> Tensor:
        """(n, h, w) -> (n, kinds, h, w), for ``draw``."""
        return F.one_hot(kinds, len(self.mean)).movedim(-1, 1).to(self.mean)

    def _fit(self, z: Tensor) -> None:
        appearance = _appearance(z)
        self.spread = appearance.std(dim=0).clamp_min(1e-6)
        clusters = KMeans(len(self.mean), n_init=3, random_state=torch.initial_seed() % 2**32)
        kinds = torch.from_numpy(clusters.fit_predict((appearance / self.spread).cpu().numpy())).long().to(z.device)
        self.centres = torch.from_numpy(clusters.cluster_centers_).to(appearance)
        count = torch.bincount(kinds, minlength=len(self.mean))
        for kind in range(len(self.mean)):
            field = GaussianField(self.shape).to(z.device)
            field._fit(z[kinds == kind])
            self.mean[kind], self.mixing[kind] = field.mean, field.mixing
        self.offset = _offsets(count / count.sum())

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.draw(self.one_hot(self.draw_kinds(n, shape[1:], generator)), generator)

    def _log_prob(self, z: Tensor) -> Tensor:
        raise ValueError("a patchwork has no density in closed form: its kinds are decided by fields of their own")


class StationaryFlow(FlowMatching):
    """``flows.FlowMatching`` from a ``Patchwork`` fitted to the latents, on maps of any size.

    It learns to move a field of each kind to latents of that kind: what is known of the kind is not lost on the way, as it
    would be if fields and latents were paired at random. At the borders its convolutions repeat what is there: zeros, which
    only the borders of tiles have, would teach it to tell tiles by their borders, and a large map has few.

    Args:
        shape: of the latents, (C, h, w).
        hidden, dilations, steps, patch, epochs, batch_size, options: see ``flows.FlowMatching``.
        kinds: see ``Patchwork``.
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
        kinds: int = 16,
        **options: float,
    ):
        super().__init__(shape, hidden, dilations, steps, patch=patch, epochs=epochs, batch_size=batch_size, **options)
        self.start = Patchwork(shape, kinds)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "replicate"

    def _fit(self, z: Tensor) -> None:
        self.start._fit(z)
        kinds = self.start.kinds_of(z)[:, None, None].expand(-1, *self.shape[1:])
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        noise = [self.start.draw(self.start.one_hot(part), generator) for part in kinds.split(BATCH)]
        Learned._fit(self, torch.stack([torch.cat(noise), z], dim=1))

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


def _smoothed(
    kernel: Tensor, n: int, shape: Sequence[int], noise: Callable[..., Tensor], generator: torch.Generator
) -> Tensor:
    """White noise smoothed along both axes, (n, *shape); what lies beyond the border is drawn, too."""
    channels, height, width = shape
    more = len(kernel) - 1
    white = noise((n * channels, 1, height + more, width + more), generator)
    smooth = F.conv2d(F.conv2d(white, kernel[None, None, None]), kernel[None, None, :, None])
    return smooth.view(n, channels, height, width)


def _appearance(z: Tensor) -> Tensor:
    """Mean and log variance of each channel of a map, (N, 2 C)."""
    return torch.cat([z.mean(dim=(2, 3)), z.var(dim=(2, 3)).clamp_min(1e-12).log()], dim=1)


def _offsets(frequency: Tensor, draws: int = 20_000) -> Tensor:
    """Offsets b for which the largest of ε_k + b_k, with ε_k ~ N(0, 1), is k as often as ``frequency`` says."""
    noise = torch.randn(draws, len(frequency), generator=torch.Generator().manual_seed(0)).to(frequency)
    target, offset = frequency.clamp_min(1 / draws), torch.zeros_like(frequency)
    for _ in range(200):
        found = torch.bincount((noise + offset).argmax(dim=1), minlength=len(frequency)) / draws
        offset = offset + 0.3 * (target.log() - found.clamp_min(1 / draws).log())
    return offset - offset.mean()
