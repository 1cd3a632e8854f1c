"""How this project computes on a CPU: on one thread, without denormal numbers, and with memory that stays."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT = -1, -3, 2**30  # from glibc's malloc.h; bytes
LARGEST_THRESHOLD = 2**25  # that older versions of glibc take for M_MMAP_THRESHOLD


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread (see ``train.fit``), take denormal numbers, which are slow, for zero; ``keep_memory``."""
    threads, flushed = torch.get_num_threads(), bool(torch.tensor(1e-40) * 1.0 == 0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_memory()
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)  # of an outer block of this kind, too
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Ask the C library, from now on, to keep what one tensor leaves free for the next one.

    By default glibc gives large blocks back to the system, which then clears them page by page when they are wanted again:
    about a twentieth of the time of training and a quarter of that of large tiles (mallopt(3)). Other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and (mallopt(M_MMAP_THRESHOLD, KEPT) or mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)):
        mallopt(M_TRIM_THRESHOLD, KEPT)
