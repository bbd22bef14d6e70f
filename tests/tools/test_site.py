"""The site of `make docs`: what it must hold, and tools/dead_links.py, which looks for links that lead nowhere."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import dead_links  # noqa: E402


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert menu == {str(f.relative_to(ROOT / "docs")) for f in (ROOT / "docs").rglob("*.md")}


def test_every_guide_is_on_the_map():
    linked = set(re.findall(r"\((guide/[^)]*)\)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {f"guide/{f.name}" for f in (ROOT / "docs" / "guide").glob("*.md")}


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda f: f.name)
def test_files_that_pages_link_to_are_there(file):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", file.read_text())
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<a href="sub/b.html#there">x</a><a href="sub/b.html#gone">x</a><a href="c.html">x</a><a href="sub/">x</a>'
        '<a href="https://x.example/y">x</a><script src="https://x.example/z.js"></script><img src="no.png"><h1 id="top"></h1>'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="there"></p><a href="../a.html#top">x</a><a href="#here">x</a>')
    assert dead_links.dead(tmp_path) == [
        "a.html: no place sub/b.html#gone",
        "a.html: no file c.html",
        "a.html: no file sub/",
        "a.html: loads https://x.example/z.js from another host",
        "a.html: no file no.png",
        "sub/b.html: no place #here",
    ]
