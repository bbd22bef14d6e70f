"""A causal language model as ONNX, for onnxruntime: input_ids -> logits, without a cache.

A layer on a grid is DequantizeLinear by blocks of its group: int4 up to 4 bits, int8 above, unsigned with zero points where the
grid has them. It is laid out as inputs x outputs, which onnxruntime turns into a quantized product. All else is fp32, and so are
products: of a 16-bit folder a weight is scale * integer before it was rounded to 16 bits.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import CheckpointError, PackError, said
from secateurs.base.progress import Progress
from secateurs.kernels.packed_linear import linears, put
from secateurs.matrix.grids import Scales
from secateurs.model.source import trusted
from secateurs.pack.on_grids import OnGrids

# opset of DequantizeLinear by blocks
OPSET = 21
# bytes from which weights lie beside the graph: one file holds 2 GB
_BESIDE = 1 << 30
# the largest difference of logits that is accepted, relative to the largest
_CLOSE = 1e-3


class _Dequantized(nn.Module):
    """A product with a weight on a grid, as ONNX has it."""

    level_IO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor | None

    def __init__(self, weight_OI: Tensor, scales: Scales, bias: Tensor | None) -> None:
        super().__init__()
        grid = scales.grid
        level_OI, zero_OG = scales.integers(weight_OI), scales.zero_OG
        if zero_OG is not None:
            level_OI = level_OI + grid.spread(zero_OG, weight_OI.shape[1])
        by_row = grid.groups(weight_OI.shape[1]) == 1
        self.attributes: dict[str, Any] = {"axis": 1} if by_row else {"axis": 0, "block_size": grid.group}
        dtype = torch.int8 if zero_OG is None else torch.uint8
        self.register_buffer("level_IO", level_OI.T.contiguous().to(dtype))
        self.register_buffer("scale_GO", _laid_out(scales.scale_OG.float(), by_row))
        self.register_buffer("zero_GO", None if zero_OG is None else _laid_out(zero_OG, by_row))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        given = [self.level_IO, self.scale_GO, *([] if self.zero_GO is None else [self.zero_GO])]
        weight_IO = torch.onnx.ops.symbolic(
            "DequantizeLinear", given, self.attributes, dtype=torch.float32, shape=self.level_IO.shape, version=OPSET
        )
        product = x @ weight_IO
        return product if self.bias is None else product + self.bias


def _laid_out(by_group_OG: Tensor, by_row: bool) -> Tensor:
    return by_group_OG[:, 0].contiguous() if by_row else by_group_OG.T.contiguous()


class _Logits(nn.Module):
    """The model from input_ids to logits, as the graph has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def prepare(found: OnGrids) -> Callable[[Path, Progress], dict[str, Any]]:
    """Raises CheckpointError for another kind of model, and where a package is missing."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise CheckpointError(f"ONNX files need the library {missing[0]}; pip install 'secateurs[onnx]'")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = type(found.model).__name__
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise CheckpointError(f"{found.checkpoint.folder} is a {kind}; to ONNX go causal language models")
    products = {name for name, _, _ in linears(found.model)}
    left = [f"{n}: it is no Linear layer, and its weights are looked up" for n in found.scales if n not in products]

    def write(out: Path, progress: Progress) -> dict[str, Any]:
        model, ids = _loaded(found), torch.arange(16).view(2, 8)
        names = [name for name in found.layer_of.values() if name in products]
        weights = {}
        for i, (key, name) in enumerate(found.layer_of.items()):
            progress("layers", i, len(found.layer_of))
            weight = found.read(key)
            if name in products:
                module: Any = model.get_submodule(name)
                weights[name] = weight_OI = weight.T if name in found.transposed else weight
                rounded_OI = found.scales[name].rounded(weight_OI)
                module.weight.data = rounded_OI.T.contiguous() if name in found.transposed else rounded_OI
        progress("layers", len(found.layer_of), len(found.layer_of))
        with torch.no_grad():
            expected = _Logits(model)(ids)
        for name in names:
            module = model.get_submodule(name)
            put(model, name, _Dequantized(weights.pop(name), found.scales[name], module.bias))
        progress("graph", 0, 2)
        program = _exported(model, ids, found)
        progress("graph", 1, 2)
        program.save(out / "model.onnx", external_data=_nbytes(model) > _BESIDE)
        _check(out / "model.onnx", ids, expected)
        found.checkpoint.copy_small_files(out)
        progress("graph", 2, 2)
        layers = [
            {
                "name": n,
                "grid": str(found.scales[n].grid),
                "stored": "int4" if found.scales[n].grid.bits <= 4 else "int8",
            }
            for n in names
        ]
        return {"layers": layers, "left": left, "warnings": [_FASTER] if layers else []}

    return write


_FASTER = (
    "onnxruntime rounds the inputs of quantized products to 8 bits unless the session's option "
    "session.qdq_matmulnbits_accuracy_level is 1"
)


def _loaded(found: OnGrids) -> Any:
    """The whole model in fp32, with an attention that can be exported."""
    return type(found.model).from_pretrained(
        found.checkpoint.folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=trusted()
    ).eval()  # fmt: skip


def _exported(model: nn.Module, ids: Tensor, found: OnGrids) -> Any:
    """torch's ONNX program, with the integers of 4 bits and fewer in int4."""
    any_length = torch.export.Dim.DYNAMIC
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.export(_Logits(model).eval(), (ids,), dynamic_shapes=({0: any_length, 1: any_length},))
            program: Any = torch.onnx.export(
                graph, (), input_names=["input_ids"], output_names=["logits"], opset_version=OPSET, verbose=False
            )
    except Exception as error:
        raise PackError(f"{type(found.model).__name__} cannot be exported to ONNX: {said(error)}") from error
    finally:
        logger.setLevel(level)
    import ml_dtypes
    import onnx_ir

    # where each node comes from in Python, most of a small file
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    for part, value in program.model.graph.initializers.items():
        layer, _, what = part.removeprefix("model.").rpartition(".")
        if what in ("level_IO", "zero_GO") and found.scales[layer].grid.bits <= 4:
            dtype = ml_dtypes.int4 if found.scales[layer].grid.symmetric else ml_dtypes.uint4
            tensor = onnx_ir.tensor(value.const_value.numpy().astype(dtype), name=part)
            value.const_value, value.dtype = tensor, tensor.dtype
    return program


def _check(file: Path, ids: Tensor, expected: Tensor) -> None:
    """Raises PackError if the file computes something else than the model, where onnxruntime is installed."""
    if not importlib.util.find_spec("onnxruntime"):
        return
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    gap = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    if not gap <= _CLOSE:
        raise PackError(f"the ONNX graph gives something else than the model: {gap:.2g} of the largest logit apart")


def _nbytes(model: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
