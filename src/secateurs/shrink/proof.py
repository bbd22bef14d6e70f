"""Shows that units can go: with zeros where others read them, and without them, a module gives the same outputs.

It is shown in float64, on parameters and buffers that are moved away from their values (ones and zeros would hide that they were
forgotten), in eval and train mode, and on inputs of two sizes where the module takes two. Random units of each group go, from a
third to a half of them. All groups go together first; where outputs differ, the groups that are at fault are found by halving.
"""

import copy
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.shrink import graph
from secateurs.shrink.graph import Graph, Group
from secateurs.shrink.outputs import Inputs, tensors_of
from secateurs.shrink.passes import backward, undone

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
# and where rounding itself makes more of a difference than that, at most this
_ROUNDING = 1e-3


# the place of dropout_p among the arguments
_DROPOUTS: dict[Any, int] = {F.multi_head_attention_forward: 10, F.scaled_dot_product_attention: 4}


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest number of b."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0


class _Certain(TorchFunctionMode):
    """Runs a model without dropout, which draws other numbers for other widths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", "") and args and isinstance(args[0], Tensor):
            return args[0]
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("scaled_dot_product_attention", "multi_head_attention_forward"):
            kwargs = {k: 0.0 if k == "dropout_p" else v for k, v in kwargs.items()}
            # torch's own attention gives it by its place
            args = tuple(0.0 if i == _DROPOUTS.get(func) else x for i, x in enumerate(args))
        return func(*args, **kwargs)


class Proof:
    """Tries of cuts on a copy of a module. done: on what each is tried; missing: what the module itself does not take."""

    def __init__(self, model: nn.Module, example: Inputs, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.missing: list[str] = []
        self.trials: list[tuple[str, Inputs]] = []
        self.model, self.dtype = model, torch.float32
        for dtype in (torch.float64, torch.float32):
            with suppress_all():
                moved = _moved(model, dtype, self.generator)
                whole = _two(example, dtype, self.generator)
                if self._runs(moved, whole, False):
                    self.model, self.dtype = moved, dtype
                    break
        # the same inputs are asked for twice
        self._known: dict[tuple[Any, ...], bool] = {}
        smaller = None
        for x in _smaller(whole):
            if self._runs(self.model, x, False):
                if self._steady(x, True):
                    smaller = x
                    break
                smaller = x if smaller is None else smaller
        inputs = [whole] if smaller is None else [smaller, tuple(torch.cat([x, x[:1]]) for x in whole)]
        if smaller is None:
            self.missing.append("inputs of another size")
        for x in inputs:
            for training in (False, True):
                if ((x is smaller and not training) or self._runs(self.model, x, training)) and (
                    not training or self._steady(x, True)
                ):
                    self.trials.append((f"{'train' if training else 'eval'} {' '.join(_shape(t) for t in x)}", x))
        if not any(name.startswith("train") for name, _ in self.trials):
            self.missing.append("train mode")

    def _steady(self, inputs: Inputs, training: bool) -> bool:
        key = (training, *map(_shape, inputs))
        if key not in self._known:
            self._known[key] = self._is_steady(inputs, training)
        return self._known[key]

    def _is_steady(self, inputs: Inputs, training: bool) -> bool:
        """True if rounding makes little of a difference: a batch norm over two places that are alike may turn a sign."""
        try:
            name = f"{'train' if training else 'eval'} "
            return self._rounding(self.model, [(name, inputs)]) < _ROUNDING
        except Exception:
            return False

    def _runs(self, model: nn.Module, inputs: Inputs, training: bool) -> bool:
        """True if the module takes these inputs, and gives the same each time."""
        try:
            with undone(model):
                a = self._outputs(model, inputs, training)
            with undone(model):
                b = self._outputs(model, inputs, training)
        except Exception:
            return False
        return bool(a) and all(torch.equal(x, y) and bool(x.isfinite().all()) for x, y in zip(a, b, strict=True))

    def _outputs(self, model: nn.Module, inputs: Inputs, training: bool) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _Certain(), suppress_all():
            torch.manual_seed(self.seed)
            return [x.double() for x in tensors_of(model.train(training)(*(x.clone() for x in inputs)))]

    def chosen(self, found: Graph, groups: Sequence[Group]) -> list[int]:
        """Random units of each group, from a third to a half by turns: two groups of one size rarely lose the same number."""
        turns = {group.name: turn for turn, group in enumerate(found.groups)}
        gone = []
        for group in groups:
            count = len(group.units)
            fewest, most = max(1, count // 3), count // 2
            many = most - turns[group.name] % (most - fewest + 1)
            seed = self.seed + zlib.crc32(group.name.encode())
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            gone += [int(group.units[i]) for i in order[:many].tolist()]
        return gone

    def why_not(self, found: Graph, removed: Sequence[int]) -> str | None:
        """Why these units cannot go, or None if the module without them is the module with zeros."""
        zeroed = copy.deepcopy(self.model)
        graph.kill(zeroed, found, removed)
        small = copy.deepcopy(zeroed)
        try:
            graph.cut(small, found, removed)
        except Exception as error:
            return _first(error)
        with undone(zeroed):
            wanted = [self._outputs(zeroed, x, name.startswith("train")) for name, x in self.trials]
        for number, ((name, inputs), expected) in enumerate(zip(self.trials, wanted, strict=True)):
            try:
                # running means move, as they do in training
                got = self._outputs(small, inputs, name.startswith("train"))
            except Exception as error:
                return f"without it the module fails: {_first(error)}"
            for a, b in zip(got, expected, strict=True):
                if a.shape != b.shape:
                    return f"without it the module gives {_shape(a)} for {_shape(b)}"
                gap = _gap(a, b)
                if not gap <= _CLOSE[self.dtype] and not gap <= self._rounding(zeroed, self.trials[: number + 1]):
                    return f"without it the module gives something else: {gap:.2g} of the largest output apart ({name})"
        return None

    def _rounding(self, model: nn.Module, trials: Sequence[tuple[str, Inputs]]) -> float:
        """The gap that rounding can make in the last of some trials: a batch norm over few places that are alike makes a large one
        of a small one, and its running means carry that on.
        """
        nudged = copy.deepcopy(model)
        size = 64 * torch.finfo(self.dtype).eps
        for p in nudged.parameters():
            if p.is_floating_point():
                p.data *= 1 + size * (torch.rand(p.shape, generator=self.generator).to(p) - 0.5)
        gap = 0.0
        with undone(model):
            for name, inputs in trials:
                pairs = zip(*(self._outputs(m, inputs, name.startswith("train")) for m in (nudged, model)), strict=True)
                gap = max((_gap(a, b) for a, b in pairs), default=0.0)
        return min(_ROUNDING, 10 * gap)

    def unheard(self, found: Graph, groups: Sequence[Group]) -> list[str]:
        """The groups whose zeros would show nothing: no output has a gradient to what reads them."""
        name, inputs = self.trials[0]
        model = copy.deepcopy(self.model).train(name.startswith("train"))
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        with torch.enable_grad(), _Certain(), suppress_all():
            outs = [x for x in tensors_of(model(*(x.clone() for x in inputs))) if x.requires_grad]
            drawn = [torch.rand(x.shape, generator=self.generator).to(x) for x in outs]
        gradients: dict[str, Tensor] = {}
        if outs:
            backward(model, outs, drawn)
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        unheard = []
        for group in groups:
            axes = [found.axes[i] for i in group.axes if found.axes[i].role == "in"]
            parts = [
                gradients[a.tensor].movedim(a.axis, 0)[np.isin(a.labels, group.units)]
                for a in axes
                if a.tensor in gradients
            ]
            if not any(bool(part.any()) for part in parts):
                unheard.append(group.name)
        return unheard


@contextmanager
def suppress_all() -> Iterator[None]:
    """No warnings: the same module has been run before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prove(model: nn.Module, found: Graph, example: Inputs, seed: int = 0) -> Graph:
    """The graph with those groups only whose units were shown to go; the others are fixed, with the reason."""
    proof = Proof(model, example, seed)
    if not proof.trials:
        why = f"nothing can be shown: {type(model).__name__} does not give the same finite outputs twice"
        return found.without({g.name: why for g in found.groups})
    refused = _refused(proof, found)
    guessed = {i for g in found.groups if g.name in refused for i in g.sizes if found.sizes[i].guessed}
    if guessed:
        # an attribute may hold the same number for another reason
        found = _without(found, guessed)
        refused = _refused(proof, found)
    left = [g for g in found.groups if len(g.units) > 1 and g.name not in refused]
    guesses = sorted({i for g in left for i in g.sizes if found.sizes[i].guessed})
    found = _fewest_guesses(proof, found, left, guesses)
    refused.update(dict.fromkeys(proof.unheard(found, left), "no output changes with it, so nothing can be shown"))
    shown = {
        "inputs": list(dict.fromkeys(name.partition(" ")[2] for name, _ in proof.trials)),
        "modes": list(dict.fromkeys(name.partition(" ")[0] for name, _ in proof.trials)),
        "missing": proof.missing,
        "dtype": str(proof.dtype).removeprefix("torch."),
    }
    return replace(found.without(refused), proof=shown)


