"""What samples of photographs look like in numbers: for ``ladder.Repaired.measure``.

Land has no strokes and no middle, so beside features it is measured by what is stationary in it: how pixels correlate at a
distance (``two_point``) and how much there is of each spatial frequency (``spectrum``).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaenb import dependence, gpu
from vaenb.classifier import classifier, extract
from vaenb.ladder import Repaired
from vaenb.quality import compare, frechet_distance
from vaenb.samples import decoded, halves, known_features, two_point_correlation
from vaenb.worth import HELD_OUT


def prior_quality(repaired: Repaired) -> dict[str, Any]:
    """Pictures from a prior beside reconstructions and data.

    Returns:
        Statistics of ``quality.compare`` against the reference images; ``to_reconstructions``: Fréchet distance to the
        reconstructions of these; ``two_point``, ``spectrum`` and ``variance`` of ``samples``, ``reconstructions`` and
        ``data``.
    """
    run = repaired.run
    reference = halves(run.images)[1]
    pictures = {
        "samples": decoded(run.model, gpu.there(repaired.prior).sample(len(reference), seed=HELD_OUT)),
        "reconstructions": decoded(run.model, dependence.aggregate(run.model, reference, HELD_OUT + 1)),
        "data": reference.float() / 255,
    }
    network = classifier(run.images.name)
    drawn, kept = (extract(network, pictures[kind]) for kind in ("samples", "reconstructions"))
    return {
        **compare(drawn, known_features(run.images.name)),
        "to_reconstructions": frechet_distance(drawn[0], kept[0]),
        **stationary(pictures),
    }


def reconstruction_quality(repaired: Repaired) -> dict[str, Any]:
    """The same for reconstructions of images other than the reference: what the best of all priors would reach."""
    run = repaired.run
    encoded, reference = halves(run.images)
    network = classifier(run.images.name)
    first, second = (
        extract(network, decoded(run.model, dependence.aggregate(run.model, images, HELD_OUT + i)))
        for i, images in enumerate((encoded, reference))
    )
    return {
        **compare(first, known_features(run.images.name)),
        "to_reconstructions": frechet_distance(first[0], second[0]),
    }


def stationary(pictures: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Two-point correlation, spectrum and variance of the brightness of each kind of picture, (N, C, H, W) in [0, 1]."""
    bright = {kind: p.mean(dim=1) for kind, p in pictures.items()}
    bright = {kind: p - p.mean() for kind, p in bright.items()}
    return {
        "two_point": {kind: two_point_correlation(p) for kind, p in bright.items()},
        "spectrum": {kind: spectrum(p).tolist() for kind, p in bright.items()},
        "variance": {kind: p.var().item() for kind, p in bright.items()},
    }


def spectrum(centred: Tensor) -> np.ndarray:
    """Power by spatial frequency: mean |Fourier coefficient|² / pixels over rings one cycle per picture wide.

    A Hann window keeps the borders, which do not meet, from counting as edges.

    Args:
        centred: (N, H, W), square, of mean 0.

    Returns:
        (H // 2 − 1,): at 1, 2, … cycles per picture.
    """
    side = centred.shape[-1]
    window = torch.hann_window(side, periodic=False)
    window = window[:, None] * window / window.square().mean()
    power = torch.fft.fft2(centred * window).abs().square().mean(dim=0) / side**2
    frequency = torch.fft.fftfreq(side) * side
    ring = torch.hypot(frequency[:, None], frequency).round().long()
    return np.array([power[ring == radius].mean().item() for radius in range(1, side // 2)])


def relative_error(curve: list[float], target: list[float]) -> float:
    """Root of the squared error of a curve over that of the target, from the second value on (the first is 1 for all)."""
    ours, theirs = np.array(curve)[1:], np.array(target)[1:]
    return float(np.sqrt(np.square(ours - theirs).sum() / np.square(theirs).sum()))
