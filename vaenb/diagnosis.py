"""Is the prior the problem? For any VAE with a prior N(0, I): what is needed is draws of its latents, and its decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vaenb.dependence import permute
from vaenb.gaussians import FullGaussian, Mixture, PositionGaussian
from vaenb.priors import Prior, StandardNormal

NEGLIGIBLE = 1.0  # nats per image
AT_A_LATENT = 5  # Gaussians in the marginal density of one latent


@dataclass(frozen=True)
class Diagnosis:
    """What N(0, I) leaves out.

    Attributes:
        gains: for each prior r fitted to the latents, what it would gain in ELBO over N(0, I) with encoder and decoder as
            they are: E[log r(z) − log N(z; 0, I)] over held-out latents, nats per image (Hoffman & Johnson 2016). Up to
            chance each is a lower bound on KL(q(z) ‖ N(0, I)).
            ``marginals`` is the better of two independent priors: for each latent a Gaussian, or a mixture, of its own.
        errors: standard errors of these means.
        sources: latents to decode and look at, (n, *shape) each, from real ones to N(0, I).
        priors: the fitted ones, to sample from.
    """

    gains: dict[str, float]
    errors: dict[str, float]
    sources: dict[str, Tensor]
    priors: dict[str, Prior]

    def verdict(self) -> str:
        """In a few sentences, what is wrong with the prior and what would mend it."""
        name = max(self.gains, key=self.gains.__getitem__)
        best, marginals = self.gains[name], self.gains["marginals"]
        if best < NEGLIGIBLE:
            return (
                f"No prior tried gains {NEGLIGIBLE:.0f} nat per image over N(0, I). If samples are bad although "
                "reconstructions are good, look elsewhere: at the decoder, or at dependence that these priors do not see."
            )
        parts = [f"N(0, I) costs at least {best - 2 * self.errors[name]:.1f} nats per image."]
        parts.append(f"Of {best:.1f} that were found, marginals of single latents are worth {max(marginals, 0):.1f},")
        parts.append(f"dependence between latents {best - max(marginals, 0):.1f}.")
        if best - marginals < NEGLIGIBLE:
            parts.append("A prior of independent latents, each with a density of its own, repairs it.")
        else:
            parts.append("For this decoder no prior of independent latents can repair it: learn a joint one.")
        return " ".join(parts)


def diagnose(train: Tensor, held_out: Tensor, components: int = 100, show: int = 14, seed: int = 0) -> Diagnosis:
    """Fit priors to latents, measure what each gains on others, and collect latents to decode.

    Args:
        train: draws z ~ q(z|x), one or more for each training image, in random order: (N, C, h, w), or (N, d).
        held_out: one draw for each of other images, (n, *shape).
        components: of the mixture, at most; fewer where there are few latents.
        show: how many latents to decode of each source.
        seed: of fits and draws.

    Raises:
        ValueError: latents of two shapes, NaN, or fewer than the Gaussian needs.
    """
    shape = tuple(train.shape[1:])
    if tuple(held_out.shape[1:]) != shape:
        raise ValueError(
            f"held-out latents of shape {tuple(held_out.shape[1:])}, training latents of {shape}: expected one shape"
        )
    size = train[0].numel()
    affordable = max(1, min(components, len(train) // (6 * size)))
    priors = {
        "a Gaussian each": PositionGaussian(shape),
        "one Gaussian": FullGaussian(shape),
        "mixture": Mixture(shape, affordable),
    }
    normal = StandardNormal(shape)
    with torch.no_grad():
        before = normal.log_prob(held_out)
        gained = {name: prior.fit(train, seed).log_prob(held_out) - before for name, prior in priors.items()}
        mixtures = _independent(train, held_out, seed) - before
        gained["marginals"] = max(mixtures, gained["a Gaussian each"], key=lambda gain: gain.mean().item())
    sources = {
        "real: z ~ q(z|x)": held_out[:show],
        "shuffled between images": permute(held_out, seed=seed)[:show],
        "a Gaussian for each latent": priors["a Gaussian each"].sample(show, seed=seed),
        "one Gaussian for all": priors["one Gaussian"].sample(show, seed=seed),
        f"mixture of {affordable}": priors["mixture"].sample(show, seed=seed),
        "N(0, I)": normal.sample(show, seed=seed),
    }
    return Diagnosis(
        {name: gain.mean().item() for name, gain in gained.items()},
        {name: (gain.std() / len(gain) ** 0.5).item() for name, gain in gained.items()},
        sources,
        priors,
    )


def _independent(train: Tensor, held_out: Tensor, seed: int) -> Tensor:
    """Log density of held-out latents, (n,), under a mixture for each latent alone, fitted to it in its own units."""
    total = held_out.new_zeros(len(held_out))
    for ours, theirs in zip(train.flatten(1).T, held_out.flatten(1).T, strict=True):
        centre, scale = ours.mean(), ours.std().clamp_min(1e-6)
        mixture = Mixture((1,), AT_A_LATENT).fit(((ours - centre) / scale)[:, None], seed)
        total += mixture.log_prob(((theirs - centre) / scale)[:, None]) - scale.log()
    return total
