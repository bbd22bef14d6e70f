"""The weights of an ONNX file, as DeepSparse and SparseML kept them, under the names of the PyTorch model that it was made from.

torch's exporter keeps the names of most parameters. A Linear layer's matrix it stores as inputs x outputs without a name; the layer
is then that of the node, /encoder/layer.0/query/MatMul, or of the bias that is added. Integers are those of DequantizeLinear, of
QuantizeLinear followed by it, of QLinearMatMul and QLinearConv, or of MatMulInteger and ConvInteger as SparseML wrote them:
Cast and Mul by the product of both scales follow, and between them may be an Add of the bias in int32.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError, said
from secateurs.rescue.tensors import Lazy

FORMAT = "ONNX"
_INTEGER = {"MatMulInteger": 3, "ConvInteger": 3, "QLinearMatMul": 5, "QLinearConv": 5}
_FLOAT = ("MatMul", "Gemm", "Conv", "Gather")
# what changes where numbers lie, and none of them
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool", "Relu", "Split", "Slice", "Flatten")
_MODULE = re.compile(r"\.module\.(weight|bias)$")


@dataclass(frozen=True)
class _Graph:
    """A graph by its names: constants, the node that makes each value, and the nodes that read it."""

    file: Path
    nodes: list[Any]
    constants: dict[str, np.ndarray[Any, Any]]
    maker: dict[str, Any]
    readers: dict[str, list[Any]]


@dataclass(frozen=True)
class _Weight:
    """A matrix as it was found. transposed: it is stored as inputs x outputs. named: the name of its initializer."""

    value: np.ndarray[Any, Any]
    named: str
    transposed: bool = False


def read(file: Path) -> Lazy:
    """The tensors. Raises CheckpointError for a file that is damaged, and for a matrix whose layer nothing names."""
    graph = _graph(file)
    out: dict[str, np.ndarray[Any, Any]] = {}
    used: set[str] = set()
    for node in graph.nodes:
        for name, weight in _weights(graph, node):
            used.add(weight.named)
            value = weight.value.T if weight.transposed else weight.value
            if name in out and not np.array_equal(out[name], value):
                raise CheckpointError(
                    f"{file} has two tensors for {name}, first at node {node.name}; it was changed after its export"
                )
            out[name] = value
    for name, value in graph.constants.items():
        plain = _MODULE.sub(r".\1", name)
        if name not in used and _is_parameter(name) and plain not in out and value.dtype.kind == "f":
            out[plain] = value
    if not out:
        raise CheckpointError(
            f"{file} holds no parameters under the names of a PyTorch model; export it again with torch.onnx"
        )
    return {name: _reader(value) for name, value in out.items()}


def _reader(value: np.ndarray[Any, Any]) -> Any:
    def read() -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value).copy())

    return read


def _graph(file: Path) -> _Graph:
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise CheckpointError(f"{file} needs the library onnx; pip install 'secateurs[onnx]'") from None
    try:
        model = onnx.load(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} keeps weights in a file that is missing: {said(error)}") from None
    except Exception as error:
        raise CheckpointError(f"{file} is truncated or corrupt ({said(error)}); download or copy it again") from None
    nodes = list(model.graph.node)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in nodes:
        if node.op_type == "Constant":
            values = [a.t for a in node.attribute if a.name == "value"]
            constants.update((node.output[0], numpy_helper.to_array(t)) for t in values)
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return _Graph(file, nodes, constants, {name: node for node in nodes for name in node.output}, readers)


def _is_parameter(name: str) -> bool:
    """Whether an initializer has the name of a module's parameter, not one that the exporter made."""
    return "." in name and "::" not in name and not name.startswith("/") and name.rpartition(".")[2].isidentifier()


def _weights(graph: _Graph, node: Any) -> Iterator[tuple[str, _Weight]]:
    """The parameters that a node multiplies with or looks up, by name."""
    if node.op_type in _INTEGER:
        yield from _of_integers(graph, node)
    elif node.op_type in _FLOAT:
        at = 0 if node.op_type == "Gather" else 1
        weight = _dequantized(graph, node.input[at])
        if weight is None or weight.value.ndim < 2:
            return
        if node.op_type == "Gather":
            weight = _looked_up(graph, node, weight)
            if weight is None:
                return
        if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB")):
            weight = replace(weight, transposed=not weight.transposed)
        yield _named(graph, node, weight), weight


def _dequantized(graph: _Graph, name: str) -> _Weight | None:
    """A float matrix that is constant, through transposes and quantization; None if it is none."""
    if name in graph.constants:
        value = graph.constants[name]
        return _Weight(value, name) if value.dtype.kind in "fiu" else None
    node = graph.maker.get(name)
    if node is None:
        return None
    if node.op_type == "Transpose":
        found = _dequantized(graph, node.input[0])
        return replace(found, value=found.value.transpose(_attribute(node, "perm") or None)) if found else None
    if node.op_type == "Identity":
        return _dequantized(graph, node.input[0])
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return None
    found = _dequantized(graph, node.input[0])
    if found is None or any(each not in graph.constants for each in node.input[1:]):
        return None
    scale = graph.constants[node.input[1]]
    zero = graph.constants[node.input[2]] if len(node.input) > 2 else np.zeros_like(scale, np.uint8)
    axis = _attribute(node, "axis")
    axis = 1 if axis is None else axis
    if scale.ndim > 1:
        raise CheckpointError(
            f"{graph.file}: {node.name} has scales by block ({list(scale.shape)}), which import does not read"
        )
    shape = [-1 if i == axis % found.value.ndim else 1 for i in range(found.value.ndim)]
    scale, wide = (
        part.reshape(shape) if part.size > 1 else part.reshape(()) for part in (scale, zero.astype(np.int64))
    )
    if node.op_type == "QuantizeLinear":
        range_of = np.iinfo(zero.dtype)
        value = np.clip(np.rint(found.value / scale) + wide, range_of.min, range_of.max).astype(zero.dtype)
    else:
        value = ((found.value.astype(np.int64) - wide) * scale).astype(scale.dtype)
    return replace(found, value=value)


