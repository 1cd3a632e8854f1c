"""Receptive fields of decoders, and what they imply for samples: which pixels cannot depend on each other.

Theorem T1: let the latents be independent between positions, and pixels independent given the latents. Then two sets of
pixels whose receptive fields do not meet are independent, whatever the weights. Proof: each set is a function of its own
latents and its own pixel noise, and these are independent. (Block factors of independent fields are finitely dependent:
Burton, Goulet & Meester 1993.)
"""

from collections.abc import Iterable

import numpy as np
from torch import nn
from torch.distributions import Distribution, Independent

from vaenb.models import VAE, AcrossPositions, Residual, SubpixelUp, WithCoordinates

POINTWISE = (nn.GELU, nn.Identity, WithCoordinates)  # what a position sees does not grow; coordinates are constants


class GlobalLayerError(ValueError):
    """A layer through which every pixel sees every latent, or one whose field is not known."""


class DependentPriorError(ValueError):
    """A theorem needs latents that are independent between positions; this prior's are not."""


def receptive_field(model: VAE, size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which positions of the map each pixel of a decoded image can see, exactly, from the layers.

    All layers are separable in what they see: pixel (y, x) sees position (i, j) if and only if ``rows[y, i]`` and
    ``columns[x, j]``. Weights that happen to be zero can make a field smaller, nothing can make it larger.

    Args:
        model: of the ``spatial`` arm, or ``mixed`` with a ``reach`` or with its layer on the side of the encoder.
        size: height and width of the image; by default the training size.

    Returns:
        Two boolean arrays, (H, h) and (W, w).

    Raises:
        GlobalLayerError: ``dense``, and a decoder of ``mixed`` without a ``reach``.
    """
    size = size or tuple(model.image_shape[1:])
    fields = []
    for axis, (pixels, positions) in enumerate(zip(size, model.grid(size), strict=True)):
        fields.append(field_of([*model.from_latent, *model.decoder], positions, axis)[:pixels])
    return fields[0], fields[1]


def field_of(layers: Iterable[nn.Module], count: int, axis: int = 0) -> np.ndarray:
    """Which of ``count`` inputs each output of a chain of layers sees along one axis: boolean, (outputs, count).

    Raises:
        GlobalLayerError: a layer whose field is not known.
    """
    seen = np.eye(count, dtype=bool)
    for layer in layers:
        seen = _step(layer, axis, len(seen)) @ seen
    return seen


def share_a_latent(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Which pairs of pixels see a common position: boolean, (H·W, H·W). The others are independent, by T1."""
    return np.kron(rows @ rows.T, columns @ columns.T)


def independent_share(model: VAE, prior: Distribution | None = None, size: tuple[int, int] | None = None) -> float:
    """Share of the pairs of different pixels that are exactly independent in samples from the model (T1).

    Args:
        model: as in ``receptive_field``.
        prior: of the map; by default N(0, I).
        size: as in ``receptive_field``.

    Raises:
        GlobalLayerError: as ``receptive_field``.
        DependentPriorError: as ``require_independent``.
    """
    require_independent(prior or model.prior(size))
    rows, columns = receptive_field(model, size)
    pixels = len(rows) * len(columns)
    meeting = int((rows @ rows.T).sum()) * int((columns @ columns.T).sum())  # both axes must meet, so the counts multiply
    return 1 - (meeting - pixels) / (pixels * (pixels - 1))


def dependence_range(rows: np.ndarray, columns: np.ndarray) -> int:
    """Largest distance max(|Δy|, |Δx|) at which two pixels can see a common position; beyond it all are independent."""
    reach = 0
    for field in (rows, columns):
        first, second = np.nonzero(field @ field.T)
        reach = max(reach, int(np.abs(first - second).max()))
    return reach


def require_independent(prior: Distribution) -> None:
    """T1 needs a prior over a map that says of itself that its positions are independent.

    Raises:
        DependentPriorError: it is not a torch ``Independent`` over (C, h, w).
    """
    if not isinstance(prior, Independent) or prior.base_dist.event_shape or len(prior.event_shape) != 3:
        raise DependentPriorError(
            f"{type(prior).__name__} over {tuple(prior.event_shape)}: exact independence of pixels (T1) needs a prior whose "
            "latents are independent between the positions of a map (C, h, w), such as model.prior()"
        )


def _step(layer: nn.Module, axis: int, count: int) -> np.ndarray:
    """Which of ``count`` inputs each output of a layer sees along one axis: boolean, (outputs, count)."""
    if isinstance(layer, POINTWISE):
        return np.eye(count, dtype=bool)
    if isinstance(layer, Residual):
        return _step(layer.within, axis, count)  # its own position is in the middle of what that sees
    if isinstance(layer, SubpixelUp):
        return _step(layer.phases, axis, count).repeat(2, axis=0)[1:-1]
    if isinstance(layer, AcrossPositions) and layer.reach is not None:
        return np.abs(np.arange(count)[:, None] - np.arange(count)) <= layer.reach
    if not isinstance(layer, nn.Conv2d):
        raise GlobalLayerError(
            f"{type(layer).__name__} in the decoder: receptive fields are defined for convolutions; through a layer across "
            "positions every pixel sees every latent, and T1 says nothing. Use the spatial arm, or mixed with a reach"
        )
    kernel, stride, dilation, padding = (
        getattr(layer, name)[axis] for name in ("kernel_size", "stride", "dilation", "padding")
    )
    outputs = (count + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    taps = np.arange(outputs)[:, None] * stride - padding + np.arange(kernel) * dilation
    if layer.padding_mode == "circular":
        taps = taps % count
    return (taps[:, :, None] == np.arange(count)).any(axis=1)