def _without(found: Graph, sizes: Collection[int]) -> Graph:
    """The graph without some of the sizes that modules state."""
    return replace(
        found, sizes=[replace(s, labels=s.labels[:0]) if i in sizes else s for i, s in enumerate(found.sizes)]
    )


def _fewest_guesses(proof: Proof, found: Graph, groups: Sequence[Group], guesses: Sequence[int]) -> Graph:
    """The graph without those guessed sizes that the groups go without as well: all of these at once, then halves of them."""
    if not guesses:
        return found
    less = _without(found, guesses)
    if proof.why_not(less, proof.chosen(less, groups)) is None:
        return less
    if len(guesses) > 1:
        middle = len(guesses) // 2
        for half in (guesses[:middle], guesses[middle:]):
            found = _fewest_guesses(proof, found, groups, half)
    return found


def _refused(proof: Proof, found: Graph) -> dict[str, str]:
    """{group: why it stays}; all others were shown to go together."""
    refused: dict[str, str] = {}
    before = -1
    while len(refused) > before:
        before = len(refused)
        # one unit alone always stays
        _search(proof, found, [g for g in found.groups if len(g.units) > 1 and g.name not in refused], refused)
    return refused


def _search(proof: Proof, found: Graph, groups: Sequence[Group], refused: dict[str, str]) -> None:
    """Find the groups whose cuts are not zeros: all of these at once, then halves of them."""
    if not groups:
        return
    why = proof.why_not(found, proof.chosen(found, groups))
    if why is None:
        return
    if len(groups) == 1:
        refused[groups[0].name] = why
        return
    before = len(refused)
    middle = len(groups) // 2
    _search(proof, found, groups[:middle], refused)
    _search(proof, found, groups[middle:], refused)
    if len(refused) == before:
        # each half can go alone, and not both: the second stays
        refused.update(dict.fromkeys((g.name for g in groups[middle:]), f"{why}, together with others"))


