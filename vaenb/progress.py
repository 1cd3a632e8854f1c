"""Progress of long computations: a bar in a terminal and in JupyterLab, plain lines in a log, nothing in tests.

``VAENB_PROGRESS`` chooses: ``bar`` (of characters), ``plain``, ``off``, or ``auto`` (the default: a bar where somebody
watches, lines elsewhere).
"""

import os
import sys
import time
from types import TracebackType

import tqdm.auto
import tqdm.std

from vaenb import processes


class Progress:
    """Counts steps. Used as ``with Progress(label, total) as progress``; writes to standard error."""

    def __init__(self, label: str, total: int, done: int = 0):
        self.label, self.total, self.started = label, total, time.monotonic()
        mode = os.environ.get("VAENB_PROGRESS", "auto")
        if processes.rank() > 0:  # the first of several processes shows it
            mode = "off"
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.plain = mode == "plain" or (mode == "auto" and not watched)
        self.bar = None
        if mode == "bar":  # under make, where several processes take turns on the terminal's last line
            self.bar = tqdm.std.tqdm(
                desc=label, total=total, initial=done, leave=False, ncols=110, position=0, mininterval=1
            )
        elif mode == "auto" and watched:
            self.bar = tqdm.auto.tqdm(desc=label, total=total, initial=done, leave=False, dynamic_ncols=True)

    def step(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def milestone(self, text: str) -> None:
        """Something worth a line in a log, such as the end of an epoch."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.plain:
            print(f"{self.label}: {text} ({time.monotonic() - self.started:.0f} s)", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
