"""Trials of what must not break the paper: ``make faults``, half an hour on two cores.

Everything happens in clones of HEAD, in folders with a space, an apostrophe and letters beyond ASCII, on digits with few
epochs. Each trial prints what was tried and what came of it; the first that fails ends the script with status 1.

    kill      ``make -j2 figures`` killed with SIGKILL, the whole group, at random moments; then once more to the end
    disk      no space left: a small file system of its own that grows from nothing; needs root
    readonly  sources and notebooks that cannot be written to (by root without its right to write everywhere)
    clock     files dated in the future and in the past: nothing is made again
    moved     the run store copied to another checkout: found; made by other code: not used
    two       two users building in one checkout at once
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = """
dataset: digits
epochs: 1
seeds: 2
02_latent_maps: {epochs: 1}
02_map_sizes: {epochs: 1}
03_bug_hunt: {scaling_epochs: 1}
04_cause: {map_epochs: 1}
05_locality: {short_epochs: 1, map_epochs: 1, learning_rates: [0.008]}
06_controls: {texture_epochs: 1, lengths: [4, 8]}
07_priors: {map_epochs: 1, count: 3200}
07_trained_jointly: {deep_epochs: 1, joint_epochs: 1, count: 3200}
08_any_size: {epochs: 1, sides: [64, 128]}
"""
FIGURES = 30  # at least so many files are made
SPACE = (0, 16, 64, 256, 1024, 4096)  # KiB that are free, one after the other
SCRATCH = "faults-"


def clone(folder: Path, name: str) -> Path:
    """A clone of HEAD under this name, with quick parameters."""
    target = folder / f"{name} of Zoë's"
    subprocess.run(["git", "clone", "--quiet", ROOT, target], check=True)
    (target / "quick.yaml").write_text(QUICK)
    return target


def start(checkout: Path, bound: bool = False) -> subprocess.Popen:
    """``make -j2 figures`` as the leader of a process group of its own.

    Args:
        checkout: where.
        bound: by permissions, also if this is root.
    """
    command = ["make", "-j2", "figures", "PARAMS=quick.yaml", f"INTERPRETER={sys.executable}"]
    if bound and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VAENB_", "MAKE"))} | {"VAENB_PROGRESS": "plain"}
    with log_of(checkout).open("a") as log:
        return subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True)


def log_of(checkout: Path) -> Path:
    """Not in the checkout, whose disk may be full."""
    scratch = next(folder for folder in checkout.parents if folder.name.startswith(SCRATCH))
    return scratch / f"{checkout.name}.log"


def to_the_end(checkout: Path, bound: bool = False) -> float:
    """Seconds of an undisturbed run, which must succeed."""
    began = time.monotonic()
    if start(checkout, bound=bound).wait():
        sys.exit("FAILED: " + log_of(checkout).read_text()[-3000:])
    return time.monotonic() - began


def made(checkout: Path) -> dict[str, str]:
    """Checksums of what was made; times, which differ from run to run, are left out of JSON files, and so are notebooks,
    which print them: of these their claims count, in files of their own."""
    found = {}
    for path in sorted((checkout / "figures" / "quick").iterdir()):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = re.sub(r'"seconds": (\[[^]]*\]|[\d.e-]+)', '"seconds": 0', content.decode()).encode()
        if path.suffix == ".ipynb":
            content = json.dumps([cell["source"] for cell in json.loads(content)["cells"]]).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def compare(name: str, checkout: Path, expected: dict[str, str]) -> None:
    """Fail where what was made differs from the undisturbed run, or a half-written file is left."""
    found = made(checkout)
    different = sorted(file for file in {*found, *expected} if found.get(file) != expected.get(file))
    leftovers = [str(p) for p in (checkout / "figures").rglob(".*")] + [
        str(p) for p in (checkout / "build" / "staging").rglob("*.*") if p.is_file()
    ]
    if different or leftovers:
        sys.exit(f"FAILED {name}: different: {different}; left over: {leftovers}")
    print(f"survived: {name}; {len(found)} files as in the undisturbed run", flush=True)


def kill(checkout: Path, kills: int, whole: float, draw: random.Random) -> None:
    """SIGKILL for everything at random moments, so many times; then to the end."""
    for index in range(kills):
        running = start(checkout)
        time.sleep(draw.uniform(0.5, whole * 2 / kills))  # in all about as long as an undisturbed run
        if running.poll() is not None:
            sys.exit(f"FAILED: it ended before kill {index + 1}, with status {running.returncode}")
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        for process in processes_in(checkout):  # kernels lead groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.5)
        print(f"  kill {index + 1} of {kills}", flush=True)
    to_the_end(checkout)


def processes_in(checkout: Path) -> list[int]:
    """Processes that work in a checkout (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(checkout):
                found.append(int(entry.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


def fill(folder: Path) -> Path:
    """Run in less space than it takes, with ever more of it; then to the end. Returns the checkout."""
    small = folder / "small file system"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1G", "tmpfs", small], check=True)
    checkout, statuses = clone(small, "full"), []
    (checkout / "build").mkdir()
    for kib in SPACE:
        size = shutil.disk_usage(small).used // 1024 + kib
        subprocess.run(["mount", "-o", f"remount,size={size}k", small], check=True)
        statuses.append(start(checkout).wait())
    print(f"  {', '.join(map(str, SPACE))} KiB free: statuses {statuses}", flush=True)
    assert statuses[0], "a write that failed was not noticed"
    subprocess.run(["mount", "-o", "remount,size=1G", small], check=True)
    said = [line for line in log_of(checkout).read_text().splitlines() if "space" in line.lower()]
    assert said, "nothing was said of the disk"
    print(f"  it said: {said[0].strip()[:200]}", flush=True)
    to_the_end(checkout)
    return checkout


def main() -> None:
    """All trials, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", default=["kill", "disk", "readonly", "clock", "moved", "two"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        calm = clone(folder, "calm")
        whole = to_the_end(calm)
        expected = made(calm)
        assert len(expected) >= FIGURES, sorted(expected)
        print(f"undisturbed: {whole:.0f} s, {len(expected)} files", flush=True)
        if "kill" in options.trials:
            checkout = clone(folder, "killed")
            kill(checkout, options.kills, whole, draw)
            compare(f"{options.kills} times kill -9", checkout, expected)
        if "disk" in options.trials and os.geteuid():
            print("disk: left out, a file system of its own needs root", flush=True)
        elif "disk" in options.trials:
            try:
                compare("no space, then little, then enough", fill(folder), expected)
            finally:
                subprocess.run(["umount", "--lazy", folder / "small file system"], check=False, stderr=subprocess.DEVNULL)
        if "readonly" in options.trials:
            checkout = clone(folder, "read-only")
            subprocess.run(["chmod", "-R", "a-w", checkout / "vaenb", checkout / "notebooks"], check=True)
            to_the_end(checkout, bound=True)
            compare("source that cannot be written to", checkout, expected)
            subprocess.run(["chmod", "-R", "u+w", checkout], check=True)
        if "clock" in options.trials:
            before = {path: path.read_bytes() for path in (calm / "figures" / "quick").iterdir()}
            for index, path in enumerate(p for p in calm.rglob("*") if p.is_file() and ".git" not in p.parts):
                moment = time.time() + (10**7 if index % 2 else -(10**8))
                os.utime(path, (moment, moment))
            seconds = to_the_end(calm)
            assert before == {path: path.read_bytes() for path in (calm / "figures" / "quick").iterdir()}
            assert seconds < whole / 5, f"{seconds:.0f} s: something was made again"
            print(f"survived: files dated in the future and in the past; nothing made again ({seconds:.1f} s)", flush=True)
        if "moved" in options.trials:
            checkout = clone(folder, "moved")
            shutil.copytree(calm / "build" / "runs", checkout / "build" / "runs")
            seconds = to_the_end(checkout)
            compare(f"a run store from another checkout ({seconds:.0f} s instead of {whole:.0f})", checkout, expected)
            entry = next(
                path for path in (checkout / "build" / "runs").glob("digits-spatial*") if (path / "run.json").is_file()
            )
            run = json.loads((entry / "run.json").read_text())
            (entry / "run.json").write_text(json.dumps(run | {"spec": {**run["spec"], "torch": "0.1"}}))
            shutil.rmtree(checkout / "build" / "stamps")
            to_the_end(checkout)
            compare("an entry made by another version", checkout, expected)
        if "two" in options.trials:
            checkout = clone(folder, "shared")
            users = [start(checkout), start(checkout)]
            assert [user.wait() for user in users] == [0, 0], log_of(checkout).read_text()[-3000:]
            compare("two users in one checkout", checkout, expected)


if __name__ == "__main__":
    main()
