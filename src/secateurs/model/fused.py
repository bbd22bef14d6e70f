"""Finds the fused parameters of experts that a class's code can have as packed matrices, one for each expert.

Found out on a small random instance (miniature.py): its experts are packed, and it has to give what it gave before.
"""

from typing import Any

import torch
from torch import nn

from secateurs.base.errors import CheckpointError, said
from secateurs.kernels.formats import pack
from secateurs.kernels.packed_experts import PackedExperts, put_experts
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, put
from secateurs.model.blocks import whole
from secateurs.model.discover import fused_in, layout_of
from secateurs.model.miniature import inputs, miniature
from secateurs.model.proof import unequal


def packable_experts(model: Any) -> tuple[dict[str, bool], dict[str, str]]:
    """Of a Hugging Face model: {path of a fused parameter: whether it is stored as [E, I, O]} of those that can be packed, and
    {path: why not} of the others."""
    fused = fused_in(model)
    if not fused:
        return {}, {}
    kinds = layout_of(model).experts
    refused = {
        path: "its code does not multiply by its matrices one by one" for path in fused if _leaf(path) not in kinds
    }
    able = {path: kinds[_leaf(path)] == "expert1d" for path in fused if path not in refused}
    why = _unlike(model, {_leaf(path): transposed for path, transposed in able.items()}) if able else None
    return ({}, refused | dict.fromkeys(able, why)) if why else (able, refused)


def _unlike(model: Any, transposed: dict[str, bool]) -> str | None:
    """Why a small instance does not run with packed experts, or None. transposed: by the parameter's name."""
    try:
        small: Any = miniature(model)
        batches = inputs(small)
    except (ValueError, CheckpointError) as error:
        return f"no small instance of it runs: {error}"
    wanted = [_outputs(small, batch) for batch in batches]
    for path in [path for path in fused_in(small) if _leaf(path) in transposed]:
        owner, _, name = path.rpartition(".")
        experts = split_experts(small.get_submodule(owner), name, transposed[name])
        for i, matrix in enumerate(experts):
            put(experts, str(i), PackedLinear.of(pack(matrix.weight)))
    try:
        found = [_outputs(small, batch) for batch in batches]
    # its code may do anything with what is not a tensor
    except Exception as error:
        return (
            f"its code does more with them than multiply by one after the other ({type(error).__name__}: {said(error)})"
        )
    differs = next((p for got, want in zip(found, wanted, strict=True) if (p := unequal(got, want)) is not None), None)
    return None if differs is None else f"with packed experts a small instance gives another {differs}"


def _outputs(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return whole(model, batch)


def split_experts(owner: nn.Module, name: str, transposed: bool) -> PackedExperts:
    """Put the matrices of a fused parameter, as dense layers, in its place."""
    parameter: Any = owner._parameters[name]
    matrices = []
    for weight in parameter.detach():
        weight_OI = weight.T.contiguous() if transposed else weight
        matrix = DenseLinear(1, 1, bias=False, device="meta")
        matrix.out_features, matrix.in_features = weight_OI.shape
        matrix.weight = nn.Parameter(weight_OI, requires_grad=False)
        matrices.append(matrix)
    experts = PackedExperts(matrices, transposed)
    put_experts(owner, name, experts)
    return experts


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
