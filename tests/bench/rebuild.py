"""How long the paper takes on MNIST: from nothing, again, and after an edit of the plotting code, by notebook.

    python tests/bench/rebuild.py [--seeds N]

In a clone of HEAD with a run store of its own, by the same command as anybody's: ``make figures``. Run it on an idle
machine; from nothing it takes half an hour to an hour on two cores. With ``--seeds`` only from nothing, all notebooks,
with as many seeds of everything; then it says which claims of the committed figures come out otherwise. On a GPU start
NVIDIA's Multi-Process Service first (``nvidia-cuda-mps-control -d``).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vaenb import claims, data

ROOT = Path(__file__).resolve().parents[2]
LAST = "08_any_size"  # land, not MNIST: timed apart from the others


@contextmanager
def clone() -> Iterator[Path]:
    """A clone of HEAD, with nothing built, for as long as it is needed."""
    data.load("mnist")  # now, lest its download be timed
    data.load(data.resolve_photographs())
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "vaenb"
        subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
        yield checkout


def measure() -> dict[str, Any]:
    """Seconds of each way to rebuild, and of each notebook in it, with its peak memory in GiB."""
    with clone() as checkout:
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


def with_seeds(parameters: dict[str, Any], seeds: int) -> dict[str, Any]:
    """A parameter file with this many seeds wherever it names a number of them."""
    return {
        name: with_seeds(value, seeds) if isinstance(value, dict) else seeds if name.endswith("seeds") else value
        for name, value in parameters.items()
    }


def measure_seeds(seeds: int) -> dict[str, Any]:
    """Seconds from nothing with this many seeds of everything, and the claims that hold there or here alone."""
    with clone() as checkout:
        shipped = yaml.safe_load((checkout / "notebooks" / "params" / "mnist.yaml").read_text())
        mine = checkout / f"{seeds}-seeds.yaml"
        mine.write_text(yaml.safe_dump(with_seeds(shipped, seeds)))
        found = made(checkout, parameters=mine)
        pairs = [
            (before, checkout / "figures" / mine.stem / before.name)
            for before in claims.figures_folder("mnist").glob("*.claims.json")
        ]
        return found | {
            "no longer hold": [claim for before, now in pairs for claim in claims.lost(before, now)],
            "hold only now": [claim for before, now in pairs for claim in claims.lost(now, before)],
        }


def made(checkout: Path, books: list[str] | None = None, parameters: Path | None = None) -> dict[str, Any]:
    """``make figures``, of some or all notebooks: seconds, and what each that was executed took."""
    stamps = checkout / "build" / "stamps" / (parameters.stem if parameters else "mnist")
    before = {path: path.read_bytes() for path in stamps.glob("*.json")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VAENB_", "MAKE", "PYTHON"))}
    environment["VAENB_DATA"] = str(next(base for base in data.bases() if base.is_dir()))
    command = ["make", "figures", f"PARAMS={parameters}" if parameters else "DATASET=mnist", f"INTERPRETER={sys.executable}"]
    command += [f"BOOKS={' '.join(books)}"] if books else []
    started = time.perf_counter()
    subprocess.run(command, cwd=checkout, env=environment | {"PYTHONPATH": str(checkout)}, check=True)
    seconds = time.perf_counter() - started
    changed = [path for path in sorted(stamps.glob("*.json")) if path.read_bytes() != before.get(path)]
    notebooks = {path.stem: json.loads(path.read_text()) for path in changed}
    return {"seconds": seconds, "notebooks": {k: {n: v[n] for n in ("seconds", "memory")} for k, v in notebooks.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="of everything, and only from nothing")
    seeds = parser.parse_args().seeds
    print(json.dumps(measure_seeds(seeds) if seeds else measure(), indent=1, ensure_ascii=False))
