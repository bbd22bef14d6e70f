"""Block by block through a model: the only place with hooks and weight layouts.

    for step in stream(model, batches):      # one block in memory, the Hugging Face module untouched
        stats = step.observe(...)            # what its layers' inputs looked like
        ...edit step.layers in place...      # the next block's inputs come from the edited block

T tokens, O outputs, I inputs, B sequences, S positions.
"""

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs import families
from secateurs.errors import CalibrationError, CheckpointError, LayerError, OutputError
from secateurs.files import write_json
from secateurs.products import widened
from secateurs.stats import Stats

Batch = dict[str, Tensor]

# logits made at a time: 256 tokens of a vocabulary of 262,144
_LOGITS = 1 << 26


# ---------------------------------------------------------------------------------------------------- weight layouts


@dataclass(frozen=True)
class Layer:
    """One prunable matrix of a block, seen as weight_OI whatever its storage.

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
        """The name of the parameter that holds the weight: experts share one."""
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
        """Put weight_OI into the parameter, in the parameter's dtype. Survivors that the dtype cannot hold become 0."""
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
        """The rows that the matrix multiplies, x_TI, from what the module is called with."""
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
    """The parameters of layers, each once, and where they are not zero. Of fused experts, those that are no layer of these are
    False.
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


# ------------------------------------------------------------------------------------------------------- activations


class Activations(Protocol):
    """The hidden states that enter each block, batch by batch."""

    def read(self, block: int, batch: int) -> Tensor: ...
    def write(self, block: int, batch: int, hidden: Tensor) -> None: ...
    def drop(self, block: int) -> None: ...


class InMemory:
    """Activations of a live model: a dict."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, Tensor]] = {}

    def read(self, block: int, batch: int) -> Tensor:
        return self._held[block][batch]

    def write(self, block: int, batch: int, hidden: Tensor) -> None:
        self._held.setdefault(block, {})[batch] = hidden

    def drop(self, block: int) -> None:
        self._held.pop(block, None)


class OnDisk:
    """Activations in a folder, so that memory holds one batch and a killed run goes on from the block it was in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, block: int, batch: int) -> Path:
        return self.folder / f"block-{block:04d}" / f"{batch:05d}.safetensors"

    def read(self, block: int, batch: int) -> Tensor:
        from safetensors.torch import load_file

        hidden: Tensor = load_file(self._file(block, batch))["hidden"]
        return hidden

    def write(self, block: int, batch: int, hidden: Tensor) -> None:
        from safetensors.torch import save_file

        file = self._file(block, batch)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": hidden.contiguous()}, file)
        # safetensors reports a full disk as its own exception type
        except Exception as error:
            raise OutputError(f"cannot write {file}: {error}; nothing is lost, free space and rerun") from None

    def drop(self, block: int) -> None:
        import shutil

        shutil.rmtree(self.folder / f"block-{block:04d}", ignore_errors=True)


def read_place(file: Path | None) -> int:
    """The block that a killed walk was in, whose inputs its store still has; 0 without a note."""
    return int(json.loads(file.read_text()).get("block", 0)) if file is not None and file.is_file() else 0


def note_place(file: Path | None, block: int, **found: Any) -> None:
    """Note which block comes next, and what was found out before it."""
    if file is not None:
        write_json(file, {"block": block, **found})


# --------------------------------------------------------------------------------------------------------- the walk


class _Stop(Exception):
    """Leave a forward pass: what was wanted is known."""


class Loader(Protocol):
    """Brings parameters into a skeleton by the prefix of their names, and takes them away."""

    def load(self, model: nn.Module, prefix: str) -> None: ...
    def load_outside(self, model: nn.Module) -> None: ...
    def release(self, model: nn.Module) -> None: ...


class AllLoaded:
    """The loader of a live model: everything is there and stays."""

    def load(self, model: nn.Module, prefix: str) -> None: ...
    def load_outside(self, model: nn.Module) -> None: ...
    def release(self, model: nn.Module) -> None: ...


def blocks_of(model: nn.Module) -> tuple[list[str], tuple[str, ...]]:
    """Names of the model's blocks in order, and of its fused expert parameters.

    A Hugging Face model needs a row in families.py (ValueError otherwise); any other module is one block, named ''.
    """
    hugging_face: Any = model
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return [""], ()
    family = families.find(config.model_type)
    # a bare base model has no attribute of that name
    base: nn.Module = getattr(model, hugging_face.base_model_prefix, model)
    container: Any = base.get_submodule(family.blocks)
    prefix = next(name for name, module in model.named_modules() if module is container)
    return [f"{prefix}.{i}" for i in range(len(container))], family.experts


def device_of(model: nn.Module) -> torch.device:
    """Where a live model's parameters are; the CPU for a skeleton, which is loaded there."""
    found = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(found, torch.device("cpu"))


