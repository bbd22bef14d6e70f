"""Tries every model type of the installed transformers on a small random model, and writes docs/models.md.

    python tools/zoo.py [--types llama,bert] [--kinds causal,vision] [--jobs 2] [--again] [--check]

A run that was killed goes on where it was: build/zoo.json has the results of one state of the code for each version of
transformers, and the page has all of them. Each type has a process of its own and --seconds of time. Exits 1 if a result is
silently wrong. With a version that is not installed: `python tools/with_transformers.py 5.24.0 tools/zoo.py [...]`.
--check runs a dozen that differ most and writes no page.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

import tiny  # noqa: E402
import torch  # noqa: E402
import zoo_checks  # noqa: E402
import zoo_types  # noqa: E402

RESULTS, PAGE = ROOT / "build" / "zoo.json", ROOT / "docs" / "models.md"
# a dozen types that differ most, and what is tried on them in the gate
FEW = (
    ("causal", "llama"), ("causal", "gptj"), ("causal", "mixtral"), ("causal", "mamba2"), ("causal", "jamba"),
    ("causal", "gemma3n_text"), ("causal", "falcon"), ("encoder", "modernbert"), ("encoder-decoder", "t5"),
    ("vision", "vit"), ("audio", "wav2vec2"), ("vision-language", "llava"),
)  # fmt: skip
QUICK = ("streamed", "magnitude", "in memory")


def tried(kind: str, model_type: str, checks: Iterable[str]) -> dict[str, Any]:
    """The results of one type: {check: {result, note}}, or {refused: why there is no small model}."""
    began = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="zoo-"))
    os.environ["SECATEURS_CACHE"] = str(work / "cache")
    try:
        model = zoo_types.small(kind, model_type)
        zoo_types.save(model, work / "dense", kind, tiny.tokenizer())
        text = str(tiny.text(work / "words"))
        seen = {"vision": zoo_types.images, "audio": zoo_types.sounds}.get(kind)
        calibration = str(seen(work / "seen")) if seen else text
        case = zoo_checks.case_of(model, work / "dense", calibration, text, work)
        found = {name: zoo_checks.check(name, case) for name in checks}
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "class": type(model).__name__,
            "parameters": parameters,
            "checks": found,
            "seconds": time.perf_counter() - began,
        }
    # a class may raise anything for a config that is not to its liking
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return {"refused": first or type(error).__name__, "seconds": time.perf_counter() - began}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _child(pipe: Any, kind: str, model_type: str, checks: tuple[str, ...]) -> None:
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = tried(kind, model_type, checks)
    pipe.send(found)


def apart(kind: str, model_type: str, checks: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """tried() in a process of its own, so that a crash or a hang is a result."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, kind, model_type, checks))
    child.start()
    there.close()
    try:
        if here.poll(seconds):
            return dict(here.recv())
        return {"refused": f"it took more than {seconds:.0f} seconds", "hung": True}
    except EOFError:
        child.join()
        return {"refused": f"its process died with exit code {child.exitcode}", "hung": True}
    finally:
        child.kill()
        child.join()


def made_of() -> tuple[str, str]:
    """What results depend on: the version of transformers, and a hash of the code of secateurs and of these tools."""
    import transformers

    files = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("zoo*.py"), Path(tiny.__file__)])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return transformers.__version__, digest.hexdigest()


def noted(results: dict[str, Any], kind: str) -> list[str]:
    """The notes of all checks that ended as `kind` says; 'wrong' is wrong without a word."""
    return [
        f"{row}, {name}: {found['note']}"
        for row, result in results.items()
        for name, found in result.get("checks", {}).items()
        if found["result"] == kind
    ]


def crashed(results: dict[str, Any]) -> list[str]:
    """The results that are an exception and no sentence."""
    return noted(results, "crash") + [
        f"{row}: {result['refused']}" for row, result in results.items() if result.get("hung")
    ]


def main(arguments: list[str] | None = None) -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, with commas between them")
    parser.add_argument("--kinds", help=f"some of {', '.join(zoo_types.KINDS)}")
    parser.add_argument("--checks", help=f"some of {', '.join(zoo_checks.CHECKS)}")
    parser.add_argument("--again", action="store_true", help="forget earlier results of these types")
    parser.add_argument("--check", action="store_true", help=f"{len(FEW)} types, {', '.join(QUICK)}; no page")
    parser.add_argument("--jobs", type=int, default=1, help="types that are tried at once")
    parser.add_argument("--seconds", type=float, default=240, help="time of one type")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # as it was imported: code that changes during a run makes its results those of no tree
    version, code = made_of()
    rows = list(FEW) if asked.check else zoo_types.rows(asked.kinds.split(",") if asked.kinds else zoo_types.KINDS)
    types = asked.types.split(",") if asked.types else [model_type for _, model_type in rows]
    absent = sorted(set(types) - {model_type for _, model_type in rows})
    rows = [row for row in rows if row[1] in types]
    absent += [f"{kind} {model_type}" for kind, model_type in rows if model_type not in zoo_types.listed(kind)]
    rows = [(kind, model_type) for kind, model_type in rows if model_type in zoo_types.listed(kind)]
    for name in absent:
        print(f"{name} is left out: transformers {version} lists no such type, or under another name")
    checks = tuple(asked.checks.split(",")) if asked.checks else QUICK if asked.check else tuple(zoo_checks.CHECKS)
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not asked.check else {}
    if stored.get(version, {}).get("code") != code:
        stored[version] = {"code": code, "results": {}}
    known = stored[version]["results"]
    todo = [row for row in rows if " ".join(row) not in known or asked.again or asked.check]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for row, found in pool.map(lambda row: (" ".join(row), apart(*row, checks, asked.seconds)), todo):
            known[row] = found
            if not asked.check:
                RESULTS.parent.mkdir(exist_ok=True)
                part = RESULTS.with_suffix(".part")
                part.write_text(json.dumps(stored, indent=1))
                part.replace(RESULTS)
            print(row, line(found), flush=True)
    results = {" ".join(row): known[" ".join(row)] for row in rows}
    wrong, crashes = noted(results, "wrong"), crashed(results)
    for text in (*wrong, *crashes):
        print(text)
    print(f"{len(results)} types, {len(wrong)} silent errors, {len(crashes)} crashes")
    if not (asked.check or asked.checks):
        from zoo_page import page

        every = [f"{kind} {model_type}" for kind, model_type in zoo_types.rows()]
        tried_so_far = {row: known[row] for row in every if row in known}
        PAGE.write_text(page(tried_so_far, version, date.today().isoformat(), len(every)))
    return 1 if wrong else 0


def line(result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"no small model: {result['refused']}"
    marks = {"yes": "+", "refused": "-", "not here": ".", "wrong": "WRONG", "crash": "CRASH"}
    return f"{result['seconds']:.1f}s " + " ".join(f"{n} {marks[c['result']]}" for n, c in result["checks"].items())


if __name__ == "__main__":
    sys.exit(main())
