"""Notebooks that pytest --nbval executes print no progress, since what they print is compared, and use this checkout."""

import os
from pathlib import Path

os.environ["VAENB_PROGRESS"] = "off"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels side by side, each on a core, as under make figures
# Not the one that the environment was made in: kernels run in the folder of their notebook.
SOURCE = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))
