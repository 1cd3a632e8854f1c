import gzip
import hashlib
import http.server
import os
import struct
import threading

import numpy as np
import pytest
import torch
from torchvision import datasets

from vaenb import data, photographs


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    """No data set remembered from another test, none beside the checkout, and no mirror answers."""
    data.load.cache_clear()
    monkeypatch.setattr(data, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("no_proxy", "*")  # servers of tests are here
    for cls in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(cls, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: refused at once
    yield
    data.load.cache_clear()


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.numpy().tobytes(), mtime=0)


@pytest.fixture
def small_fashion(monkeypatch, tmp_path):
    """A folder with four archives in the real format, of 6 and 4 images, under checksums that torchvision then checks."""
    torch.manual_seed(0)
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for (name, _), count in zip(datasets.FashionMNIST.resources, (6, 6, 4, 4), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        content = idx(torch.randint(0, 10, shape, dtype=torch.uint8))
        (folder / name).write_bytes(content)
        resources.append((name, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    return folder


def test_digits_are_real_handwriting_at_28x28():
    digits = data.load("digits")
    assert digits.image_shape == (1, 28, 28)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.dtype == torch.uint8
    assert digits.train.max() > 240
    assert digits.train.min() == 0
    assert set(digits.test_labels.tolist()) == set(range(10))
    assert "not" not in digits.title
    assert "stand-in" in digits.title


def test_fingerprint_tells_data_apart_and_repeats():
    first = data.load("digits").fingerprint
    data.load.cache_clear()
    assert data.load("digits").fingerprint == first


def test_binarised_pixels_are_one_as_often_as_they_are_grey():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(4000, 1)
    ones = data.binarise(pixels, torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)))
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    expected = torch.arange(256) / 255
    deviation = (ones.mean(0) - expected) / (expected * (1 - expected) / 4000).sqrt().clamp(min=1e-9)
    assert deviation.abs().max() < 4.5
    assert ones[:, 0].sum() == 0
    assert ones[:, 255].sum() == 4000


def test_a_given_folder_is_verified_copied_and_only_read(small_fashion, build, monkeypatch):
    monkeypatch.setenv("VAENB_DATA", str(small_fashion))
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in small_fashion.iterdir()}
    fashion = data.load("fashion")
    assert fashion.train.shape == (6, 1, 28, 28)
    assert fashion.test_labels.shape == (4,)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in small_fashion.iterdir()} == before
    assert {p.name for p in (build / "data" / "FashionMNIST" / "raw").iterdir()} == set(before)


def test_a_given_folder_may_be_relative(small_fashion, monkeypatch):
    monkeypatch.chdir(small_fashion.parent)
    monkeypatch.setenv("VAENB_DATA", small_fashion.name)
    assert len(data.load("fashion").train) == 6


def test_files_of_the_other_set_that_have_the_same_names_are_not_damaged_ones(small_fashion, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, "0" * 32) for name, _ in datasets.FashionMNIST.resources])
    monkeypatch.setenv("VAENB_DATA", str(small_fashion))
    with pytest.raises(data.DataError, match="download failed"):
        data.load("mnist")
    assert "holds no complete MNIST" in capsys.readouterr().err
    assert len(data.load("fashion").train) == 6


def test_download_verifies_and_keeps(small_fashion, build, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(small_fashion))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        first = data.load("fashion").fingerprint
        server.shutdown()
    data.load.cache_clear()
    assert data.load("fashion").fingerprint == first  # from build/data, the server is gone
    assert not list((build / "data").glob(".download-*"))


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: c[:-1] + b"\1", lambda c: b""])
def test_a_damaged_archive_is_named_with_both_checksums_and_never_used(damage, small_fashion, build, monkeypatch):
    monkeypatch.setenv("VAENB_DATA", str(small_fashion))
    name, md5 = datasets.FashionMNIST.resources[0]
    content = damage((small_fashion / name).read_bytes())
    (small_fashion / name).write_bytes(content)
    with pytest.raises(data.DataError) as caught:
        data.load("fashion")
    for part in (str(small_fashion / name), md5, hashlib.md5(content).hexdigest(), "Delete the file"):
        assert part in str(caught.value)
    assert not (build / "data" / "FashionMNIST" / "raw" / name).exists()


def test_an_archive_damaged_after_it_was_copied_is_found(small_fashion, build, monkeypatch):
    monkeypatch.setenv("VAENB_DATA", str(small_fashion))
    data.load("fashion")
    data.load.cache_clear()
    monkeypatch.delenv("VAENB_DATA")
    name = datasets.FashionMNIST.resources[2][0]
    os.truncate(build / "data" / "FashionMNIST" / "raw" / name, 10)
    with pytest.raises(data.DataError, match="is damaged"):
        data.load("fashion")


def test_auto_falls_back_to_digits_loudly(capsys):
    assert data.resolve("auto") == "digits"
    assert "FALLING BACK" in capsys.readouterr().err


def test_mnist_never_falls_back():
    assert data.resolve("mnist") == "mnist"
    with pytest.raises(data.DataError, match=r"download failed: .*what needs no network: digits"):
        data.load("mnist")


def test_without_a_network_the_command_line_hears_of_the_embedded_photographs(monkeypatch):
    def no_network(base):
        raise OSError("no route to host")

    monkeypatch.setattr(photographs, "download_eurosat", no_network)
    with pytest.raises(data.DataError, match=r"download failed: .*what needs no network: photos or folder:PATH"):
        data.load("eurosat")


def test_a_damaged_mnist_is_no_reason_to_fall_back(tmp_path, monkeypatch):
    for name, _ in datasets.MNIST.resources:
        (tmp_path / name).write_bytes(b"junk")
    monkeypatch.setenv("VAENB_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match="is damaged"):
        data.resolve("auto")


@pytest.mark.parametrize("name", ["imagenet", "../mnist", ""])
def test_unknown_names(name):
    for function in (data.load, data.resolve):
        with pytest.raises(data.DataError, match="unknown data set"):
            function(name)


def test_textures_are_stationary_with_the_correlation_that_their_name_says():
    for length in data.TEXTURE_LENGTHS:
        texture = data.load(f"texture-{length}")
        assert texture.image_shape == (1, 28, 28)
        assert (len(texture.train), len(texture.test)) == (8000, 2000)
        field = torch.special.logit((texture.train[:, 0].double() / 255).clamp(1 / 512, 1 - 1 / 512))
        variance = field.var(dim=0)
        assert variance.std() / variance.mean() < 0.05  # the same law at every pixel
        shift = min(length, 4)
        row = (field[:, shift:] * field[:, :-shift]).mean() / field.square().mean()
        column = (field[:, :, shift:] * field[:, :, :-shift]).mean() / field.square().mean()
        expected = np.exp(-(shift**2) / (2 * length**2))
        assert row.item() == pytest.approx(expected, abs=0.03)
        assert column.item() == pytest.approx(expected, abs=0.03)
    assert data.load("texture-1").fingerprint != data.load("texture-2").fingerprint
