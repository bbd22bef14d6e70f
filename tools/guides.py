"""Runs every command and every Python block of the guides and of the README, and keeps the output that they show true.

    python tools/guides.py                      # run all pages on small models and compare
    python tools/guides.py --update 04 06       # run these pages, and write into them what was printed
    python tools/guides.py --real 01            # on SmolLM2-135M; output is not compared

A page begins with a comment, `<!-- guide: small=lm real=smollm2 -->`: which model $MODEL is (tools/guide_models.py). Blocks fenced
as bash or python run in their order in an empty folder that holds the model as `my-model`; a block fenced as text after one is what
it printed. A comment before a block says what is special of it: `<!-- run: exit=5 -->` (or 0,5), `<!-- run: varies -->` (which of
several answers is printed depends on the machine: some output is asked for, its words are not), `<!-- run: real -->` (on real
models only), `<!-- run: needs=vllm -->` (only where that can be imported), `<!-- run: no, REASON -->`.

A number matches a number, a unit a unit of its kind, a line of a table's frame any other; all else is compared word by word.
"""

import argparse
import importlib.util
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import guide_models
import guides_shell

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_UNITS = (r"(?<=# )(?:B|KB|MB|GB)\b", "bytes"), (r"(?<=# )(?:us|ms|s|seconds?|minutes?|hours?)\b", "time")


@dataclass
class Block:
    """A fenced block. line: where its text begins, from 0. shown: the lines of the output after it, first and one past the last."""

    kind: str
    text: str
    line: int
    options: dict[str, str] = field(default_factory=dict)
    shown: tuple[int, int] | None = None


@dataclass
class Page:
    """A page of the guides. options: of its first comment."""

    file: Path
    lines: list[str]
    blocks: list[Block]
    options: dict[str, str]


def pages() -> list[Path]:
    """The pages that are run: the guides, and the README."""
    return [*sorted((ROOT / "docs" / "guide").glob("[0-9]*.md")), ROOT / "README.md"]


def options_of(line: str, word: str) -> dict[str, str] | None:
    """What a comment says: {'exit': '5', 'varies': ''}; None if the line is no such comment."""
    found = re.fullmatch(rf"\s*<!-- {word}: (.*?) -->\s*", line)
    if found is None:
        return None
    if found[1].startswith("no, "):
        return {"no": found[1].removeprefix("no, ")}
    return {key: value for key, _, value in (part.partition("=") for part in found[1].split())}


def read(file: Path) -> Page:
    """Find the blocks of a page. Raises ValueError for a fence that is not closed, and for output that belongs to no block."""
    lines = file.read_text(encoding="utf-8").splitlines()
    name = file.name
    # the README begins with its title; its model is the guides'
    page = Page(file, lines, [], {})
    said_first = options_of(lines[0], "guide")
    page.options = {"small": "lm"} if said_first is None else said_first
    at, last, said = 0, None, {}
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            kind = line[3:].strip()
            end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == "```"), None)
            if end is None:
                raise ValueError(f"{name}:{at + 1}: this block is not closed")
            if kind in ("bash", "python"):
                last = Block(kind, "\n".join(lines[at + 1 : end]), at + 1, said)
                page.blocks.append(last)
            elif kind == "text":
                if last is None:
                    raise ValueError(f"{name}:{at + 1}: this output follows no bash or python block")
                last.shown, last = (at + 1, end), None
            at, said = end + 1, {}
            continue
        if (options := options_of(line, "run")) is not None:
            said = options
        elif line.strip():
            last = None
        at += 1
    return page


def shape(text: str) -> list[str]:
    """What is compared of an output: its lines without numbers, units, frames and widths of columns."""
    found = []
    for line in text.splitlines():
        line = _NUMBER.sub("#", line)
        for pattern, instead in _UNITS:
            line = re.sub(pattern, instead, line)
        line = " ".join(re.sub(r"[─━]+", " ", line).split())
        if line:
            found.append(line)
    return found


def differs(shown: str, printed: str) -> str | None:
    """The first line that is shown and was not printed so, as a sentence; None where both have one shape."""
    want, got = shape(shown), shape(printed)
    for i in range(max(len(want), len(got))):
        a, b = (lines[i] if i < len(lines) else "(the end)" for lines in (want, got))
        if a != b:
            return f"line {i + 1} of the output is shown as\n    {a}\nand was printed as\n    {b}\nall that was printed:\n{printed}"
    return None


