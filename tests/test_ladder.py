"""Fitted priors in the store, and what is measured of them; on the digits and untrained or briefly trained models."""

import numpy as np
import pytest
import torch

from vaenb import data, dependence, joint, ladder, likelihood, samples, worth
from vaenb.config import Config
from vaenb.gaussians import FullGaussian
from vaenb.models import VAE, evaluate
from vaenb.priors import StandardNormal
from vaenb.train import fit

COUNT = 2000


@pytest.fixture
def run():
    return fit(Config("digits", epochs=1))


def test_a_prior_is_fitted_once_and_found_again(run, monkeypatch):
    first = ladder.repair(run, "full Gaussian", COUNT)
    monkeypatch.setattr(FullGaussian, "_fit", lambda *_: pytest.fail("fitted again"))
    again = ladder.repair(run, "full Gaussian", COUNT)
    assert again.folder == first.folder
    assert torch.equal(again.prior.sample(5), first.prior.sample(5))
    assert again.cost["parameters"] == 1 + 49 + 49 * 50 // 2  # a covariance is symmetric


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


def test_distances_are_means_over_sets_of_pictures(run):
    prior = ladder.repair(run, "per position", COUNT)
    one, two = (worth.prior_quality(prior, sets=sets) for sets in (1, 2))
    z = prior.prior.sample(len(samples.halves(run.images)[1]), seed=worth.HELD_OUT + 1)
    second = worth.against(run, z)
    for distance in ("frechet", "to_reconstructions"):
        assert two[distance] == pytest.approx((one[distance] + second[distance]) / 2)
    assert two["density"] == one["density"]
    with pytest.raises(ValueError, match="at least one set"):
        worth.prior_quality(prior, sets=0)


class Shown(StandardNormal):
    """Not a prior: its draws are pictures that it is given."""

    def sample(self, n, grid=None, seed=0):
        return self.pictures[:n].float() / 255


def test_training_images_are_copies_and_test_images_are_not(run, monkeypatch):
    repaired = ladder.repair(run, "N(0, I)", COUNT)
    shown = repaired.__dict__["prior"] = Shown(run.model.latent_shape)  # in place of the cached one
    monkeypatch.setattr(worth, "decoded", lambda _, pictures: pictures)
    monkeypatch.setattr(dependence, "aggregate", lambda _, images, __: images.float() / 255)
    shown.pictures = worth._some(run.images.test, worth.COPIES)
    honest = worth.copies(repaired)
    assert honest["median"] == honest["low"] == 1
    assert 0 < honest["error"] < 0.2
    shown.pictures = torch.cat([run.images.train[:30], shown.pictures[30:]])  # more than a twentieth, less than half
    assert worth.copies(repaired)["low"] < 1e-2 < 0.9 < worth.copies(repaired)["median"]
    shown.pictures = run.images.train
    assert worth.copies(repaired)["median"] < 1e-2
    with pytest.raises(ValueError, match="only mixtures"):
        worth.copies(repaired, temperature=0.9)


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
    assert len(ladder.build(ladder.FINE, model, count=6 * 196 * 5).means) == 10  # of more draws of the same images
    with pytest.raises(ValueError, match="choose one of N"):
        ladder.build("best", model)


def test_joint_training_raises_the_bound_that_encoder_decoder_and_prior_share(run):
    before = ladder.repair(run, "mixture", COUNT)
    after = ladder.tune(before, epochs=3)
    bounds = [repaired.measure(worth.bounds, k=5, subset=100)["negative_elbo"] for repaired in (before, after)]
    assert bounds[1] < bounds[0] - 5
    # Not only because the VAE was trained for longer: that alone, with N(0, I), gains less.
    longer = ladder.tune(ladder.repair(run, "N(0, I)", COUNT), epochs=3).measure(worth.bounds, k=5, subset=100)
    assert bounds[1] < longer["negative_elbo"] - 2
    assert ladder.tune(before, epochs=3).folder == after.folder
    # What it trained is kept apart: the run that it began with is as it was.
    weights = [torch.cat([p.flatten() for p in r.run.model.parameters()]) for r in (before, after)]
    assert not torch.equal(*weights)
    assert torch.equal(weights[0], torch.cat([p.flatten() for p in fit(run.config).model.parameters()]))


