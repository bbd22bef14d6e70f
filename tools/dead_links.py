"""Finds links of a built site that lead nowhere: files that are missing, and places within a page.

    python tools/dead_links.py site        # one line for each; exit code 1 if there is one

Links to other hosts are not followed, since building needs no network; what a page loads (scripts, styles, pictures) has to
lie in the site.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """What a page names: its anchors, its links, and what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        said = {key: value or "" for key, value in attributes}
        self.anchors |= {said[key] for key in ("id", "name") if key in said}
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
        if "src" in said:
            self.loaded.append(said["src"])
        if tag == "link" and said.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(said["href"])


def dead(site: Path) -> list[str]:
    """Sentences on the links of all pages that lead nowhere."""
    # the page for what is not found is read at any address, so its links are absolute
    pages = {file: _Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    found = []
    for file, page in pages.items():
        here = file.relative_to(site)
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    found.append(f"{here}: loads {link} from another host")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file.resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{here}: no file {link}")
                continue
            known = next((p for f, p in pages.items() if f.resolve() == target), None)
            if parts.fragment and known is not None and unquote(parts.fragment) not in known.anchors:
                found.append(f"{here}: no place {link}")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    if not site.is_dir():
        raise SystemExit(f"no folder {site}; make it with `make docs`")
    found = dead(site)
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages, no dead link")
    raise SystemExit(bool(found))
