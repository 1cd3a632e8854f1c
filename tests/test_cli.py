import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from vaenb import bundle, ladder, photographs
from vaenb.__main__ import main
from vaenb.config import Config
from vaenb.train import fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has hardly learned, by the command line; it is only written and read here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAENB_BUILD", str(tmp_path_factory.mktemp("build")))
        patch.setitem(
            photographs.PRESETS, "small", {"hidden": (4, 8), "latent_channels": 2, "likelihood": "logistic", "epochs": 1}
        )
        patch.setitem(
            ladder.ANY_SIZE, "stationary flow", (ladder.StationaryFlow, {"patch": 2, "epochs": 1, "hidden": 8, "steps": 2})
        )
        out = tmp_path_factory.mktemp("out") / "land"
        assert main(["train", "photos", "--out", str(out)]) == 0
        yield out


def test_a_picture_of_any_size_through_the_model(trained, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(37, 90), dtype=np.uint8)).save(tmp_path / "grey.tiff")
    assert main(["reconstruct", str(trained), str(tmp_path / "grey.tiff"), "--out", str(tmp_path / "out")]) == 0
    made = np.asarray(Image.open(tmp_path / "out" / "grey.png"))
    assert made.shape == (37, 90, 3)
    loaded = bundle.load(trained)
    image = torch.from_numpy(np.asarray(Image.open(tmp_path / "grey.tiff")).copy()).expand(3, -1, -1)
    mean = loaded.model.decode(loaded.model.encode(image[None].float() / 255).mean, (37, 90)).mean[0]
    assert np.abs(made.astype(int) - (mean * 255).round().permute(1, 2, 0).numpy()).max() <= 1


