"""Keeps pruned weights exactly zero through any torch optimizer.

Gradients of removed weights are set to 0 before a step, and whenever its closure has made new ones; the weights after the step. The
optimizer's state for them is cleared before the next step, so momentum, moments and weight decay move nothing. All are hooks of the
optimizer, so plain loops, closures, gradient scalers, accumulation, compiled modules, DDP and FSDP2 (whose optimizer steps shards)
need no other change.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateurs.base.errors import PlanError
from secateurs.train.copies import Copy, found_in
from secateurs.train.matrices import computed, make_plain, prunable

# the integer type of a weight's size in bytes
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 18


class Held:
    """Masks of parameters, kept by hooks on their optimizer.

    see: called once in a step, when its gradients are there and none is cleared yet; of a closure, when it was called once. after:
    called when a step is done and removed weights are 0 again.
    parameters, masks: {name: tensor}, masks bool of the parameter's shape, True where a weight stays. optimizer: whose steps are
    watched. hold() makes one.

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Linear(4, 1, bias=False)
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> held = sc.train.hold(net, optimizer, masks={"weight": mask})
        >>> held.sparsity, (net.weight != 0).tolist()
        (0.5, [[True, False, True, False]])
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
        see: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self._see, self._after = see, after
        self._followed: list[Copy] = []
        # an optimizer whose step() calls that of its base class calls hooks twice
        self._begun = self._seen = False
        # True where a weight is removed: the complement of its mask
        self._removed: dict[str, Tensor] = {}
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.update(masks)

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Replace masks. Removed weights become 0 now, and the optimizer's state for them before its next step.

        Raises PlanError, naming the parameter, for a name that is not held and for a mask of another shape.
        """
        for name, mask in masks.items():
            if name not in self.parameters:
                raise PlanError(f"there is no parameter {name} to hold")
            parameter = self.parameters[name]
            if mask.shape != parameter.shape:
                raise PlanError(
                    f"{name} is {tuple(parameter.shape)} and its mask {tuple(mask.shape)}; they must be alike"
                )
        for name, mask in masks.items():
            self._removed[name] = ~_placed(mask, self.parameters[name])
        self.apply()
        for copy in self._followed:
            self.apply_to(copy)
        # not now: a state may still be loaded
        self._state_is_clear = False

    def apply(self) -> None:
        """Set removed weights to 0."""
        with torch.no_grad():
            for name, removed in self._removed.items():
                _clear(local(self.parameters[name]), local(removed))

    @property
    def masks(self) -> dict[str, Tensor]:
        """{parameter: bool mask, True where a weight stays}."""
        return {name: ~removed for name, removed in self._removed.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of held weights that is removed."""
        gone, total = (sum(int(f(local(r))) for r in self._removed.values()) for f in (torch.sum, torch.numel))
        return gone / total if total else 0.0

    def apply_to(self, copy: Copy) -> None:
        """Set removed weights to 0 in another copy of the model, found by their names.

        copy: an average of its weights (EMA, SWA), a deep copy, a teacher, or a state dict; plain, or in the wrapper of DDP, FSDP2,
        torch.compile, AveragedModel or PEFT. Raises PlanError for a copy that lacks a held parameter; then nothing is changed.
        """
        with torch.no_grad():
            for name, tensor in self._in(copy).items():
                _clear(local(tensor), local(_beside(self._removed[name], tensor)))

    def follow(self, copy: Copy) -> None:
        """apply_to() now, and whenever masks change: for an average that goes on while weights are removed.

        Without it the average keeps a share of every removed weight. Zeros of both stay zeros of the average by themselves.
        """
        self.apply_to(copy)
        self._followed.append(copy)

    def _in(self, copy: Copy) -> dict[str, Tensor]:
        return found_in(copy, {name: tuple(removed.shape) for name, removed in self._removed.items()})

    def release(self, *copies: Copy) -> None:
        """Remove the hooks. Zeros stay until something changes them.

        copies: of the model, as of apply_to(), such as the average that is shipped. Warns of each that has weights left where the
        model has none.
        """
        for handle in self._handles:
            handle.remove()
        self._handles, self._followed = [], []
        for copy in copies:
            left = [n for n, t in self._in(copy).items() if _any((t.detach() != 0) & _beside(self._removed[n], t))]
            if left:
                warnings.warn(
                    f"{type(copy).__name__} is not as sparse as the model: {len(left)} of {len(self._removed)} matrices have "
                    f"weights where the model has zeros, first {left[0]}; call apply_to() on it before you save it",
                    stacklevel=2,
                )

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as {name: bool tensor}, for a checkpoint beside the optimizer's."""
        return self.masks

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the masks that state_dict() gave. state: these."""
        self.update(state)

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Clear gradients of removed weights; of a step that is given a closure also whenever that has made new ones."""
        if not self._state_is_clear:
            self._clear_state()
            self._state_is_clear = True
        self._begun = True
        # args[0] is the optimizer
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if given is None:
            self._take_gradients()
            return None
        self.clear_gradients()

        def closure() -> Any:
            found = given()
            self._take_gradients()
            return found

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _take_gradients(self) -> None:
        if not self._seen:
            self._seen = True
            self._see()
        self.clear_gradients()

    def _after_step(self, *_: Any) -> None:
        self.apply()
        if self._begun:
            self._begun = self._seen = False
            self._after()

    def clear_gradients(self) -> None:
        """Set gradients of removed weights to 0, as every step does; before one, for a norm of gradients that leaves them out.

        Raises PlanError for sparse gradients.
        """
        for name, removed in self._removed.items():
            gradient = self.parameters[name].grad
            if gradient is not None and gradient.is_sparse:
                raise PlanError(
                    f"{name} has sparse gradients, whose zeros cannot be held; make its layer with sparse=False"
                )
            if gradient is not None:
                _clear(local(gradient), local(removed))

    def _clear_state(self) -> None:
        for name, removed in self._removed.items():
            parameter = self.parameters[name]
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    _clear(local(value), local(removed))
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self._restart_if_it_moves_removed_weights(self.optimizer)

    def _restart_if_it_moves_removed_weights(self, optimizer: torch.optim.LBFGS) -> None:
        """LBFGS keeps differences of all parameters in one vector. Parts of them are no curvature, so it starts over instead."""
        every = optimizer.param_groups[0]["params"]
        state = optimizer.state.get(every[0], {})
        names = {id(p): name for name, p in self.parameters.items()}
        gone = torch.cat([
            self._removed[names[id(p)]].flatten() if id(p) in names else torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            for p in every
        ])  # fmt: skip
        kept = [state.get("d"), state.get("prev_flat_grad"), *state.get("old_dirs", ()), *state.get("old_stps", ())]
        if any(bool((vector[gone] != 0).any()) for vector in kept if vector is not None):
            state.clear()


