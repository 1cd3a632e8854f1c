"""Encoder, decoder and a learned prior trained together: what is left to gain when nothing is frozen.

With a prior r(z) in place of N(0, I), −ELBO is E_q[−log p(x|z) − log r(z)] − H(q(z|x)), and all three may be learned from
it (Tomczak & Welling 2018 do it with the VampPrior, Chen et al. 2017 with an autoregressive one).
"""

import torch
from torch import Tensor, nn

from vaenb import gpu
from vaenb.models import VAE, reparametrise
from vaenb.muon import groups
from vaenb.priors import Prior, minimise


def train_jointly(
    model: VAE, prior: Prior, images: Tensor, epochs: int, learning_rate: float, seed: int, batch_size: int = 64
) -> None:
    """Minimise −ELBO over encoder, decoder and prior, in place, from where they are.

    Args:
        model: a trained VAE.
        prior: fitted to its latents, with a density to train through.
        images: uint8, (N, C, H, W); shown to the model anew at every step, see ``pixels.observed``.
        epochs, learning_rate, batch_size: see ``priors.minimise``.
        seed: of the order, binarisation and latent noise.

    Raises:
        ValueError: a prior without a density that gradients can go through, or a loss that became NaN.
    """
    if not prior.differentiable:
        raise ValueError(
            f"{type(prior).__name__} has no density to train through: choose a mixture or an autoregressive prior"
        )
    both = nn.ModuleList([model, prior]).to(gpu.device()).requires_grad_()

    def negative_elbo(batch: Tensor) -> Tensor:
        shape = batch.shape  # and not the batch, or q below, which would be kept with the way to draw
        x = model.observed(batch, gpu.drawn(lambda: torch.rand(shape), batch.device))
        q = model.encode(x)
        z = reparametrise(q, gpu.drawn(lambda: torch.randn(shape[0], *model.latent_shape), batch.device))
        return (prior.negative_log_prob(z) - model.decode(z).log_prob(x) - q.entropy()).mean()

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        minimise(negative_elbo, both, images, "joint training", epochs, batch_size, learning_rate, groups(model, prior))
    both.requires_grad_(False)
