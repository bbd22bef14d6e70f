"""A plain copy of a model that is stored in another way: quantized, as GGUF, or as an adapter to another model.

Pruning reads tensors by name from 16- or 32-bit safetensors and writes them back. What is stored in another way is written as such
a folder once, by transformers' and peft's own readers, and kept in the cache folder (plain/ in it) for later commands. A quantized
folder is read tensor by tensor; GGUF files and adapters take the whole model in memory.
"""

import fcntl
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn

from secateurs.base.errors import CheckpointError, SecateursError, said
from secateurs.base.files import cache_folder, write_json, writing
from secateurs.model.checkpoint import Checkpoint, fingerprint_of_files
from secateurs.model.shards import write_index, write_shard
from secateurs.model.source import INDEX, SINGLE, resolve, trusted

# bytes that are read and written together, of one parameter at least
_BYTES = 1 << 27
_ADAPTER = "adapter_config.json"
# ways of quantization whose transformers reader dequantizes on a CPU
_DEQUANTIZED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
# transformers 5.22 reads compressed-tensors without their scales; much older ones know no GGUF that is written again
_READERS = "5.23"


@dataclass(frozen=True)
class Plain:
    """A folder of plain safetensors. note, key: what to know of it, and a hash of what it was made from; None if it is as given."""

    folder: Path
    note: str | None = None
    key: str | None = None


def plain(given: Path) -> Plain:
    """The folder as it is, or its plain copy, made now if there is none. Raises CheckpointError for what nothing here reads."""
    import transformers

    kind = _kind(given)
    if kind is None:
        return Plain(given)
    if kind != "adapter" and Version(transformers.__version__) < Version(_READERS):
        raise CheckpointError(
            f"{given} is {'GGUF' if kind == 'gguf' else kind}, and reading that needs transformers {_READERS} or newer; "
            f"{transformers.__version__} is installed"
        )
    write, sentence = _HOW[kind]
    key = fingerprint_of_files(_read(given, kind))
    folder = cache_folder() / "plain" / key[:32]
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_suffix(".lock")):
            if not folder.is_dir():
                part = folder.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                write(given, part)
                part.rename(folder)
    return Plain(folder, f"{given} {sentence(given)}; its plain copy is {folder}", key)


def _kind(given: Path) -> str | None:
    """The row of _HOW for a model, None if it is plain."""
    if given.is_file():
        return "gguf"
    if (given / _ADAPTER).is_file():
        return "adapter"
    config = given / "config.json"
    if config.is_file():
        method = (_config(config).get("quantization_config") or {}).get("quant_method")
        if method in _DEQUANTIZED:
            return "quantized"
    weights = (given / name for name in (SINGLE, INDEX))
    return "gguf" if any(given.glob("*.gguf")) and not any(file.is_file() for file in weights) else None


def _read(given: Path, kind: str) -> set[Path]:
    """The files that a copy depends on."""
    if given.is_file():
        return {given, *given.parent.glob("tokenizer*")}
    folders = [given]
    if kind == "adapter" and _base(given) != str(given):
        base = resolve(_base(given))
        folders.append(base if base.is_dir() else base.parent)
    return {file for folder in folders for file in folder.iterdir() if file.is_file()}


