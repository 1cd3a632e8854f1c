import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vaenb import figures
from vaenb.claims import Claim, conclude, lost
from vaenb.figures.style import spread


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VAENB_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


def gallery():
    pictures = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    return {"samples": pictures, "data": pictures}


def test_the_same_figure_has_the_same_bytes_and_its_numbers_read_back(folder):
    digests = set()
    for _ in range(2):
        shown = figures.save(
            figures.gallery(gallery(), 3, "T"), "name", "digits", gallery(), alt="What is seen.", note="n = 9."
        )
        digests.add(hashlib.sha256((folder / "name.png").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert shown.data == (folder / "name.png").read_bytes()
    assert shown.alt == "What is seen."
    content = json.loads((folder / "name.json").read_text())
    np.testing.assert_array_equal(figures.read_numbers(content)["samples"], gallery()["samples"])
    assert content["alt"] == "What is seen."
    assert sorted(p.name for p in folder.iterdir()) == ["name.json", "name.png"]


def test_a_figure_of_the_stand_in_says_so_and_one_of_mnist_does_not(folder):
    for dataset, says in (("digits", True), ("mnist", False)):
        figures.save(figures.gallery(gallery(), 3, "T"), dataset, dataset, {}, alt="")
        assert ("stand-in for MNIST" in json.loads((folder / f"{dataset}.json").read_text())["caption"]) == says
    assert (folder / "digits.png").read_bytes() != (folder / "mnist.png").read_bytes()


def test_numbers_of_every_kind_read_back(folder):
    numbers = {"a": [1, 2.5, "x"], "b": {"c": np.float64(0.1), 7: np.arange(3)}, "d": (True, None)}
    figures.save(figures.new(height=1), "name", "digits", numbers, alt="")
    back = figures.read_numbers(json.loads((folder / "name.json").read_text()))
    assert back["a"] == [1, 2.5, "x"]
    assert back["b"]["c"] == 0.1
    np.testing.assert_array_equal(back["b"]["7"], np.arange(3))
    assert back["d"] == [True, None]


def test_mosaic_puts_every_picture_in_its_place():
    pictures = np.arange(5)[:, None, None] * np.ones((5, 3, 4))
    canvas = figures.mosaic(pictures, columns=2, gap=1, fill=-1)
    assert canvas.shape == (3 * 3 + 2, 2 * 4 + 1)
    assert [canvas[0, 0], canvas[0, 5], canvas[4, 0], canvas[4, 5], canvas[8, 0], canvas[8, 5]] == [0, 1, 2, 3, 4, -1]
    assert (canvas[3] == -1).all()


def test_grey_is_the_decoders_mean_in_256_steps():
    images = torch.tensor([[[[0.0, 0.5], [1.0, 0.25]]]])
    assert figures.grey(images).tolist() == [[[0, 128], [255, 64]]]


def test_every_plot_renders_without_a_display(folder):
    generator = np.random.default_rng(0)
    ink = generator.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    seeds = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    colours = generator.integers(0, 256, (7, 45, 45, 3), dtype=np.uint8)
    figs = [
        figures.seed_points({"rate": seeds, "−ELBO": seeds}, {"a": "C0", "b": "C1"}, "T"),
        figures.latent_maps(
            generator.integers(0, 256, (10, 4, 28, 28), dtype=np.uint8),
            generator.normal(size=(10, 4, 7, 7)),
            generator.uniform(size=(10, 4, 7, 7)),
            ink,
            "T",
        ),
        figures.map_sizes(
            [7, 14],
            ink[:10],
            [generator.normal(size=(10, s, s)) for s in (7, 14)],
            [ink, ink],
            {"rate": [[1, 2], [3, 4]]},
            "T",
        ),
        figures.reshaped_latents(
            ink[:10], {"x": generator.normal(size=(10, 28, 28))}, {"x": (0.1, generator.uniform(size=99))}, "T"
        ),
        figures.quantiles({"x": generator.normal(size=500)}, "T"),
        figures.loss_scaling(
            {"dense": {"s": ink}, "spatial": {"s": ink}}, {"dense": {"s": "c"}, "spatial": {"s": "c"}}, "T"
        ),
        figures.worth(
            {"m": {"a": ([0.0, 0.0], [300.0, 310.0]), "b": ([9.0], [20.0])}},
            {"m": "C0"},
            ("nats", "distance"),
            "T",
            {"m": 2.0},
        ),
        figures.neighbours({"x": (ink[:8], ink[8:16])}, {"d": generator.uniform(size=99)}, "T"),
        figures.land({"64×64": {"a": colours, "b": colours}, "90×180": {"a": np.tile(colours[0], (2, 4, 1))}}, "T"),
    ]
    for index, figure in enumerate(figs):
        picture = figures.save(figure, f"f{index}", "digits", {}, alt="a")
        pixels = np.asarray(Image.open(io.BytesIO(picture.data)).convert("L"))
        assert pixels.std() > 5
        assert (pixels[:, [0, -1]] > 250).mean() > 0.9  # nothing runs off the sides


def test_claims_are_printed_without_digits_that_differ_and_written_with_them(folder, capsys):
    claims = [Claim("E0.1", "It is so.", {"x": 0.123456}, True), Claim("E0.2", "It is not.", {"x": [1.5]}, np.bool_(False))]
    conclude("00", "digits", claims)
    assert capsys.readouterr().out == "E0.1  holds  It is so.\nE0.2  DOES NOT HOLD  It is not.\n"
    written = json.loads((folder / "00.claims.json").read_text())
    assert [(c["id"], c["holds"]) for c in written] == [("E0.1", True), ("E0.2", False)]
    assert written[0]["measured"] == {"x": 0.123456}


def test_a_claim_is_lost_when_it_held_and_no_longer_does(tmp_path):
    def write(name, verdicts):
        (tmp_path / name).write_text(
            json.dumps([{"id": i, "claim": "c", "measured": {}, "holds": h} for i, h in verdicts.items()])
        )
        return tmp_path / name

    before = write("before", {"A": True, "B": False, "C": True})
    assert lost(before, write("same", {"A": True, "B": True, "C": True})) == []
    assert lost(before, write("worse", {"A": False, "B": False})) == ["A c", "C c"]
    assert lost(tmp_path / "none", tmp_path / "same") == []
    assert lost(before, tmp_path / "none") == ["A c", "C c"]


@pytest.mark.parametrize(
    ("values", "pattern", "text"),
    [
        ([0.10, 0.16], "{:.0%}", "4%"),
        ([0.100, 0.104], "{:.0%}", "0.3%"),
        ([1.0, 1.006], "{:.1f}", "0.004"),
        ([70, 75], "{:.0f}", "4"),
        ([0.5, 0.5], "{:.0%}", "0%"),
    ],
)
def test_a_small_spread_is_not_printed_as_none(values, pattern, text):
    assert spread(values, pattern) == text


def test_strips_put_each_number_in_the_row_of_its_pictures():
    rows = {name: np.zeros((6, 28, 28), dtype=np.uint8) for name in ("first", "second", "third")}
    values = {"nats": {"first": [1.0, 2.0], "second": [4.0, 6.0], "third": []}}
    figure = figures.strips(rows, values, dict.fromkeys(rows, "black"), "T", form={"nats": "{:.1f}"})
    names, printed = figure.axes[0::2], figure.axes[1::2]
    assert [axes.get_ylabel() for axes in names] == list(rows)
    assert [[text.get_text() for text in axes.texts] for axes in printed] == [["1.5", "± 0.7"], ["5.0", "± 1.4"], []]
    figure.canvas.draw()
    for left, right in zip(names, printed, strict=True):
        (a, b), (c, d) = (np.array(axes.get_position())[:, 1] for axes in (left, right))
        assert c - 0.02 <= (a + b) / 2 <= d + 0.02  # side by side


def test_curves_go_through_the_means_of_their_seeds():
    curve = figures.Curve([1, 2], [[1.0, 3.0], [5.0, 5.0]], "black")
    figure = figures.curves({"panel": {"name": curve}}, {"panel": ("x", "y")}, "T", marks={"panel": [(1.5, "red", "here")]})
    (axes,) = figure.axes
    line = next(line for line in axes.lines if line.get_label() == "name")
    np.testing.assert_allclose(line.get_ydata(), [2, 5])
    assert axes.get_xlabel() == "x"


def test_a_matrix_that_exceeds_its_limits_says_so():
    figure = figures.matrices({"m": figures.Matrix(np.array([[0.0, 2.0]]), "unit", (-1, 1))}, "T")
    bar = figure.axes[1]
    assert bar.get_xlabel() == "unit"
    assert bar._colorbar.extend == "max"


def test_colour_pictures_are_shown_as_they_are():
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    figure = figures.land({"row": {"one": picture, "many": np.stack([picture] * 6)}}, "T", columns=3)
    one, many = (axes.images[0].get_array() for axes in figure.axes)
    np.testing.assert_array_equal(one, picture)
    assert many.shape == (2 * 6 + 2, 3 * 9 + 2 * 2, 3)  # two pixels between tiles
    np.testing.assert_array_equal(many[-6:, -9:], picture)


# Simulations of complete colour blindness on linear RGB: Machado, Oliveira & Fernandes 2009, severity 1
COLOUR_BLIND = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _lab(rgb):
    """CIE L*a*b* (D65) of linear RGB, (N, 3)."""
    xyz = rgb @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    relative = xyz / [0.9505, 1.0, 1.089]
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("eyes", COLOUR_BLIND)
def test_colours_of_models_and_curves_can_be_told_apart_by_everybody(eyes):
    """A difference of 2.3 is just noticeable side by side; lines and points a few pixels wide want several times that."""
    colours = np.array([*figures.PALETTE[:5], (0, 0, 0)])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = _lab(np.clip(linear @ np.array(COLOUR_BLIND[eyes]).T, 0, 1))
    distance = np.linalg.norm(seen[:, None] - seen, axis=-1)[np.triu_indices(len(seen), 1)]
    assert distance.min() > 15
    assert np.allclose(_lab(np.array([[0.0] * 3, [1.0] * 3])), [[0, 0, 0], [100, 0, 0]], atol=0.1)
