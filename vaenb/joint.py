"""Encoder, decoder and a learned prior trained together: what is left to gain when nothing is frozen.

With a prior r(z) in place of N(0, I), −ELBO is E_q[−log p(x|z) − log r(z)] − H(q(z|x)), and all three may be learned from
it (Tomczak & Welling 2018 do it with the VampPrior, Chen et al. 2017 with an autoregressive one).
"""

import torch
from torch import Tensor, nn

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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    both = nn.ModuleList([model, prior]).to(device).requires_grad_()

    def negative_elbo(batch: Tensor) -> Tensor:
        x = model.observed(batch, torch.rand(batch.shape)).to(device)
        q = model.encode(x)
        z = reparametrise(q, torch.randn(q.mean.shape).to(device))
        return (prior.negative_log_prob(z) - model.decode(z).log_prob(x) - q.entropy()).mean()

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        minimise(negative_elbo, both, images, "joint training", epochs, batch_size, learning_rate, groups(model, prior))
    both.requires_grad_(False)
