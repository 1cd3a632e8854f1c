"""Readers against whatever bytes they are given: a value, or the error that they promise; nothing is ever executed.

VAENB_FUZZ is the number of inputs for each reader (default 30); ``make fuzz`` tries 15,000 each.
"""

import hashlib
import io
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vaenb import bundle, checkpoints, claims, data, execute, figures, ladder, page, paper, pictures, runs
from vaenb.config import Config
from vaenb.train import fit

FUZZ = settings(
    max_examples=int(os.environ.get("VAENB_FUZZ", "30")),
    deadline=None,
    derandomize="VAENB_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
BYTES = st.binary(max_size=400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw, contents):
    """A good file with bytes overwritten, cut off, doubled or put in; sometimes the good file itself."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["overwrite", "cut", "double", "insert", "ones"]))
        if kind == "overwrite" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, max(len(content), 1)))]
        elif kind == "double":
            content[at:at] = content[at : at + 64]
        elif kind == "insert":
            content[at:at] = draw(BYTES)
        else:
            content[at : at + 8] = b"\xff" * 8
    return bytes(content)


class Bomb:
    """What a pickle would do to whoever loads it."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "exploded").exists()


def encoded(form, mode="RGB"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


PICTURES = [encoded(form) for form in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "TGA")]
PICTURES += [encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")] + [encoded("TIFF", "CMYK")]


@FUZZ
@given(content=damaged(PICTURES) | BYTES)
def test_pictures(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    try:
        read = pictures.read(path)
    except pictures.Unreadable as error:
        assert str(path) in str(error)
    else:
        assert read.dtype == np.uint8
        assert read.ndim == 3
        assert read.shape[2] == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A bundle, its run, and a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAENB_BUILD", str(folder / "build"))
        patch.setenv("VAENB_PROGRESS", "off")
        run = fit(Config("digits", epochs=1, hidden=(2, 4)))
        bundle.save(ladder.repair(run, "per position", 400), folder / "bundle")
    return folder, run


@FUZZ
@given(content=st.data())
def test_bundles(tmp_path, trained, content):
    good = trained[0] / "bundle"
    folder = tmp_path / "bundle"
    folder.mkdir(exist_ok=True)
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    about = json.loads(files["bundle.json"])
    victim = content.draw(st.sampled_from([*sorted(files), "a value"]))
    if victim == "a value":
        key = content.draw(st.sampled_from([*about, *(("config", name) for name in about["config"])]))
        where, name = (about["config"], key[1]) if isinstance(key, tuple) else (about, key)
        where[name] = content.draw(JSON)
        changed = {"bundle.json": json.dumps(about).encode()}
    else:
        changed = {victim: content.draw(damaged([files[victim]]) | BYTES)}
    for name, inside in (files | changed).items():
        (folder / name).write_bytes(inside)
    try:
        loaded = bundle.load(folder)
    except bundle.BundleError as error:
        assert str(folder) in str(error)
    else:
        assert isinstance(loaded.model, torch.nn.Module)


@pytest.mark.parametrize("shape", [[None, False], [1, 28], [1, 28, -28], [1, 28, 28.0], "128", None, {"0": 1}])
def test_a_bundle_for_images_of_no_shape(tmp_path, trained, shape):
    good = trained[0] / "bundle"
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    about = json.loads((good / "bundle.json").read_text()) | {"image_shape": shape}
    (tmp_path / "bundle.json").write_text(json.dumps(about))
    with pytest.raises(bundle.BundleError, match="image_shape is"):
        bundle.load(tmp_path)


@FUZZ
@given(content=st.data())
def test_entries_of_the_run_store(tmp_path, trained, content):
    good = trained[1].folder
    spec = runs.read(good)["spec"]
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    victim = content.draw(st.sampled_from(sorted(files)))
    changed = content.draw(damaged([files[victim]]) | BYTES)
    folder = tmp_path / good.name
    folder.mkdir(exist_ok=True)
    for name, inside in (files | {victim: changed}).items():
        (folder / name).write_bytes(inside)
    same = changed == files[victim] or (
        victim == runs.CHECKSUMS and changed.decode(errors="replace").splitlines() == files[victim].decode().splitlines()
    )
    if not same and victim != runs.CHECKSUMS:
        assert runs.problem_with(folder, spec)
    elif not same:
        runs.problem_with(folder, spec)  # an answer, whichever: lines in another order mean the same
    else:
        assert runs.problem_with(folder, spec) is None


CHECKPOINT = safetensors.torch.save({"history": torch.zeros(1, 4, dtype=torch.float64)})


@FUZZ
@given(content=damaged([CHECKPOINT]) | BYTES)
@pytest.mark.filterwarnings("ignore:ignoring the damaged checkpoint")
def test_checkpoints(tmp_path, content):
    for path in tmp_path.glob("checkpoint-*"):
        path.unlink()
    good = tmp_path / f"checkpoint-00001-{hashlib.sha256(CHECKPOINT).hexdigest()[:16]}.safetensors"
    good.write_bytes(content)
    assert checkpoints.newest(tmp_path) == (content if content == CHECKPOINT else b"")


PARAMETERS = [path.read_bytes() for path in sorted((execute.NOTEBOOKS / "params").glob("*.yaml"))]
PARAMETERS += [b"!!python/object/apply:os.system ['touch exploded']", b"a: &a [*a]", b"- x", b"dataset: ../../etc", b"1: 2"]


NAMES: dict[Path, set[str]] = {}
execute_names = execute._parameter_names


@FUZZ
@given(content=damaged(PARAMETERS) | BYTES)
def test_parameter_files(tmp_path, monkeypatch, content):
    for notebook in sorted(execute.NOTEBOOKS.glob("*.ipynb")):
        NAMES[notebook] = NAMES.get(notebook) or execute_names(notebook)
    monkeypatch.setattr(execute, "_parameter_names", NAMES.__getitem__)  # papermill reads each notebook anew
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    try:
        found = execute.parameters_for("01_symptom", path, {})
    except execute.ExecutionError as error:
        assert str(path) in str(error)
    else:
        assert set(found) <= NAMES[execute.NOTEBOOKS / "01_symptom.ipynb"]


NOTEBOOK = json.dumps({
    "cells": [{"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": ["n = 1\n"], "outputs": [],
               "execution_count": 1}],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}}, "nbformat": 4, "nbformat_minor": 5,
}).encode()  # fmt: skip


@FUZZ
@given(content=damaged([NOTEBOOK]) | BYTES | JSON.map(lambda value: json.dumps(value).encode()))
def test_notebooks(tmp_path, monkeypatch, content):
    (tmp_path / "notebooks").mkdir(exist_ok=True)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "mine.yaml").write_text("{}")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path / "notebooks")
    source = tmp_path / "notebooks" / "01_demo.ipynb"
    source.write_bytes(content)
    try:
        execute._key(source, tmp_path / "mine.yaml", {})
        execute.parameters_for("01_demo", tmp_path / "mine.yaml", {})
    except execute.ExecutionError as error:
        assert "01_demo.ipynb" in str(error)
    try:
        page._read(source)
    except page.PageError as error:
        assert str(source) in str(error)


