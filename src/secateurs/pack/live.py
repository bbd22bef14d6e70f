"""accelerate(): packed layers in a live model."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from secateurs.base.errors import PackError
from secateurs.kernels.formats import pack
from secateurs.kernels.packed_experts import run_one_by_one
from secateurs.kernels.packed_linear import (
    DenseLinear,
    LayerChoice,
    PackedLinear,
    choose,
    group_shared_inputs,
    linears,
    put,
)
from secateurs.kernels.sparse_convolution import SparseConvolution, choose_convolution
from secateurs.model.fused import packable_experts, split_experts
from secateurs.model.reads import READ, read_by_code


# tensors made under inference_mode() would have no versions, by which a changed weight is noticed
@torch.inference_mode(False)
def accelerate(model: nn.Module, profile: Any = None) -> list[LayerChoice]:
    """Put packed layers into a live model on the CPU, in place; returns the choice for each layer, in order.

    choose() decides for each layer; a Linear that stays dense uses our dense kernel where that is faster. Experts that a Hugging
    Face model has in one parameter are layers too, where its code bears it (secateurs.model.fused).
    Weights shared between modules (a head tied to the embeddings), computed from others (weight norm), multiplied in a fused
    kernel (nn.TransformerEncoderLayer) or read by a Hugging Face model's own code stay dense. The model is for inference from
    then on. Convolutions stay dense but for plain 1x1 ones in fp32 of which seven eighths and more are zeros: these are multiplied
    in CSR. Raises PackError for a model that is not on the CPU.
    model: any module with Linear or Conv1D layers. profile: of `secateurs probe`, None for rules that were measured elsewhere.

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(256, 256)).bfloat16().eval()
        >>> _ = net[0].weight.data.mul_(torch.rand(256, 256) > 0.9)  # 90% zeros
        >>> [choice.name for choice in sc.accelerate(net)]
        ['0']
        >>> net(torch.ones(1, 256, dtype=torch.bfloat16)).shape
        torch.Size([1, 256])
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    encoders = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    fused = {linear for encoder in encoders for linear in (encoder.linear1, encoder.linear2)}
    read: set[str] = set()
    if hasattr(getattr(model, "config", None), "model_type"):
        read, _ = read_by_code(model)
    choices = []
    for name, module, transposed in list(linears(model)):
        weight: Any = module.weight
        if weight.device.type != "cpu":
            raise PackError(f"{name} is on {weight.device}; the kernels run on the CPU: model.cpu() first")
        choice = choose(name, weight.detach().T if transposed else weight.detach(), profile)
        stays = {0: "its weight is computed from other parameters", 1: ""}.get(uses[id(weight)], "shared weight")
        if module in fused:
            stays = "nn.TransformerEncoderLayer multiplies by it in a fused kernel"
        choice = choice.but(stays or (READ if name in read else None))
        if choice.format == "bitmask":
            bias: Any = module.bias
            packed = pack((weight.detach().T if transposed else weight.detach()).contiguous())
            put(model, name, PackedLinear.of(packed, bias, transposed))
        elif not transposed and uses[id(weight)]:
            module.__class__ = DenseLinear
        choices.append(choice)
    choices += _accelerate_convolutions(model, uses)
    if hasattr(getattr(model, "config", None), "model_type"):
        choices += _accelerate_experts(model, uses, profile)
    group_shared_inputs(model)
    return choices


def _accelerate_convolutions(model: nn.Module, uses: Counter[int]) -> list[LayerChoice]:
    choices = []
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            continue
        weight: Any = module.weight
        if weight.device.type != "cpu":
            raise PackError(f"{name} is on {weight.device}; the kernels run on the CPU: model.cpu() first")
        stays = {0: "its weight is computed from other parameters", 1: None}.get(uses[id(weight)], "shared weight")
        choice = choose_convolution(name, module).but(stays)
        if not choice.plain:
            put(model, name, SparseConvolution(module))
        choices.append(choice)
    return choices


def _accelerate_experts(model: nn.Module, uses: Counter[int], profile: Any) -> list[LayerChoice]:
    able, _ = packable_experts(model)
    choices = []
    for name, transposed in able.items():
        place, _, leaf = name.rpartition(".")
        owner = model.get_submodule(place)
        fused: Any = owner._parameters[leaf]
        if fused.device.type != "cpu":
            raise PackError(f"{name} is on {fused.device}; the kernels run on the CPU: model.cpu() first")
        found = [
            choose(f"{name}.{i}", w.T if transposed else w, profile).but(
                "shared weight" if uses[id(fused)] > 1 else None
            )
            for i, w in enumerate(fused.detach())
        ]
        choices += found
        if all(choice.plain for choice in found):
            continue
        experts = split_experts(owner, leaf, transposed)
        for i, choice in enumerate(found):
            if not choice.plain:
                put(experts, str(i), PackedLinear.of(pack(experts[i].weight)))
        run_one_by_one(model)
    return choices
