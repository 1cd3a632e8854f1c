"""Time and memory of samples and reconstructions against their size, each in a process of its own.

    python tests/bench/any_size.py MODEL [SCENE]

MODEL is a folder that ``python -m vaenb train`` wrote; SCENE a picture to reconstruct. Run it on an idle machine.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TIMES = {512: 24, 1024: 12, 2048: 6, 4096: 3}  # how often each side is drawn; the median counts


def measured(model: str, folder: str, *arguments: str, times: int = 1) -> tuple[float, float]:
    """Median seconds and peak memory in GiB of a command of vaenb, in a process that has drawn a small picture before."""
    code = """if True:
        import resource, sys, time
        from vaenb.__main__ import main
        model, folder, times, *arguments = sys.argv[1:]
        main(["sample", model, "--size", "256x256", "--out", folder + "/first.png"])
        seconds = []
        for _ in range(int(times)):
            started = time.perf_counter()
            assert main(arguments) == 0
            seconds.append(time.perf_counter() - started)
        print(sorted(seconds)[len(seconds) // 2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    command = [sys.executable, "-c", code, model, folder, str(times), *arguments]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, memory = said.split()[-2:]
    return float(seconds), int(memory) * (1 if sys.platform == "darwin" else 1024) / 2**30


def benchmark(model: str, scene: str | None) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as folder:
        for side, times in TIMES.items():
            out = ["--size", f"{side}x{side}", "--out", str(Path(folder, "sample.png"))]
            seconds, memory = measured(model, folder, "sample", model, *out, times=times)
            each = seconds / (side / 1024) ** 2
            print(f"sample {side}×{side}: {seconds:.1f} s, {each:.2f} s per 1024², peak memory {memory:.2f} GiB", flush=True)
        if scene:
            seconds, memory = measured(model, folder, "reconstruct", model, scene, "--out", folder)
            print(f"reconstruct {Path(scene).name}: {seconds:.1f} s, peak memory {memory:.2f} GiB")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    benchmark(*sys.argv[1:], *[None] * (3 - len(sys.argv)))
