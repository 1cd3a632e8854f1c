import os

import pytest

os.environ["VAENB_PROGRESS"] = "off"
os.environ["OMP_NUM_THREADS"] = "1"  # workers side by side, each on a core; and results to the bit depend on it


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    """Every test has a build folder of its own: no run, file or download outlives it or comes from elsewhere."""
    folder = tmp_path / "build"
    monkeypatch.setenv("VAENB_BUILD", str(folder))
    for name in ("VAENB_DATA", "VAENB_FIGURES"):
        monkeypatch.delenv(name, raising=False)
    return folder
