"""The matrices of a block that may be pruned, each read and written as weight_OI whatever its storage.

T tokens, O outputs, I inputs, B sequences, S positions.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One prunable matrix of a block, read and written as weight_OI whatever its storage.

    kind: 'linear' [O, I]; 'conv1d' [I, O] (GPT-2); 'conv2d' [O, C, kh, kw], read as O x (kh kw C) so that neighbours
    are input channels, as hardware reads N:M; 'expert', slice `index` of a fused [E, O, I] parameter.
    refused: why the layer cannot be pruned at all, or None.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    kind: str
    index: int = 0
    refused: str | None = None

    @property
    def tensor_name(self) -> str:
        """The name of the parameter that holds the weight; fused experts share one."""
        return self.name.rsplit(".", 1)[0] if self.kind == "expert" else self.name + ".weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        shape = self.parameter.shape
        if self.kind == "expert":
            return shape[1], shape[2]
        if self.kind == "conv1d":
            return shape[1], shape[0]
        return shape[0], self.parameter.numel() // shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Height and width of a convolution's kernel."""
        return tuple(self.parameter.shape[2:]) if self.kind == "conv2d" else ()

    def read(self) -> Tensor:
        """weight_OI in its own dtype; may share memory with the parameter."""
        weight = self.parameter.detach()
        if self.kind == "expert":
            return weight[self.index]
        if self.kind == "conv1d":
            return weight.T
        return weight.permute(0, 2, 3, 1).flatten(1) if self.kind == "conv2d" else weight

    def write(self, weight_OI: Tensor) -> None:
        """Write weight_OI into the parameter, in the parameter's dtype. Weights too small for the dtype become 0."""
        weight = self.parameter.detach()
        if self.kind == "expert":
            weight[self.index].copy_(weight_OI)
        elif self.kind == "conv1d":
            weight.copy_(weight_OI.T)
        elif self.kind == "conv2d":
            out, channels, height, width = weight.shape
            weight.copy_(weight_OI.reshape(out, height, width, channels).permute(0, 3, 1, 2))
        else:
            weight.copy_(weight_OI)

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs x_TI that the matrix multiplies, from what the module is called with."""
        if self.kind != "conv2d":
            return x.reshape(-1, x.shape[-1])
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            left, right, top, bottom = conv._reversed_padding_repeated_twice
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = nn.functional.pad(x, (left, right, top, bottom), mode=mode)
            padding: tuple[int, ...] = (0, 0)
        else:
            padding = conv.padding
        batch, channels = x.shape[:2]
        # unfold gives channels slowest; neighbours must be channels
        patches = nn.functional.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
        patches = patches.reshape(batch, channels, -1, patches.shape[-1])
        return patches.permute(0, 3, 2, 1).reshape(-1, patches.shape[1] * patches.shape[2])


def layers_of(block: nn.Module, prefix: str, experts: Sequence[str] = ()) -> list[Layer]:
    """Every matrix of a block that may be pruned, in module order; a shared parameter once, under its first name.

    Norms, biases, embeddings and routers are not nn.Linear, Conv1D, Conv2d or fused experts, so they never appear.
    """
    found: list[Layer] = []
    seen: set[int] = set()
    for path, module in block.named_modules():
        name = f"{prefix}.{path}".strip(".")
        for parameter_name in experts:
            fused = module._parameters.get(parameter_name)
            if fused is not None and fused.dim() == 3:
                found += [Layer(f"{name}.{parameter_name}.{i}", module, fused, "expert", i) for i in range(len(fused))]
        weight = getattr(module, "weight", None)
        kind = _kind(module)
        if kind is None or not isinstance(weight, nn.Parameter) or id(weight) in seen:
            continue
        seen.add(id(weight))
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        refused = "grouped convolution: its rows see different inputs" if grouped else None
        found.append(Layer(name, module, weight, kind, refused=refused))
    return found


def survivors(layers: Iterable[Layer]) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, mask of its weights that are not zero) for each parameter of the layers, each parameter once.

    In a parameter of fused experts, experts that are not among the layers are False.
    """
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in layers:
        parameter = layer.parameter
        if layer.kind != "expert":
            found[id(parameter)] = parameter, parameter.detach() != 0
            continue
        if id(parameter) not in found:
            found[id(parameter)] = parameter, torch.zeros_like(parameter, dtype=torch.bool)
        found[id(parameter)][1][layer.index] = layer.read() != 0
    return list(found.values())


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    # by name, because transformers is optional for a live module
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def matches(name: str, globs: Iterable[str]) -> str | None:
    """The first glob that the layer's name matches, or None."""
    return next((glob for glob in globs if fnmatch.fnmatchcase(name, glob)), None)
