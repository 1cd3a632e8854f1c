"""Gaussian priors: for each position alone, for all latents together, and mixtures of these."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vaenb.priors import Prior, standard_normal
from vaenb.progress import Progress


class PositionGaussian(Prior):
    """Independent Gaussians, each with the mean and variance of its latent: all marginals to second order, no dependence."""

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape)
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("scale", torch.ones(self.shape))

    def parameter_count(self) -> int:
        """Means and variances."""
        return 2 * self.size

    def _fit(self, z: Tensor) -> None:
        _check_varies(z)
        self.mean, self.scale = z.mean(dim=0), z.std(dim=0)

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.mean + self.scale * self._noise((n, *shape), generator)

    def _log_prob(self, z: Tensor) -> Tensor:
        return standard_normal((z - self.mean) / self.scale) - self.scale.log().sum()


class _SquareLengths(torch.autograd.Function):
    """|W_k z − c_k|² of latents z, (n, d), for components with W, (K, d, d), and c, (K, d): (n, K).

    One matrix product there and two back, and little else that goes through all K·d·n entries, which leave the cache:
    autograd would write them four times more. Where no gradient is wanted, some components at once. First derivatives only,
    and not for ``torch.func``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, centre: Tensor) -> Tensor:
        """See the class. Latents come last in memory, where sums over the d entries are faster."""
        columns = z.T.contiguous()
        if not any(ctx.needs_input_grad):  # some components at once, which stay in the cache
            parts = zip(weight.split(50), centre.split(50), strict=True)
            return torch.cat([_whitened(columns, *part).square_().sum(dim=1) for part in parts]).T
        white = _whitened(columns, weight, centre)
        ctx.save_for_backward(z, weight, white)
        return white.square().sum(dim=1).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        z, weight, white = ctx.saved_tensors
        change = (white * (2 * gradient.T.contiguous()[:, None])).flatten(0, 1)
        of_weight = (change @ z).view_as(weight)
        return (weight.flatten(0, 1).T @ change).T, of_weight, -change.sum(dim=1).view(weight.shape[:2])


def _whitened(columns: Tensor, weight: Tensor, centre: Tensor) -> Tensor:
    """W_k z − c_k for latents in columns, (d, n): (K, d, n)."""
    flat = torch.addmm(centre.flatten()[:, None], weight.flatten(0, 1), columns, beta=-1)
    return flat.view(*centre.shape, -1)


