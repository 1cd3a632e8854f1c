"""How fast the page is in headless Chromium: seconds to load from disk, milliseconds from a drag to the decoded digit.

python tests/bench/page.py [build/paper.html]
"""

import shutil
import statistics
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

ROUNDS = 5
DRAG = """() => {
  const map = document.querySelector('[data-role=map]'), box = map.getBoundingClientRect();
  const at = (type, y) => map.dispatchEvent(new PointerEvent(type, {clientX: box.x + 40, clientY: box.y + y, pointerId: 1}));
  map.setPointerCapture = () => {};
  at('pointerdown', 80);
  const times = [];
  for (let i = 0; i < 50; i++) {
    const started = performance.now();
    at('pointermove', 80 - i);
    times.push(performance.now() - started);
  }
  at('pointerup', 30);
  return times;
}"""


def main(path: Path) -> None:
    """Print medians and extremes."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--disable-gpu"], chromium_sandbox=False)
        loads, drags = [], []
        for _ in range(ROUNDS):
            tab = browser.new_page()
            started = time.perf_counter()
            tab.goto(path.resolve().as_uri())
            tab.wait_for_function("window.explorer !== undefined")
            loads.append(time.perf_counter() - started)
            drags += tab.evaluate(DRAG)
            tab.close()
        browser.close()
    print(f"loaded in {statistics.median(loads):.2f} s (at most {max(loads):.2f}, {ROUNDS} times)")
    print(f"a drag decodes in {statistics.median(drags):.1f} ms (at most {max(drags):.1f}, {len(drags)} times)")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/paper.html"))
