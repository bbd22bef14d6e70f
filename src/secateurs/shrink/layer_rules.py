"""What layers do to the numbers of channels: they read them, make new ones, or have an element for each of them.

The rules are as in operators.py. A weight has labels along its axes; they are made when the weight is first used, and tied if it is
used again.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from secateurs.shrink.attention import Attention
from secateurs.shrink.labels import changing
from secateurs.shrink.operators import Given, Rule, Unknown, names
from secateurs.shrink.readers import Reader

if TYPE_CHECKING:
    from secateurs.shrink.trace import Walk


def _vector(walk: "Walk", given: Given, labels: Tensor, arguments: Sequence[str]) -> str | None:
    """Tie parameters that have an element for each channel. Returns the module that holds them."""
    owner = None
    for name in arguments:
        found = given.name_of(name)
        if found is not None:
            walk.axis(found, 0, labels)
            owner = found.rpartition(".")[0]
    return owner


def _channels(walk: "Walk", x: Tensor, axis: int, what: str) -> Tensor:
    """The labels along one axis; what changes along others is tied."""
    axis %= x.dim()
    return walk.mixed(x, [a for a in range(x.dim()) if a != axis], what).reshape(-1).expand(x.shape[axis])


def _batch_norm(walk: "Walk", given: Given) -> Any:
    x = given["input"]
    if given.name == "instance_norm":
        x = walk.mixed(x, range(2, x.dim()), given.what).expand(x.shape)
    labels = _channels(walk, x, 1, given.what)
    owner = _vector(walk, given, labels, ("weight", "bias", "running_mean", "running_var"))
    path = walk.module_of(given.node) if owner is None else owner
    if isinstance(walk.model.get_submodule(path), nn.modules.batchnorm._NormBase):
        walk.state(path, "num_features", labels)
    source = given.held["input"]
    # a norm that several layers feed has one mean for all; one over tokens has none for a linear layer's channels
    made = _name(source).startswith("conv") or (_name(source) == "linear" and x.dim() == 2)
    maker = source.args[1] if made and len(source.args) > 1 else None
    if (
        given.name == "batch_norm"
        and given.held["running_mean"] is not None
        and len(source.users) == 1
        and maker in walk.names
    ):
        walk.norms(walk.names[maker], path)
    elif path:
        walk.norms("", path)
    return x


def _name(node: fx.Node) -> str:
    """The operator's name."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _group_norm(walk: "Walk", given: Given) -> Any:
    x, groups = given["input"], given["num_groups"]
    labels = _channels(walk, x, 1, given.what)
    firsts = walk.mixed(labels.reshape(groups, -1), [1], given.what)
    owner = _vector(walk, given, labels, ("weight", "bias"))
    path = walk.module_of(given.node) if owner is None else owner
    if isinstance(walk.model.get_submodule(path), nn.GroupNorm):
        walk.state(path, "num_groups", firsts.reshape(-1))
        walk.state(path, "num_channels", labels)
    return x


def _layer_norm(walk: "Walk", given: Given) -> Any:
    x, count = given["input"], len(given["normalized_shape"])
    out = walk.mixed(x, range(-count, 0), given.what).expand(x.shape)
    parts = [given[name] for name in ("weight", "bias") if given.held.get(name) is not None]
    for part in parts:
        walk.join(out, part.expand(x.shape), f"{given.what} takes it together with one that stays")
    return out


def _prelu(walk: "Walk", given: Given) -> Any:
    x, name = given["self"], given.name_of("weight")
    assert name is not None
    if given["weight"].numel() > 1:
        labels = _channels(walk, x, 1 if x.dim() > 1 else 0, given.what)
        walk.axis(name, 0, labels)
        walk.state(name.rpartition(".")[0], "num_parameters", labels)
    return x


