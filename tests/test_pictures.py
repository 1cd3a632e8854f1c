import numpy as np
import pytest
import torch
from PIL import Image

from vaenb import folders, pictures


def test_any_kind_of_file_is_read_as_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    grey = rgb[..., 0]
    alpha = np.concatenate([rgb, np.full((5, 7, 1), 255, np.uint8)], axis=2)
    alpha[0, 0, 3] = 0
    for name, array in {"rgb.png": rgb, "grey.png": grey, "alpha.png": alpha, "rgb.tiff": rgb, "rgb.bmp": rgb}.items():
        Image.fromarray(array).save(tmp_path / name)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    repeated = np.repeat(grey[..., None], 3, axis=2)
    for name, expected in {
        "rgb.png": rgb,
        "grey.png": repeated,
        "deep.png": repeated,
        "rgb.tiff": rgb,
        "rgb.bmp": rgb,
    }.items():
        np.testing.assert_array_equal(pictures.read(tmp_path / name), expected, err_msg=name)
    composed = rgb.copy()
    composed[0, 0] = 0
    np.testing.assert_array_equal(pictures.read(tmp_path / "alpha.png"), composed)
    assert pictures.read(tmp_path / "palette.gif").shape == (5, 7, 3)


def test_pictures_are_turned_upright_and_so_are_crops(tmp_path):
    upright = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # held in portrait: stored turned, to be turned by 90° clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pictures.read(tmp_path / "turned.png"), upright)
    (crop,) = folders.cut(tmp_path / "turned.png", [(0, 1)], 32)
    np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), upright[:32, -32:])


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "tile.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(pictures.PictureError, match=r"tile\.png cannot be read as a picture"):
        pictures.read(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_band_by_band_is_read_again(tmp_path, channels):
    image = torch.rand(channels, 23, 11)
    path = tmp_path / "out.png"
    pictures.write_png(path, image.split(5, dim=1), (23, 11), channels)
    read = torch.from_numpy(pictures.read(path).copy()).permute(2, 0, 1)
    assert torch.equal(read, (image * 255).round().byte().expand(3, -1, -1))
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_nothing_half_written_is_left(tmp_path):
    def bands():
        yield torch.rand(3, 4, 8)
        raise RuntimeError("no more")

    path = tmp_path / "out.png"
    path.write_bytes(b"what was there before")
    with pytest.raises(RuntimeError, match="no more"):
        pictures.write_png(path, bands(), (8, 8), 3)
    assert path.read_bytes() == b"what was there before"
    assert len(list(tmp_path.iterdir())) == 1
