"""Notebooks that pytest --nbval executes print no progress: what they print is compared."""

import os

os.environ["VAENB_PROGRESS"] = "off"
