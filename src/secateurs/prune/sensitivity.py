"""How much the model's loss depends on every output of every layer: E[g^2], the diagonal of the Fisher information.

g is the gradient of -log p(y) by an output, y drawn from the model's own next-token distribution. An error d in output o
then costs about g_o^2 d^2 / 2 nats (Fisher information as the Hessian of the KL divergence: Amari 1998; one factor of
K-FAC, Martens and Grosse 2015, arXiv 1503.05671). Layer errors in these units can be compared: between the rows of a
layer, and between layers.

Of a model that gives embeddings of length 1, g is the gradient of the embedding along a random normal direction, so d costs about
g_o^2 d^2 / 2 of its cosine with the dense embedding, 1 - cos being half the squared distance.

The pass goes forward block by block and then back block by block, each run again with gradients, so memory holds one
block, one batch and one batch's logits; hidden states lie in the store. T tokens, O outputs, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.base.processes import ALONE, Ranks
from secateurs.matrix.stats import Stats
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch
from secateurs.model.blocks import Loader, leave, pieces
from secateurs.model.layers import EXPERTS, Layer
from secateurs.model.products import Product, products
from secateurs.model.walk import stream

Tick = Callable[[], None]
Embed = Callable[[Any, Batch], Tensor]


def sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    loader: Loader,
    store: Activations,
    seed: int = 0,
    tick: Tick = lambda: None,
    embed: Embed | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Tensor], dict[str, Stats]]:
    """{layer name: E[g_o^2] over its tokens, [O]}, and the norms of the layers' inputs on the same tokens. Blocks' names have
    that of what leaves them.

    Both empty for a model that gives no logits, or others than of each position or each input, or one number. store: an empty one,
    left with the inputs of block 0. tick: called once for each batch and block forward, once a batch for the head, once for each
    batch and block backward. embed: makes embeddings [N, D] of the model's output for a batch, in place of logits. ranks: those
    that share the batches; each returns what all found, and draws what one alone would.
    """
    batches = ranks.share(batches)
    last = 0
    for step in stream(model, batches, loader, store, keep_last=True, keep_all=True, tick=tick):
        last = step.index + 1

    def embedded(i: int, hidden: Tensor) -> Tensor:
        assert embed
        return embed(leave(model, loader, hidden, batches[i]), batches[i])

    held = [store.read(last, i).shape[:2] for i in range(len(batches))]
    width, dtype = (lambda x: (x.shape[1], x.dtype))(embedded(0, store.read(last, 0))) if embed and held else (0, None)
    generator = torch.Generator().manual_seed(seed)
    shapes = ranks.merged([(n, width) if embed else (n, positions) for n, positions in held])
    if embed is None:
        drawn = ranks.share([torch.rand(shape, generator=generator) for shape in shapes])
    else:
        drawn = ranks.share([torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes])
    gradients: dict[int, Tensor] = {}
    known = True
    for i, batch in enumerate(batches):
        hidden = store.read(last, i)
        if embed is not None:
            hidden = hidden.detach().requires_grad_(True)
            gradients[i] = _along(hidden, embedded(i, hidden), drawn[i])
            tick()
            continue
        gradients[i] = torch.empty_like(hidden)
        for at in pieces(model, batch):
            piece = hidden[:, at].detach().requires_grad_(True)
            logits = getattr(leave(model, loader, piece, batch, at), "logits", None)
            # distributions over the last axis: one of each position, or one of each input
            of = {piece.shape[:2]: drawn[i][:, at], piece.shape[:1]: drawn[i][:, 0]}
            uniform = None if logits is None else of.get(logits.shape[:-1])
            # a softmax over one number is 1 whatever it is
            if logits is None or uniform is None or logits.shape[-1] == 1:
                known = False
                break
            gradients[i][:, at] = _head(piece, logits, uniform)
        if not known:
            break
        tick()
    loader.release(model)
    if not all(ranks.gather(known)):
        return {}, {}
    found: dict[str, Tensor] = {}
    norms: dict[str, Stats] = {}
    for step in stream(model, batches, loader, store, backwards=True):
        sums = _Sums()
        for i in range(len(batches)):
            if gradients[i].dim() == 3:
                sums.add(step.name, gradients[i])
            hidden = step.inputs(i).detach().requires_grad_(True)
            with step.evaluating(), torch.enable_grad(), sums.watch(step.layers):
                out = step.call(hidden, i)
            (gradients[i],) = torch.autograd.grad(out, hidden, gradients[i])
            tick()
        sums = functools.reduce(_Sums.__add__, ranks.gather(sums))
        found.update(sums.means())
        norms.update(sums.norms())
        store.drop(step.index + 1)
    return found, norms


def _along(hidden: Tensor, found_ND: Tensor, direction_ND: Tensor) -> Tensor:
    """The gradient by hidden states of the embeddings that are made of them, each along a direction of its own."""
    (gradient,) = torch.autograd.grad(found_ND, hidden, direction_ND.to(found_ND.device))
    return gradient


def _head(hidden: Tensor, logits: Tensor, uniform: Tensor) -> Tensor:
    """The gradient by the hidden states of the summed -log p(y) of drawn tokens y; its gradient by a logit is p - 1[y]."""
    with torch.no_grad():
        rows_TV = logits.detach().reshape(-1, logits.shape[-1])
        uniform_T = uniform.reshape(-1).to(rows_TV.device)
        by_logits_TV = torch.empty_like(rows_TV)
        each = max(1, _LOGITS // rows_TV.shape[-1])
        for start in range(0, len(rows_TV), each):
            part = slice(start, start + each)
            chance_TV = rows_TV[part].float().softmax(-1)
            drawn_T1 = draw(chance_TV, uniform_T[part])[:, None]
            chance_TV.scatter_add_(1, drawn_T1, torch.full_like(drawn_T1, -1.0, dtype=chance_TV.dtype))
            by_logits_TV[part] = chance_TV
    (gradient,) = torch.autograd.grad(logits, hidden, by_logits_TV.reshape(logits.shape))
    return gradient


def draw(chance_TV: Tensor, uniform_T: Tensor) -> Tensor:
    """One word a row, [T]: the first whose chance, with those of all before it, exceeds a number from [0, 1) times their sum.

    A running sum takes a thirtieth of the time of torch.multinomial.
    """
    sums_TV = chance_TV.cumsum(-1)
    found_T1 = torch.searchsorted(sums_TV, uniform_T[:, None] * sums_TV[:, -1:], right=True)
    return found_T1[:, 0].clamp(max=chance_TV.shape[1] - 1)


# chances made at a time
_LOGITS = 1 << 22


class _Sums:
    """Squared gradients by what layers give, and squared inputs, summed while a block is run and run back."""

    def __init__(self) -> None:
        # {name: its sum in fp64, as in Stats, so that it does not matter who adds them in which order; and of how many tokens}
        self.gradients: dict[str, tuple[Tensor, int]] = {}
        self.inputs: dict[str, tuple[Tensor, int]] = {}

    @staticmethod
    def _add(sums: dict[str, tuple[Tensor, int]], name: str, squares: Tensor, tokens: int) -> None:
        before, some = sums.get(name, (0, 0))
        sums[name] = before + squares, some + tokens

    def add(self, name: str, gradient: Tensor) -> None:
        gradient_TO = gradient.detach().float().reshape(-1, gradient.shape[-1])
        self._add(self.gradients, name, gradient_TO.square().sum(0).double(), len(gradient_TO))

    def see(self, layer: Layer, x: Tensor) -> None:
        x_TI = layer.inputs(x.detach()).float()
        self._add(self.inputs, layer.name, x_TI.square().sum(0).double(), len(x_TI))

    def __add__(self, other: "_Sums") -> "_Sums":
        """The sums over both's tokens."""
        both = _Sums()
        for one in (self, other):
            for mine, theirs in ((both.gradients, one.gradients), (both.inputs, one.inputs)):
                for name, (squares, tokens) in theirs.items():
                    self._add(mine, name, squares, tokens)
        return both

    def means(self) -> dict[str, Tensor]:
        return {name: (squares / tokens).float() for name, (squares, tokens) in self.gradients.items()}

    def norms(self) -> dict[str, Stats]:
        return {name: Stats(tokens, squares.float()) for name, (squares, tokens) in self.inputs.items()}

    def watch(self, layers: Sequence[Layer]) -> "_Outputs":
        return _Outputs(self, layers)


