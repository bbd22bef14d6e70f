"""Reads and writes model folders: a skeleton without weights that is filled and emptied block by block; sharded safetensors.

A model need never be in memory as a whole. Tensors that nothing edits are copied as they are in the source; edited ones keep
their name and dtype. Pickled weights are refused; a model that is stored in another way is read from its plain copy (plain.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.device import return_memory
from secateurs.base.errors import CheckpointError, said
from secateurs.base.files import write_json
from secateurs.base.progress import no_bars
from secateurs.model import attention, shards
from secateurs.model.blocks import blocks_of
from secateurs.model.miniature import seeded
from secateurs.model.on_meta import without_weights
from secateurs.model.sentences import Sentences, sentences_of
from secateurs.model.source import resolve, trusted, untrusted, weights_of

# weights outside the blocks that are written together
_SHARD_WEIGHTS = 1 << 27
# bytes of a safetensors dtype; those not listed take 8 at most
_ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "F64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}


class Checkpoint:
    """One Hugging Face folder: its config, where each tensor lies, and a loader for walk.stream().

    given: where the model is; folder: where it is read, which is another place for one that is stored in another way. note: what a
    reader of its numbers should know of that, or None. sentences: what else there is of a sentence-transformers folder, or None.
    """

    sentences: Sentences | None = None

    def __init__(self, model: str | Path, packed: bool = False) -> None:
        """packed: the folder may be one of `secateurs pack`, whose skeleton is that of the dense model."""
        # it makes the copy with a Checkpoint
        from secateurs.model.plain import plain

        self.given = resolve(model)
        self.sentences = sentences_of(self.given)
        self._copy = plain(self.sentences.transformer if self.sentences else self.given)
        self.note = self._copy.note
        self._open(self._copy.folder, packed)

    def _open(self, folder: Path, packed: bool = False, quantizer: Any = None) -> None:
        """quantizer: transformers' own of a quantized folder, which dequantizes what is loaded."""
        self.folder = folder
        config = self.folder / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{self.folder} has no config.json, so it is not a Hugging Face model")
        try:
            self.raw_config: dict[str, Any] = json.loads(config.read_text())
        except ValueError as error:
            raise CheckpointError(f"{config} is not JSON: {error}") from None
        stored = self.raw_config.get("quantization_config")
        method = (stored or {}).get("quant_method")
        if method == "secateurs" and not packed:
            raise CheckpointError(f"{self.folder} is packed; `secateurs pack --dense` gives the plain model back")
        if stored is not None and method != "secateurs" and quantizer is None:
            raise CheckpointError(
                f"{self.folder} is already quantized ({method or 'by no method that it names'}), and nothing here turns that back "
                "into 16-bit weights on a CPU; prune the model that it was made from"
            )
        self.file_of = shards.files_of(weights_of(self.folder, self.raw_config))
        self.target_of: dict[str, str] = {}
        # of stored tensors that are not a parameter each: the parameters that are made of them
        self.converted: dict[str, frozenset[str]] = {}
        # of the model's tensors, those that no file holds
        self._missing: set[str] = set()
        self._mapping: list[Any] = []
        self._prefix = ""
        self._quantizer = quantizer
        self._outside_loaded = False
        # parameters that were found finite: an embedding is loaded many times in a run
        self._sound: set[str] = set()

    # ------------------------------------------------------------------------------------------------------ reading

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name as stored."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of[name], []).append(name)
        out: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with shards.opened(file) as handle:
                out.update((name, handle.get_tensor(name)) for name in wanted)
        return out

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights: as config.json states it, else that of the first tensor."""
        stated = self.raw_config.get("dtype") or self.raw_config.get("torch_dtype")
        if isinstance(stated, str):
            return getattr(torch, stated.removeprefix("torch."))  # type: ignore[no-any-return]
        name = next(iter(self.file_of))
        return self.read([name])[name].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in set(self.file_of.values()))

    @property
    def numel(self) -> int:
        """The numbers in the weight files."""
        total = 0
        for key, file in self.file_of.items():
            with shards.opened(file) as handle:
                total += math.prod(handle.get_slice(key).get_shape())
        return total

    def ordered_keys(self) -> list[str]:
        """All stored names in natural order."""
        return sorted(self.file_of, key=shards.natural)

    def nbytes_of(self, key: str) -> int:
        """Bytes of one tensor as stored, from its file's header."""
        with shards.opened(self.file_of[key]) as handle:
            part = handle.get_slice(key)
            return int(math.prod(part.get_shape())) * _ITEMSIZE.get(part.get_dtype(), 8)

    def shape_of(self, key: str) -> list[int]:
        """The shape of one tensor as stored."""
        with shards.opened(self.file_of[key]) as handle:
            return list(handle.get_slice(key).get_shape())

    def fingerprint(self) -> str:
        """A hash that changes when a weight file or the config does; of names, sizes and times, not of contents.

        Of a plain copy, that of the model that it was made from.
        """
        return self._copy.key or fingerprint_of_files({*self.file_of.values(), self.folder / "config.json"})

    def tokenizer(self) -> Any:
        """The folder's tokenizer. Raises CheckpointError if there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trusted())
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise CheckpointError(untrusted(self.folder)) from None
            raise CheckpointError(f"{self.folder} has no tokenizer that loads: {said(error)}") from None

    def described(self) -> tuple[Any, Any]:
        """The model's own class and its config. Raises CheckpointError."""
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=trusted())
        except Exception as error:
            if self._own_code() and not trusted():
                raise CheckpointError(untrusted(self.folder)) from None
            raise CheckpointError(f"{self.folder}/config.json: {said(error)}") from None
        names = getattr(config, "architectures", None) or []
        cls = self._class(names[0]) if names else None
        if cls is None:
            if self._own_code() and not trusted():
                raise CheckpointError(untrusted(self.folder))
            raise CheckpointError(
                f"{self.folder}/config.json names architecture {names}; transformers has no such class"
            )
        return cls, config

    def skeleton(self) -> Any:
        """The model's own class with every parameter on the meta device; buffers are real."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        cls, config = self.described()
        if getattr(config, "dtype", None) is None:
            config.dtype = self.dtype
        if self._quantizer is not None:
            del config.quantization_config
        with without_weights():
            model = cls._from_config(config)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(attention.register())
        # parameters on meta take the dtype they will be loaded in; a float8 or integer tensor keeps its own
        cast(model, config.dtype)
        model.eval()
        if hasattr(model, "set_experts_implementation") and getattr(config, "_experts_implementation", None) != "eager":
            # fused expert kernels do not show which expert saw which token
            with suppress(ValueError, RuntimeError, AttributeError):
                model.set_experts_implementation("eager")
        self._mapping = get_model_conversion_mapping(model, hf_quantizer=self._quantizer)
        self._prefix = model.base_model_prefix
        converters = [m for m in self._mapping if isinstance(m, WeightConverter)]
        state = model.state_dict()
        for key in self.file_of:
            target, source = self.renamed(key, state)
            self.target_of[key] = target
            if source is not None:
                first, *others = next(c.target_patterns for c in converters if source in c.source_patterns)
                every = {target, *(target.replace(first, other) for other in others)}
                self.converted[key] = frozenset(every & state.keys())
        self._missing = set(state).difference(*map(self.targets_of, self.file_of))
        self._tie(model)
        return model

    def renamed(self, key: str, state: Mapping[str, Any]) -> tuple[str, str | None]:
        """What from_pretrained calls a stored tensor where the model has those of `state`, and the converter's pattern for it."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        kinds = ([m for m in self._mapping if isinstance(m, kind)] for kind in (WeightRenaming, WeightConverter))
        target, source = rename_source_key(key, *kinds, self._prefix, state)
        return (key, None) if target not in state and key in state else (target, source)

    def targets_of(self, key: str) -> frozenset[str]:
        """The names in the model of what a stored tensor holds."""
        return self.converted.get(key) or frozenset({self.target_of[key]})

    def _tie(self, model: Any) -> None:
        """Make one of what the class ties, as from_pretrained does: not where both are stored and differ."""
        model.tie_weights(missing_keys=set(self._missing), recompute_mapping=False)

    def _own_code(self) -> dict[str, str]:
        """{class: where the folder says that its code is}, for a model with code of its own."""
        auto_map = self.raw_config.get("auto_map") or {}
        return {ref.rpartition(".")[2]: ref for ref in auto_map.values() if isinstance(ref, str)}

    def _class(self, name: str) -> Any:
        """The model's class: of its own code if that may be run, else transformers'; None if there is neither."""
        import transformers
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        own = self._own_code()
        if name in own and trusted():
            return get_class_from_dynamic_module(own[name], str(self.folder))
        return getattr(transformers, name, None)

    # ------------------------------------------------------------------------------------- the Loader of parts.py

    def keys_under(self, prefix: str) -> list[str]:
        """Stored names whose parameters lie under a module, in natural order; '' is the whole model."""
        return sorted((k for k, t in self.target_of.items() if _is_under(t, prefix)), key=shards.natural)

    def load(self, model: nn.Module, prefix: str) -> None:
        """Fill the parameters under a module; '' is the whole model.

        Raises CheckpointError for a missing, misshapen or non-finite tensor.
        """
        self._fill(model, self.keys_under(prefix))
        if not prefix:
            self._tie(model)
            self._outside_loaded = True
        self._check(model, lambda name: _is_under(name, prefix))

    def load_outside(self, model: nn.Module) -> None:
        """Fill all parameters that lie in no block: embeddings, final norm, head."""
        if self._outside_loaded:
            return
        names = self.block_names(model)
        for keys in self.outside_groups(model):
            self._fill(model, keys)
        self._tie(model)
        self._check(model, lambda name: not any(_is_under(name, prefix) for prefix in names))
        self._outside_loaded = True

    def load_whole(self, model: nn.Module) -> None:
        """Fill every parameter."""
        self.load_outside(model)
        for name in self.block_names(model):
            self.load(model, name)

    def outside_keys(self, model: nn.Module) -> list[str]:
        names = self.block_names(model)
        return [key for key, target in self.target_of.items() if not any(_is_under(target, prefix) for prefix in names)]

    def outside_groups(self, model: nn.Module) -> list[list[str]]:
        """outside_keys() in groups, one for each shard; a large embedding has its own, so that two are never in memory at once."""
        groups: list[list[str]] = []
        room = 0
        for key in self.outside_keys(model):
            with shards.opened(self.file_of[key]) as handle:
                numel = math.prod(handle.get_slice(key).get_shape())
            if not groups or numel > room:
                groups.append([])
                room = _SHARD_WEIGHTS
            groups[-1].append(key)
            room -= numel
        return groups

    def release(self, model: nn.Module) -> None:
        """Send every parameter back to the meta device."""
        # what was one stays one
        gone: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    if parameter not in gone:
                        gone[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                    module._parameters[name] = gone[parameter]
        self._outside_loaded = False
        # glibc would keep the holes of every block
        return_memory()

    def block_names(self, model: nn.Module) -> list[str]:
        """The names of the model's blocks, [''] for a model that is walked as a whole."""
        return blocks_of(model)[0]

    def _fill(self, model: Any, keys: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if not keys:
            return
        settings = LoadStateDictConfig(
            weight_mapping=self._mapping, dtype=model.config.dtype, hf_quantizer=self._quantizer
        )
        with no_bars():
            # None is the last parameter's default, and what older versions of transformers ask for in front of it
            info, _ = convert_and_load_state_dict_in_model(model, self.read(keys), settings, None)
        for name, got, want in info.mismatched_keys:
            raise CheckpointError(f"{self.folder}: {name} has shape {list(got)}, config.json asks for {list(want)}")
        if info.conversion_errors:
            raise CheckpointError(f"{self.folder}: {next(iter(info.conversion_errors.values()))}")

    def _make(self, model: Any, wanted: Callable[[str], bool]) -> None:
        """Give values to parameters that the class says files may lack, as from_pretrained does: Marian's sines of positions."""
        patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        for name in sorted(self._missing):
            if not wanted(name) or not any(re.search(pattern, name) for pattern in patterns):
                continue
            *path, leaf = name.split(".")
            owners = [model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
            module, parameter = owners[-1], owners[-1]._parameters.get(leaf)
            if parameter is not None and parameter.device.type == "meta":
                made = torch.empty_like(parameter, device="cpu")
                module._parameters[leaf] = nn.Parameter(made, requires_grad=False)
                next(owner for owner in reversed(owners) if hasattr(owner, "_init_weights"))._init_weights(module)

    def _check(self, model: nn.Module, wanted: Callable[[str], bool]) -> None:
        with seeded():
            self._make(model, wanted)
        for name, parameter in model.named_parameters():
            if not wanted(name):
                continue
            if parameter.device.type == "meta":
                raise CheckpointError(f"{self.folder} has no tensor for {name}, which its config.json asks for")
            parameter.requires_grad_(False)
            if name in self._sound or not parameter.is_floating_point():
                continue
            bad = _not_finite(parameter)
            if bad:
                raise CheckpointError(
                    f"{self.folder}: {bad} of {parameter.numel()} weights of {name} are NaN or infinite"
                )
            self._sound.add(name)

    def made_of(self, model: Any, name: str, keys: list[str]) -> Tensor:
        """The parameter that stored tensors are converted to, in their dtype. Raises CheckpointError."""
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        on_meta = module._parameters[leaf]
        try:
            self._fill(model, keys)
            return module._parameters[leaf].detach()  # type: ignore[no-any-return]
        finally:
            module._parameters[leaf] = on_meta

    # ------------------------------------------------------------------------------------------------------ writing

    def stored_as(self, model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors that save_pretrained() stores for a parameter that files hold in parts."""
        from transformers.core_model_loading import revert_weight_conversion

        # what was loaded before decides otherwise, and another process has loaded something else
        model.__dict__.pop("_weight_conversions", None)
        found = revert_weight_conversion(model, {name: tensor})
        return {key: part.contiguous() for key, part in found.items()}

    def edited(self, model: nn.Module, prefix: str, names: set[str]) -> dict[str, Tensor]:
        """The stored tensors of a block after some of its parameters were edited; see edited_keys()."""
        return self.edited_keys(model, self.keys_under(prefix), names)

    def edited_keys(self, model: Any, keys: list[str], names: set[str]) -> dict[str, Tensor]:
        """Stored tensors after some of the model's parameters were edited, by any of their names: same names, dtypes and shapes."""
        from transformers.core_model_loading import revert_weight_conversion

        parameters = dict(model.named_parameters(remove_duplicate=False))
        edited = {id(parameters[name]) for name in names}
        names = {name for name, parameter in parameters.items() if id(parameter) in edited}
        made = (self.converted[key] for key in keys if key in self.converted)
        fused = sorted({name for targets in made if targets & names for name in targets})
        out: dict[str, Tensor] = {}
        if fused:
            found = revert_weight_conversion(model, {name: model.get_parameter(name) for name in fused})
            out = {_stored_name(name, keys, self._prefix): tensor for name, tensor in found.items()}
        plain = {k: self.target_of[k] for k in keys if self.target_of[k] in names and k not in self.converted}
        out.update((key, model.get_parameter(name)) for key, name in plain.items())
        stored = self.read(keys)
        unknown = sorted(set(out) - set(stored))
        if unknown:
            raise CheckpointError(f"{self.folder}: {unknown[0]} would be written and was never read")
        at: set[int] = set()
        for key, tensor in out.items():
            if tensor.numel() != stored[key].numel():
                raise CheckpointError(
                    f"{self.folder}: {key} is stored as {list(stored[key].shape)} and would be written as {list(tensor.shape)}; "
                    "load it in transformers, save it again, and prune that"
                )
            # safetensors refuses two names of one place in memory
            tensor = tensor.clone() if tensor.data_ptr() in at else tensor
            at.add(tensor.data_ptr())
            stored[key] = tensor.detach().to(stored[key].dtype).reshape(stored[key].shape)
        return stored

    def copy_small_files(self, to: Path, but: tuple[str, ...] = ()) -> None:
        """Config, tokenizer, templates: everything but weights, the old model card and what `but` names.

        Of a sentence-transformers folder the other modules too; its transformer is at the root of the new one.
        """
        shards.copy_small_files(self.folder, to, but)
        # the name of a weight file that is not there
        if "transformers_weights" in self.raw_config and "config.json" not in but:
            kept = {key: value for key, value in self.raw_config.items() if key != "transformers_weights"}
            write_json(to / "config.json", kept)
        if self.sentences is not None:
            self.sentences.copy_to(to)


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and times."""
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters to a dtype, in place. Buffers stay as they are, as from_pretrained leaves them.

    In 16 bits the frequencies of rotary positions would be off by up to a 500th, which turns far tokens by radians.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite. Counted in pieces, because a mask of a whole embedding would take much memory."""
    bad = 0
    for piece in torch.split(tensor.detach().flatten(), 1 << 24):
        if not piece.numel():
            continue
        # torch compares no float8
        wide = piece.float() if piece.itemsize == 1 else piece
        # one pass is enough where all are finite: with a NaN both are NaN
        low, high = wide.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad += wide.numel() - int(torch.isfinite(wide).sum())
    return bad


def _stored_name(name: str, keys: Iterable[str], prefix: str) -> str:
    """The one of the stored names that is this one but for what stands before or for the base model's prefix; else the name."""
    bare = re.split(rf"(?:^|\.){prefix}\.", name)[-1]
    found = [key for key in keys if key == name or f".{key}".endswith(f".{bare}")]
    return found[0] if len(found) == 1 else name


def _is_under(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}.") if prefix else True