def _looked_up(graph: _Graph, node: Any, weight: _Weight) -> _Weight | None:
    """An embedding: its float table, or the one that its integers are when what was looked up is dequantized."""
    if weight.value.dtype.kind == "f":
        return weight
    for reader in graph.readers.get(node.output[0], ()):
        if reader.op_type == "DequantizeLinear" and all(each in graph.constants for each in reader.input[1:]):
            scale, zero = (graph.constants[each] for each in reader.input[1:3])
            return replace(
                weight, value=((weight.value.astype(np.int64) - zero.astype(np.int64)) * scale).astype(scale.dtype)
            )
    return None


def _of_integers(graph: _Graph, node: Any) -> Iterator[tuple[str, _Weight]]:
    at = 1 if node.op_type in ("MatMulInteger", "ConvInteger") else 3
    held, zero_name = (
        node.input[at],
        node.input[_INTEGER[node.op_type]] if len(node.input) > _INTEGER[node.op_type] else "",
    )
    if held not in graph.constants:
        # a product of two activations
        return
    integer = graph.constants[held].astype(np.int64)
    zero = graph.constants[zero_name].astype(np.int64) if zero_name else np.int64(0)
    rescale = None
    if at == 3:
        scale = graph.constants[node.input[4]]
    else:
        rescale, scale = _scales_around(graph, node)
    by_row = node.op_type in ("ConvInteger", "QLinearConv")
    if scale.size > 1:
        scale = scale.reshape([-1, *[1] * (integer.ndim - 1)] if by_row else [1, -1])
    if np.size(zero) > 1:
        zero = zero.reshape([-1, *[1] * (integer.ndim - 1)] if by_row else [1, -1])
    value = ((integer - zero) * scale).astype(np.float32)
    weight = _Weight(value, held, transposed=not by_row)
    name = _named(graph, node, weight)
    yield name, weight
    bias = _added(graph, node.output[0])
    if rescale is not None and bias is not None and graph.constants[bias].dtype == np.int32:
        numbers = graph.constants[bias].reshape(-1) * rescale
        yield f"{name.removesuffix('.weight')}.bias", _Weight(numbers.astype(np.float32), bias)


def _scales_around(graph: _Graph, node: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(what sums are multiplied with, the scale of the weight) of MatMulInteger and ConvInteger."""
    output, into = node.output[0], node.input[0]
    while True:
        readers = graph.readers.get(output, [])
        after = readers[0] if len(readers) == 1 else None
        if after is None or after.op_type not in ("Add", "Cast", "Mul"):
            raise CheckpointError(f"{graph.file}: nothing says what scale the weight of {node.name} has")
        constant = [name for name in after.input if name in graph.constants]
        if after.op_type == "Mul":
            if not constant:
                raise CheckpointError(
                    f"{graph.file}: {node.name} is scaled by its inputs while it runs, which import does not read; use the "
                    "model that it was exported from"
                )
            product = graph.constants[constant[0]].astype(np.float32)
            break
        output = after.output[0]
    while (before := graph.maker.get(into)) is not None and before.op_type in _MOVES:
        into = before.input[0]
    if before is None or before.op_type != "QuantizeLinear" or before.input[1] not in graph.constants:
        raise CheckpointError(f"{graph.file}: nothing says what scale the inputs of {node.name} have")
    return product, (product / graph.constants[before.input[1]].astype(np.float32)).astype(np.float32)


def _added(graph: _Graph, output: str) -> str | None:
    """The constant that is added to a value, if one is and nothing else reads it."""
    readers = graph.readers.get(output, [])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    return next((name for name in readers[0].input if name in graph.constants), None)


def _named(graph: _Graph, node: Any, weight: _Weight) -> str:
    """The parameter's name: its own, else its node's module or its bias's with .weight."""
    if _is_parameter(weight.named) and weight.named.endswith("weight"):
        return _MODULE.sub(r".\1", weight.named)
    scope = [part for part in node.name.split("/")[:-1] if part]
    if scope[-1:] == ["module"]:
        scope = scope[:-1]
    if scope:
        return ".".join([*scope, "weight"])
    # a head's bias may be another module's, so it comes last
    bias = _added(graph, node.output[0])
    if bias is not None and _is_parameter(bias) and bias.endswith(".bias"):
        return _MODULE.sub(r".\1", bias).removesuffix("bias") + "weight"
    raise CheckpointError(
        f"{graph.file}: nothing names the layer of {weight.named} ({node.op_type} {node.name or 'without a name'}); export the "
        "model again with torch 1.13 or newer"
    )


def _attribute(node: Any, name: str) -> Any:
    found = [each for each in node.attribute if each.name == name]
    return (list(found[0].ints) or found[0].i) if found else None
