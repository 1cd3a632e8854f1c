"""Notebooks that pytest --nbval executes print no progress: what they print is compared."""

import os

os.environ["VAENB_PROGRESS"] = "off"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels side by side, each on a core, as under make figures
