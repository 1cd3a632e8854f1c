"""How long the paper takes on MNIST: from nothing, again, and after an edit of the plotting code, by notebook.

    python tests/bench/rebuild.py

In a clone of HEAD with a run store of its own, by the same command as anybody's: ``make figures``. Run it on an idle
machine; from nothing it takes half an hour on two cores.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vaenb import data

ROOT = Path(__file__).resolve().parents[2]
LAST = "08_any_size"  # land, not MNIST: timed apart from the others


def measure() -> dict[str, Any]:
    """Seconds of each way to rebuild, and of each notebook in it, with its peak memory in GiB."""
    data.load("mnist")  # now, lest its download be timed
    data.load(data.resolve_photographs())
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "vaenb"
        subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
        books = re.search("^BOOKS := (.*)$", (checkout / "Makefile").read_text(), re.MULTILINE)[1].split()
        found = {
            "cold": made(checkout, [book for book in books if book != LAST]),
            f"{LAST}, cold": made(checkout, [LAST]),
            "warm": made(checkout),
        }
        changed = subprocess.check_output(["git", "diff", "--name-only", "*.png"], cwd=checkout, text=True)
        found["pictures unlike the committed ones"] = changed.split()
        with (checkout / "vaenb" / "figures" / "style.py").open("a") as style:
            style.write("\nEDITED = True\n")
        return found | {"after an edit of a plot": made(checkout)}


def made(checkout: Path, books: list[str] | None = None) -> dict[str, Any]:
    """``make figures``, of some or all notebooks: seconds, and what each that was executed took."""
    stamps = checkout / "build" / "stamps" / "mnist"
    before = {path: path.read_bytes() for path in stamps.glob("*.json")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VAENB_", "MAKE", "PYTHON"))}
    environment["VAENB_DATA"] = str(next(base for base in data.bases() if base.is_dir()))
    command = ["make", "figures", "DATASET=mnist", f"INTERPRETER={sys.executable}"]
    command += [f"BOOKS={' '.join(books)}"] if books else []
    started = time.perf_counter()
    subprocess.run(command, cwd=checkout, env=environment | {"PYTHONPATH": str(checkout)}, check=True)
    seconds = time.perf_counter() - started
    changed = [path for path in sorted(stamps.glob("*.json")) if path.read_bytes() != before.get(path)]
    notebooks = {path.stem: json.loads(path.read_text()) for path in changed}
    return {"seconds": seconds, "notebooks": {k: {n: v[n] for n in ("seconds", "memory")} for k, v in notebooks.items()}}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