@contextmanager
def _replaced_forward(modules: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    # only the forward of the instance: loops over blocks still find the attributes they read
    before = [module.__dict__.get("forward") for module in modules]
    for i, module in enumerate(modules):
        module.forward = make(i)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            # accelerate moves inputs to a block's device in a forward of the instance
            if forward is not None:
                module.forward = forward


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module for module in model.modules() if module.training}
    model.eval()
    eager = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if eager and before not in (None, "eager"):
        # the fused kernels hide which expert saw which token
        eager("eager")
    try:
        with torch.no_grad(), widened():
            yield
    finally:
        if eager and before not in (None, "eager"):
            eager(before)
        for module in training:
            module.training = True


@dataclass
class _Call:
    """The arguments of a block besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, windows: int, whole: int) -> "_Call":
        """The same for fewer windows than the whole batch: tensors that have one entry a window are cut."""
        if windows == whole:
            return self
        leaves, spec = tree_flatten((self.args, self.kwargs))
        cut = [x[:windows] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == whole else x for x in leaves]
        return _Call(*tree_unflatten(cut, spec))


def _same(a: object, b: object) -> bool:
    leaves_a, leaves_b = tree_flatten(a)[0], tree_flatten(b)[0]
    if len(leaves_a) != len(leaves_b):
        return False
    pairs = zip(leaves_a, leaves_b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else isinstance(y, type(x)) for x, y in pairs)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _run(model: nn.Module, batch: Batch) -> Any:
    hugging_face = hasattr(getattr(model, "config", None), "model_type")
    return model(**batch, use_cache=False) if hugging_face else model(**batch)


def _enter(model: nn.Module, blocks: list[nn.Module], batch: Batch) -> tuple[Tensor, list[_Call]]:
    """Run what comes before the blocks: the hidden states that enter block 0, and how each block is called."""
    entered: list[Tensor] = []
    calls: list[_Call] = []

    def make(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, rest, named = _hidden(args, kwargs)
            entered.append(hidden)
            calls.append(_Call(rest, named))
            if i == len(blocks) - 1:
                raise _Stop
            return hidden

        return forward

    with _replaced_forward(blocks, make):
        try:
            _run(model, batch)
        except _Stop:
            return entered[0], calls
    raise CheckpointError(f"the last block of {type(model).__name__} was never called; is its family row right?")


def leave(model: nn.Module, loader: Loader, hidden: Tensor, batch: Batch, at: slice | None = None) -> Any:
    """Run what comes after the blocks (norms, head) on hidden states that left the last one: the model's output.

    at: the positions of the batch that `hidden` is of, for norms and heads treat each alone; None is all of them. Gradients flow
    to `hidden` if it requires them.
    """
    if at is not None:
        length = _shape(batch)[1]
        batch = {n: x[:, at] if x.dim() > 1 and x.shape[1] == length else x for n, x in batch.items()}
    names, _ = blocks_of(model)
    blocks = [model.get_submodule(name) for name in names]

    def make(i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return hidden

        return forward

    loader.load_outside(model)
    with _evaluating(model), _replaced_forward(blocks, make), torch.set_grad_enabled(hidden.requires_grad):
        return _run(model, batch)


def pieces(model: nn.Module, hidden: Tensor) -> list[slice]:
    """Positions of hidden states [N, S, D], so few at a time that their logits are no more than _LOGITS: those of a large
    vocabulary would take more memory than all else.
    """
    words = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    each = max(1, _LOGITS // (words * hidden.shape[0]))
    return [slice(start, start + each) for start in range(0, hidden.shape[1], each)]


def whole(model: nn.Module, batch: Batch) -> Any:
    """Run a whole model in evaluation mode: its output. Gradients flow where they are enabled."""
    grad = torch.is_grad_enabled()
    with _evaluating(model), torch.set_grad_enabled(grad):
        return _run(model, batch)


@dataclass
class Step:
    """One block on its way through: its layers to edit, and a pass over its inputs to look at them. windows: of each batch."""

    index: int
    count: int
    name: str
    block: nn.Module
    layers: list[Layer]
    windows: list[int]
    _model: nn.Module = field(repr=False)
    _forward: Callable[[int], Tensor] = field(repr=False)
    _keep_output: Callable[[int, Tensor], None] | None = field(default=None, repr=False)
    _tick: Callable[[], None] = field(default=lambda: None, repr=False)
    _call: Callable[..., Tensor] | None = field(default=None, repr=False)
    _teacher: Activations | None = field(default=None, repr=False)
    _store: Activations | None = field(default=None, repr=False)
    _targets: Activations | None = field(default=None, repr=False)
    _seen: set[int] = field(default_factory=set, repr=False)

    @property
    def can_tune(self) -> bool:
        """Whether there is a place for targets()."""
        return self._targets is not None and self._call is not None

    @property
    def batches(self) -> int:
        return len(self.windows)

    def evaluating(self) -> AbstractContextManager[None]:
        """The model in evaluation mode and without gradients, as calls of the block expect it."""
        return _evaluating(self._model)

    def call(self, hidden: Tensor, batch: int) -> Tensor:
        """The block, as it now is, on some windows of a batch: hidden states in, hidden states out."""
        assert self._call
        return self._call(hidden, batch)

    def inputs(self, batch: int) -> Tensor:
        """The hidden states that enter the block, from the blocks before it as they now are."""
        assert self._store
        return self._store.read(self.index, batch)

    def see_targets(self) -> None:
        """Keep what the block, which must still be dense, makes of its inputs; nothing to do if observe() has seen it."""
        assert self._targets
        with self.evaluating():
            for batch in range(self.batches):
                if batch not in self._seen:
                    self._targets.write(self.index, batch, self._forward(batch))
                    self._seen.add(batch)

    def targets(self, batch: int) -> Tensor:
        """What the dense block makes of the inputs that it now gets; needs stream(targets=...)."""
        assert self._targets
        return self._targets.read(self.index, batch)

    def observe(self, layers: Sequence[Layer], gram: bool, drift: bool = False) -> dict[str, Stats]:
        """One pass over all batches: Stats of each layer's inputs, by layer name; layers called on one tensor share
        one Stats. An expert's Stats hold the tokens routed to it, possibly none. drift: also how far the inputs
        have moved from the dense model's (Stats.drift_II); needs stream(teacher=...), leaves experts out. What leaves the
        block is kept for targets() where stream() was given a place for it.

        Raises LayerError if an input is not finite or a layer was never called.
        """
        watch = _Watch(layers, gram, self._keep_output is None and self._targets is None)
        with _evaluating(self._model), watch.hooks():
            for batch in range(self.batches):
                if drift:
                    assert self._teacher
                    with watch.looking_at_dense():
                        dense = self.call(self._teacher.read(self.index, batch), batch)
                    self._teacher.write(self.index + 1, batch, dense)
                    self._tick()
                try:
                    output = self._forward(batch)
                    if self._keep_output:
                        self._keep_output(batch, output)
                    if self._targets:
                        self._targets.write(self.index, batch, output)
                        self._seen.add(batch)
                except _Stop:
                    pass
                watch.next_batch()
                self._tick()
        return watch.finish()


class _Watch:
    """Sums over the inputs of layers while their block runs."""

    def __init__(self, layers: Sequence[Layer], gram: bool, may_stop: bool) -> None:
        self.layers = [layer for layer in layers if layer.kind != "expert"]
        self.experts = [layer for layer in layers if layer.kind == "expert"]
        self.gram = gram
        # the last layer's output is not needed to know its input; experts have no last call
        self.may_stop = may_stop and not self.experts
        self.leader: dict[str, str] = {}
        self.sums: dict[str, Stats] = {}
        self.current: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self.first_batch = True
        self.dense: dict[str, Tensor] | None = None
        self.at_dense = False

    @contextmanager
    def looking_at_dense(self) -> Iterator[None]:
        """Inputs are those of the dense model: kept until the same batch of the pruned one comes by."""
        self.dense, self.at_dense = {}, True
        try:
            yield
        finally:
            self.at_dense = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [layer.module.register_forward_pre_hook(self._hook(layer)) for layer in self.layers]
        try:
            with _ExpertMode(self) if self.experts else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if self.at_dense:
                assert self.dense is not None
                self.dense[layer.name] = x
                return
            self.called.add(layer.name)
            if self.first_batch and layer.name not in self.leader:
                shared = (name for name, other in self.current.items() if other is x and layer.kind != "conv2d")
                self.leader[layer.name] = next(shared, layer.name)
            leader = self.leader[layer.name]
            if leader != layer.name and self.current.get(leader) is not x:
                raise LayerError(f"{layer.name} shared its input with {leader} in one batch and not in the next")
            if leader == layer.name:
                self.current[layer.name] = x
                self.add(layer, layer.inputs(x))
            if self.may_stop and not self.first_batch and len(self.called) == len(self.layers):
                raise _Stop

        return hook

    def add(self, layer: Layer, x_TI: Tensor) -> None:
        if self.at_dense:
            return
        if layer.name not in self.sums:
            self.sums[layer.name] = Stats.zeros(layer.shape[1], self.gram, x_TI.device)
        dense = None if self.dense is None else self.dense.get(layer.name)
        self.sums[layer.name].add_(x_TI, None if dense is None else layer.inputs(dense))

    def next_batch(self) -> None:
        missing = [layer.name for layer in self.layers if layer.name not in self.leader]
        if missing:
            raise LayerError(
                f"{missing[0]} was never called on calibration inputs; leave it out with --skip '{missing[0]}'"
            )
        self.first_batch = False
        self.current.clear()
        self.called.clear()

    def finish(self) -> dict[str, Stats]:
        if self.experts and not any(layer.name in self.sums for layer in self.experts):
            raise LayerError(
                f"no expert of {self.experts[0].tensor_name} was seen at work; its forward is not the eager one"
            )
        for name, stats in self.sums.items():
            stats.finish()
            if not torch.isfinite(stats.sqnorm_I).all():
                bad = int((~torch.isfinite(stats.sqnorm_I)).sum())
                raise LayerError(
                    f"{name}: {bad} of {len(stats.sqnorm_I)} inputs were NaN or infinite on calibration text"
                )
        found = {layer.name: self.sums[self.leader[layer.name]] for layer in self.layers}
        for layer in self.experts:
            found[layer.name] = self.sums.get(layer.name) or Stats.zeros(
                layer.shape[1], self.gram, layer.parameter.device
            )
        return found


class _ExpertMode(TorchFunctionMode):
    """Watches F.linear for calls on a slice of a fused expert parameter: an eager expert loop has no module to hook."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch
        self.at = {layer.read().data_ptr(): layer for layer in watch.experts}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and isinstance(args[1], Tensor):
            layer = self.at.get(args[1].data_ptr())
            if layer is not None and tuple(args[1].shape) == layer.shape:
                self.watch.add(layer, args[0].reshape(-1, layer.shape[1]))
        return func(*args, **(kwargs or {}))


