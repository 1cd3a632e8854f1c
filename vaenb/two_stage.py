"""Two classics that repair the prior in a second stage: the VampPrior and the two-stage VAE.

The VampPrior (Tomczak & Welling 2018) was proposed for joint training; here encoder and decoder stay as they are, so that
its nats compare with those of the other priors.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vaenb import gpu
from vaenb.models import VAE
from vaenb.priors import Learned, standard_normal


class Vamp(Learned):
    """Mixture of what the encoder makes of learned *pseudo-inputs*: r(z) = Σ_k w_k q(z|u_k).

    Args:
        model: the VAE whose encoder is used.
        components: pseudo-inputs.
        training: see ``priors.Learned``.
    """

    def __init__(self, model: VAE, components: int = 200, **training: float):
        super().__init__(model.latent_shape, **training)
        self._model = (model,)  # in a tuple, so that its weights do not become part of the prior
        self.pseudo_inputs = nn.Parameter(torch.zeros(components, *model.image_shape))  # logits of grey values
        self.log_weights = nn.Parameter(torch.zeros(components))

    def _apply(self, fn: Callable, recurse: bool = True) -> "Vamp":
        model = copy.deepcopy(self._model[0])  # others use the original, where it is
        self._model = (model._apply(fn),)
        return super()._apply(fn, recurse)

    def least(self) -> int:
        """One latent to start each pseudo-input from."""
        return len(self.pseudo_inputs)

    def _fit(self, z: Tensor) -> None:
        with torch.no_grad():
            self.pseudo_inputs.copy_(self._model[0].decode(z[: len(self.pseudo_inputs)]).mean.logit().clamp(-4, 4))
        super()._fit(z)

    def components(self) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of the components, (K, d) each."""
        q = self._model[0].encode(self.pseudo_inputs.sigmoid())
        return q.mean.flatten(1), q.base_dist.scale.flatten(1)

    def _log_prob(self, z: Tensor) -> Tensor:
        means, scales = self.components()
        flat, precision = z.flatten(1), scales**-2
        square = flat**2 @ precision.T - 2 * flat @ (means * precision).T + (means**2 * precision).sum(dim=1)
        constant = self.log_weights.log_softmax(dim=0) - scales.log().sum(dim=1) - 0.5 * self.size * math.log(2 * math.pi)
        return torch.logsumexp(constant - 0.5 * square, dim=1)

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        means, scales = self.components()
        chosen = torch.multinomial(self.log_weights.softmax(dim=0).cpu(), n, replacement=True, generator=generator)
        return (means[chosen] + scales[chosen] * self._noise((n, self.size), generator)).view(n, *shape)


class TwoStage(Learned):
    """A second VAE, on the latents of the first, with as many latents and a learned noise (Dai & Wipf 2019).

    ``log_prob`` is the importance-weighted bound: a lower bound in expectation (Burda et al. 2016).
    """

    DRAWS = 25  # of the bound

    def __init__(self, shape: Sequence[int], hidden: int = 512, **training: float):
        super().__init__(shape, **training)
        d = self.size
        self.encoder, self.decoder = (
            nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out))
            for out in (2 * d, d)
        )
        self.log_noise = nn.Parameter(torch.zeros(()))

    def _log_weight(self, z: Tensor) -> Tensor:
        """Log r(z, u) / q(u|z) for one draw of the second latent u, (N,)."""
        mean, log_scale = self.encoder(z).chunk(2, dim=1)
        shape = mean.shape
        noise = gpu.drawn(lambda: torch.randn(shape), mean.device)
        u = mean + log_scale.exp() * noise
        likelihood = standard_normal((z - self.decoder(u)) / self.log_noise.exp()) - self.size * self.log_noise
        return likelihood + standard_normal(u) - standard_normal(noise) + log_scale.sum(dim=1)

    def loss(self, z: Tensor) -> Tensor:
        """−ELBO of the second VAE."""
        return -self._log_weight(z.flatten(1)).mean()

    def _log_prob(self, z: Tensor) -> Tensor:
        weights = torch.stack([self._log_weight(z.flatten(1)) for _ in range(self.DRAWS)])
        return torch.logsumexp(weights, dim=0) - math.log(self.DRAWS)

    def _sample(self, n: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        mean = self.decoder(self._noise((n, self.size), generator))
        return (mean + self.log_noise.exp() * self._noise(mean.shape, generator)).view(n, *shape)
