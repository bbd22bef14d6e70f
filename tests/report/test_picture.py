"""tools/report_picture.py: the README's picture can be made again."""

import importlib.util
import struct
from pathlib import Path

from visit import needs_browser

ROOT = Path(__file__).parents[2]


def size(file):
    """Width and height of a PNG, from its first chunk."""
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


@needs_browser
def test_a_picture_has_the_first_screen_and_no_more(run, tmp_path):
    spec = importlib.util.spec_from_file_location("report_picture", ROOT / "tools" / "report_picture.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.picture([run], tmp_path / "out.png", width=1280)
    width, height = size(tmp_path / "out.png")
    assert width == 1280
    # verdict, table and chart; the page is several times as long
    assert 400 < height < 900
    # the run directory itself is left as it is
    assert not (run / "report.html").exists()


def test_the_readme_shows_a_small_picture():
    file = ROOT / "docs" / "report.png"
    assert "(docs/report.png)" in (ROOT / "README.md").read_text()
    assert size(file)[0] == 1280
    assert file.stat().st_size < 200_000
