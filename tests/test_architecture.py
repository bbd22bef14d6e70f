"""Imports point downwards: docs/design.md draws the layers."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "secateurs"
# from the bottom; a module may import those on its own level and below
LEVELS = [
    {"errors", "families", "device", "files", "effort"},
    {"patterns", "stats", "report", "library", "semi_structured"},
    {"formats"},
    {"scores", "attention", "card", "kernels"},
    {"measure", "linear", "profile"},
    {"solvers", "allocate", "walk", "lab", "tuning", "reconstruct"},
    {"checkpoint", "calibrate", "evaluate", "sensitivity", "permute", "distill"},
    {"plan", "inspection"},
    {"block"},
    {"apportion"},
    {"prune", "verify", "pack", "probe", "bench"},
    {"summary", "hf"},
    {"__init__"},
    {"cli"},
]
TORCH_ONLY = {"patterns", "stats", "scores", "solvers", "allocate", "tuning", "reconstruct"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "secateurs":
                yield from (f"secateurs.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_a_level():
    assert {f.stem for f in SOURCE.glob("*.py")} == set().union(*LEVELS)


def test_no_import_points_up():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for file in SOURCE.glob("*.py"):
        for module in imports(file):
            name = module.removeprefix("secateurs.").split(".")[0]
            if module.startswith("secateurs.") and name in level:
                assert level[name] <= level[file.stem], f"{file.stem} imports {name}, which lies above it"


def test_the_core_knows_neither_files_nor_transformers():
    for name in TORCH_ONLY:
        foreign = {m.split(".")[0] for m in imports(SOURCE / f"{name}.py")}
        assert not foreign & {"transformers", "pathlib", "os", "time", "safetensors", "typer", "rich"}, name


def test_transformers_is_imported_inside_functions():
    # the plugin's classes are subclasses of transformers' own
    for file in set(SOURCE.glob("*.py")) - {SOURCE / "hf.py"}:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                assert not any(n.split(".")[0] == "transformers" for n in names), file.name
