"""Several processes that train one run together, one for each device, on one machine or many.

They are started by ``torchrun --nproc-per-node=N script.py`` or ``fabric run --devices=N script.py``, and every one of them
runs the whole script. Process 0 decides and writes; the others follow it. A script that is started by itself is the
ordinary case of one process, for which every function here does nothing and no process group exists.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vaenb import runs

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# How long a process waits for the others before it gives up. The longest honest wait is that for process 0 while it
# evaluates the test images; of a process that dies, the others are told at once, when its connections close.
TIMEOUT = timedelta(minutes=30)
POLL = 2.0  # seconds between two looks at a run that another job is busy with
# Seconds. When a connection breaks, all operations on it fail at once, but the threads of Gloo that hold their tensors abort
# the process if Python ends before they have let go (github.com/pytorch/pytorch/pull/179291).
LET_GO = 1.0
GLOO_SAYS = ("gloo", "pair closure")  # in errors of broken connections: its file, or that another operation has timed out


class ProcessLost(RuntimeError):
    """Another process of this job has stopped, or did not answer for ``TIMEOUT``."""


class ProcessesDiffer(RuntimeError):
    """The processes of this job do not want the same, or do not see the same files."""


def count() -> int:
    """How many processes this job has."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch (N, …): N / ``count()`` rows, rounded up for the first processes, down for others."""
    return batch.tensor_split(count())[rank()]


def fabric(precision: str | None = None) -> "Fabric":
    """The device of this process, and its connection to the others: a GPU each if there are GPUs, else the CPU.

    Gloo connects CPUs, NCCL GPUs. What ``fabric run`` was told about devices holds.

    Raises:
        ValueError: more processes than GPUs; ``fabric run`` was told another precision or strategy.
    """
    from lightning_fabric import Fabric  # two of seven seconds of all imports, for what has to train
    from lightning_fabric.strategies import DDPStrategy

    if not torch.cuda.is_available():  # set by Fabric; else every step of Adam looks for the driver's library
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    accelerator = os.environ.get("LT_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if count() == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    here = int(os.environ["LOCAL_WORLD_SIZE"])  # processes on this machine
    if accelerator != "cpu" and 0 < torch.cuda.device_count() < here:
        raise ValueError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: start one for each GPU, or train on "
            "CPUs with CUDA_VISIBLE_DEVICES="
        )
    devices = os.environ.get("LT_DEVICES", here)
    strategy = DDPStrategy(timeout=TIMEOUT, broadcast_buffers=False)  # the buffers are constants
    result = Fabric(
        accelerator=accelerator, devices=devices, num_nodes=count() // here, strategy=strategy, precision=precision
    )
    if "LT_CLI_USED" not in os.environ:  # ``fabric run`` has connected them by now
        result.launch()
    return result


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def broadcast(content: bytes = b"") -> bytes:
    """What process 0 calls this with, at every process."""
    if count() == 1:
        return content
    device = _device()
    size = torch.tensor([len(content)], device=device)
    dist.broadcast(size, src=0)
    if not size:
        return b""
    tensor = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if rank() == 0:
        tensor.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(tensor, src=0)
    return tensor.cpu().numpy().tobytes()


def entry(
    label: str,
    spec: Mapping[str, Any],
    modules: Sequence[ModuleType],
    make: Callable[[Path], Mapping[str, Any]],
    wait: bool = True,
) -> Path:
    """``runs.entry`` for all processes: process 0 looks it up and locks it, all of them call ``make`` if it has to be made.

    Args:
        label, spec, modules, wait: see ``runs.entry``.
        make: does its work with the other processes; only that of process 0 writes to the folder and returns the summary.

    Raises:
        runs.Busy, runs.DiskFull: see ``runs.entry``. ``Busy`` at every process.
        ProcessLost: another process stopped or hangs.
        ProcessesDiffer: another process asks for another entry, or does not see the file system of process 0.
    """
    if count() == 1:
        return runs.entry(label, spec, modules, make, wait)
    told = False
    with _watching():
        fabric()
        _check_same(f"{label}-{runs.key(spec, modules)}")
        while True:
            if rank() == 0:
                state, folder = _lead(label, spec, modules, make)
            else:
                state, folder = _follow(make)
            if state == "ready":
                break
            if not wait:
                raise runs.Busy(f"another job computes {label}")
            if rank() == 0 and not told and os.environ.get("VAENB_PROGRESS") != "off":
                print(f"waiting for another job that computes {label}", file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL)
    if not folder.is_dir():
        raise ProcessesDiffer(
            f"process {rank()} does not see {folder}, which process 0 has written: "
            "set VAENB_BUILD to a folder that all machines share"
        )
    return folder


def _lead(label: str, spec: Mapping[str, Any], modules: Sequence[ModuleType], make: Callable) -> tuple[str, Path]:
    def announced(folder: Path) -> Mapping[str, Any]:
        _tell("make", folder)
        return make(folder)

    try:
        folder = runs.entry(label, spec, modules, announced, wait=False)
    except runs.Busy:
        return _tell("busy")
    return _tell("ready", folder)


def _follow(make: Callable[[Path], Any]) -> tuple[str, Path]:
    state, folder = _tell()
    if state == "make":
        make(folder)
        state, folder = _tell()
    return state, folder


def _tell(state: str = "", folder: Path = Path()) -> tuple[str, Path]:
    """Process 0 says what happens next, the others hear it."""
    state, path = json.loads(broadcast(json.dumps([state, str(folder)]).encode()))
    return state, Path(path)


def _check_same(name: str) -> None:
    theirs = broadcast(name.encode()).decode()
    differ = total(torch.tensor(float(theirs != name), device=_device()))
    if differ:
        raise ProcessesDiffer(
            f"process {rank()} asks for {name}, and another process of this job for something else: all must run the same "
            "script with the same code, packages and data"
        )


def _device() -> torch.device:
    """Where tensors must be that go to other processes."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def _watching() -> Iterator[None]:
    """Say in plain words what a broken connection means."""
    try:
        yield
    except RuntimeError as error:
        of_gloo = type(error) is RuntimeError and any(words in str(error).lower() for words in GLOO_SAYS)
        if not (of_gloo or isinstance(error, dist.DistError)):
            raise
        time.sleep(LET_GO)
        raise ProcessLost(
            f"process {rank()} of {count()} stops: another one has stopped, or did not answer for {TIMEOUT} (h:min:s)."
            " Completed epochs are kept: run the same command again, with as many processes as you like"
        ) from error
