"""Time and memory of samples and reconstructions against their size, each in a process of its own.

    python tests/bench/any_size.py MODEL [SCENE]

MODEL is a folder that ``python -m vaenb train`` wrote; SCENE a picture to reconstruct. Run it on an idle machine.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = (512, 1024, 2048, 4096)


def measured(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in GiB of a command of vaenb."""
    code = "import resource, sys; from vaenb.__main__ import main; status = main(sys.argv[1:]); " \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"  # fmt: skip
    started = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, int(said.split()[-1]) * unit / 2**30


def benchmark(model: str, scene: str | None) -> None:
    """Print a table; the time of starting Python is measured apart and taken off."""
    with tempfile.TemporaryDirectory() as folder:
        start, _ = measured("info", model)
        print(f"start: {start:.1f} s")
        for side in SIDES:
            seconds, memory = measured("sample", model, "--size", f"{side}x{side}", "--out", str(Path(folder, "sample.png")))
            each = (seconds - start) / (side / 1024) ** 2
            print(f"sample {side}×{side}: {seconds:.1f} s, {each:.2f} s per 1024², peak memory {memory:.2f} GiB", flush=True)
        if scene:
            seconds, memory = measured("reconstruct", model, scene, "--out", folder)
            print(f"reconstruct {Path(scene).name}: {seconds:.1f} s, peak memory {memory:.2f} GiB")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    benchmark(*sys.argv[1:], *[None] * (3 - len(sys.argv)))
