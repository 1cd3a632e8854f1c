"""Work that processes share with no more between them than the run store: each passes over what another one computes.

A notebook's long computations are *jobs*, independent of each other. On a machine with many cores, *helpers* execute the
same notebook beside it (``python -m vaenb.execute --helper``), so that its jobs are in the store sooner; what helpers draw
is thrown away. They end where they would have to wait outside of ``each``, where ``each`` leaves them nothing to do, and
when nobody makes the notebook's figures any longer.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from vaenb import runs
from vaenb.progress import Progress

Result = TypeVar("Result")


def each(jobs: Sequence[Callable[[bool], Result]], label: str) -> list[Result]:
    """The results of all jobs, in their order.

    Args:
        jobs: each called with whether to wait for other processes, and again later if it raises ``runs.Busy``, which it may
            only where it was told not to wait. What it computes it leaves in the store.
        label: of the progress bar.
    """
    results: dict[int, Result] = {}
    queue, passed_over = deque(enumerate(jobs)), 0
    with Progress(label, len(jobs)) as progress:
        while queue:
            index, job = queue.popleft()
            wait = passed_over > len(queue)  # others are busy with everything that is left
            try:
                results[index] = job(wait)
            except runs.Busy:
                if wait:
                    raise
                queue.append((index, job))
                passed_over += 1
                continue
            passed_over = 0
            progress.step()
    return [results[index] for index in range(len(jobs))]


def _end_with(lock: Path) -> None:
    while runs.is_held(lock):
        time.sleep(1)
    os._exit(0)  # at any moment, as by kill -9: the store has nothing half-written


if runs.HELPER in os.environ:
    threading.Thread(target=_end_with, args=(Path(os.environ[runs.HELPER]),), daemon=True).start()