def _moved(model: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """A copy with all floating numbers a little larger than they are, each by another amount."""
    out = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for tensor in (*out.parameters(), *out.buffers()):
            if tensor.is_floating_point() and tensor.numel():
                finite = tensor.masked_fill(~tensor.isfinite(), 0)
                size = finite.abs().mean() if float(finite.abs().max()) else tensor.new_tensor(1.0)
                more = torch.rand(tensor.shape, generator=generator).to(tensor)
                tensor.add_((0.2 * size + 0.1 * (size < 1e-3)) * more)
    return out


def _two(example: Inputs, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Two examples, the second a little different."""
    found = []
    for x in example:
        x = x[:2] if len(x) > 1 else torch.cat([x, x])
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            x = (x + noise * x.float().std(unbiased=False).clamp(min=0.1)).to(dtype)
        found.append(x)
    return tuple(found)


def _smaller(inputs: Inputs) -> Iterator[Inputs]:
    """The same inputs with shorter axes: the last two of images, the last of sequences and token ids, else the one before."""
    for share in (4, 2):
        for number in (3, 2, 1):
            out = []
            for x in inputs:
                last = range(2, x.dim()) if number == 3 else [min(number, x.dim() - 1)]
                for axis in last:
                    if axis > 0 and x.shape[axis] % share == 0 and x.shape[axis] > share:
                        x = x.narrow(axis, 0, x.shape[axis] // share)
                out.append(x)
            if any(a.shape != b.shape for a, b in zip(out, inputs, strict=True)):
                yield tuple(out)


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