def test_originals_and_namesakes_are_not_overwritten(trained, tmp_path, capsys):
    for name in ("a.png", "a.jpg", "notes.txt"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name, format="PNG")
    before = (tmp_path / "a.png").read_bytes()
    for images, out in ((["a.png"], ""), (["a.png", "a.jpg"], "out")):
        paths = [str(tmp_path / image) for image in images]
        assert main(["reconstruct", str(trained), *paths, "--out", str(tmp_path / out)]) == 1
        assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == before
    (tmp_path / "a.jpg").unlink()
    assert main(["reconstruct", str(trained), str(tmp_path), "--out", str(tmp_path / "out")]) == 0  # and not the notes
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_pictures_that_cannot_be_used_are_named_and_left_out(trained, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "in" / "good.png")
    Image.new("RGB", (3, 50), "red").save(tmp_path / "in" / "tiny.png")
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "good.png").read_bytes()[:60])
    assert main(["reconstruct", str(trained), str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "cut.png cannot be read" in said
    assert "tiny.png: an image of 50×3 pixels is smaller than the stride" in said
    assert "2 of 3 pictures were left out" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]


def test_a_full_disk_says_so_and_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["sample", str(trained), "--out", str(tmp_path / "new.png")]) == 1
    assert "no space left on the device for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_samples_of_any_size_repeat_with_their_seed(trained, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = str(tmp_path / f"{name}.png")
        assert main(["sample", str(trained), "--size", "70x41", "--seed", str(seed), "--out", out]) == 0
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert a.shape == (70, 41, 3)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert main(["sample", str(trained), "--count", "2", "--out", str(tmp_path / "many.png")]) == 0
    assert {"many-0.png", "many-1.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_folder_of_pictures_of_ones_own(trained, tmp_path, capsys):
    generator = np.random.default_rng(0)
    (tmp_path / "my archive").mkdir()
    for index, size in enumerate([(70, 90, 3), (64, 64, 3), (200, 130, 3), (66, 66, 3)]):
        Image.fromarray(generator.integers(256, size=size, dtype=np.uint8)).save(tmp_path / "my archive" / f"{index}.png")
    data_name, out = f"folder-33:{tmp_path / 'my archive'}", tmp_path / "own"  # whose 9×9 maps halves do not divide
    assert main(["info", data_name]) == 0
    assert main(["train", data_name, "--out", str(out)]) == 0
    assert "33×33 crops of the images in my archive" in bundle.load(out).about["data"]
    assert main(["sample", str(out), "--size", "50x30", "--out", str(tmp_path / "new.png")]) == 0
    assert np.asarray(Image.open(tmp_path / "new.png")).shape == (50, 30, 3)
    assert main(["train", "folder:nowhere", "--out", str(tmp_path / "x")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_info(trained, capsys):
    assert main(["info", str(trained)]) == 0
    said = capsys.readouterr().out
    assert "two photographs that scikit-learn carries" in said
    assert "a latent position for every 4×4 pixels" in said
    assert main(["info", "photos"]) == 0
    assert "800 training and 200 test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "landsat"], "unknown data set 'landsat'"),
        (["train", "landsat", "--out", "OUT"], "unknown data set 'landsat'"),
        (["sample", "OUT", "--out", "x.png"], "no trained model: it has no bundle.json"),
        (["reconstruct", "MODEL", "OUT/none.png", "--out", "OUT/o"], "none.png cannot be read as a picture"),
        (["sample", "MODEL", "--size", "3x9", "--out", "OUT/x.png"], "smaller than the stride of 4"),
        (["sample", "MODEL", "--out", "OUT/none/x.png"], "cannot write to the folder"),
        (["sample", "MODEL", "--out", "OUT/x.jpg"], "expected the name of a picture that ends in .png"),
        (["sample", "MODEL", "--out", "OUT"], "expected the name of a picture that ends in .png"),
        (["train", "digits", "--out", "OUT/x"], "digits is grey"),
        (["reconstruct", "MODEL", "MODEL", "--out", "OUT"], "no picture"),
    ],
)
def test_clear_errors_and_nothing_left(trained, tmp_path, capsys, arguments, message):
    places = {"OUT": str(tmp_path), "MODEL": str(trained)}
    for short, long in places.items():
        arguments = [argument.replace(short, long) for argument in arguments]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.png"))


def test_crops_too_small_for_a_prior_are_refused_before_training(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    assert main(["train", f"folder-4:{tmp_path}", "--out", str(tmp_path / "x")]) == 1
    assert "a map of one position" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [*(["--size", size] for size in ("64", "64x", "0x64", "axb")), ["--seed", "-1"], ["--seed", str(2**64)]]
)
def test_sizes_and_seeds_that_are_none(trained, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(trained), *option, "--out", "x.png"])
    assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_a_damaged_bundle_is_never_used(trained, tmp_path):
    for damaged in [path.name for path in trained.iterdir()]:
        folder = tmp_path / damaged
        folder.mkdir()
        for path in trained.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if damaged == "bundle.json":
            about = json.loads((folder / damaged).read_text())
            about["config"]["arm"] = "transformer"
            (folder / damaged).write_text(json.dumps(about))
        else:
            content = (folder / damaged).read_bytes()
            (folder / damaged).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(bundle.BundleError, match=r"damaged|does not fit"):
            bundle.load(folder)
        (folder / damaged).unlink()
        with pytest.raises(bundle.BundleError, match=r"incomplete|it has no bundle\.json"):
            bundle.load(folder)


@pytest.mark.parametrize("older", [1, 2, 3])
def test_a_bundle_of_another_format_is_refused_rather_than_decoded_to_scrambled_pictures(trained, tmp_path, older):
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    about = json.loads((tmp_path / "bundle.json").read_text())
    del about["format"]  # the first format named none
    (tmp_path / "bundle.json").write_text(json.dumps(about | ({"format": older} if older > 1 else {})))
    with pytest.raises(
        bundle.BundleError, match=f"has format {older}, this version of vaenb reads 4: train the model again"
    ):
        bundle.load(tmp_path)


def test_weights_of_others_in_the_folder_stay(trained, build, monkeypatch):
    others = ["model-00001-of-00002.safetensors", "prior-mine.safetensors"]
    older = trained / f"model-{'0' * 16}.safetensors"
    for name in (*others, older.name):
        (trained / name).write_text("weights")
    repaired = ladder.repair(fit(Config(**bundle.load(trained).about["config"])), "stationary flow", 300)
    bundle.save(repaired, trained)
    assert all((trained / name).exists() for name in others)
    assert not older.exists()
    for name in others:
        (trained / name).unlink()


def test_the_bundle_is_what_was_trained(trained, build, monkeypatch):
    loaded = bundle.load(trained)
    about = Config(**loaded.about["config"])
    monkeypatch.setenv("VAENB_BUILD", str(build))
    again = fit(about)  # anew: this test's store is empty
    z = torch.randn(3, *loaded.model.latent_shape)
    torch.testing.assert_close(loaded.model.decode(z).mean, again.model.decode(z).mean, atol=0, rtol=0)
