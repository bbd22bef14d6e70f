"""Finds the layers whose weight a model's code reads itself, which must stay a plain matrix.

Most code calls the module that holds a weight. Mamba's mixers multiply by `dt_proj.weight`, routers by a copy in fp32: a module
with another kind of weight in its place would fail there. Found out on a small random instance (miniature.py), watched while it
runs. Of a weight that several modules hold (a head tied to the embeddings) any of them may run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from secateurs.base.errors import CheckpointError
from secateurs.model.couplings import pattern_of
from secateurs.model.layers import kind_of
from secateurs.model.miniature import inputs, miniature

# what code asks of a weight that is the same of a weight stored in another way
_SAME: frozenset[Any] = frozenset(
    getattr(Tensor, name).__get__ for name in ("dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta")
)
# why such a layer is not packed
READ = "the model's code reads its weight itself"


def read_by_code(model: Any) -> tuple[set[str], str | None]:
    """The names of the linear layers and embeddings of a Hugging Face model whose weight its code reads; and why that is not known,
    or None.

    A layer that no made-up input reaches is not among them. Layers whose names differ by numbers only count as one.
    """
    try:
        small = miniature(model)
        with _reads(small) as found:
            inputs(small)
            # a tower of images is not called on text
            with suppress(ValueError):
                inputs(small, "images and text")
    except (ValueError, CheckpointError) as error:
        return set(), str(error)
    patterns = set(map(pattern_of, found))
    return {name for name, _ in model.named_modules() if pattern_of(name) in patterns}, None


@contextmanager
def _reads(model: nn.Module) -> Iterator[set[str]]:
    """A context that collects the names of layers whose weight is used while no module that holds it runs."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) in ("linear", "conv1d") or isinstance(module, nn.Embedding)
    }
    weights: dict[int, list[str]] = {}
    for name, module in layers.items():
        weights.setdefault(id(module.weight), []).append(name)
    running: set[int] = set()
    found: set[str] = set()

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func not in _SAME:
                used = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                found.update(name for x in used & weights.keys() - running for name in weights[x])
            return func(*args, **(kwargs or {}))

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        running.add(id(module.weight))
        whole = all(isinstance(x, Tensor) and not x.is_floating_point() for x in args)
        # one that multiplies, too, or is told more than which rows
        if isinstance(module, nn.Embedding) and (len(args) != 1 or kwargs or not whole):
            found.update(weights[id(module.weight)])

    def end(module: nn.Module, _: Any, __: Any) -> None:
        running.discard(id(module.weight))

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in layers.values()]
    handles += [module.register_forward_hook(end, always_call=True) for module in layers.values()]
    try:
        with Mode():
            yield found
    finally:
        for handle in handles:
            handle.remove()
