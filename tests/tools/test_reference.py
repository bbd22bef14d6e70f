"""The reference: what every name of docs/api.md says of itself, and that its examples run and print what they show.

Examples run as a reader would run them: in an empty folder, in the order of the page, after the block at its head.
"""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import secateurs as sc
from secateurs.base import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()


def found(path):
    """What stands at a dotted path. A module comes before what else has its name, as in the tool that makes the page."""
    parts, rest = path.split("."), []
    while True:
        try:
            at = importlib.import_module(".".join(parts))
            break
        except ModuleNotFoundError:
            rest.insert(0, parts.pop())
    for name in rest:
        at = getattr(at, name)
    return at


NAMES = {name: found(f"secateurs.{name}") for name in re.findall(r"^::: secateurs\.(.*)$", PAGE, re.M)}
MODULES = {name: o for name, o in NAMES.items() if inspect.ismodule(o)}


def methods(kind):
    """{name: function} of what is public of a class itself."""
    plain = {n: getattr(v, "__func__", getattr(v, "fget", v)) for n, v in vars(kind).items() if not n.startswith("_")}
    return {n: inspect.unwrap(v) for n, v in plain.items() if inspect.isfunction(inspect.unwrap(v))}


def members(module):
    """{name: function or class} of what is public in a module and was made there."""
    own = {n: o for n, o in vars(module).items() if not n.startswith("_") and inspect.getmodule(o) is module}
    return {n: o for n, o in own.items() if inspect.isclass(o) or inspect.isfunction(o)}


CALLED = {name: o for name, o in NAMES.items() if name not in MODULES}
MEMBERS = {f"{name}.{n}": o for name, module in MODULES.items() for n, o in members(module).items()}
CLASSES = {n: o for n, o in {**CALLED, **MEMBERS}.items() if inspect.isclass(o)}
PROTOCOLS = [kind for kind in CLASSES.values() if getattr(kind, "_is_protocol", False)]
# what a class does as a protocol of its own module says is told there
METHODS = {
    f"{name}.{n}": o
    for name, kind in CLASSES.items()
    for n, o in methods(kind).items()
    if o.__doc__ or not any(n in methods(p) and p.__module__ == kind.__module__ for p in PROTOCOLS)
}
EVERY = {**NAMES, **MEMBERS, **METHODS}


def unnamed(o):
    """Parameters of a function, or of a class's constructor, that its text does not name."""
    if issubclass(o, BaseException) if inspect.isclass(o) else False:
        return []
    parameters = [
        n for n in inspect.signature(o).parameters if not n.startswith("_") and n not in ("self", "args", "kwargs")
    ]
    return [n for n in parameters if not re.search(rf"(?<!\w){re.escape(n)}(?!\w)", o.__doc__ or "")]


def raised(function):
    """Names of the errors in a function's own `raise X(...)` statements."""
    # a dataclass's own constructor has no text
    if inspect.unwrap(function).__code__.co_filename == "<string>":
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def unsaid(o):
    """Errors that a function or a class's constructor raises in its own code and does not name."""
    # an object that has these methods is one; nobody makes a protocol
    if getattr(o, "_is_protocol", False):
        return []
    if not inspect.isclass(o):
        own = raised(o)
    else:
        own = {e for n in ("__init__", "__post_init__") if n in vars(o) for e in raised(vars(o)[n])}
    return sorted(e for e in own if e not in (o.__doc__ or ""))


def test_the_page_shows_every_public_name_and_not_a_module_of_that_name():
    # tables of rows, each with a page of its own words
    tables = (sc.kernels, sc.train, sc.train.SCORES)
    public = [getattr(module, name) for module in (sc, sc.train) for name in module.__all__]
    assert {id(o) for o in NAMES.values()} == {id(o) for o in public} - {id(o) for o in tables}
    assert set(MODULES) == {"scores", "solvers", "patterns", "formats"}


@pytest.mark.parametrize("name", EVERY)
def test_it_says_in_its_first_line_what_it_is(name):
    lines = (EVERY[name].__doc__ or "").strip().splitlines()
    assert lines, "no summary"
    assert len(lines[0].split()) >= 3, "no summary"
    # dataclasses write their signature where nobody wrote anything
    assert not lines[0].startswith(f"{name.rpartition('.')[2]}("), "no summary"


@pytest.mark.parametrize("name", CALLED)
def test_it_names_every_parameter(name):
    assert unnamed(CALLED[name]) == []


@pytest.mark.parametrize("name", {**CALLED, **METHODS})
def test_it_names_what_it_raises(name):
    assert unsaid(EVERY[name]) == []


@pytest.mark.parametrize("name", [n for n, o in CALLED.items() if not inspect.isclass(o)])
def test_a_function_says_whether_it_raises(name):
    said = re.search(r"Raises (nothing|[\w, ]*Error)", CALLED[name].__doc__)
    assert said, "write what it raises, or 'Raises nothing of its own.'"
    known = {n for n, o in vars(errors).items() if inspect.isclass(o)} | {"ValueError", "ImportError", "OSError"}
    assert set(re.findall(r"\w+Error\b", CALLED[name].__doc__)) <= known


def test_checks_of_the_reference_can_fail():
    def quiet(first, second):
        """Do what first says."""
        if second:
            raise ValueError("no")

    assert (unnamed(quiet), unsaid(quiet)) == (["second"], ["ValueError"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder in which the block at the head of the page was run."""
    block = re.search(r"(?s)```python\n(.*?)```", PAGE)[1]
    where = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setenv("SECATEURS_CACHE", str(where / ".cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        exec(compile(block, "docs/api.md", "exec"), {})
        yield where


# in one test: an example may use what one above it on the page has written
def test_every_example_runs_and_prints_what_it_shows(folder, capsys):
    without, failed = [], []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for name, o in NAMES.items():
        test = doctest.DocTestParser().get_doctest(inspect.cleandoc(o.__doc__), {}, name, None, None)
        if not test.examples:
            without.append(name)
        told = []
        runner.run(test, out=told.append)
        failed += told
    assert not failed, "".join(failed)
    assert without == []
