"""The transformers plugin: from_pretrained() of a packed folder gives a model that runs on the sparse kernels.

Importing secateurs registers it. Without it the packed layers' tensors have shapes that transformers refuses, so nothing
loads with random weights in their place.
"""

import re
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateurs.base.errors import CheckpointError, DeviceError, PackError
from secateurs.kernels.formats import FORMATS, VERSION
from secateurs.kernels.packed_embedding import PackedEmbedding, TiedHead, make_dense, tied_to
from secateurs.kernels.packed_experts import PackedExperts, put_experts, run_one_by_one, with_fences
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, group_shared_inputs, put
from secateurs.matrix.grids import Grid, parse
from secateurs.pack.decoding import fuse_blocks
from secateurs.pack.stored import check_version

METHOD = "secateurs"


@register_quantization_config(METHOD)
class SecateursConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of a packed folder. layers: module name -> {format, survivors, transposed}, and of integers {grid, dtype,
    length}. experts: fused parameter whose matrices are among the layers -> its name in the plain folder, None if
    it is stored in parts there."""

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int = VERSION,
        experts: dict[str, str | None] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers, self.experts = layers or {}, experts or {}
        check_version(format_version)


@register_quantizer(METHOD)
class SecateursQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps packed layers in before the weights are loaded, and checks them after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers: dict[str, dict[str, Any]] = self.quantization_config.layers
        for name in self.quantization_config.experts:
            self._fuse(model, name)
        # what keeps other loaders out
        model._keys_to_ignore_on_load_unexpected |= {
            rf"(^|\.){re.escape(n)}$" for n in self.quantization_config.experts
        }
        for name, layer in layers.items():
            if name.rpartition(".")[0] in self.quantization_config.experts:
                continue
            found = self._find(model, name)
            if found is None:
                continue
            module = model.get_submodule(found)
            of = PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear
            packed = _empty(name, layer, module.weight, getattr(module, "bias", None) is not None, of)
            put(model, found, packed)
            if isinstance(packed, PackedEmbedding):
                packed.keep(module)
                self._tie(model, found, packed)
            # some classes initialize by a module's name, or all in a module that has no weights of its own, and would take the
            # survivors for a matrix; none of them is missing, or the folder does not load
            above = model.get_submodule(found.rpartition(".")[0])
            for done in (packed, *(() if above is model or _holds(above) else (above,))):
                done._is_hf_initialized = True
        return model

    def _fuse(self, model: Any, name: str) -> None:
        """Put packed experts, yet empty, in the place of a fused parameter."""
        place, _, leaf = name.rpartition(".")
        found = self._find(model, place)
        if found is None:
            return
        owner = model.get_submodule(found)
        fused = owner._parameters.get(leaf)
        if fused is None or fused.dim() != 3:
            raise CheckpointError(f"config.json: {name} has no experts in a {type(owner).__name__}; pack it again")
        layers, matrices, turned = self.quantization_config.layers, [], set()
        for i, weight in enumerate(fused):
            layer = layers.get(f"{name}.{i}")
            if layer is None:
                raise CheckpointError(f"config.json: {name}.{i} is missing among the layers; pack it again")
            turned.add(bool(layer.get("transposed")))
            if layer.get("format") == "dense" and not layer.get("grid"):
                rows, columns = weight.shape[::-1] if layer.get("transposed") else weight.shape
                made: Any = DenseLinear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
                made.requires_grad_(False)
            else:
                made = _empty(f"{name}.{i}", layer, weight, False)
            made._is_hf_initialized = True
            matrices.append(made)
        if len(turned) > 1:
            raise CheckpointError(f"config.json: some of {name} are transposed and some not; pack it again")
        experts: Any = PackedExperts(matrices, turned.pop())
        experts._is_hf_initialized = True
        put_experts(owner, leaf, experts)

    @staticmethod
    def _tie(model: Any, name: str, embedding: PackedEmbedding) -> None:
        """Let what the class ties to an embedding multiply with what that stores, or look rows up there."""
        for tied, to in model.all_tied_weights_keys.items():
            if to == f"{name}.weight":
                place = tied.removesuffix(".weight")
                made: Any = tied_to(embedding, model.get_submodule(place))
                made._is_hf_initialized = True
                put(model, place, made)

    @staticmethod
    def _find(model: Any, name: str) -> str | None:
        """The layer's name in this class of model: with, without or under the prefix of the base model; None if there is none."""
        prefix = f"{model.base_model_prefix}."
        names = {n for n, _ in model.named_modules()}
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for place, module in model.named_modules():
            if isinstance(module, PackedLinear):
                if module.weight.device.type != "cpu":
                    raise DeviceError(
                        f"packed layers multiply on the CPU, and {place} was loaded to {module.weight.device}: load with "
                        "device_map='cpu', or run what `secateurs pack --dense` makes"
                    )
                try:
                    module.packed()
                except PackError as error:
                    raise CheckpointError(
                        f"{model.config._name_or_path}: {place}: {error}; copy or pack it again"
                    ) from None
            elif isinstance(module, TiedHead):
                module.fit_bias()
            elif type(module) is nn.Linear and module.weight.device.type == "cpu":
                module.__class__ = DenseLinear
        group_shared_inputs(model)
        if self.quantization_config.experts:
            run_one_by_one(model)
            # saved as they were loaded, matrix by matrix
            model._weight_conversions = [
                conversion
                for conversion in model._weight_conversions
                if not any(
                    conversion.reverse_transform().rename_source_key(name)[1]
                    for name in self.quantization_config.experts
                )
            ]
        # of tokens that are decoded, which `bench` tells
        self.why_not_fused = fuse_blocks(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """What save_pretrained() stores."""
        return with_fences(model) if self.quantization_config.experts else None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        make_dense(model)
        # of the tensors that were loaded, none was made of parts; what is saved is
        model.__dict__.pop("_weight_conversions", None)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _empty(
    name: str, layer: dict[str, Any], weight: Any, bias: bool, of: type[PackedLinear] = PackedLinear
) -> PackedLinear:
    """A packed layer in the place of a matrix, for the loader to fill, as config.json describes it."""
    grid, kind = _grid(name, layer), layer.get("format")
    if kind not in FORMATS or (kind == "dense" and grid is None):
        raise CheckpointError(f"{name} is packed as {kind!r}, which this secateurs does not know")
    survivors, length = _count(name, layer, "survivors"), _count(name, layer, "length") if grid else None
    transposed = bool(layer.get("transposed"))
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    return of.empty((rows, columns), survivors, weight.dtype, bias, transposed, str(kind), grid, length)


def _grid(name: str, layer: dict[str, Any]) -> Grid | None:
    try:
        return parse(layer["grid"]) if layer.get("grid") else None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {name}: {error}; pack it again") from None


def _count(name: str, layer: dict[str, Any], what: str) -> int:
    found = layer.get(what)
    if type(found) is not int or found < 0:
        raise CheckpointError(f"config.json: {name} has {what} {found!r}, which is no count; pack it again")
    return found


def _holds(module: nn.Module) -> bool:
    """True if a module has tensors of its own."""
    return any(x is not None for x in (*module._parameters.values(), *module._buffers.values()))
