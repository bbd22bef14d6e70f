"""The guides and the README: every block runs, and what a page shows is what it printed. tools/guides.py is the harness."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import guides  # noqa: E402
import guides_shell  # noqa: E402

PAGES = guides.pages()


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.stem)
def test_every_block_runs_and_prints_what_its_page_shows(file):
    guides.check(guides.read(file))


@pytest.mark.real
@pytest.mark.timeout(3600 * 3)
@pytest.mark.parametrize("file", [f for f in PAGES if "real" in guides.read(f).options], ids=lambda f: f.stem)
def test_every_block_runs_on_a_real_model(file):
    guides.check(guides.read(file), real=True)


def test_there_is_a_page_for_each_task():
    assert [f.name[:2] for f in PAGES[:-1]] == [f"{i:02}" for i in range(1, 11)]
    assert PAGES[-1].name == "README.md"


@pytest.mark.parametrize("file", PAGES[:-1], ids=lambda f: f.stem)
def test_a_guide_is_two_screens_of_prose(file):
    """120 lines of text at most; blocks and their output are not counted."""
    page = guides.read(file)
    blocks = sum(len(b.text.splitlines()) + (b.shown[1] - b.shown[0] if b.shown else 0) for b in page.blocks)
    assert len(page.lines) - blocks <= 120


PAGE = """<!-- guide: -->
```bash
echo 3 layers, 0.5 s
```

```text
{shown}
```

<!-- run: exit=3 -->
```bash
exit 3
```

```python
x = 1
```

```python
print(x + 1, "two")
```

```text
9 two
```
"""


def page(folder, shown, text=PAGE):
    file = folder / "page.md"
    file.write_text(text.format(shown=shown))
    return guides.read(file)


def test_numbers_may_differ_and_words_may_not(tmp_path):
    guides.check(page(tmp_path, "12 layers, 20 ms"))
    with pytest.raises(AssertionError, match=r"(?s)page.md:2.*shown as\s+# blocks.*printed as\s+# layers"):
        guides.check(page(tmp_path, "3 blocks, 0.5 s"))
    with pytest.raises(AssertionError, match="the end"):
        guides.check(page(tmp_path, "3 layers, 0.5 s\nand more"))
    # nor is a page right that shows less than was printed
    assert guides.differs("one", "one\nand more").startswith(
        "line 2 of the output is shown as\n    (the end)\nand was printed as"
    )
    assert guides.differs("1 layer", "2 layer") is None


def test_a_block_that_ends_otherwise_than_the_page_says_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"page.md:11: this block ended with exit code 3, the page says \[0\]"):
        guides.check(page(tmp_path, "3 layers, 0.5 s", PAGE.replace("<!-- run: exit=3 -->", "")))
    failing = PAGE.replace("x = 1", "raise KeyError('gone')")
    with pytest.raises(AssertionError, match=r"(?s)page.md:15.*page.md\", line 16.*KeyError: 'gone'"):
        guides.check(page(tmp_path, "3 layers, 0.5 s", failing))
    # the first command of a block that fails ends it, also inside a pipe
    with pytest.raises(AssertionError, match="exit code 1"):
        guides.check(page(tmp_path, "3 layers, 0.5 s", PAGE.replace("echo 3", "false | cat; echo 3")))


def test_update_writes_what_was_printed_and_nothing_else(tmp_path):
    found = page(tmp_path, "old")
    guides.update(found)
    wanted = PAGE.format(shown="3 layers, 0.5 s").replace("9 two", "2 two")
    assert found.file.read_text() == wanted
    # what stands below moves with a block that grows or shrinks
    longer = page(tmp_path, "old\nolder\noldest")
    guides.update(longer)
    assert longer.file.read_text() == wanted


def test_a_page_whose_blocks_are_all_left_out_fails(tmp_path):
    left = "<!-- guide: -->\n<!-- run: no, it costs money -->\n```bash\ntrue\n```\n"
    with pytest.raises(AssertionError, match="no block was run"):
        guides.check(page(tmp_path, "", left))


def test_output_without_a_block_and_a_block_without_an_end_are_refused(tmp_path):
    for text, said in (("```text\nx\n```\n", "follows no bash"), ("```bash\ntrue\n", "is not closed")):
        with pytest.raises(ValueError, match=said):
            page(tmp_path, "", text)


def test_a_command_in_a_pipe_ends_with_its_own_code(tmp_path):
    shell = guides_shell.Shell(tmp_path, guides.ENVIRONMENT)
    try:
        assert shell.bash("secateurs --version | cat").out.startswith("secateurs ")
        ran = shell.bash("secateurs prune nowhere --out x | cat")
        assert (ran.code, "error: " in ran.error) == (1, True)
    finally:
        shell.close()


def test_commands_and_options_of_the_readme_exist():
    """Of the table of commands: what is written there is in the command line's own help."""
    import typer

    from secateurs.cli import app

    commands = typer.main.get_command(app).commands
    block = re.search(r"(?s)## What to run\n\n```\n(.*?)```", (ROOT / "README.md").read_text())[1]
    named = set()
    for line in block.splitlines():
        words = [w for w in re.split(r"[ |]+", line.split("   ")[0].removeprefix("secateurs ")) if w in commands]
        assert words, line
        named |= set(words)
        known = {o for w in words for p in commands[w].params for o in (*p.opts, *p.secondary_opts)}
        known |= {
            o
            for w in words
            for sub in getattr(commands[w], "commands", {}).values()
            for p in sub.params
            for o in p.opts
        }
        for option in re.findall(r"--[a-z-]+", line):
            assert option in known, f"{option} of {words}: {line}"
    assert named == set(commands)