def hold(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None = None) -> Held:
    """Keep a model's zeros through training: call `sc.train.hold(model, optimizer)`, and leave the loop as it is.

    masks: {parameter: bool, True = stays}; by default every matrix that is trained keeps the zeros that it has: of Linear, Conv1D,
    Conv2d and fused experts. Masks of torch.nn.utils.prune and torch.ao.pruning are taken over and their reparametrization is
    removed, which makes new parameters: create the optimizer after take_over(). Raises PlanError for a model without zeros, for
    zeros that are computed in every pass (weight norm), for an optimizer that does not own a masked parameter that is trained, and
    for a mask of another shape. By default matrices without any weight, which is how LoRA's and other added layers begin, are not
    held.

    Example:

        >>> import torch, secateurs as sc
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> for weight in (net[0].weight, net[2].weight):
        ...     weight.data[weight.abs() < weight.abs().median()] = 0
        >>> optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        >>> held = sc.train.hold(net, optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> held.release()
        >>> float((net[0].weight == 0).float().mean()) >= 0.49
        True
    """
    taken = take_over(model)
    wanted = {**_found(model, optimizer), **taken} if masks is None else dict(masks)
    if masks is None and not wanted:
        frozen = [name for name, p in prunable(model) if not p.requires_grad and _has_zeros(p)]
        raise PlanError(
            "the model has no zeros that training could change: prune it first, or give masks"
            + (
                f"; frozen matrices have zeros ({len(frozen)}, first {frozen[0]}), and whatever is merged into them later fills "
                "them (LoRA): use sc.train.lora, or give masks and call apply_to() on the merged model"
                if frozen
                else ""
            )
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name in list(wanted):
        if name not in named:
            raise PlanError(f"the model has no parameter {name}; known, for one: {next(iter(named), 'none')}")
        other = first.setdefault(id(named[name]), name)
        if other != name and not torch.equal(wanted[other], wanted.pop(name)):
            raise PlanError(f"{other} and {name} are one parameter, and their masks differ; give one mask")
    hint = "make it after take_over()" if taken else "give it model.parameters()"
    # nothing moves what is frozen
    check_owned(optimizer, {name: named[name] for name in wanted if named[name].requires_grad}, hint)
    return Held({name: named[name] for name in wanted}, wanted, optimizer)


def _found(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{parameter: mask} of the matrices with zeros. Raises PlanError for a weight with zeros that is no parameter."""
    for name, weight in computed(model):
        if _any(weight == 0):
            raise PlanError(
                f"{name} has zeros and is computed in every pass, so they cannot be held; make it a plain parameter"
            )
    owned = _owned(optimizer)
    # nothing moves a frozen matrix that the optimizer does not have
    found = {n: p.detach() != 0 for n, p in prunable(model) if (p.requires_grad or id(p) in owned) and _has_zeros(p)}
    return {name: mask for name, mask in found.items() if _any(mask)}


def check_owned(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], hint: str = "give it model.parameters()"
) -> None:
    """Raise PlanError for the first parameter that the optimizer does not own."""
    owned = _owned(optimizer)
    for name, parameter in named.items():
        if id(parameter) not in owned:
            raise PlanError(f"the optimizer does not own {name}, whose zeros it should keep; {hint}")


def _owned(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def take_over(model: nn.Module) -> dict[str, Tensor]:
    """Turn masks of torch.nn.utils.prune (weight_orig, weight_mask) and torch.ao.pruning (FakeSparsity) into plain zeros.

    Returns {parameter: mask}. The parameters are new objects afterwards.
    model: changed in place. Raises nothing of its own; a model without such masks gives {}.

    Example:

        >>> import torch, secateurs as sc
        >>> from torch.nn.utils import prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = prune.l1_unstructured(net[0], "weight", amount=0.5)
        >>> {name: int(mask.sum()) for name, mask in sc.train.take_over(net).items()}
        {'0.weight': 8}
        >>> [name for name, _ in net.named_parameters()]
        ['0.bias', '0.weight']
    """
    from torch.nn.utils import prune

    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for leaf in [name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask")]:
            if f"{leaf}_orig" in module._parameters:
                mask = module._buffers[f"{leaf}_mask"]
                assert mask is not None
                found[f"{path}.{leaf}".strip(".")] = mask.detach().bool().clone()
                prune.remove(module, leaf)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(module):
            for leaf, chain in list(module.parametrizations.items()):
                masks = [p.mask for p in chain if type(p).__name__ == "FakeSparsity"]
                if masks:
                    found[f"{path}.{leaf}".strip(".")] = masks[0].detach().bool().clone()
                    make_plain(module, leaf)
    return found


def _placed(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask on its parameter's device, and distributed like it if the parameter is a DTensor."""
    mask = mask.to(device=parameter.device, dtype=torch.bool)
    if not hasattr(parameter, "to_local") or hasattr(mask, "to_local"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    whole: Any = parameter
    return distribute_tensor(mask, whole.device_mesh, whole.placements)


def _beside(removed: Tensor, tensor: Tensor) -> Tensor:
    """What is removed, on the device of another copy's tensor and distributed like that."""
    if hasattr(tensor, "to_local"):
        same = getattr(removed, "placements", None) == getattr(tensor, "placements", None)
        return removed if same else _placed(whole(removed), tensor)
    return whole(removed).to(tensor.device)


def _has_zeros(parameter: nn.Parameter) -> bool:
    return _any(parameter.detach() == 0)


def _any(mask: Tensor) -> bool:
    """True if any of a mask is, on whatever rank: all ranks ask of the same masks in the same order, and get the same answer."""
    return bool(whole(mask.any()))


def _clear(values: Tensor, removed: Tensor) -> None:
    """Set values to 0 where `removed`, in place."""
    # on CPUs with integers, in pieces that stay in the cache: masked_fill_ takes 7 times as long
    bits = _BITS.get(values.element_size())
    if values.device.type != "cpu" or bits is None or not values.is_contiguous():
        values.masked_fill_(removed, 0)
        return
    flat, gone = values.view(-1).view(bits), removed.contiguous().view(-1).view(torch.int8)
    for start in range(0, len(flat), _PIECE):
        part = slice(start, start + _PIECE)
        # all bits are one where the weight stays
        flat[part].bitwise_and_(gone[part].to(bits).sub_(1))


def local(tensor: Any) -> Tensor:
    """This rank's shard of a distributed tensor; any other tensor as it is."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def whole(tensor: Any) -> Tensor:
    """All of a distributed tensor, gathered from all ranks; any other tensor as it is."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach()
