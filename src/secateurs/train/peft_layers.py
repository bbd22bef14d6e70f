"""PEFT's own LoRA layers, made to keep the zeros of the weights that they add to.

PEFT computes x W' + x (up @ down)' * scaling, and merges W + up @ down * scaling: dense, so zeros are gone. Here the product is
masked in both, mask = W != 0, so that what was trained is what is merged:

    W + mask * (up @ down) * scaling
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.base.errors import PlanError


def mask_peft(model: nn.Module) -> list[str]:
    """Make every LoRA layer of a PEFT model keep the zeros of its weight, in training and when it is merged; their names.

    Call it once, after get_peft_model() or PeftModel.from_pretrained(), before training or merging. Adapters that are added later
    to the same layers are masked too. The saved adapter is an ordinary one: whoever loads it calls this again, since a plain merge
    would fill the zeros. Changes the layers of `model`.

    Raises PlanError for a model without LoRA layers on weights with zeros, and for LoRA that cannot be masked: of embeddings, of
    convolutions and of parameters that have zeros, and DoRA and other variants.
    model: what PEFT made.

    Example:

        >>> import torch, secateurs as sc
        >>> from peft import LoraConfig, get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> _ = net[0].weight.data.mul_(torch.rand(16, 16) > 0.5)
        >>> zeros = net[0].weight == 0
        >>> model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> sc.train.mask_peft(model)
        ['base_model.model.0']
        >>> bool((model.merge_and_unload()[0].weight[zeros] == 0).all())
        True
    """
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise PlanError("mask_peft is for models of the library peft; pip install 'secateurs[models]'") from None
    plain, masked = _classes()
    found: list[tuple[str, Any]] = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)
    ]
    with_zeros = [(name, layer) for name, layer in found if bool((_weight(layer).detach() == 0).any())]
    if not with_zeros:
        what = (
            f"none of its {len(found)} LoRA layers is on a weight with zeros"
            if found
            else "it has no LoRA layers of PEFT"
        )
        raise PlanError(f"there is nothing to mask in this {type(model).__name__}: {what}; prune the model first")
    for name, layer in with_zeros:
        if type(layer) not in (plain, masked):
            kind = f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
            raise PlanError(
                f"{name}: zeros under a LoRA layer of kind {kind} cannot be kept; give linear layers alone as target_modules"
            )
        if getattr(layer, "lora_variant", None):
            raise PlanError(f"{name}: zeros under a variant of LoRA, such as DoRA, cannot be kept; use plain LoRA")
        if layer.merged:
            raise PlanError(f"{name}: its adapter is merged already, and the zeros are gone; unmerge it first")
    for _, layer in with_zeros:
        if not isinstance(layer, masked):
            layer.__class__ = masked
            layer.register_buffer("zero_mask", _weight(layer).detach() != 0, persistent=False)
    return [name for name, _ in with_zeros]


def _weight(layer: Any) -> Tensor:
    base = layer.get_base_layer()
    # LoRA of a parameter names it; a packed layer has no weight, and its zeros are those of its format
    named = getattr(layer, "parameter_name", "weight")
    weight = getattr(base, named, None)
    return weight if isinstance(weight, Tensor) else torch.ones(1)


@functools.cache
def _classes() -> tuple[type, type]:
    """PEFT's layer, and the one that it becomes."""
    from peft.tuners.lora import Linear

    class MaskedLinear(Linear):  # type: ignore[misc]
        zero_mask: Tensor

        def get_delta_weight(self, adapter: str) -> Tensor:
            """What merge() adds to the weight, in the weight's layout."""
            delta: Tensor = super().get_delta_weight(adapter) * self.zero_mask
            return delta

        def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                whole: Tensor = super().forward(x, *args, **kwargs)
                return whole
            if adapter_names is not None:
                raise PlanError(
                    "adapters that keep zeros are for whole batches; set_adapter() instead of adapter_names"
                )
            result: Tensor = self.base_layer(x, *args, **kwargs)
            dtype = result.dtype
            for name in self.active_adapters:
                if name in self.lora_A:
                    delta = self.get_delta_weight(name)
                    # GPT-2 stores inputs by outputs
                    delta_OI = delta.T if self.fan_in_fan_out else delta
                    bias = self.lora_B[name].bias
                    added = F.linear(self.lora_dropout[name](self._cast_input_dtype(x, delta.dtype)), delta_OI)
                    result = result + (added if bias is None else added + bias * self.scaling[name])
            return result.to(dtype)

    return Linear, MaskedLinear