class Mixture(Prior):
    """Mixture of Gaussians with full covariances, by expectation maximisation (Dempster et al. 1977).

    It starts from clusters (k-means) and makes most of its sweeps on a part of the latents. On a CPU and with (8, 4) sweeps,
    in single precision, this took a seventh of the time of scikit-learn's mixture; it runs on a GPU, and its density is
    differentiable, so that a VAE can be trained together with it.

    Args:
        shape: of the latents.
        components: how many Gaussians.
        sweeps: of expectation maximisation over the first ``PART`` latents, and then over all.
        ridge: added to the variances, which keeps covariances of few latents from overfitting.
        shrinkage: latents, beside its own, from which a component takes the covariance that all have within theirs, in the
            mean: it overfits less, and what has lost its latents keeps a width (like Fraley & Raftery 2007).
    """

    PART = 60_000
    LEAST_SHARE = 1e-5  # most components have no part in most latents
    ALL_AGAIN = 4  # sweeps of which the first one asks all components, and the others those that had a part
    differentiable = True
    at_once = 10_000  # a component's draws take one solve, however many they are

    def __init__(
        self,
        shape: Sequence[int],
        components: int,
        sweeps: tuple[int, int] = (5, 2),
        ridge: float = 1e-2,
        shrinkage: float = 1.0,
    ):
        super().__init__(shape)
        self.sweeps, self.ridge, self.shrinkage = sweeps, ridge, shrinkage
        self.log_weights = nn.Parameter(torch.full((components,), -math.log(components)))
        self.means = nn.Parameter(torch.zeros(components, self.size))
        # Lower triangular W with inverse covariance Wᵀ W; what lies above the diagonal is zero and stays so.
        self.whitening = nn.Parameter(torch.eye(self.size).repeat(components, 1, 1))

    def least(self) -> int:
        """For each component as many latents as its mean has entries, and one more."""
        return len(self.means) * (self.size + 1)

    def parameter_count(self) -> int:
        """Weights, means and symmetric covariances."""
        return len(self.means) * (1 + self.size + self.size * (self.size + 1) // 2)

    def _fit(self, z: Tensor) -> None:
        flat = z.flatten(1)
        part = flat[: self.PART]
        clusters = MiniBatchKMeans(
            len(self.means), batch_size=4096, n_init=1, max_iter=20, random_state=torch.initial_seed() % 2**32
        )
        labels = torch.from_numpy(clusters.fit_predict(part.cpu().numpy())).long().to(z.device)
        members = [(labels == k).nonzero()[:, 0] for k in range(len(self.means))]
        self._maximise(*self._statistics(part, members, [part.new_ones(len(own)) for own in members]))
        for latents, sweeps in zip((part, flat), self.sweeps, strict=True):
            self.refine(latents, sweeps)

    @torch.no_grad()
    def refine(self, z: Tensor, sweeps: int = 1) -> None:
        """More sweeps of expectation maximisation, from where it is; z: (N, ...).

        Of many latents the Gaussians follow each ``PART``, with what the others said when last asked: as good after three
        sweeps as else after more than four. What had no part in a latent is not asked again in the next few sweeps
        (incremental and sparse, Neal & Hinton 1998).
        """
        flat = z.to(self.device_of.device).flatten(1)
        parts = flat.chunk(max(1, len(flat) // self.PART))
        known: dict[int, tuple[Tensor, ...]] = {}
        members: dict[int, list[Tensor]] = {}
        with Progress(type(self).__name__, sweeps * len(parts)) as progress:
            for sweep in range(sweeps):
                for i, part in enumerate(parts):
                    if sweep % self.ALL_AGAIN == 0:
                        share = self._responsibilities()(part)
                        members[i] = [each.nonzero()[:, 0] for each in share > self.LEAST_SHARE]
                    else:
                        share = self._shares_of_members(part, members[i])
                    weights = [each[own] for each, own in zip(share, members[i], strict=True)]
                    del share  # large
                    known[i] = self._statistics(part, members[i], weights)
                    self._maximise(*(sum(each) for each in zip(*known.values(), strict=True)))
                    progress.step()

    @torch.no_grad()
    def tempered(self, temperature: float) -> Self:
        """The same mixture with covariances ``temperature``² times as large, a density like any other.

        Below 1 it keeps to where the components are densest, as samplers of flows do (Kingma & Dhariwal 2018).

        Raises:
            ValueError: a temperature that is not positive and finite.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}: expected a positive number, 1 to leave the mixture as it is")
        tempered = copy.deepcopy(self)
        tempered.whitening.div_(temperature)
        return tempered

    def _statistics(self, flat: Tensor, members: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, sums and sums of squares for each component over its members among latents, (n, d), with their weights."""
        counts, sums, squares = (torch.zeros_like(x) for x in (self.log_weights, self.means, self.whitening))
        for k, (own, weight) in enumerate(zip(members, weights, strict=True)):
            latents = flat[own]
            weighted = latents.T * weight
            counts[k], sums[k], squares[k] = weight.sum(), weighted.sum(dim=1), weighted @ latents
        return counts, sums, squares

    @torch.no_grad()
    def _maximise(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        """The weights, means and covariances that fit these ``_statistics`` best."""
        counts = counts.clamp_min(1e-3)
        self.means.copy_(sums / counts[:, None])
        scatter = squares - counts[:, None, None] * self.means[:, :, None] * self.means[:, None, :]
        within = scatter.sum(dim=0) / counts.sum()
        covariances = (scatter + self.shrinkage * within) / (counts + self.shrinkage)[:, None, None]
        covariances.diagonal(dim1=1, dim2=2).add_(self.ridge)
        identity = torch.eye(self.size).to(squares)
        lower = torch.linalg.cholesky(covariances)
        self.whitening.copy_(torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False))
        self.log_weights.copy_((counts / counts.sum()).log())

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.log_weights.exp().cpu(), n, replacement=True, generator=generator)
        chosen, noise = chosen.to(self.means.device), self._noise((n, self.size), generator)
        z = self.means[chosen]
        for component in chosen.unique():
            own = chosen == component  # W (z − μ) = ε
            z[own] += torch.linalg.solve_triangular(self.whitening[component], noise[own].T, upper=False).T
        return z.view(n, *shape)

    def _log_prob(self, z: Tensor) -> Tensor:
        return torch.logsumexp(self._log_joint(z.flatten(1)), dim=1)

    @torch.no_grad()
    def _responsibilities(self) -> Callable[[Tensor], Tensor]:
        """The share of each component in each latent, (n, d) -> (K, n), faster than by ``_log_joint``.

        A Gaussian's log density is linear in the entries of z and in the products of two of them, so that one matrix product
        gives those of all components. Rounding is larger, which is why densities are not computed like this.
        """
        lower = self.whitening.tril()
        precisions = lower.mT @ lower
        first, second = torch.triu_indices(self.size, self.size, device=lower.device)
        quadratic = precisions[:, first, second] * torch.where(first == second, -0.5, -1.0)
        centre = self.means.mean(dim=0)  # products are small around it, and rounding is
        means = self.means - centre
        linear = (precisions @ means[:, :, None])[:, :, 0]
        constant = self._log_peaks() - 0.5 * (linear * means).sum(dim=1)
        # Latents whose products fit into a cache, and so many that operations are not too small; GPUs want larger ones.
        at_once = max(32, (600_000 if lower.device.type == "cpu" else 30_000_000) // len(first))

        def share(flat: Tensor) -> Tensor:
            shares = flat.new_empty(len(self.means), len(flat))
            for part, into in zip(flat.split(at_once), shares.split(at_once, dim=1), strict=True):
                z = (part - centre).T.contiguous()
                products = torch.cat([z[i] * z[i:] for i in range(len(z))])  # in the order of ``triu_indices``
                into.copy_(torch.addmm(constant[:, None], linear, z).addmm_(quadratic, products).softmax(dim=0))
            return shares

        return share

    def _shares_of_members(self, flat: Tensor, members: list[Tensor]) -> Tensor:
        """The share of each component in each latent, (n, d) -> (K, n), where only ``members`` can have one."""
        log_joint = flat.new_full((len(members), len(flat)), -math.inf)
        peaks = self._log_peaks()
        for k, own in enumerate(members):
            log_joint[k, own] = peaks[k] - 0.5 * ((flat[own] - self.means[k]) @ self.whitening[k].T).square().sum(dim=1)
        return log_joint.softmax(dim=0)

    def _log_joint(self, flat: Tensor) -> Tensor:
        """Log density of component and latent, (n, d) -> (n, K)."""
        lower = self.whitening.tril()
        centres = (lower @ self.means[:, :, None]).squeeze(2)
        # The few latents of a step at once, many latents in parts that fit into a cache
        squares = [_SquareLengths.apply(part, lower, centres) for part in flat.split(128)]
        return self._log_peaks() - 0.5 * torch.cat(squares)

    def _log_peaks(self) -> Tensor:
        """Log weight times density of each component at its mean, (K,)."""
        log_volume = self.whitening.diagonal(dim1=1, dim2=2).abs().log().sum(dim=1)
        return self.log_weights.log_softmax(dim=0) + log_volume - 0.5 * self.size * math.log(2 * math.pi)


class FullGaussian(Mixture):
    """A Gaussian with the mean and the covariance of all latents: dependence to second order."""

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape, components=1, ridge=1e-6)

    def _fit(self, z: Tensor) -> None:
        _check_varies(z)
        flat, everything = z.flatten(1), torch.arange(len(z), device=z.device)
        centre = flat.mean(dim=0)  # first, or squares of what lies far from 0 would lose the variance
        self._maximise(*self._statistics(flat - centre, [everything], [z.new_ones(len(z))]))
        with torch.no_grad():
            self.means.add_(centre)


def _check_varies(z: Tensor) -> None:
    if not (z.std(dim=0) > 0).all():
        raise ValueError("latents that never vary have no density: are some channels or positions constant?")
