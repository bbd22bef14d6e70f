"""Which files a model is read from: those of a folder, of a hub id, or one GGUF file; and whether code of its own may be run."""

import os
import re
from pathlib import Path
from typing import Any

from secateurs.base.errors import CheckpointError, said
from secateurs.base.files import inside
from secateurs.base.run_directory import model_in

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth")
# an environment variable, so that the processes that a command starts have it too
_TRUST = "SECATEURS_TRUST_REMOTE_CODE"


def trust_remote_code() -> None:
    """Let models run the Python code that lies beside their weights, in this process and those that it starts."""
    os.environ[_TRUST] = "1"


def trusted() -> bool:
    """Whether models may run code of their own: trust_remote_code of transformers, which asks on the terminal where it is None."""
    return os.environ.get(_TRUST) == "1"


def untrusted(folder: Path) -> str:
    """The sentence for a model that needs code of its own and may not run it."""
    return f"{folder} needs Python code of its own (auto_map in its JSON files); read it, then allow it with --trust-remote-code"


def resolve(model: str | Path) -> Path:
    """The folder of a model: a local folder as it is, of a run directory its model; a GGUF file as it is; else that of a hub id,
    whose safetensors and small files are downloaded.

    Raises CheckpointError if it is none of these.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return model_in(folder)
    if folder.is_file():
        if folder.suffix == ".gguf":
            return folder
        raise CheckpointError(
            f"{model} is a file; give the folder with config.json and {SINGLE}, a .gguf file, or a hub id"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise CheckpointError(f"no folder {model} here, and it cannot be a hub id (those read 'owner/name')")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *(["*.py"] if trusted() else [])]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(f"no folder {model} here, and the hub did not give it: {said(error)}") from None


def weights_of(folder: Path, config: dict[str, Any]) -> Path:
    """The file that transformers reads the weights from: the one that config.json names, else model.safetensors, else the index of
    its shards. Other weight files that lie there are not read. Raises CheckpointError if there is none.
    """
    stated = config.get("transformers_weights")
    for name in [stated] if isinstance(stated, str) else [SINGLE, INDEX]:
        if inside(folder, name, folder / "config.json").is_file():
            return folder / name
    names = sorted(file.name for file in folder.iterdir())
    others = ", ".join([name for name in names if name.endswith(".safetensors")][:3])
    if others:
        read = stated or f"{SINGLE} or {INDEX}"
        raise CheckpointError(
            f"{folder} has {others}, and transformers reads {read}; name it {SINGLE} if it is the whole model; shards need an index"
        )
    pickled = [n for n in names if n.endswith(_PICKLED) and n.startswith(("pytorch_model", "model", "consolidated"))]
    if pickled:
        code = (
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"[c.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') for c in (M, T)]"
        )
        raise CheckpointError(
            f"{folder} has no {SINGLE}, and {pickled[0]} is pickled, which may run code when it is read; convert it: "
            f'python -c "{code}"'
        )
    raise CheckpointError(
        f"{folder} has no {SINGLE} and no {INDEX}; download the model again (of a hub repository pickled and GGUF files are not "
        "downloaded: fetch one of these and give its path)"
    )


def from_config(model: str) -> tuple[Any, int, str | None]:
    """A model's class without weights, bytes of a weight, and a note, from its config alone; of a hub id only that is downloaded.

    Raises CheckpointError if it is neither a folder with a config.json nor a hub id, or of a class that transformers has not.
    """
    import transformers

    from secateurs.model.miniature import empty

    folder = Path(model).expanduser()
    place = model_in(folder) if folder.is_dir() else model
    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=trusted())
    except Exception as error:
        raise CheckpointError(f"no config.json for {model} here or on the hub: {said(error)}") from None
    names = getattr(config, "architectures", None) or [""]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise CheckpointError(f"{model} is of architecture {names[0] or 'none'}; transformers has no such class")
    note = None
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        note = "it is stored quantized: a plain copy in 16 bits is made in the cache first, as large as the model again"
        del config.quantization_config
    itemsize = getattr(config.dtype, "itemsize", 2)
    return empty(cls, config), itemsize, note
