"""Imports point downwards: docs/design.md draws the layers."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "secateurs"
# from the bottom; a module may import those on its own level and below
LEVELS = [
    {"errors", "families", "device", "files", "effort", "ranks", "estimate", "hardware", "products"},
    {"patterns", "stats", "report", "library", "semi_structured", "gates", "tasks"},
    {"formats"},
    {"scores", "attention", "card", "kernels"},
    {"measure", "linear", "profile"},
    {"solvers", "allocate", "walk", "lab", "tuning", "reconstruct"},
    {"checkpoint", "calibrate", "evaluate", "sensitivity", "permute", "distill"},
    {"plan", "inspection"},
    {"block"},
    {"apportion"},
    {"prune", "verify", "pack", "probe", "bench"},
    {"train.schedules", "train.held"},
    {"train.pruning", "train.masked", "train.lottery", "train.callbacks", "train.lora"},
    {"train.recover"},
    {"train"},
    {"structured", "structured.budget", "structured.columns", "structured.graph", "structured.bridge"},
    {"structured.units"},
    {"structured.experts", "structured.width"},
    {"structured.losses", "structured.latency"},
    {"structured.channels", "structured.export", "structured.shrink"},
    {"realize", "queueing"},
    {"decide", "fleet", "charts"},
    {"page"},
    {"summary", "hf"},
    {"__init__"},
    {"cli"},
]
TORCH_ONLY = {"patterns", "stats", "scores", "solvers", "allocate", "tuning", "reconstruct"}


def name_of(file):
    """secateurs.structured.units is structured.units; a package is its folder."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.startswith("secateurs"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_a_level():
    assert {name_of(f) for f in SOURCE.rglob("*.py")} == set().union(*LEVELS)


def test_no_import_points_up():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for file in SOURCE.rglob("*.py"):
        for module in imports(file):
            name = module.removeprefix("secateurs.")
            # a name in a module, or in a module of a package
            while name not in level and "." in name:
                name = name.rpartition(".")[0]
            if module.startswith("secateurs.") and name in level:
                assert level[name] <= level[name_of(file)], f"{name_of(file)} imports {name}, which lies above it"


def test_the_core_knows_neither_files_nor_transformers():
    for name in TORCH_ONLY:
        foreign = {m.split(".")[0] for m in imports(SOURCE / f"{name}.py")}
        assert not foreign & {"transformers", "pathlib", "os", "time", "safetensors", "typer", "rich"}, name


def test_transformers_is_imported_inside_functions():
    # the plugin's classes are subclasses of transformers' own
    for file in set(SOURCE.rglob("*.py")) - {SOURCE / "hf.py"}:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                assert not any(n.split(".")[0] == "transformers" for n in names), file.name