class _Outputs(TorchFunctionMode):
    """Hooks the gradient of every product with a layer's matrix: modules by hook, slices of fused experts by a mode."""

    def __init__(self, sums: _Sums, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.sums = sums
        self.places = [(layer, module) for layer in layers if layer.refused is None for module in layer.places]
        self.experts = {layer.read().data_ptr(): layer for layer in layers if layer.kind in EXPERTS}
        self.handles: list[Any] = []

    def __enter__(self) -> "_Outputs":
        self.handles = [module.register_forward_hook(self._hook(layer)) for layer, module in self.places]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def _hook(self, layer: Layer) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            self.sums.see(layer, args[0])
            # a router may give more than its products
            if isinstance(out, Tensor) and out.requires_grad:
                hooked: Any = out
                # a convolution's outputs are not its last axis
                last = -1 - len(module.kernel_size) if layer.kind == "conv" else -1
                hooked.register_hook(lambda gradient: self.sums.add(layer.name, gradient.movedim(last, -1)))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for product in products(func, args, kwargs or {}) if self.experts else ():
            layer = self.experts.get(product.place)
            if layer is not None and product.shape == layer.shape and out.requires_grad:
                self.sums.see(layer, product.x_TI)
                out.register_hook(functools.partial(self._add, layer, product))
        return out

    def _add(self, layer: Layer, product: Product, gradient: Tensor) -> None:
        self.sums.add(layer.name, product.of(gradient))
