"""Imports between folders point one way, files are short enough to read, and tensors-only code stays so."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "secateurs"
# from the bottom; a folder may import those before it, and itself
ORDER = (
    "base", "matrix", "kernels", "model", "quality", "machine", "prune", "pack", "rescue", "shrink", "train", "decide", "report", "cli",
)  # fmt: skip
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES = 500


def imports(file):
    """(module, imported name or None, is at the top level) of every import."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None, node in tree.body) for alias in node.names)


def folder_of(file):
    parts = file.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else None


def test_every_folder_has_its_place_and_says_what_it_holds():
    folders = {folder.name for folder in SOURCE.iterdir() if any(folder.glob("*.py"))}
    assert folders == set(ORDER)
    for folder in ORDER:
        assert ast.get_docstring(ast.parse((SOURCE / folder / "__init__.py").read_text())), folder
    # tests lie in folders of the same names
    tests = list(Path(__file__).parent.glob("*/test_*.py"))
    assert {f.parent.name for f in tests} <= {*ORDER, "tools"}
    # pytest imports them by their names alone
    assert len({f.name for f in tests}) == len(tests)


@pytest.mark.parametrize("file", [f for f in FILES if folder_of(f)], ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_import_points_up(file):
    own = folder_of(file)
    for module, name, _ in imports(file):
        parts = module.split(".")
        if parts[0] != "secateurs":
            continue
        found = parts[1] if len(parts) > 1 else name
        # the package itself says where the compiled kernels lie
        if found is not None:
            assert ORDER.index(found) <= ORDER.index(own), f"{own} imports {found}, which stands above it"
        # a sibling's private names are its own
        assert name is None or not name.startswith("_"), f"{module}.{name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_a_file_is_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES


def test_one_matrix_needs_neither_files_nor_transformers():
    for file in SOURCE.glob("matrix/*.py"):
        foreign = {module.split(".")[0] for module, _, _ in imports(file)}
        assert not foreign & {"transformers", "pathlib", "os", "time", "safetensors", "typer", "rich"}, file.name


def test_transformers_is_imported_inside_functions():
    for file in set(FILES) - {SOURCE / "pack" / "plugin.py"}:
        # the plugin's classes are subclasses of transformers' own
        assert not [m for m, _, top in imports(file) if top and m.split(".")[0] == "transformers"], file.name
