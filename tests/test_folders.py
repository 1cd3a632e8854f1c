import dataclasses
import os
import re
import shutil
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from vaenb import data, folders, models, runs
from vaenb.config import Config
from vaenb.train import fit

SIDE = 28


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setenv("VAENB_WORKERS", "0")
    data.load.cache_clear()
    yield
    data.load.cache_clear()


def picture(height, width, number):
    """Red tells the row, green the column, blue the file."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, np.full_like(rows, number)], axis=-1).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """24 lossless images, 30 to 122 pixels high and wide, in three folders."""
    root = tmp_path / "Holiday photos, 2024!"
    for number in range(24):
        folder = root / ("", "a", "a/b")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(30 + 4 * number, 122 - 3 * number, number).save(folder / f"{number}.{('png', 'BMP', 'tiff')[number % 3]}")
    return root


def load(root, side=SIDE):
    data.load.cache_clear()
    return data.load(f"folder-{side}:{root}")


def epoch(images, seed=0, batch_size=7, share=lambda batch: batch):
    return list(images.batches(torch.Generator().manual_seed(seed), batch_size, share, torch.device("cpu")))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def numbers_of(crops):
    return set(crops[:, 2].flatten().tolist())


def test_every_crop_is_a_piece_of_one_file(photos):
    images = load(photos)
    assert images.image_shape == (3, SIDE, SIDE)
    for crops in (torch.cat(epoch(images)), images.test, images.train[:]):
        assert crops.dtype == torch.uint8
        for crop in crops:
            number = crop[2, 0, 0].item()
            expected = torch.from_numpy(np.asarray(picture(SIDE, SIDE, number)).transpose(2, 0, 1).copy())
            expected[:2] += crop[:2, :1, :1]
            assert torch.equal(crop, expected)
            assert crop[0, -1, -1] < 30 + 4 * number
            assert crop[1, -1, -1] < 122 - 3 * number


def test_crops_reach_every_edge_and_move_from_epoch_to_epoch(tmp_path):
    for number in range(2):
        picture(SIDE + 2, SIDE + 1, number).save(tmp_path / f"{number}.png")
    images = load(tmp_path)
    places = {tuple(crop[:2, 0, 0].tolist()) for seed in range(80) for crop in epoch(images, seed)[0]}
    assert places == {(row, column) for row in range(3) for column in range(2)}


def test_an_epoch_has_each_file_in_proportion_to_its_area_up_to_a_cap(photos, monkeypatch):
    monkeypatch.setattr(folders, "CAP", 4)
    images = load(photos)
    seen = torch.cat(epoch(images))
    assert len(seen) == len(images.train) == len(images.train_labels)
    counts = np.bincount(seen[:, 2, 0, 0].numpy(), minlength=24)
    areas = np.array([(30 + 4 * n) * (122 - 3 * n) for n in range(24)])
    expected = np.minimum(areas // SIDE**2, 4)
    assert all(count in (0, wanted) for count, wanted in zip(counts, expected, strict=True))
    assert (counts > 0).sum() == len(images.train.files)


def test_the_order_visits_every_crop_once_and_is_shuffled(photos):
    train = load(photos).train
    orders = [train.order(torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(len(train))) for order in orders)
    assert not torch.equal(*orders)
    owners = torch.from_numpy(train.owners)[orders[0]]
    assert (owners.diff() == 0).float().mean() > 0.5  # several crops from one decoding
    assert (owners.diff() < 0).any()


def test_no_file_is_in_both_splits_and_a_new_one_moves_no_other(photos):
    before = load(photos)
    assert not numbers_of(before.test) & numbers_of(torch.cat(epoch(before)))
    assert 2 <= len(before.held_out.files) <= 8
    picture(40, 40, 99).save(photos / "new.png")
    after = load(photos)
    new = {"new.png"}
    assert set(after.held_out.files) - new == set(before.held_out.files)
    assert set(after.train.files) - new == set(before.train.files)


def test_test_crops_are_fixed_limited_and_show_the_middle_of_every_image_first(photos, monkeypatch):
    images = load(photos)
    assert torch.equal(images.test, load(photos).test)
    assert len(images.test) == len(images.held_out) == len(images.test_labels)
    monkeypatch.setattr(folders, "TEST_CROPS", len(images.held_out.files))
    for crop in load(photos).test:
        number = crop[2, 0, 0].item()
        assert crop[0, 0, 0] == (30 + 4 * number - SIDE + 1) // 2
        assert crop[1, 0, 0] == (122 - 3 * number - SIDE + 1) // 2


def test_the_number_of_workers_changes_nothing_nor_are_the_callers_random_numbers_touched(photos, monkeypatch):
    images = load(photos)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    alone = epoch(images)
    monkeypatch.setenv("VAENB_WORKERS", "2")
    assert folders.workers() == 2
    helped = epoch(images)
    assert all(torch.equal(*pair) for pair in zip(alone, helped, strict=True))
    assert torch.equal(torch.randn(3), expected)
    assert not torch.equal(torch.cat(epoch(images, seed=1)), torch.cat(alone))


def test_the_shares_of_several_processes_are_together_the_batch_of_one(photos):
    images = load(photos)
    shares = [epoch(images, share=lambda batch, rank=rank: batch.tensor_split(3)[rank]) for rank in range(3)]
    for whole, *parts in zip(epoch(images), *shares, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_one_image_at_a_time_is_decoded(photos, monkeypatch):
    images, opened, most = load(photos), [], []
    real = Image.open

    def counted(*arguments, **keywords):
        image = real(*arguments, **keywords)
        opened.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in opened))
        return image

    monkeypatch.setattr(Image, "open", counted)
    epoch(images)
    assert len(most) >= len(images.train.files)
    assert max(most) <= 2
    assert len(most) < len(images.train)  # several crops from one decoding


def test_crops_are_indexed_like_a_tensor(photos):
    train = load(photos).train
    everything = train[:]
    assert everything.shape == train.shape
    assert torch.equal(train[3], everything[3])
    assert torch.equal(train[-1], everything[-1])
    index = torch.tensor([5, 2, 2, 40])
    assert torch.equal(train[index], everything[index])
    assert train[:0].shape == (0, 3, SIDE, SIDE)
    with pytest.raises(IndexError):
        train[len(train)]


def grey(mode, value):
    return Image.new(mode, (SIDE, SIDE), value)


def palette():
    image = grey("P", 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (grey("L", 77), "x.png", (77, 77, 77)),
        (grey("1", 1), "x.png", (255, 255, 255)),
        (grey("LA", (200, 51)), "x.png", (40, 40, 40)),
        (grey("RGBA", (250, 100, 0, 51)), "x.png", (50, 20, 0)),
        (grey("RGBA", (250, 100, 0, 0)), "x.webp", (0, 0, 0)),
        (palette(), "x.png", (10, 20, 30)),
        (palette(), "x.gif", (10, 20, 30)),
        (Image.fromarray(np.full((SIDE, SIDE), 129 * 257, dtype=np.uint16)), "x.png", (129, 129, 129)),
        (grey("I;16", 129 * 257), "x.tif", (129, 129, 129)),
        (grey("CMYK", (0, 255, 0, 0)), "x.tif", (255, 0, 255)),
        (grey("RGB", (1, 2, 3)), "x.ppm", (1, 2, 3)),
    ],
)
def test_all_kinds_of_pixels_become_8_bit_rgb(image, name, expected, tmp_path):
    image.save(tmp_path / name)
    (crop,) = folders.cut(tmp_path / name, [(0.3, 0.7)], SIDE)
    assert torch.equal(crop, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE))


def test_a_transparent_colour_of_a_palette_is_black(tmp_path):
    palette().save(tmp_path / "x.png", transparency=1)
    (crop,) = folders.cut(tmp_path / "x.png", [(0, 0)], SIDE)
    assert crop.max() == 0


def test_few_broken_files_are_named_and_skipped_many_are_refused(photos):
    (photos / "junk.jpg").write_bytes(b"not a picture")
    (photos / "empty.png").touch()
    with pytest.warns(UserWarning, match=r"2 of 26 image files in .* cannot be read: empty.png \(.*\), junk.jpg \(no image"):
        images = load(photos)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once
        assert len(torch.cat(epoch(images))) == len(images.train)
    for number in range(7):
        (photos / f"junk{number}.jpg").write_bytes(b"not a picture")
    message = r"9 of 33 .*junk\.jpg \(.* and 4 more: more than 10%.*repair or remove"
    with pytest.raises(data.DataError, match=message) as caught:
        load(photos)
    assert "junk6" not in str(caught.value)


def test_truncated_files_are_found_while_streaming_and_replaced_by_others_the_same_way_every_time(photos, monkeypatch):
    images = load(photos)
    victim = next(path for path in images.train.files if path.endswith("png"))
    truncate(photos / victim)
    number = int(victim.rsplit("/")[-1].split(".")[0])
    results = []
    for workers in ("0", "2"):
        monkeypatch.setenv("VAENB_WORKERS", workers)
        images = load(photos)
        with pytest.warns(UserWarning, match=rf"1 of 24 image files .*{re.escape(victim)} \("):
            results.append(torch.cat(epoch(images)))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            epoch(images, seed=1)
    assert torch.equal(*results)
    assert len(results[0]) == len(images.train)
    assert number not in numbers_of(results[0])


def test_many_truncated_files_stop_the_training(photos):
    for path in load(photos).train.files:
        truncate(photos / path)
    with pytest.raises(data.DataError, match=r"not one of|more than 10%"):
        epoch(load(photos))


def test_a_truncated_test_file_is_left_out(photos):
    before = load(photos)
    count = len(before.test)
    victim = before.held_out.files[0]
    truncate(photos / victim)
    with pytest.warns(UserWarning, match=victim):
        after = load(photos).test
    assert 0 < len(after) < count
    assert numbers_of(after) < numbers_of(before.test)


def test_a_bomb_is_a_broken_file(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)
    Image.new("1", (200, 200)).save(photos / "bomb.png")
    with pytest.raises(data.DataError, match=r"exceeds limit"):
        load(photos)


def test_small_images_are_skipped_and_when_none_is_left_the_largest_is_told(photos):
    with pytest.warns(UserWarning, match="skipping 3 of 24 images"):
        assert len(load(photos, 40).train.files) > 10
    with pytest.raises(data.DataError, match=r"none of the 24 images .* 128×128 pixels, the largest has 82×83.*folder-82:"):
        load(photos, 128)


def test_folders_without_enough_images(tmp_path):
    with pytest.raises(data.DataError, match="is not a folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"junk")
    with pytest.raises(data.DataError, match=r"no image in .*looked for files ending in .*\.png"):
        load(tmp_path)
    picture(40, 40, 0).save(tmp_path / "one.png")
    with pytest.raises(data.DataError, match=r"one image .* two or more"):
        load(tmp_path)
    picture(40, 40, 1).save(tmp_path / "two.png")
    assert (len(load(tmp_path).train.files), len(load(tmp_path).held_out.files)) == (1, 1)


@pytest.mark.parametrize("name", ["folder", "folder:", "folder-0:/tmp", "folder-x:/tmp", "folders:/tmp"])
def test_names_that_say_no_folder(name):
    for function in (data.load, data.resolve):
        with pytest.raises(data.DataError, match=r"unknown data set .*folder:PATH"):
            function(name)


def test_fingerprint_depends_on_paths_sizes_and_crops(photos, tmp_path):
    first = load(photos).fingerprint
    for path in photos.rglob("*.png"):
        os.utime(path, (1, 1))
    assert load(photos).fingerprint == first
    shutil.copytree(photos, tmp_path / "copy")
    assert load(tmp_path / "copy").fingerprint == first
    assert load(photos, 29).fingerprint != first
    (tmp_path / "copy" / "0.png").rename(tmp_path / "copy" / "00.png")
    second = load(tmp_path / "copy").fingerprint
    (tmp_path / "copy" / "00.png").write_bytes((tmp_path / "copy" / "00.png").read_bytes() + b"\0")
    assert len({first, second, load(tmp_path / "copy").fingerprint}) == 3


def test_the_label_is_a_file_name(photos):
    config = Config(f"folder-{SIDE}:{photos}")
    assert config.label == "folder-28-holiday-photos-2024-spatial-7x7x1-s0"
    assert Config("folder:/x/写真").label == "folder-images-spatial-7x7x1-s0"
    assert data.resolve(config.dataset) == config.dataset


def test_an_interrupted_run_on_a_folder_equals_an_uninterrupted_one_bit_for_bit(photos, monkeypatch, tmp_path):
    config = Config(f"folder-{SIDE}:{photos}", batch_size=16, epochs=3)
    whole = fit(config)
    assert len(whole.history["rate"]) == 3
    monkeypatch.setenv("VAENB_BUILD", str(tmp_path / "interrupted"))
    monkeypatch.setenv("VAENB_WORKERS", "2")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        calls = iter([models.evaluate, stop])
        patch.setattr(models, "evaluate", lambda *a: next(calls)(*a))
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    data.load.cache_clear()
    resumed = fit(config)
    for name in ("model.safetensors", "history.csv"):
        assert runs.sha256(resumed.folder / name) == runs.sha256(whole.folder / name)
    assert fit(dataclasses.replace(config, seed=1)).history != whole.history


@pytest.mark.parametrize("given", ["two", "-1", "1.5"])
def test_a_bad_number_of_workers_is_named(given, monkeypatch):
    monkeypatch.setenv("VAENB_WORKERS", given)
    with pytest.raises(data.DataError, match=f"VAENB_WORKERS={given}"):
        folders.workers()
