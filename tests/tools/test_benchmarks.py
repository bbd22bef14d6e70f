"""Benchmarks and tools run seldom, so what they take from secateurs is checked here: every name must be there."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "bench").glob("*.py"), *(ROOT / "tools").glob("*.py")])


def programs(text):
    """The file's tree, and those of the programs that it hands to `python -c`."""
    tree = ast.parse(text)
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "from secateurs" in node.value:
            try:
                yield ast.parse(node.value.split("; print")[0])
            except SyntaxError:
                # a sentence
                continue


def test_a_program_in_a_string_is_read():
    found = [*programs("""RUN = 'from secateurs.nowhere import nothing'""")]
    assert [node.module for node in ast.walk(found[1]) if isinstance(node, ast.ImportFrom)] == ["secateurs.nowhere"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_what_it_imports_is_there(file):
    for tree in programs(file.read_text()):
        modules = {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("secateurs"):
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = getattr(module, alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f"{file.name}:{node.lineno}: {ast.unparse(node)}"
