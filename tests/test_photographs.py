import numpy as np
import pytest
import torch
from PIL import Image

from vaenb import data, photographs


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    """A part of EuroSAT, of two classes with ten tiles each, in the layout of torchvision."""
    generator = np.random.default_rng(0)
    for name in ("Forest", "River"):
        folder = tmp_path / "given" / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(1, 11):
            tile = generator.integers(256, size=(64, 64, 3), dtype=np.uint8)
            Image.fromarray(tile).save(folder / f"{name}_{number}.jpg")
    monkeypatch.setenv("VAENB_DATA", str(tmp_path / "given"))
    monkeypatch.setattr(data, "ROOT", tmp_path / "nowhere" / "main")
    data.load.cache_clear()
    yield tmp_path / "given" / "eurosat" / "2750"
    data.load.cache_clear()


def test_a_part_of_eurosat_is_called_that(tiles):
    images = data.load("eurosat")
    assert images.train.shape == (16, 3, 64, 64)
    assert images.test.shape == (4, 3, 64, 64)
    assert images.test_labels.tolist() == [0, 0, 1, 1]
    assert images.title == "a part of EuroSAT (20 of its 27,000 tiles)"
    np.testing.assert_array_equal(  # number 5 is the first test image
        images.test[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(tiles / "Forest" / "Forest_5.jpg"))
    )
    assert data.resolve_photographs("auto") == "eurosat"
    before = images.fingerprint
    (tiles / "River" / "River_7.jpg").unlink()
    data.load.cache_clear()
    assert data.load("eurosat").fingerprint != before


def test_a_damaged_tile_stops_everything(tiles):
    path = tiles / "River" / "River_3.jpg"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(data.DataError, match=r"River_3\.jpg cannot be read .*nothing was trained on it"):
        data.load("eurosat")
    with pytest.raises(data.DataError, match=r"River_3"):
        data.resolve_photographs("auto")


def test_a_tile_of_another_size(tiles):
    Image.new("RGB", (65, 64)).save(tiles / "River" / "River_3.jpg")
    with pytest.raises(data.DataError, match="has 65×64 pixels: EuroSAT's tiles have 64×64"):
        data.load("eurosat")


def test_without_eurosat_the_embedded_photographs_serve_loudly(tmp_path, monkeypatch, capsys):
    def no_network(base):
        raise OSError("no route to host")

    monkeypatch.setattr(data, "ROOT", tmp_path / "nowhere" / "main")
    monkeypatch.setattr(photographs, "download_eurosat", no_network)
    data.load.cache_clear()
    assert data.resolve_photographs("auto") == "photos"
    said = capsys.readouterr().out
    assert "FALLING BACK" in said
    assert "no route to host" in said
    with pytest.raises(data.DataError, match="no route to host"):
        data.load("eurosat")
    with pytest.raises(data.DataError, match="choose auto or one of eurosat, photos"):
        data.resolve_photographs("mnist")


def test_the_embedded_photographs_keep_test_crops_apart():
    images = data.load("photos")
    assert images.image_shape == (3, 64, 64)
    assert len(images.train) == 800
    assert len(images.test) == 200
    assert torch.bincount(images.train_labels).tolist() == [400, 400]
    from sklearn.datasets import load_sample_images

    for label, photograph in enumerate(load_sample_images().images):
        kept = torch.from_numpy(photograph[:, : photograph.shape[1] * 4 // 5].copy()).permute(2, 0, 1)
        apart = torch.from_numpy(photograph[:, photograph.shape[1] * 4 // 5 :].copy()).permute(2, 0, 1)
        for split, labels, area in ((images.train, images.train_labels, kept), (images.test, images.test_labels, apart)):
            crop = split[labels == label][3]
            height, width = area.shape[1] - 63, area.shape[2] - 63
            places = (area[:, :height, :width] == crop[:, :1, :1]).all(dim=0).nonzero().tolist()
            assert any(torch.equal(area[:, y : y + 64, x : x + 64], crop) for y, x in places)
