"""The optimiser: steps of Adam, but along orthogonal matrices where weights are matrices (Muon, Jordan et al. 2024).

The gradient of a matrix is mostly a few large singular values. Momentum whose singular values are all set to about one moves
all directions alike, so that maps take fewer epochs than with Adam; FC-VAEs do not. torch.optim.Muon takes no convolutions,
and computes in 16 bits.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vaenb.models import AcrossPositions

BETAS = (0.9, 0.99)  # of Adam; a shorter memory of the squared gradient suits a few thousand steps
MOMENTUM = 0.95
SIZE = 0.4  # root mean square over the entries of a step, about, in units of the learning rate
QUINTIC = (3.4445, -4.7750, 2.0315)  # takes singular values from a few thousandths to 1 to about one (Jordan et al. 2024)
ITERATIONS = 5
DAMPING = 1e-3  # of squared singular values, as a share of their sum: trains better than none, and lets rounding grow less
LARGEST = 256  # shorter side of a matrix, beyond which making it orthogonal would take longer than the network does


class Muon(torch.optim.Adam):
    """Adam, and orthogonalised momentum for the parameters of groups with ``matrices: True``, as ``groups`` makes them.

    Args:
        params: parameters or groups of them.
        lr: learning rate of all.
    """

    def __init__(self, params: Iterable[Any], lr: float):
        super().__init__(params, lr=lr, betas=BETAS, fused=True)
        self._step_supports_amp_scaling = False  # a loss scaled for 16 bits: unscale gradients before the step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; PyTorch's takes a hundredth of a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients that the parameters hold."""
        found = [(group, weight) for group in self.param_groups if group.get("matrices") for weight in group["params"]]
        gradients = [weight.grad for _, weight in found]
        for _, weight in found:
            weight.grad = None  # not for Adam
        super().step()
        alike: dict[Any, list[tuple[Tensor, Tensor, float | Tensor]]] = {}  # matrices of one shape take their step together
        for (group, weight), gradient in zip(found, gradients, strict=True):
            if gradient is None:
                continue
            weight.grad = gradient
            state = self.state[weight]
            if not state:  # Adam looks for the step of whatever has a state
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
            state["step"] += 1
            matrix = gradient.lerp(state["momentum"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM).flatten(1)
            size = group["lr"] * SIZE * (max(matrix.shape) * group.get("share", 1.0)) ** 0.5
            alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append((weight, matrix, size))
        for members in alike.values():
            steps = orthogonalised(torch.stack([matrix for _, matrix, _ in members]))
            for (weight, _, size), step in zip(members, steps, strict=True):
                step = step.view(weight.shape)
                if isinstance(size, Tensor):  # in a recorded ``gpu.Step``
                    weight.sub_(step * size)
                else:
                    weight.sub_(step, alpha=size)


def groups(model: nn.Module, *others: nn.Module) -> list[dict[str, Any]]:
    """For ``Muon``: weights of a model that mix channels or positions are matrices; the rest, and all of others, are Adam's.

    A convolution is the matrix (channels out, channels in × taps); one with a single channel in mixes none. Layers for
    hundreds of latents are Adam's, too: they are too large. Of weights across positions with a reach only a share is in use.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p.shape[1] > 1 and min(p.flatten(1).shape) <= LARGEST]
    limited = {
        id(layer.weight): layer
        for layer in model.modules()
        if isinstance(layer, AcrossPositions) and layer.reach is not None
    }
    chosen = set(map(id, matrices))
    rest = [p for module in (model, *others) for p in module.parameters() if id(p) not in chosen]
    shares = [
        {"share": limited[id(p)].near.mean().item(), "params": [p], "matrices": True} for p in matrices if id(p) in limited
    ]
    return [{"params": [p for p in matrices if id(p) not in limited], "matrices": True}, *shares, {"params": rest}]


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U Vᵀ for each matrix U S Vᵀ: singular values s become s / √(s² + ``DAMPING`` Σ s²), times 0.68 to 1.13.

    By a Newton-Schulz iteration, whose polynomials are those of the Gram matrix of the shorter side: small products.

    Args:
        matrices: (B, m, n).
    """
    high = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if high else matrices
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-15)  # what is smaller fades
    whole = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device).expand(len(wide), -1, -1)
    gram = torch.baddbmm(whole, wide, wide.mT, beta=DAMPING)
    a, b, c = QUINTIC
    for i in range(ITERATIONS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the polynomial, less its constant a
        whole = torch.baddbmm(whole, rest, whole, beta=a)
        if i + 1 < ITERATIONS:
            half = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(half, half, rest, beta=a)
    result = whole @ wide
    return result.mT if high else result
