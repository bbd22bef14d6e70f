"""A picture of a report's first screen: python tools/report_picture.py RUN... OUT.png [--width 1280]

Makes the page of one or more run directories, as `secateurs report` does, and takes a picture of its decision in a headless
Chromium. docs/report.png is that of a decision on SmolLM2-135M.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from secateurs.report import page


def picture(runs: list[Path], out: Path, width: int = 1280) -> None:
    """Write a PNG of everything from the top of the page to the end of its decision."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = page.write(runs, Path(folder) / "report.html")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="light")
        tab.goto(file.as_uri())
        tab.wait_for_function("document.documentElement.dataset.ready === 'yes'")
        box = tab.locator("#decision").bounding_box()
        clip = {"x": 0, "y": 0, "width": width, "height": box["y"] + box["height"]}
        tab.screenshot(path=out, clip=clip, full_page=True)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of decide, prune, shrink or recover")
    parser.add_argument("out", type=Path, help="the picture, a PNG file")
    parser.add_argument("--width", type=int, default=1280, help="of the page, in pixels; default 1280, a phone has 390")
    asked = parser.parse_args()
    picture(asked.runs, asked.out, asked.width)
