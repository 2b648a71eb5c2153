"""Takes the pictures of recorded reports that the documents show, with a headless Chromium.

    python scripts/screenshot.py

Each is written beside its report in benchmarks/results, from the top of the page down.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
#: Width and height of the pictures by report, in pixels.
SIZES = {"loadtest_cpu": (1000, 2040), "agreement_cpu": (1200, 560)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(browser: str, report: Path, width: int, height: int) -> None:
    """Writes the picture of an HTML file beside it."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--force-device-scale-factor=1", f"--user-data-dir={profile}",
            f"--window-size={width},{height}", f"--screenshot={report.with_suffix('.png')}",
            report.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300)


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("Chromium is not installed: `apt-get install chromium` brings it.")
    for name, size in SIZES.items():
        take(browser, RESULTS / f"{name}.html", *size)


if __name__ == "__main__":
    main()
