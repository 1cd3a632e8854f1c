import dataclasses

import numpy as np
import pytest
import torch

from vaenb import data, samples
from vaenb.models import VAE


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE().requires_grad_(False)


def test_what_is_encoded_is_not_what_pictures_are_compared_with(digits):
    encoded, reference = samples.halves(digits)
    assert len(encoded) == len(reference) == len(digits.train) // 2
    assert not {image.numpy().tobytes() for image in encoded} & {image.numpy().tobytes() for image in reference}
    many = dataclasses.replace(digits, test=digits.train.repeat(7, 1, 1, 1), train=digits.train.repeat(8, 1, 1, 1))
    encoded, reference = samples.halves(many)
    assert len(encoded) == len(reference) == samples.COUNT
    assert torch.equal(reference, many.test[: samples.COUNT])


def test_sources_keep_what_they_say(vae, digits):
    z = samples.latents(vae, digits, "reconstructions")
    permuted, independent = (samples.latents(vae, digits, source) for source in ("permuted-1", "per-position"))
    torch.testing.assert_close(permuted.sort(0).values, z.sort(0).values, rtol=0, atol=0)
    assert not torch.equal(permuted, z)
    torch.testing.assert_close(independent.mean(0), z.mean(0), rtol=0, atol=5 * z.std(0).max().item() / len(z) ** 0.5)
    torch.testing.assert_close(samples.latents(vae, digits, "permuted-7").sum(), z.sum())  # one block: only the order
    prior = samples.latents(vae, digits, "prior")
    assert prior.shape == z.shape
    assert torch.corrcoef(torch.stack([prior.flatten(), independent.flatten()]))[0, 1] > 0.9  # common random numbers …
    assert abs(torch.corrcoef(torch.stack([prior.flatten(), z.flatten()]))[0, 1]) < 0.03  # … not those of the posterior


@pytest.mark.parametrize("source", ["permuted", "permuted-x", "posterior"])
def test_unknown_source(vae, digits, source):
    with pytest.raises(ValueError, match="choose reconstructions, permuted-1"):
        samples.latents(vae, digits, source)


def test_pixel_correlation_finds_what_t1_forbids_and_allows(vae, digits):
    result = samples.pixel_correlation(vae, digits, n=2000, splits=10)
    far = np.mean(result["independent"]) / (np.std(result["independent"], ddof=1) / 5**0.5)
    assert abs(far) < 5
    near = np.array(result["by_distance"])[:, 1]
    assert near.mean() > 10 * near.std(ddof=1) / 5**0.5


def test_pixel_correlation_sees_a_violation(vae, digits, monkeypatch):
    """Were latents not independent, pixels beyond the range would correlate: the test of T1 can fail."""
    independent = torch.randn

    def shared(count, *shape, generator):
        return independent(count, *shape, generator=generator) + 3 * independent(count, 1, 1, 1, generator=generator)

    monkeypatch.setattr(torch, "randn", shared)
    result = samples.pixel_correlation(vae, digits, n=2000, splits=10)["independent"]
    assert np.mean(result) > 5 * np.std(result, ddof=1) / 5**0.5


def test_global_models_have_no_independent_pixels(digits):
    result = samples.pixel_correlation(VAE("mixed").requires_grad_(False), digits, n=100, splits=2)
    assert result["independent"] is None


def test_two_point_correlation_of_a_known_field(vae):
    texture = data.load("texture-4")
    result = samples.two_point(vae, texture, sources=["prior"])
    known = np.exp(-(np.arange(10) ** 2) / (2 * 4**2))
    np.testing.assert_allclose(result["data"][:10], known, atol=0.07)  # the sigmoid changes it a little
    assert result["variance"]["data"] == pytest.approx(1)
    assert result["prior"][0] == pytest.approx(1)


def test_picture_quality_tells_sources_apart(vae, digits):
    result = samples.picture_quality(vae, digits, sources=["reconstructions", "prior"])
    assert set(result) == {"reconstructions", "prior"}
    floor = samples.floors("digits")
    assert floor["frechet"] < result["prior"]["frechet"]  # an untrained decoder draws grey
    assert result["prior"]["mean_image_error"] > 0.1


def test_nats_of_an_untrained_encoder_bound_what_they_say(vae, digits):
    nats = samples.aggregate_nats(vae, digits, count=1200)
    assert set(nats) == {"position", "full", "total_correlation"}
    assert nats["full"] == pytest.approx(nats["position"], abs=2)  # hardly any dependence before training
    assert set(samples.aggregate_nats(vae, digits, count=600)) == {"position", "total_correlation"}  # too few for the third


def test_pixel_statistics_refuse_colour(vae, digits):
    colour = dataclasses.replace(digits, train=digits.train.expand(-1, 3, -1, -1), test=digits.test.expand(-1, 3, -1, -1))
    for measure in (lambda: samples.data_correlation(colour), lambda: samples.two_point(vae, colour)):
        with pytest.raises(ValueError, match="3 channels"):
            measure()


def test_statistics_of_the_mean_picture_are_relative_to_those_of_data(vae, digits, monkeypatch):
    grey = samples.halves(digits)[1].float() / 255
    for name in ("classifier", "known_features", "extract"):  # it takes long to train
        monkeypatch.setattr(samples, name, lambda *_: None)
    monkeypatch.setattr(samples, "compare", lambda *_: {})
    monkeypatch.setattr(samples, "decoded", lambda *_: 0.5 * grey)  # half as bright as data
    measured = samples.picture_quality(vae, digits)["prior"]
    assert measured["mean_image_contrast"] == pytest.approx(0.25, rel=1e-4)
    expected = (0.5 * grey.mean(dim=0)).square().sum() / grey.var(dim=0).sum()
    assert measured["mean_image_error"] == pytest.approx(expected.item(), rel=1e-4)


def test_nats_are_measured_on_latents_that_nothing_was_fitted_to(vae, digits, monkeypatch):
    z = torch.randn(300, 1, 7, 7, generator=torch.Generator().manual_seed(0))  # N(0, I): nothing to gain
    monkeypatch.setattr(samples, "aggregate", lambda *_: z)
    nats = samples.aggregate_nats(vae, digits)
    assert nats["position"] < 0  # held out, overfitting costs
    assert abs(nats["total_correlation"]) < 1  # the plug-in value is 2
