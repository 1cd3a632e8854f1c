"""Distributions of pixels given the output of a decoder, and the pictures that each is a distribution of.

    bernoulli   binary pixels, one with a probability of their own: handwriting, binarised anew whenever it is seen
    logistic    256 grey values per channel: a logistic distribution cut into as many bins (Salimans et al. 2017)
    gaussian    256 grey values per channel: a normal distribution cut into as many bins

The last two have one scale for each channel, learned with the rest: a fixed one would weigh distortion against rate by
fiat (σ-VAE, Rybkin et al. 2021). They are probabilities of the grey values as stored, so nats turn into bits per dimension.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent

from vaenb.data import binarise

LIKELIHOODS = ("bernoulli", "logistic", "gaussian")
LEVELS = 255  # steps between the darkest and the brightest grey value
FAR = 1e6  # standard deviations out, where nothing is left and gradients are still finite
LEAST_LOG_SCALE = -7.0  # a quarter of a grey value: a narrower distribution is nearly all in one bin


class Discretised(Distribution):
    """A location family cut into the bins around the grey values 0, 1/255, …, 1; the outermost bins are unbounded.

    Args:
        location: of the distribution that is cut, any shape.
        scale: positive, broadcast to it.
        family: ``logistic`` or ``gaussian``.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, location: Tensor, scale: Tensor, family: str):
        self.location, self.scale, self.family = location, scale, family
        super().__init__(location.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location, as a grey value that a picture can have; the mean but for the cut."""
        return self.location.clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of grey values in {0, 1/255, …, 1}, nats."""
        # Contiguous, as the value is: elementwise operations on two layouts of memory are slow.
        centred, half = (value - self.location.contiguous()) / self.scale, 0.5 / LEVELS / self.scale
        upper, lower = centred + half, centred - half
        lowest, highest = value < 0.5 / LEVELS, value > 1 - 0.5 / LEVELS
        if self.family == "logistic":  # F(upper) − F(lower) = F(upper) F(−lower) (1 − exp(lower − upper))
            below, above = F.logsigmoid(upper).where(~highest, 0), F.logsigmoid(-lower).where(~lowest, 0)
            return below + above + torch.log(-torch.expm1(-2 * half)).where(~(lowest | highest), 0)
        # Mirrored to the lower tail, where cumulative probabilities keep their digits
        mirrored = (centred > 0) & ~lowest | highest
        top, bottom = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
        log_top, log_bottom = (torch.special.log_ndtr(x) for x in (top, bottom.masked_fill(lowest | highest, -FAR)))
        return log_top + torch.log(-torch.expm1((log_bottom - log_top).clamp_max(-1e-7)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Grey values in {0, 1/255, …, 1}."""
        shape = self._extended_shape(torch.Size(sample_shape))
        if self.family == "gaussian":
            noise = torch.randn(shape, device=self.location.device)
        else:
            noise = torch.rand(shape, device=self.location.device).clamp(1e-6, 1 - 1e-6).logit()
        return ((self.location + self.scale * noise).clamp(0, 1) * LEVELS).round() / LEVELS


def distribution(likelihood: str, output: Tensor, log_scale: Tensor | None = None) -> Independent:
    """p(x|z) over (N, C, H, W) from what the decoder puts out: logits, or grey values less ½.

    Args:
        likelihood: of ``LIKELIHOODS``.
        output: (N, C, H, W).
        log_scale: see ``scale``, (C,); not for ``bernoulli``.
    """
    if likelihood == "bernoulli":
        return Independent(Bernoulli(logits=output, validate_args=False), 3, validate_args=False)
    return Independent(Discretised(output + 0.5, scale(log_scale)[:, None, None], likelihood), 3, validate_args=False)


def scale(log_scale: Tensor) -> Tensor:
    """The learned scale of each channel, in units of the whole range of grey values; bounded from below, smoothly."""
    return (LEAST_LOG_SCALE + F.softplus(log_scale - LEAST_LOG_SCALE)).exp()


def observed(likelihood: str, pixels: Tensor, uniform: Tensor) -> Tensor:
    """What a model of this likelihood is shown of stored images: binarised, or the grey values as they are in [0, 1].

    Args:
        likelihood: of ``LIKELIHOODS``.
        pixels: uint8, (N, C, H, W).
        uniform: uniform on [0, 1), the same shape; only ``bernoulli`` has a use for it.
    """
    return binarise(pixels, uniform) if likelihood == "bernoulli" else pixels.float() / LEVELS


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """Nats per image as bits per pixel and channel: the unit in which published results for photographs compare."""
    return nats / (dimensions * math.log(2))