def stream(
    model: nn.Module,
    batches: Sequence[Batch],
    loader: Loader | None = None,
    store: Activations | None = None,
    start: int = 0,
    propagate: str = "pruned",
    keep_last: bool = False,
    tick: Callable[[], None] = lambda: None,
    teacher: Activations | None = None,
    targets: Activations | None = None,
    keep_all: bool = False,
    backwards: bool = False,
) -> Iterator[Step]:
    """Yield the model's blocks in order, each with the inputs that the blocks before it give.

    batches: what the model is called with; empty walks without inputs. propagate: 'pruned' sends inputs through each
    block as the caller left it, 'dense' as it was when observed. start > 0 goes on from the inputs of that block, which
    `store` holds from an earlier walk: the inputs of a block are dropped only after the next block was yielded and
    done, so a caller that notes its place before editing a block can always return to it. keep_last also stores what
    leaves the last block, for leave(). tick is called after every batch of every pass. teacher: where the inputs that
    the dense blocks would have are kept beside those of the edited ones; observe(drift=True) of every block sees to it.
    targets: where a block's dense outputs are kept until the next block. keep_all drops
    no block's inputs; backwards then goes through the same blocks from the last to the first.
    Raises CheckpointError for a model without a family row, CalibrationError if blocks need more than hidden states.
    """
    loader = loader or AllLoaded()
    store = store or InMemory()
    try:
        names, experts = blocks_of(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    blocks = [model.get_submodule(name) for name in names]
    whole = names == [""]
    stores = [] if start or backwards else [store] if teacher is None else [store, teacher]
    calls = {} if whole else _enter_all(model, blocks, batches, loader, stores)

    indices = range(start, len(names))
    for index in reversed(indices) if backwards else indices:
        block = blocks[index]
        loader.load(model, names[index])

        def call(hidden: Tensor, batch: int, index: int = index, block: nn.Module = block) -> Any:
            return _called(block, calls, index, hidden, batches[batch])

        def forward(batch: int, index: int = index, call: Callable[[Tensor, int], Any] = call) -> Any:
            return _first(_run(model, batches[batch])) if whole else call(store.read(index, batch), batch)

        def keep_output(batch: int, hidden: Tensor, index: int = index) -> None:
            store.write(index + 1, batch, hidden)

        wanted = not whole and not backwards and (keep_last or index < len(names) - 1)
        early = keep_output if wanted and propagate == "dense" else None
        layers = layers_of(block, names[index], experts)
        yield Step(
            index, len(names), names[index], block, layers, [_shape(b)[0] for b in batches], model, forward, early, tick,
            None if whole else call, teacher, store, targets,
        )  # fmt: skip
        if not keep_all and not backwards:
            store.drop(index - 1)
        if teacher is not None:
            teacher.drop(index - 1)
        if targets is not None:
            targets.drop(index)
        if wanted and not early:
            with _evaluating(model):
                for batch in range(len(batches)):
                    keep_output(batch, forward(batch))
                    tick()
        loader.release(model)


def caller(model: nn.Module, batches: Sequence[Batch]) -> Callable[..., Tensor]:
    """A function (index, hidden, batch, block=None) that runs a block of a live model, or another in its place, on hidden states of
    some windows of a batch, with the arguments that the model as it now is gives to that place: also after blocks were taken out.
    """
    names, _ = blocks_of(model)
    blocks = [model.get_submodule(name) for name in names]
    calls = _enter_all(model, blocks, batches, AllLoaded(), [])

    def call(index: int, hidden: Tensor, batch: int, block: nn.Module | None = None) -> Any:
        return _called(blocks[index] if block is None else block, calls, index, hidden, batches[batch])

    return call


def _called(
    block: nn.Module, calls: dict[tuple[int, ...], list[_Call]], index: int, hidden: Tensor, batch: Batch
) -> Any:
    """A block on hidden states of some windows of a batch, with the arguments of place `index`."""
    shape = _shape(batch)
    arguments = calls[shape][index].of(hidden.shape[0], shape[0])
    return _first(block(hidden, *arguments.args, **arguments.kwargs))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _shape(batch: Batch) -> tuple[int, ...]:
    return tuple(next(iter(batch.values())).shape)


def _enter_all(
    model: nn.Module, blocks: list[nn.Module], batches: Sequence[Batch], loader: Loader, stores: Sequence[Activations]
) -> dict[tuple[int, ...], list[_Call]]:
    """How blocks are called, by the shape of the batch; what enters block 0 goes to the stores."""
    calls: dict[tuple[int, ...], list[_Call]] = {}
    if not batches:
        return calls
    loader.load_outside(model)
    with _evaluating(model):
        for i, batch in enumerate(batches):
            known = calls.get(_shape(batch))
            if known and not stores:
                continue
            hidden, found = _enter(model, blocks, batch)
            if known and i == 1 and not _same([vars(c) for c in known], [vars(c) for c in found]):
                raise CalibrationError(
                    f"the blocks of {type(model).__name__} take arguments that change with the tokens; "
                    "only hidden states may"
                )
            calls.setdefault(_shape(batch), found)
            for store in stores:
                store.write(0, i, hidden)
    loader.release(model)
    return calls