def _embedding(walk: "Walk", given: Given) -> Any:
    name = given.name_of("weight")
    assert name is not None
    out = walk.axis(name, 1, None, "out")
    _fix_tied(walk, name, out)
    walk.state(name.rpartition(".")[0], "embedding_dim", out)
    return out.expand(given.shape)


def _fix_tied(walk: "Walk", name: str, *labels: Tensor) -> None:
    for part in labels if name in walk.tied else ():
        walk.fix(part, walk.tied[name])


def _reads(walk: "Walk", given: Given, reader: Reader, labels: Tensor, places: int) -> None:
    """A reader, unless its call is out of sight: inside torch's own attention function, which a class of another forward calls."""
    path = walk.module_of(given.node)
    module = walk.model.get_submodule(path)
    if isinstance(module, Attention):
        _of_attention(walk, module, path, reader.weight.rpartition(path)[2].lstrip("."), labels)
    if isinstance(module, nn.MultiheadAttention) and not isinstance(module, Attention):
        walk.fix(labels, f"{path} reads it, a {type(module).__name__}, which wants as many outputs as inputs")
        walk.count(reader.weight, places)
    else:
        walk.read(reader, labels, places)


def _of_attention(walk: "Walk", module: Attention, path: str, weight: str, labels: Tensor) -> None:
    """What an attention states of the channels that one of its weights reads."""
    if weight == "out_proj.weight":
        heads_H = walk.mixed(labels.reshape(module.num_heads, -1), [1], f"its heads in {path}")
        walk.state(path, "num_heads", heads_H.reshape(-1))
    for kind, attribute in (("q", "embed_dim"), ("k", "kdim"), ("v", "vdim")):
        if weight in ("in_proj_weight", f"{kind}_proj_weight"):
            walk.state(path, attribute, labels)


def _linear(walk: "Walk", given: Given) -> Any:
    x, name, bias = given["input"], given.name_of("weight"), given.name_of("bias")
    assert name is not None
    places = x.numel() // x.shape[-1]
    if changing(x) and x.dim() - 1 not in changing(x):
        # it mixes places, not channels, and takes every channel by itself
        walk.count(name, places)
        return walk.mixed(x, [-1], given.what).expand(given.shape)
    labels = _channels(walk, x, -1, given.what)
    return _made(walk, given, name, bias, "linear", labels, places).expand(given.shape)


def _made(
    walk: "Walk", given: Given, name: str, bias: str | None, kind: str, labels: Tensor, places: int, groups: int = 1
) -> Tensor:
    """The new channels of a layer that reads others."""
    into, of = (0, 1) if kind == "transposed" else (1, 0)
    shape = walk.shape_of(name)
    if groups > 1:
        # every group must keep equally many: the same places go from each
        walk.mixed(labels.reshape(groups, -1), [0], given.what)
    walk.axis(name, into, labels if into == 0 else labels[: shape[1]], "in")
    out = walk.axis(name, of, None, "out")
    if groups > 1 and of == 0:
        walk.mixed(out.reshape(groups, -1), [0], given.what)
    elif groups > 1:
        out = out.repeat(groups)
    if bias is not None:
        walk.axis(bias, 0, out)
    _fix_tied(walk, name, labels, out)
    path = name.rpartition(".")[0]
    module = walk.model.get_submodule(path)
    takes = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    for attribute, part in (
        ("in_features", labels),
        ("in_channels", labels),
        ("out_features", out),
        ("out_channels", out),
    ):
        if takes:
            walk.state(path, attribute, part)
    # the intercept of a bias that others hold would go to them as well
    kept = bias if bias is not None and bias not in walk.tied and bias.rpartition(".")[0] == path else None
    own = f"{path}.bias".lstrip(".")
    if bias is None and takes and isinstance(getattr(module, "bias", None), Tensor):
        # this call leaves it out
        walk.axis(own, 0, out)
    elif bias is None and takes and _may_have_a_bias(walk, given.node, module):
        # an intercept may come there
        kept = own
        walk.axes[own, 0] = (out, "")
    _reads(walk, given, Reader(name, kind, labels.numpy(), kept, groups), labels, places)
    return out