def _config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other process makes the same copy."""
    handle = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _reading(given: Path, package: str) -> Iterator[None]:
    """What transformers and others raise for a model that they cannot read, as one sentence. package: what may not be there."""
    try:
        yield
    except ImportError:
        raise CheckpointError(f"{given} needs the library {package}; pip install 'secateurs[models]'") from None
    except (SecateursError, SafetensorError):
        raise
    except OSError as error:
        # those of a disk say so by number
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise
        raise CheckpointError(f"{given} cannot be read: {said(error)}") from None
    except struct.error:
        raise CheckpointError(f"{given} is truncated; download or copy it again") from None
    except Exception as error:
        raise CheckpointError(f"{given} cannot be read: {said(error)}") from None


# ---------------------------------------------------------------------------------------------------------- quantized


class _Quantized(Checkpoint):
    """A quantized folder whose tensors are dequantized when they are loaded."""

    def __init__(self, folder: Path, quantizer: Any) -> None:
        self.given, self.note = folder, None
        self._open(folder, quantizer=quantizer)

    @property
    def dtype(self) -> torch.dtype:
        stated = self.raw_config.get("dtype") or self.raw_config.get("torch_dtype")
        return getattr(torch, stated) if isinstance(stated, str) else torch.bfloat16

    def groups(self) -> list[list[str]]:
        """Stored names, those of one parameter together, in groups that fit into memory."""
        of: dict[str, list[str]] = {}
        for key in self.ordered_keys():
            of.setdefault(self.target_of[key], []).append(key)
        groups: list[list[str]] = []
        room = 0
        for keys in of.values():
            nbytes = sum(map(self.nbytes_of, keys))
            if not groups or nbytes > room:
                groups.append([])
                room = _BYTES
            groups[-1] += keys
            room -= nbytes
        return groups

    def loaded(self, model: nn.Module, keys: list[str]) -> dict[str, Tensor]:
        """Tensors as a plain folder of this model would store them."""
        from transformers.core_model_loading import revert_weight_conversion

        self._fill(model, keys)
        found = {name: p.detach() for name, p in model.named_parameters() if p.device.type != "meta"}
        buffers = dict(model.named_buffers())
        found |= {target: buffers[target] for key in keys if (target := self.target_of[key]) in buffers}
        # those that dequantize would be reverted too
        any_model: Any = model
        any_model._weight_conversions = None
        plain_tensors: dict[str, Tensor] = revert_weight_conversion(any_model, found)
        return plain_tensors


def _dequantize(given: Path, out: Path) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    raw = _config(given / "config.json")
    settings = raw.pop("quantization_config")
    _one_kind(given, settings)
    with _reading(given, str(settings["quant_method"])):
        quantizer = AutoHfQuantizer.from_config({**settings, "dequantize": True}, pre_quantized=True)
        quantizer.validate_environment()
        source = _Quantized(given, quantizer)
        model = source.skeleton()
        groups = source.groups()
        for i, keys in enumerate(groups):
            write_shard(out, i, len(groups), source.loaded(model, keys))
            source.release(model)
    write_index(out, len(groups))
    source.copy_small_files(out, but=("config.json",))
    write_json(out / "config.json", {**raw, "dtype": str(model.config.dtype).removeprefix("torch.")})


def _one_kind(given: Path, settings: dict[str, Any]) -> None:
    """Raises CheckpointError for layers of several kinds of integers: transformers reads all as the first, unnoticed."""
    kinds = {
        tuple((group.get("weights") or {}).get(key) for key in ("num_bits", "group_size", "symmetric"))
        for group in (settings.get("config_groups") or {}).values()
        # those have readers of their own
        if not any("experts" in target for target in group.get("targets", ()))
    }
    if len(kinds) > 1:
        bits = ", ".join(sorted(f"{kind[0]}" for kind in kinds))
        raise CheckpointError(
            f"{given} has layers quantized in {len(kinds)} ways (bits {bits}), which transformers does not turn back into 16-bit "
            "weights; use the model that it was made from"
        )


def _quantized_note(given: Path) -> str:
    method = _config(given / "config.json")["quantization_config"]["quant_method"]
    return f"is quantized ({method}): it was dequantized, and quality is measured against the dequantized model"


# --------------------------------------------------------------------------------------------------------------- GGUF


def _gguf(given: Path) -> Path:
    """The one GGUF file of a folder."""
    if given.is_file():
        return given
    files = sorted(given.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(
            f"{given} holds {len(files)} GGUF files, {', '.join(f.name for f in files[:3])}; name one of them; parts of one model "
            "are joined by llama-gguf-split --merge"
        )
    return files[0]


def _from_gguf(given: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = _gguf(given)
    with _reading(file, "gguf"):
        from transformers.integrations.gguf.reader import GgufHeader

        dtype = GgufHeader.from_file(str(file)).dtype or torch.bfloat16
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        # without dequantize=True the loader keeps packed blocks and refuses to save them
        settings = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=settings, dtype=dtype)
        model.save_pretrained(out)
        tokenizer = {"pretrained_model_name_or_path": str(file.parent)} if _own_tokenizer(file.parent) else where
        AutoTokenizer.from_pretrained(**tokenizer, trust_remote_code=trusted()).save_pretrained(out)


def _own_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _gguf_note(given: Path) -> str:
    own = _own_tokenizer(_gguf(given).parent)
    whose = (
        "beside it"
        if own
        else "as transformers reads it from the file (put the model's own tokenizer files beside it to use those)"
    )
    return f"is GGUF: it was dequantized, and quality is measured against the dequantized model; the tokenizer is the one {whose}"


# ------------------------------------------------------------------------------------------------------------ adapters


def _base(given: Path) -> str:
    """The model that an adapter belongs to: the one beside it, else the one that it names."""
    if (given / "config.json").is_file():
        return str(given)
    named = _config(given / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{given} is an adapter that names no base model (base_model_name_or_path in {_ADAPTER})")
    beside = given / named
    return str(beside) if beside.is_dir() else named


def _merge(given: Path, out: Path) -> None:
    base = _base(given)
    with _reading(given, "peft"), tempfile.TemporaryDirectory() as name:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if base == str(given):
            # transformers would load the adapter of a folder that has one by itself, and not merge it
            for file in given.iterdir():
                if file.is_file() and not file.name.startswith("adapter_"):
                    (Path(name) / file.name).symlink_to(file.resolve())
            base = name
        source = Checkpoint(resolve(base))
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto", trust_remote_code=trusted())
        merged: Any = PeftModel.from_pretrained(model, str(given)).merge_and_unload(safe_merge=True)
        source.copy_small_files(out, but=("config.json",))
        merged.save_pretrained(out)
        tokenizer = given if _own_tokenizer(given) else source.folder
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trusted()).save_pretrained(out)


def _merge_note(given: Path) -> str:
    base = _base(given)
    beside = f"the model beside it (without {_ADAPTER} that would be read alone)" if base == str(given) else base
    return f"holds an adapter: it was merged into {beside}"


_HOW: dict[str, tuple[Callable[[Path, Path], None], Callable[[Path], str]]] = {
    "quantized": (_dequantize, _quantized_note),
    "gguf": (_from_gguf, _gguf_note),
    "adapter": (_merge, _merge_note),
}
"""How a plain copy is made, and what is said of it."""