def test_after_joint_training_a_mixture_is_fitted_anew_to_latents_of_the_model_as_it_is_now(run):
    tuned = ladder.tune(ladder.repair(run, "mixture", COUNT), epochs=1)
    assert tuned.rung == ladder.FINE
    again = ladder.build(tuned.rung, tuned.run.model, COUNT)
    again.fit(ladder._draws(tuned.run.model, run.images.train, COUNT, ladder.EACH), seed=run.config.seed)
    assert torch.equal(again.means, tuned.prior.means)
    for other in ("N(0, I)", "full Gaussian"):  # a full Gaussian is a mixture of one
        assert ladder.tune(ladder.repair(run, other, COUNT), epochs=1).rung == other


def test_draws_are_as_many_of_each_posterior_as_one_asks_for(run):
    images = run.images.train[:100]
    z = ladder._draws(run.model, images, count=200, each=3)
    assert z.shape == (600, *run.model.latent_shape)
    assert len(torch.unique(z, dim=0)) == 600
    once = ladder._draws(run.model, images, count=200)
    assert torch.equal(ladder._draws(run.model, images, count=150), once[:150])  # the second pass ends early
    many = dependence.aggregate(run.model, images[:2], seed=1, each=2000).view(2000, 2, -1)
    assert torch.equal(many[0], dependence.aggregate(run.model, images[:2], seed=1).flatten(1))
    pixels, _ = dependence.noise_sources(1)
    q = run.model.encode(run.model.observed(images[:2], torch.rand(2, *run.images.image_shape, generator=pixels)))
    assert torch.allclose(many.mean(dim=0), q.mean.flatten(1), atol=0.15)
    assert torch.allclose(many.std(dim=0), q.stddev.flatten(1), rtol=0.1)


def test_other_priors_can_be_fitted_to_a_jointly_trained_model(run):
    tuned = ladder.tune(ladder.repair(run, "mixture", COUNT), epochs=1)
    again = ladder.repair(tuned.run, "full Gaussian", COUNT)
    assert again.folder != ladder.repair(run, "full Gaussian", COUNT).folder
    assert again.measure(worth.nats)["gain"] > 0


def test_a_prior_without_a_density_to_train_through_is_refused(run):
    with pytest.raises(ValueError, match="has no density to train through"):
        ladder.tune(ladder.repair(run, "per position", COUNT), epochs=1)


def test_joint_training_repeats_bit_for_bit(run):
    models = [run.config.build(run.images.image_shape) for _ in range(2)]
    priors = [ladder.build("mixture", model, COUNT) for model in models]
    before = [parameter.clone() for parameter in priors[0].parameters()]
    for model, prior in zip(models, priors, strict=True):
        joint.train_jointly(model, prior, run.images.train[:256], epochs=1, learning_rate=1e-3, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*(p.parameters() for p in priors), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[1:], list(priors[0].parameters())[1:], strict=True))


def test_a_prior_that_is_no_mixture_has_no_temperature(run):
    with pytest.raises(ValueError, match="only mixtures have one"):
        worth.prior_quality(ladder.repair(run, "per position", COUNT), temperature=0.9)


def test_nats_are_gained_on_test_images_and_compared_with_training_images(run, monkeypatch):
    repaired, shown, aggregate = ladder.repair(run, "per position", COUNT), [], dependence.aggregate

    def watched(model, images, *seed):
        shown.append(images)
        return aggregate(model, images, *seed)

    monkeypatch.setattr(dependence, "aggregate", watched)
    worth.nats(repaired)
    for name, images in zip(("test", "train"), shown, strict=True):
        known = {image.numpy().tobytes() for image in getattr(run.images, name)}
        assert all(image.numpy().tobytes() in known for image in images)


def test_what_joint_training_minimises_is_minus_elbo(monkeypatch):
    torch.manual_seed(0)
    model, images, values = VAE(), data.load("digits").test[:200], []

    def only_evaluate(loss, _, pixels, *rest):
        values.extend(loss(pixels).item() for _ in range(20))

    monkeypatch.setattr(joint, "minimise", only_evaluate)
    joint.train_jointly(model, StandardNormal(model.latent_shape), images, epochs=1, learning_rate=1e-3, seed=0)
    assert sum(values) / 20 == pytest.approx(sum(evaluate(model, images)).mean().item(), abs=1)
