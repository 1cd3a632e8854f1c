"""Autoregressive convolutional prior: each position of the map given those above it and to its left, in nats, exactly.

Masked convolutions after PixelCNN (van den Oord et al. 2016). The first kernel is wide, so that there is no blind spot
within its reach; a mixture of Gaussians with full covariances over the channels of a position is the output (Salimans et
al. 2017 use logistics).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaenb.priors import Convolutional, standard_normal

REACH = 6  # of the first kernel: all of a 7×7 map


class CausalConv(nn.Conv2d):
    """A convolution that sees the rows above and its own row up to the position itself, or, if strict, up to its left.

    Args:
        channels_in, channels_out: of the layer.
        reach: rows above, and columns to either side.
        strict: without the position itself.
    """

    def __init__(self, channels_in: int, channels_out: int, reach: int, strict: bool = False):
        super().__init__(channels_in, channels_out, (reach + 1, 2 * reach + 1))
        self.reach = reach
        mask = torch.ones(self.weight.shape[2:])
        mask[-1, reach + (not strict) :] = 0
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():  # as wide as for a layer with as few inputs
            self.weight *= (mask.numel() / mask.sum()).sqrt()

    def pad(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> with what lies outside of the map, zeros."""
        return F.pad(x, (self.reach, self.reach, self.reach, 0))

    def valid(self, padded: Tensor) -> Tensor:
        """Where the whole kernel fits."""
        return F.conv2d(padded, self.weight * self.mask, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, h, w) -> (N, C_out, h, w)."""
        return self.valid(self.pad(x))


class Block(nn.Module):
    """Residual block: h + mix(gelu(see(gelu(h))))."""

    def __init__(self, hidden: int):
        super().__init__()
        self.see, self.mix = CausalConv(hidden, hidden, reach=1), nn.Conv2d(hidden, hidden, 1)
        nn.init.zeros_(self.mix.weight)

    def forward(self, h: Tensor) -> Tensor:
        """(N, hidden, h, w) -> the same shape."""
        return h + self.mix(F.gelu(self.see(F.gelu(h))))


class Autoregressive(Convolutional):
    """Log r(z) = Σ_i log r(z_i | z_<i), positions in reading order.

    Args:
        shape, patch, position_aware, training: see ``priors.Convolutional``.
        hidden, blocks: width and depth.
        components: of the mixture at a position.
    """

    differentiable = True

    def __init__(self, shape: Sequence[int], hidden: int = 64, blocks: int = 3, components: int = 8, **options: float):
        super().__init__(shape, hidden, **options)
        c = self.channels
        self.first = CausalConv(c, hidden, REACH, strict=True)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(blocks))
        self.components = components
        self.last = nn.Conv2d(hidden, components * (1 + c + c * (c + 1) // 2), 1)
        rows, columns = torch.tril_indices(c, c)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture at each position given the positions before it.

        Args:
            z: latents in patches, (N, channels, h, w).

        Returns:
            Positions in reading order, M = N·h·w of them: log weights (M, K), means (M, K, C), and lower triangular L
            (M, K, C, C) with inverse covariance LᵀL.
        """
        h = self.first(z) + self.where(z.shape[-2:])
        for block in self.blocks:
            h = block(h)
        return self._mixture(h)

    def _mixture(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, k = self.channels, self.components
        out = self.last(F.gelu(h)).movedim(1, -1).reshape(-1, k, 1 + c + c * (c + 1) // 2)
        log_weights, means, entries = out.split([1, c, c * (c + 1) // 2], dim=-1)
        lower = entries.new_zeros(len(out), k, c, c)
        lower[..., self.rows, self.columns] = torch.where(self.rows == self.columns, entries.clamp(-6, 6).exp(), entries)
        return log_weights.squeeze(-1).log_softmax(dim=-1), means, lower

    def _log_prob(self, z: Tensor) -> Tensor:
        z = self.to_patches(z)
        log_weights, means, lower = self.conditionals(z)
        at = z.movedim(1, -1).reshape(-1, 1, self.channels)
        whitened = (lower @ (at - means).unsqueeze(-1)).squeeze(-1)
        log_volume = lower.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        return torch.logsumexp(log_weights + log_volume + standard_normal(whitened, 2), dim=1).view(len(z), -1).sum(dim=1)

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Position by position; what earlier positions have computed is kept, so all of them cost as much as one pass."""
        height, width = self.patches(shape[1:] or (1, 1))
        z = self.first.pad(self.device_of.new_zeros(n, self.channels, height, width))
        kept = [b.see.pad(z.new_zeros(n, b.see.in_channels, height, width)) for b in self.blocks]
        where = self.where((height, width))
        for y in range(height):
            for x in range(width):
                h = self.first.valid(z[:, :, y : y + REACH + 1, x : x + 2 * REACH + 1])
                h = h + (where[:, :, y : y + 1, x : x + 1] if torch.is_tensor(where) else 0)
                for block, memory in zip(self.blocks, kept, strict=True):
                    memory[:, :, y + 1, x + 1] = F.gelu(h)[..., 0, 0]
                    h = h + block.mix(F.gelu(block.see.valid(memory[:, :, y : y + 2, x : x + 3])))
                log_weights, means, lower = self._mixture(h)
                chosen = torch.multinomial(log_weights.exp().cpu(), 1, generator=generator)[:, 0].to(z.device)
                each = torch.arange(n, device=z.device)
                noise = self._noise((n, self.channels, 1), generator)
                drawn = means[each, chosen] + torch.linalg.solve_triangular(lower[each, chosen], noise, upper=False)[..., 0]
                z[:, :, y + REACH, x + REACH] = drawn
        return self.from_patches(z[:, :, REACH:, REACH:-REACH])
