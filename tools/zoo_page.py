"""docs/models.md from the results of zoo.py."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zoo_checks
import zoo_types

# what has to hold for a type to count as pruned exactly
EXACT = ("saved", "streamed", "magnitude", "sparsegpt")
_HEAD = """# Model types

Types that transformers {version} lists, each as a small random model, pruned, shrunk and packed by `tools/zoo.py` on {day}; each
result held against the same worked out on the whole model in memory. To make this page again, for
this or another version of transformers:

    python tools/zoo.py
    python tools/with_transformers.py {version} tools/zoo.py

secateurs supports transformers {supported}: the oldest and the newest of it pass `--check`, a dozen types that differ most
([log.md](log.md#2026-11-30-versions-of-transformers)).

The small model has the class and the config of its type, few narrow blocks of every kind, and random weights
(`src/secateurs/model/miniature.py`). A type that is not listed runs the same code; what it needs is found out in the same way.

| | tried | pruned exactly | refused in a sentence | stopped by an error | silently wrong |
|---|---|---|---|---|---|
{counts}

*Pruned exactly*: saved, streamed, magnitude and sparsegpt below are all ✓. The columns:

- **saved**: transformers itself saves the small model and loads it again with the same outputs.
- **streamed**: what enters every block of a walk is what enters it in the whole model, for two lengths, padded and not.
- **magnitude**: half of every layer's weights are zero, exactly; the saved folder loads in transformers, has the tensors of the
  whole model with masks made by hand, and gives its outputs. The number is the share of the model's weights that were pruned.
- **sparsegpt**: the same with the saved values put by name into the whole model.
- **in memory**: sparsegpt of the module in memory; first and last block solved again from plain hooks on the whole model.
- **2:4**: every group of four inputs keeps two at most (wanda).
- **reordered**: 2:4 with reordered inputs; the weights that are left, put back in their old places, give the same outputs.
- **neurons, heads, layers**: `shrink`; the smaller model gives what the dense one gives without those units.
- **experts**: `shrink`; the smaller mixtures give what the dense ones give if they never choose the experts that went.
- **packed**: the packed folder loads in transformers and gives the same.

✓ holds; · does not occur in the type, or transformers itself cannot do it; a number is the sentence of a refusal below the table;
**error** is an exception that should be a sentence; **WRONG** is a silent error, and there must be none.
"""


def page(results: Mapping[str, Any], version: str, day: str, listed: int) -> str:
    """listed: how many types transformers lists."""
    kinds = {kind: {r: x for r, x in results.items() if r.startswith(f"{kind} ")} for kind in zoo_types.KINDS}
    rows = [_counts(f"**{kind}**", found) for kind, found in kinds.items() if found]
    counts = "\n".join([*rows, _counts("**all**", results)])
    parts = [_HEAD.format(version=version, day=day, supported=_supported(), counts=counts)]
    if listed > len(results):
        parts.append(
            f"**{listed - len(results)} of {listed} types have not been tried yet**; the command goes on with them.\n"
        )
    parts += [_table(kind, found) for kind, found in kinds.items() if found]
    return "\n".join(parts)


def _supported() -> str:
    """The range of transformers in pyproject.toml."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    return re.findall(r'"transformers([^"]+)"', text)[0].replace(",", ", ")


def exact(result: Mapping[str, Any]) -> bool:
    return "checks" in result and all(result["checks"].get(n, {}).get("result") == "yes" for n in EXACT)


def _counts(title: str, results: Mapping[str, Any]) -> str:
    made = [r for r in results.values() if "checks" in r]
    good = sum(map(exact, made))
    # a silent error in any column counts, whatever else holds
    wrong = sum(_has(r, "wrong", r["checks"]) for r in made)
    crashed = sum(_has(r, "crash", EXACT) for r in made) + sum(bool(r.get("hung")) for r in results.values())
    rest = sum(not exact(r) and not _has(r, "crash", EXACT) and not _has(r, "wrong", EXACT) for r in made)
    share = f" ({good / len(made):.0%})" if made else ""
    return f"| {title} | {len(made)} | {good}{share} | {rest} | {crashed} | {wrong} |"


def _has(result: Mapping[str, Any], kind: str, columns: Iterable[str]) -> bool:
    return any(result["checks"][n]["result"] == kind for n in columns if n in result["checks"])


def _table(kind: str, results: Mapping[str, Any]) -> str:
    columns = list(zoo_checks.CHECKS)
    sentences: dict[str, int] = {}
    shown: list[str] = []

    def cell(found: Mapping[str, str]) -> str:
        result, note = found["result"], found["note"]
        if result == "yes":
            return f"✓ {note.split('%')[0]}%" if "% of" in note else "✓"
        if result == "not here":
            return "·"
        key = _alike(note)
        if key not in sentences:
            sentences[key] = len(sentences) + 1
            shown.append(note)
        return {"refused": "", "crash": "**error** ", "wrong": "**WRONG** "}[result] + str(sentences[key])

    lines = [f"## {kind}", "", f"| type | class | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    absent = []
    for row, result in results.items():
        model_type = row.removeprefix(f"{kind} ")
        if "checks" not in result:
            absent.append(f"- {model_type}: {_plain(result['refused'])}")
            continue
        cells = [cell(result["checks"][n]) if n in result["checks"] else "" for n in columns]
        also = " (text and images)" if result.get("images") else ""
        lines.append(f"| {model_type} | {result['class']}{also} | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. {_plain(note)}" for i, note in enumerate(shown, 1)), ""]
    if absent:
        lines += [
            "No small model was made of these types, whose default configs state too little or need a package that is not here:",
            "",
        ]
        lines += [*absent, ""]
    return "\n".join(lines)


def _alike(note: str) -> str:
    """A sentence without the names and numbers that differ from type to type."""
    return re.sub(r"\S*[._]\S*|'[^']*'|\d+|[A-Z]\w*[A-Z]\w*", "_", note)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
