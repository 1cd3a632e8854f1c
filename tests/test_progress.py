import io
import re
import sys

import pytest

from vaenb.progress import Progress


def train(monkeypatch, mode, tty=False):
    class Stream(io.StringIO):
        def isatty(self):
            return tty

    stream = Stream()
    monkeypatch.setenv("VAENB_PROGRESS", mode)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with Progress("run", total=4, done=2) as progress:
        for epoch in (3, 4):
            progress.step()
            progress.milestone(f"epoch {epoch}")
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["plain", "auto"])
def test_a_log_gets_a_line_per_milestone(mode, monkeypatch):
    lines = train(monkeypatch, mode).splitlines()
    assert [re.sub(r"\d+ s", "t", line) for line in lines] == ["run: epoch 3 (t)", "run: epoch 4 (t)"]


@pytest.mark.parametrize(("mode", "tty"), [("bar", False), ("auto", True)])
def test_somebody_who_watches_gets_a_bar(mode, tty, monkeypatch):
    written = train(monkeypatch, mode, tty)
    assert "run:" in written
    assert "4/4" in written
    assert "\n" not in written.strip()


def test_off_is_silent(monkeypatch):
    assert train(monkeypatch, "off", tty=True) == ""
