"""A sentence-transformers folder: where its transformer lies, how it makes an embedding of hidden states, what else belongs to it.

modules.json                       the modules in order: a transformer, pooling, and perhaps more
config.json ..., or 0_Transformer/ the transformer, a plain Hugging Face folder
1_Pooling/config.json              which hidden states are pooled, and how
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateurs.base.errors import CheckpointError
from secateurs.base.files import inside, write_json

_MODULES = "modules.json"
# modules that change no angle between embeddings
_APPLIED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Sentences:
    """folder: with modules.json. transformer: the Hugging Face folder in it. pooling: the ways whose results are joined, e.g.
    ('mean',). length: tokens of an input at most, or None. left: types of modules that come after pooling.
    """

    folder: Path
    transformer: Path
    modules: list[dict[str, Any]]
    pooling: tuple[str, ...]
    length: int | None
    left: tuple[str, ...]

    def copy_to(self, to: Path) -> None:
        """Write modules.json for a folder that has the transformer at its root, and copy what else belongs to it."""
        for file in self.folder.iterdir():
            if (
                file.is_file()
                and file.suffix in (".json", ".txt")
                and file.name != _MODULES
                and not (to / file.name).exists()
            ):
                shutil.copyfile(file, to / file.name)
        for module in self.modules:
            if not _is(module, "Transformer") and (self.folder / module["path"]).is_dir() and module["path"]:
                shutil.copytree(self.folder / module["path"], to / module["path"], dirs_exist_ok=True)
        write_json(to / _MODULES, [{**m, "path": ""} if _is(m, "Transformer") else m for m in self.modules])


def sentences_of(folder: Path) -> Sentences | None:
    """The sentence-transformers folder that this is, or None. Raises CheckpointError for one that cannot be read."""
    file = folder / _MODULES
    if not file.is_file():
        return None
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        for module in modules:
            inside(folder, module["path"], file)
        transformer = next((folder / m["path"] for m in modules if _is(m, "Transformer")), None)
        if transformer is None:
            raise CheckpointError(f"{file} names no transformer, so there is nothing to prune")
        pooling = next((m["path"] for m in modules if _is(m, "Pooling")), None)
        ways = _ways(json.loads((folder / pooling / "config.json").read_text(encoding="utf-8"))) if pooling else ()
        left = tuple(_type(m) for m in modules if _type(m) not in _APPLIED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} or a file that it names cannot be read: {error}") from None
    return Sentences(folder, transformer, modules, ways, _length(transformer), left)


def _ways(config: dict[str, Any]) -> tuple[str, ...]:
    """{'pooling_mode_mean_tokens': true} or {'pooling_mode': 'mean'} -> ('mean',)."""
    stated = config.get("pooling_mode")
    if stated:
        return tuple(stated) if isinstance(stated, list) else tuple(str(stated).split("+"))
    on = (key for key, value in config.items() if key.startswith("pooling_mode_") and value is True)
    return tuple(key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in on)


def _length(transformer: Path) -> int | None:
    for file in sorted(transformer.glob("sentence_*_config.json")):
        found = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length")
        if isinstance(found, int):
            return found
    return None


def _type(module: dict[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _is(module: dict[str, Any], kind: str) -> bool:
    return _type(module) == kind
