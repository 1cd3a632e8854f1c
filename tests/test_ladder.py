"""Fitted priors in the store, and what is measured of them; on the digits and untrained or briefly trained models."""

import numpy as np
import pytest
import torch

from vaenb import data, ladder, likelihood, worth
from vaenb.config import Config
from vaenb.gaussians import Mixture
from vaenb.models import VAE
from vaenb.priors import StandardNormal
from vaenb.train import fit

COUNT = 2000


@pytest.fixture
def run():
    return fit(Config("digits", epochs=1))


def test_a_prior_is_fitted_once_and_found_again(run, monkeypatch):
    first = ladder.repair(run, "full Gaussian", COUNT)
    monkeypatch.setattr(Mixture, "_fit", lambda *_: pytest.fail("fitted again"))
    again = ladder.repair(run, "full Gaussian", COUNT)
    assert again.folder == first.folder
    assert torch.equal(again.prior.sample(5), first.prior.sample(5))
    assert again.cost["parameters"] == 1 + 49 + 49**2


def test_another_number_of_latents_is_another_prior(run):
    assert ladder.repair(run, "per position", COUNT).folder != ladder.repair(run, "per position", COUNT // 2).folder


def test_the_price_of_the_standard_normal_is_nothing_and_a_fit_has_one(run):
    assert worth.nats(ladder.repair(run, "N(0, I)", COUNT))["gain"] == 0
    # What is gained in nats is gained in the bound: T6, each term on test images.
    repaired = ladder.repair(run, "full Gaussian", COUNT)
    before = likelihood.log_weights(run.model, run.images.test, 50).mean()
    after = likelihood.log_weights(run.model, run.images.test, 50, prior=repaired.prior).mean()
    gain = worth.nats(repaired)
    assert (after - before).item() == pytest.approx(gain["gain"], abs=4 * gain["standard_error"])


def test_the_standard_normal_as_a_prior_changes_no_bound(run):
    own = likelihood.log_weights(run.model, run.images.test[:20], 3)
    given = likelihood.log_weights(run.model, run.images.test[:20], 3, prior=StandardNormal(run.model.latent_shape))
    assert torch.allclose(own, given, atol=1e-3)


def test_pictures_are_compared_with_data_and_with_reconstructions(run):
    plain = ladder.repair(run, "N(0, I)", COUNT)
    quality, limit = plain.measure(worth.prior_quality), plain.measure(worth.reconstruction_quality)
    assert limit["to_reconstructions"] < quality["to_reconstructions"]
    assert 0 < limit["nearest"] < 1
    assert quality["seconds"] > 0


def test_the_nearest_image_is_found():
    images = data.load("digits")
    pictures = images.train[[3, 700]].float() / 255
    distance, index = worth.nearest(pictures, images.train)
    assert np.allclose(distance, 0, atol=1e-3)
    assert index.tolist() == [3, 700]
    brute = (images.train[:50].float() / 255 - 0.5).square().mean(dim=(1, 2, 3)).sqrt()
    distance, index = worth.nearest(torch.full((1, 1, 28, 28), 0.5), images.train[:50])
    assert index[0] == brute.argmin()
    assert distance[0] == pytest.approx(brute.min().item(), abs=1e-5)


def test_a_rung_fits_the_model():
    model = VAE("spatial", stride=2)
    assert ladder.build("autoregressive", model).patch == 2
    assert len(ladder.build("mixture", model, count=6 * 196 * 5).means) == 5
    assert len(ladder.build("mixture", model, count=10).means) == 1
    with pytest.raises(ValueError, match="choose one of N"):
        ladder.build("best", model)