def left_out(block: Block, real: bool) -> str | None:
    """Why a block is not run here, or None."""
    if "no" in block.options:
        return block.options["no"]
    if "real" in block.options and not real:
        return "for real models only"
    needs = block.options.get("needs")
    if needs and importlib.util.find_spec(needs) is None:
        return f"{needs} is not installed"
    return None


def model_of(page: Page, real: bool) -> Path | None:
    """The folder that $MODEL is on this page."""
    name = page.options.get("real" if real else "small")
    if name == "smollm2":
        import smollm2

        return smollm2.fetch()
    return guide_models.fetch(name) if name else None


def run(page: Page, real: bool = False) -> Iterator[tuple[Block, guides_shell.Ran]]:
    """Run the blocks of a page. Raises AssertionError at the first that ends otherwise than the page says."""
    where = page.file.relative_to(ROOT) if page.file.is_relative_to(ROOT) else page.file
    with tempfile.TemporaryDirectory(prefix="guide-") as folder:
        environment = {**ENVIRONMENT, "SECATEURS_CACHE": f"{folder}/.cache"}
        if (model := model_of(page, real)) is not None:
            (Path(folder) / "my-model").symlink_to(model)
            environment["MODEL"] = "my-model"
        shell = guides_shell.Shell(Path(folder), environment, installed=real, seconds=7200 if real else 600)
        try:
            for block in page.blocks:
                if reason := left_out(block, real):
                    print(f"{where}:{block.line}: not run: {reason}", file=sys.stderr)
                    continue
                text = block.text.replace("path/or/hub-id", "my-model")
                start = time.monotonic()
                ran = shell.bash(text) if block.kind == "bash" else shell.python(text, str(where), block.line)
                print(f"{where}:{block.line}: {time.monotonic() - start:.1f} s", file=sys.stderr)
                allowed = [int(code) for code in block.options.get("exit", "0").split(",")]
                assert ran.code in allowed, (
                    f"{where}:{block.line}: this block ended with exit code {ran.code}, the page says {allowed}\n{block.text}\n"
                    f"{ran.out}\n{ran.error}"
                )
                yield block, ran
        finally:
            shell.close()


def printed(block: Block, ran: guides_shell.Ran) -> str:
    """What a page shows of a block: its standard output, and the sentence of a command that failed."""
    if ran.code and block.kind == "bash":
        return ran.out + "".join(f"{line}\n" for line in ran.error.splitlines() if line.startswith("error: "))
    return ran.out


def check(page: Page, real: bool = False) -> None:
    """Run a page and compare what it shows. Raises AssertionError with the place and the lines that differ."""
    ran_any = False
    for block, ran in run(page, real):
        ran_any = True
        if block.shown is None or real:
            continue
        shown, got = "\n".join(page.lines[slice(*block.shown)]), printed(block, ran)
        if "varies" in block.options:
            assert got.strip(), f"{page.file.name}:{block.line}: nothing was printed"
            continue
        found = differs(shown, got)
        assert found is None, (
            f"{page.file.name}:{block.line}: {found}\nif the page is to say this: tools/guides.py --update {page.file.stem}"
        )
    assert ran_any, f"{page.file.name}: no block was run"


def update(page: Page) -> None:
    """Run a page and write into it what was printed."""
    lines, moved = list(page.lines), 0
    for block, ran in run(page):
        if block.shown is None:
            continue
        first, end = (at + moved for at in block.shown)
        new = [line.rstrip() for line in printed(block, ran).strip("\n").splitlines()]
        lines[first:end] = new
        moved += len(new) - (end - first)
    page.file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", help="the beginnings of their names; default: all")
    parser.add_argument("--update", action="store_true", help="write what was printed into the pages")
    parser.add_argument("--real", action="store_true", help="on real models, with the installed command")
    asked = parser.parse_args()
    # nothing of this process has to be imported anew in a fork
    guides_shell._FORKED.set_forkserver_preload(guides_shell.PRELOADED)
    for file in pages():
        if not asked.page or any(file.name.startswith(name) for name in asked.page):
            start = time.monotonic()
            (update if asked.update else lambda page: check(page, asked.real))(read(file))
            print(f"{file.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