FIGURE = json.dumps({"alt": "x", "caption": "y", "numbers": {"a": [1.0, 2.0], "b": figures.encode(np.arange(3.0))}}).encode()
CLAIMS = json.dumps([{"id": "E1.1", "claim": "It holds.", "measured": {"x": [1.0]}, "holds": True}]).encode()


@FUZZ
@given(numbers=damaged([FIGURE]) | BYTES | JSON.map(lambda v: json.dumps(v).encode()), made=damaged([CLAIMS]) | BYTES)
def test_results(tmp_path, monkeypatch, numbers, made):
    folder = tmp_path / "figures" / "mine"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    (folder / "chart.json").write_bytes(numbers)
    (folder / "01_demo.claims.json").write_bytes(made)
    results = paper.Results("mine")
    for read in (
        lambda: f"{results('chart', 'a'):.1f}",
        lambda: f"{results.claim('E1.1', 'x'):.1f}",
        lambda: results.verdict("E1.1"),
        lambda: results.figure("chart", "A caption."),
    ):
        try:
            read()
        except paper.ResultError as error:
            assert str(folder) in str(error)


@FUZZ
@given(before=damaged([CLAIMS]) | BYTES)
def test_claims_of_an_earlier_run(tmp_path, before):
    (tmp_path / "before.json").write_bytes(before)
    (tmp_path / "now.json").write_bytes(CLAIMS)
    try:
        assert isinstance(claims.lost(tmp_path / "before.json", tmp_path / "now.json"), list)
    except claims.ClaimsError as error:
        assert "before.json" in str(error)


@FUZZ
@given(content=BYTES | JSON.map(lambda value: json.dumps(value).encode()))
def test_stamps(tmp_path, content):
    (tmp_path / "stamp.json").write_bytes(content)
    assert isinstance(execute._read_stamp(tmp_path / "stamp.json"), dict)


@FUZZ
@given(name=st.text(max_size=30) | st.sampled_from(["../mnist", "folder:", "folder-0:x", "mnist/../../x", "eurosat\0"]))
def test_names_of_data_sets(name):
    if name in {"auto", *data.TITLES, *data.TEXTURES, *data.PHOTOGRAPHS}:
        return
    with pytest.raises(data.DataError):
        data.load(name)
    with pytest.raises(execute.ExecutionError):
        execute.parameter_file(name)


@pytest.mark.parametrize(
    "evil",
    [pickle.dumps(Bomb()), struct.pack("<Q", 2**62) + b"{}"],
    ids=["a pickle under the name of safetensors", "a header of exabytes"],
)
def test_weights_that_match_their_checksum_and_are_hostile_are_refused(tmp_path, trained, evil):
    about = json.loads((trained[0] / "bundle" / "bundle.json").read_text())
    digest = hashlib.sha256(evil).hexdigest()
    about["sha256"] = {"model": digest, "prior": digest}
    (tmp_path / "bundle.json").write_text(json.dumps(about))
    for name in ("model", "prior"):
        (tmp_path / f"{name}-{digest[:16]}.safetensors").write_bytes(evil)
    with pytest.raises(bundle.BundleError):
        bundle.load(tmp_path)
