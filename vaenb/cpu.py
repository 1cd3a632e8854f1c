"""How this project computes on a CPU: on one thread, without denormal numbers, and with memory that stays."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 2**30  # from glibc's malloc.h; bytes


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread (see ``train.fit``), take denormal numbers, which are slow, for zero; ``keep_memory``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_memory()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Ask the C library, from now on, to keep what one tensor leaves free for the next one.

    By default glibc gives large blocks back to the system, which then clears them page by page when they are wanted again:
    about a twentieth of the time of training and a quarter of that of large tiles (mallopt(3)). Other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, KEPT)