def _may_have_a_bias(walk: "Walk", node: fx.Node, module: nn.Module) -> bool:
    """True if a node is the call of a layer without a bias in torch's own forward function, which would add one."""
    own = {type(module).forward, getattr(type(module), "_conv_forward", nn.Linear.forward)}
    return (
        walk.model.get_submodule(walk.module_of(node)) is module
        and "forward" not in vars(module)
        and all(f.__module__.startswith("torch.nn.") for f in own)
    )


def _convolution(walk: "Walk", given: Given) -> Any:
    x, name, bias = given["input"], given.name_of("weight"), given.name_of("bias")
    assert name is not None
    groups, shape = given.held.get("groups", 1), walk.shape_of(name)
    if x.dim() != len(shape):
        raise Unknown("without a batch")
    labels = _channels(walk, x, 1, given.what)
    kind = "transposed" if given.name.startswith("conv_transpose") else "conv"
    taken = x.shape if kind == "transposed" else given.shape
    places = prod(taken) // taken[1]
    beside = [-1 if axis == 1 else 1 for axis in range(len(shape))]
    if groups == x.shape[1] and groups > 1:
        # depthwise: channel i makes channels i k to i k + k - 1
        many = given.shape[1] // groups
        out = labels.repeat_interleave(many)
        walk.axis(name, 0, out if kind == "conv" else labels, "out")
        if bias is not None:
            walk.axis(bias, 0, out)
        _fix_tied(walk, name, labels)
        walk.count(name, places)
        path = name.rpartition(".")[0]
        for attribute, part in (("in_channels", labels), ("groups", labels), ("out_channels", out)):
            walk.state(path, attribute, part)
    else:
        out = _made(walk, given, name, bias, kind, labels, places, groups)
    return out.reshape(beside).expand(given.shape)


def _recurrent(walk: "Walk", given: Given) -> Any:
    """GRU and LSTM of one layer and one direction: rows of the gates, and columns of the state, go with its elements."""
    held = [walk.names.get(node) for node in given.held["params"]]
    path, x = walk.module_of(given.node), given["input"]
    if given["num_layers"] != 1 or given["bidirectional"] or len(held) not in (2, 4) or not all(held):
        raise Unknown("of several layers or directions")
    (inputs, state, *biases), labels = held, _channels(walk, x, -1, given.what)
    assert inputs is not None
    assert state is not None
    gates = walk.shape_of(inputs)[0] // walk.shape_of(state)[1]
    walk.axis(inputs, 1, labels, "in")
    hidden = walk.axis(state, 1, None, "in")
    rows = hidden.repeat(gates)
    for name in (inputs, state):
        walk.axis(name, 0, rows, "out")
    for bias in biases:
        assert bias is not None
        walk.axis(bias, 0, rows)
    _fix_tied(walk, inputs, labels, hidden)
    places = x.numel() // x.shape[-1]
    takers = biases or [None, None]
    walk.read(Reader(inputs, "inputs", labels.numpy(), takers[0]), labels, places)
    walk.read(Reader(state, "state", hidden.numpy(), takers[1]), hidden, places)
    walk.state(path, "input_size", labels)
    walk.state(path, "hidden_size", hidden)
    for first in given["hx"] if isinstance(given["hx"], list) else [given["hx"]]:
        walk.join(first, hidden.expand(first.shape), "its first state stays")
    return [hidden.expand(tuple(y.shape)) for y in given.node.meta["val"]]


LAYERS: dict[str, Rule] = {
    **names(_batch_norm, "batch_norm instance_norm"),
    **names(_group_norm, "group_norm"),
    **names(_layer_norm, "layer_norm rms_norm"),
    **names(_prelu, "prelu"),
    **names(_embedding, "embedding"),
    **names(_linear, "linear"),
    **names(_convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    **names(_recurrent, "gru lstm"),
}
