"""Trained decoders and what their latents may be drawn from, in one file for the page's explorer (``web/explorer.js``)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaenb import dependence, figures
from vaenb.claims import figures_folder
from vaenb.gaussians import Mixture
from vaenb.ladder import Repaired
from vaenb.models import VAE
from vaenb.runs import write_atomically

POOL = 200  # encoded test images of each model: examples, and what positions are permuted between


def export(dataset: str, models: Mapping[str, Mapping[str, Repaired]], labels: Tensor) -> Path:
    """Write ``explorer.json`` to the figures folder.

    Args:
        dataset: decides the folder.
        models: for each title the fitted priors by name, all of one VAE; Gaussians and mixtures of them.
        labels: classes of the test images, int64, (N,); the examples go through them in turn.

    Returns:
        The file.
    """
    content = {title: _model(next(iter(priors.values())), priors, labels) for title, priors in models.items()}
    path = figures_folder(dataset) / "explorer.json"
    write_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")
    return path


@torch.no_grad()
def _model(one: Repaired, priors: Mapping[str, Repaired], labels: Tensor) -> dict[str, Any]:
    model: VAE = one.run.model
    each = min(POOL // 10, int(torch.bincount(labels).min()))
    chosen = torch.stack([(labels == label).nonzero()[:each, 0] for label in labels.unique()], dim=1).flatten()
    draws = dependence.aggregate(model, one.run.images.test[chosen], seed=0)
    return {
        "latent_shape": list(model.latent_shape),
        "decoder": {name: figures.encode(value.float().numpy()) for name, value in _decoder(model).items()},
        "examples": {"draws": figures.encode(draws.numpy()), "labels": labels[chosen].tolist()},
        "priors": {name: _gaussians(prior.prior) for name, prior in priors.items()},
    }


def _decoder(model: VAE) -> dict[str, Tensor]:
    """The tensors that ``explorer.js`` computes with: one layer from the latents, two that double the size."""
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
            if name.startswith(("from_latent", "decoder"))}  # fmt: skip


def _gaussians(prior: Mixture) -> dict[str, Any]:
    """Weights, means and factors: z = mean + factor · ε with ε ~ N(0, I)."""
    if not isinstance(prior, Mixture):
        raise ValueError(f"the explorer draws from Gaussians and mixtures of them, not from {type(prior).__name__}")
    lower = prior.whitening.tril()
    identity = torch.eye(lower.shape[1]).expand_as(lower)
    factors = torch.linalg.solve_triangular(lower, identity, upper=False)  # W (z − μ) = ε
    rows, columns = torch.tril_indices(*lower.shape[1:])
    return {
        "weights": figures.encode(prior.log_weights.softmax(dim=0).numpy()),
        "means": figures.encode(prior.means.detach().numpy()),
        "factors": figures.encode(factors[:, rows, columns].detach().contiguous().numpy()),  # lower triangles, row by row
    }
