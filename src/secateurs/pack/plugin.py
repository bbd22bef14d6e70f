"""The transformers plugin: from_pretrained() of a packed folder gives a model that runs on the sparse kernels.

Importing secateurs registers it. Without it the packed layers' tensors have shapes that transformers refuses, so nothing
loads with random weights in their place.
"""

from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateurs.base.errors import CheckpointError, DeviceError, PackError
from secateurs.kernels.formats import FORMATS, VERSION, VERSIONS
from secateurs.kernels.packed_embedding import PackedEmbedding, TiedHead, make_dense, tied_to
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, group_shared_inputs, put
from secateurs.matrix.grids import Grid, parse
from secateurs.pack.decoding import fuse_blocks

METHOD = "secateurs"


@register_quantization_config(METHOD)
class SecateursConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of a packed folder. layers: module name -> {format, survivors, transposed}, and of integers {grid, dtype,
    length}."""

    def __init__(
        self, layers: dict[str, dict[str, Any]] | None = None, format_version: int = VERSION, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = layers or {}
        if format_version not in VERSIONS:
            raise CheckpointError(
                f"this folder is packed in format version {format_version}, this secateurs reads versions "
                f"{', '.join(map(str, VERSIONS))}: "
                "use the release that wrote it, or its `secateurs pack --dense`"
            )


@register_quantizer(METHOD)
class SecateursQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps packed layers in before the weights are loaded, and checks them after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers: dict[str, dict[str, Any]] = self.quantization_config.layers
        for name, layer in layers.items():
            grid, kind = _grid(name, layer), layer.get("format")
            if kind not in FORMATS or (kind == "dense" and grid is None):
                raise CheckpointError(f"{name} is packed as {kind!r}, which this secateurs does not know")
            found = self._find(model, name)
            if found is None:
                continue
            survivors, length = _count(name, layer, "survivors"), _count(name, layer, "length") if grid else None
            transposed = bool(layer.get("transposed"))
            module = model.get_submodule(found)
            shape = tuple(module.weight.shape)
            of = PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear
            packed = of.empty(
                (shape[1], shape[0]) if transposed else (shape[0], shape[1]),
                survivors, module.weight.dtype, getattr(module, "bias", None) is not None, transposed, str(kind), grid, length,
            )  # fmt: skip
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
        fuse_blocks(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        make_dense(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


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
