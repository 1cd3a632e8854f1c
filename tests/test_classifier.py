import dataclasses

import numpy as np
import pytest
import torch

from vaenb import classifier, runs
from vaenb.data import DataError, load


def test_learns_the_digits_once_and_is_found_again(build, monkeypatch):
    images = load("digits")
    network = classifier.classifier("digits")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    (folder,) = build.glob("runs/classifier-digits-*")
    summary = runs.read(folder)["summary"]
    _, probabilities = classifier.extract(network, images.test)
    accuracy = (probabilities.argmax(axis=1) == images.test_labels.numpy()).mean()
    assert accuracy == summary["test_accuracy"] >= 0.95

    train = classifier._train
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("it was trained again"))
    again = classifier.classifier("digits")
    for name, weights in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weights, atol=0, rtol=0)

    def train_a_little(images, folder):
        monkeypatch.setattr(classifier, "EPOCHS", 1)
        monkeypatch.setattr(classifier, "LEAST_STEPS", 1)
        return train(images, folder)

    (folder / "classifier.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(classifier, "_train", train_a_little)
    with pytest.warns(UserWarning, match="no longer matches its checksum"):
        classifier.classifier("digits")
    assert runs.read(folder)["summary"]["epochs"] == 1


def test_training_repeats_and_leaves_the_callers_random_numbers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(classifier, "LEAST_STEPS", 1)
    written = []
    for name in ("first", "second"):
        torch.manual_seed(len(written))
        before, on_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        classifier._train(load("digits"), tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(map(torch.equal, torch.cuda.get_rng_state_all(), on_gpus))
        written.append((tmp_path / name / "classifier.safetensors").read_bytes())
    before = torch.get_rng_state()
    classifier.classifier("digits")
    assert torch.equal(torch.get_rng_state(), before)
    if not on_gpus:  # whose kernels add up in any order
        assert written[0] == written[1]


def test_features_and_probabilities_of_either_kind_of_image():
    torch.manual_seed(0)
    network = classifier.Classifier().eval()
    images = load("digits").test[:30]
    features, probabilities = classifier.extract(network, images, batch=7)
    assert features.shape == (30, classifier.FEATURES)
    assert features.dtype == probabilities.dtype == np.float64
    assert features.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    for same in classifier.extract(network, images.float() / 255), classifier.extract(network, images.double() / 255):
        np.testing.assert_allclose(same[0], features, atol=1e-5)
    x = images.float() / 255
    np.testing.assert_allclose(network(x).softmax(1).detach(), probabilities, atol=1e-6)
    torch.testing.assert_close(network.head(network.features(x)), network(x))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 28, 28), r"\(N, 1, 28, 28\)"),
        (torch.zeros(3, 1, 32, 32), r"\(N, 1, 28, 28\)"),
        (torch.zeros(0, 1, 28, 28), "N ≥ 1"),
        (torch.full((3, 1, 28, 28), 255.0), "expected uint8, or floats in"),
        (torch.full((3, 1, 28, 28), torch.nan), "from nan to nan"),
        (torch.zeros((3, 1, 28, 28), dtype=torch.int64), "torch.int64 images"),
    ],
)
def test_images_that_are_not_for_it(images, message):
    with pytest.raises(ValueError, match=message):
        classifier.extract(classifier.Classifier().eval(), images)


def test_unknown_data():
    with pytest.raises(DataError, match="unknown data set"):
        classifier.classifier("emnist")


def test_data_without_classes():
    images = load("digits")
    alike = dataclasses.replace(images, train_labels=torch.zeros_like(images.train_labels))
    with pytest.raises(ValueError, match="single class"):
        classifier._train(alike, None)


def test_a_classifier_of_colour_pictures_of_another_size():
    network = classifier.Classifier((3, 64, 60), classes=4).eval()
    features, probabilities = classifier.extract(network, torch.rand(5, 3, 64, 60))
    assert features.shape == (5, classifier.FEATURES)
    assert probabilities.shape == (5, 4)
    with pytest.raises(ValueError, match=r"\(N, 3, 64, 60\)"):
        classifier.extract(network, torch.rand(5, 3, 60, 64))
