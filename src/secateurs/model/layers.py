"""The matrices of a block that may be pruned, each read and written as weight_OI whatever its storage.

T tokens, O outputs, I inputs, B sequences, S positions.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# kinds whose layers are parts of a larger parameter
EXPERTS = ("expert", "expert1d")
_PARTS = (*EXPERTS, "attention")


@dataclass(frozen=True)
class Layer:
    """One prunable matrix of a block, read and written as weight_OI whatever its storage.

    kind: 'linear' [O, I]; 'conv1d' [I, O] (GPT-2); 'conv' [O, C, kernel], a convolution over one to three axes, read as
    O x (kernel C) so that neighbours are input channels, as hardware reads N:M; 'expert', slice `index` of a fused
    [E, O, I] parameter, and 'expert1d', of an [E, I, O] one; 'attention', third `index` (query, key, value) of the
    in_proj_weight [3 O, I] of nn.MultiheadAttention, and 'projection', where that has three parameters instead.
    refused: why the layer cannot be pruned at all, or None. places: the modules that are called with what it multiplies,
    `module` first; none where that happens within a larger function. also: the other names of the parameter.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    kind: str
    index: int = 0
    refused: str | None = None
    places: tuple[nn.Module, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def tensor_name(self) -> str:
        """The name of the parameter that holds the weight; fused experts and projections share one."""
        if self.kind in _PARTS:
            return self.name.rsplit(".", 1)[0]
        return self.name if self.kind == "projection" else self.name + ".weight"

    @property
    def part(self) -> int | slice:
        """The index of the layer's part of the parameter."""
        if self.kind != "attention":
            return self.index
        rows = self.parameter.shape[0] // 3
        return slice(self.index * rows, (self.index + 1) * rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        shape = self.parameter.shape
        if self.kind in EXPERTS:
            return (shape[1], shape[2]) if self.kind == "expert" else (shape[2], shape[1])
        if self.kind == "attention":
            return shape[0] // 3, shape[1]
        if self.kind == "conv1d":
            return shape[1], shape[0]
        return shape[0], self.parameter.numel() // shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sides of a convolution's kernel."""
        return tuple(self.parameter.shape[2:]) if self.kind == "conv" else ()

    def read(self) -> Tensor:
        """weight_OI in its own dtype; may share memory with the parameter."""
        weight = self.parameter.detach()
        if self.kind in _PARTS:
            return weight[self.part].T if self.kind == "expert1d" else weight[self.part]
        if self.kind == "conv1d":
            return weight.T
        return weight.movedim(1, -1).flatten(1) if self.kind == "conv" else weight

    def write(self, weight_OI: Tensor) -> None:
        """Write weight_OI into the parameter, in the parameter's dtype. Weights too small for the dtype become 0."""
        weight = self.parameter.detach()
        if self.kind in _PARTS:
            weight[self.part].copy_(weight_OI.T if self.kind == "expert1d" else weight_OI)
        elif self.kind == "conv1d":
            weight.copy_(weight_OI.T)
        elif self.kind == "conv":
            out, channels, *kernel = weight.shape
            weight.copy_(weight_OI.reshape(out, *kernel, channels).movedim(-1, 1))
        else:
            weight.copy_(weight_OI)

    def inputs(self, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """The inputs x_TI that the matrix multiplies, from what a module is called with. module: one of `places`, or None."""
        if self.kind != "conv":
            return x.reshape(-1, x.shape[-1])
        conv: Any = self.module if module is None else module
        axes = len(conv.kernel_size)
        x = x if x.dim() > axes + 1 else x[None]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        for axis, size, gap, stride in zip(
            range(2, 2 + axes), conv.kernel_size, conv.dilation, conv.stride, strict=True
        ):
            x = x.unfold(axis, gap * (size - 1) + 1, stride)[..., ::gap]
        # [B, C, places, kernel]: a row for each place; neighbours must be channels
        return x.movedim(1, -1).flatten(axes + 1).flatten(0, axes)


def layers_of(block: nn.Module, prefix: str, experts: Mapping[str, str] | None = None) -> list[Layer]:
    """Every matrix of a block that may be pruned, in module order; a shared parameter once, under its first name.

    Norms, biases, embeddings, routers and whatever else is not multiplied by one of the modules below are in others_of().
    """
    found: list[Layer] = []
    # by the parameter's id: its place in `found`
    known: dict[int, int] = {}
    names = _names(block, prefix)
    for path, module in block.named_modules():
        name = f"{prefix}.{path}".strip(".")
        for parameter_name, kind in (experts or {}).items():
            fused = module._parameters.get(parameter_name)
            if fused is not None and fused.dim() == 3:
                found += [Layer(f"{name}.{parameter_name}.{i}", module, fused, kind, i) for i in range(len(fused))]
        if isinstance(module, nn.MultiheadAttention):
            new = [y for y in _projections(module, name) if id(y.parameter) not in known]
            known.update((id(y.parameter), len(found)) for y in new)
            found += new
        weight = getattr(module, "weight", None)
        stored = kind_of(module)
        if stored is None or not isinstance(weight, nn.Parameter):
            continue
        refused = "grouped convolution: its rows see different inputs" if getattr(module, "groups", 1) > 1 else None
        if id(weight) not in known:
            known[id(weight)] = len(found)
            found.append(Layer(name, module, weight, stored, refused=refused, places=(module,)))
            continue
        first = found[known[id(weight)]]
        if first.kind != stored and "conv1d" in (first.kind, stored):
            refused = f"{name} multiplies the same weight transposed"
        places, refused = (*first.places, module), first.refused or refused
        found[known[id(weight)]] = replace(first, places=places, refused=refused)
    return [_with_other_names(layer, names) for layer in found]


def _names(block: nn.Module, prefix: str) -> dict[int, list[str]]:
    """The names of every parameter, by its id."""
    names: dict[int, list[str]] = {}
    for path, parameter in block.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(f"{prefix}.{path}".strip("."))
    return names


def _with_other_names(layer: Layer, names: Mapping[int, Sequence[str]]) -> Layer:
    also = tuple(_layer_name(n) for n in names[id(layer.parameter)] if n != layer.tensor_name)
    return replace(layer, also=also) if also else layer


def _layer_name(parameter_name: str) -> str:
    """'a.b.weight' is a.b's, whatever else keeps its own name."""
    return parameter_name.removesuffix(".weight")


def _projections(module: nn.MultiheadAttention, name: str) -> list[Layer]:
    packed = module._parameters.get("in_proj_weight")
    if packed is not None:
        parts = enumerate(("query", "key", "value"))
        return [Layer(f"{name}.in_proj_weight.{part}".strip("."), module, packed, "attention", i) for i, part in parts]
    apart = ((n, module._parameters.get(n)) for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    return [Layer(f"{name}.{n}".strip("."), module, p, "projection") for n, p in apart if p is not None]


@dataclass(frozen=True)
class Other:
    """A parameter of two or more dimensions that is no layer. name: as a layer's would be. why: it is not pruned."""

    name: str
    parameter: nn.Parameter
    why: str

    @property
    def shape(self) -> tuple[int, int]:
        rows = self.parameter.shape[0]
        return rows, self.parameter.numel() // max(1, rows)


def others_of(block: nn.Module, prefix: str, layers: Iterable[Layer]) -> list[Other]:
    """Every parameter of two or more dimensions that no layer holds, once, with the reason why it is not pruned."""
    held = {id(layer.parameter) for layer in layers}
    found = []
    for path, parameter in block.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in held:
            name = _layer_name(f"{prefix}.{path}".strip("."))
            found.append(Other(name, parameter, _why_not(block, path)))
    return found


def why_computed(block: nn.Module, path: str) -> str | None:
    """Why the parameter of that name is not itself what a module multiplies with: its weight is computed from it; or None."""
    owner, _, leaf = path.rpartition(".")
    inside, found, target = owner.rpartition("parametrizations.")
    if found:
        chain: Any = block.get_submodule(f"{inside}parametrizations.{target.split('.')[0]}")
        by = ", ".join(type(step).__name__.strip("_") for step in chain)
        return (
            f"{inside}{target.split('.')[0]} is computed from it by {by}; call torch.nn.utils.parametrize."
            "remove_parametrizations first"
        )
    module = block.get_submodule(owner)
    plain = next((leaf.removesuffix(end) for end in ("_g", "_v", "_orig") if leaf.endswith(end)), None)
    if plain and plain not in module._parameters and hasattr(module, plain):
        by = ", ".join(type(hook).__name__ for hook in module._forward_pre_hooks.values()) or "a hook"
        remove = (
            "torch.nn.utils.prune.remove"
            if leaf.endswith("_orig") and hasattr(module, f"{plain}_mask")
            else ("torch.nn.utils.remove_weight_norm or remove_spectral_norm")
        )
        return f"{plain} is computed from it by {by} before each call; call {remove} first"
    return None


def _why_not(block: nn.Module, path: str) -> str:
    why = why_computed(block, path)
    if why is not None:
        return why
    module = block.get_submodule(path.rpartition(".")[0])
    if kind_of(module) is not None:
        return "outside the blocks, which alone are pruned"
    for types, why in _NOT_PRUNED:
        if isinstance(module, types):
            return why
    if "norm" in type(module).__name__.lower():
        return "a norm: it multiplies elements, not a matrix"
    return f"{type(module).__name__} uses it in code of its own, so the inputs that it multiplies are not known"


_NOT_PRUNED: tuple[tuple[Any, str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "an embedding: its rows are looked up, not multiplied"),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        "a transposed convolution: its outputs overlap, so no row has an error of its own",
    ),
    ((nn.RNNBase, nn.RNNCellBase), "a recurrent layer: its steps run in one call, where their inputs are not seen"),
    (nn.Bilinear, "a bilinear layer: it multiplies two inputs at once"),
)


def survivors(layers: Iterable[Layer], whole: Sequence[Layer] = ()) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, mask of its weights that are not zero) for each parameter of the layers, each parameter once.

    In a parameter of several layers, parts that are not among the layers are False. whole: of these, layers with a mask of ones.
    """
    all_of = {layer.name for layer in whole}
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in layers:
        parameter = layer.parameter
        if layer.kind not in _PARTS:
            found[id(parameter)] = parameter, (parameter.detach() != 0) | (layer.name in all_of)
            continue
        if id(parameter) not in found:
            found[id(parameter)] = parameter, torch.zeros_like(parameter, dtype=torch.bool)
        mask_OI = (layer.read() != 0) | (layer.name in all_of)
        found[id(parameter)][1][layer.part] = mask_OI.T if layer.kind == "expert1d" else mask_OI
    return list(found.values())


def kind_of(module: nn.Module) -> str | None:
    """How a module's weight is stored, as in Layer.kind; None for a module that multiplies by no such matrix."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    # by name, because transformers is optional for a live module
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def matches(name: str, globs: Iterable[str]) -> str | None:
    """The first glob that the layer's name matches, or None."""
    return next((glob for glob in globs if fnmatch.fnmatchcase(name, glob)), None)
