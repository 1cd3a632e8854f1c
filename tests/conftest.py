import os

import pytest

os.environ["VAENB_PROGRESS"] = "off"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side, each on a core: two threads each would only wait


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch):
    """Every test has a build folder of its own: no run, file or download outlives it or comes from elsewhere."""
    folder = tmp_path / "build"
    monkeypatch.setenv("VAENB_BUILD", str(folder))
    for name in ("VAENB_DATA", "VAENB_FIGURES"):
        monkeypatch.delenv(name, raising=False)
    return folder
