"""What operators do to the numbers of channels: (walk, given) -> labels of what comes out. Layers have rules in layer_rules.py.

Most operators need a name only. Some are run on the labels as they are, because they move elements; some tie what stands in the
same place, most of which torch marks as pointwise; some take all places along an axis together. A rule that does not know raises
Unknown, and the channels stay.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from secateurs.shrink.labels import FREE, changing, either, same

if TYPE_CHECKING:
    from secateurs.shrink.trace import Walk


class Unknown(Exception):
    """An operator, or this use of it, is in no table. The message ends a sentence that begins with the operator's name."""


class Computed(Unknown):
    """A layer whose parameter is made of others in each pass."""


class Given:
    """The arguments of a call by name. shape: of what comes out, if it is one tensor."""

    def __init__(self, walk: "Walk", node: fx.Node, name: str, held: dict[str, Any]) -> None:
        self.walk, self.node, self.name, self.held = walk, node, name, held
        found = node.meta["val"]
        self.shape = tuple(found.shape) if isinstance(found, Tensor) else ()
        self.what = f"{name.rstrip('_')}{walk.place(node)}"

    @classmethod
    def of(cls, walk: "Walk", node: fx.Node, name: str) -> "Given":
        schema: Any = getattr(node.target, "_schema", None)
        if schema is None:
            raise Unknown
        held = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        held.update(zip([a.name for a in schema.arguments], node.args, strict=False))
        return cls(walk, node, name, {**held, **node.kwargs})

    def __getitem__(self, name: str) -> Any:
        """An argument, with labels for tensors."""
        return fx.node.map_arg(self.held[name], self.walk.labels)

    def name_of(self, name: str) -> str | None:
        """The name of the parameter that an argument is. Raises Unknown if it is a tensor that was computed."""
        node = self.held.get(name)
        if node is None:
            return None
        if node not in self.walk.names:
            raise Computed(f"with a {name} that is computed")
        return self.walk.names[node]

    def tensors(self) -> list[Tensor]:
        return [found for source in self.node.all_input_nodes if isinstance(found := self.walk.labels(source), Tensor)]


Rule = Callable[["Walk", Given], Any]


# ---------------------------------------------------------------------------------------------- elements that are moved


def _same(walk: "Walk", given: Given) -> Any:
    first = given.tensors()[0]
    if tuple(first.shape) != given.shape:
        raise Unknown
    return first


def _moving(walk: "Walk", given: Given) -> Any:
    """The operator itself, run on labels. What comes out must be rectangular; sizes that it states are remembered."""
    name = {"view": "reshape", "_unsafe_view": "reshape"}.get(given.name, given.name)
    function = given.node.target if name == given.name else torch.ops.aten.reshape.default
    args, kwargs = fx.node.map_arg((given.node.args, given.node.kwargs), walk.labels)
    if name == "reshape":
        args, kwargs = (args[0], given.shape), {}
    out = function(*args, **kwargs)  # type: ignore[operator]
    for part in out if isinstance(out, list | tuple) else [out]:
        if len(changing(part)) > 1:
            walk.shaped.append((part, (), given.what))
    return list(out) if isinstance(out, tuple) else out


def _shaping(walk: "Walk", given: Given) -> Any:
    """view, reshape, expand and the like, whose sizes may be those of a module."""
    out = _moving(walk, given)
    for axis, size in enumerate(out.shape):
        if axis in changing(out):
            walk.sized.append((given.node, size, out, axis))
    return out


def _chunk(walk: "Walk", given: Given) -> Any:
    """Parts along an axis. Equal ones lose the same places, so that they are equal afterwards."""
    x, axis = given["self"], given["dim"] % given["self"].dim()
    parts = list(_moving(walk, given))
    if axis not in changing(x):
        return parts
    equal = all(part.shape == parts[0].shape for part in parts)
    for part in parts:
        if equal:
            walk.join(parts[0], part, f"{given.what} gives it beside one that stays")
        elif given.name == "chunk":
            walk.fix(part, f"it goes through {given.what}, in parts that are not equal")
        walk.sized.append((given.node, part.shape[axis], part, axis))
    return parts


def _glu(walk: "Walk", given: Given) -> Any:
    """One half times the sigmoid of the other: both lose the same places."""
    x, axis = given["self"], given["dim"] % given["self"].dim()
    a, b = x.chunk(2, axis)
    walk.join(a, b, f"{given.what} takes it together with one that stays")
    return walk.numbers.find(a)


def _slice(walk: "Walk", given: Given) -> Any:
    x, axis = given["self"], given["dim"] % given["self"].dim()
    out, size = _moving(walk, given), x.shape[axis]
    start, end = given["start"] or 0, given["end"]
    start, end = (min(max(n + size if n < 0 else n, 0), size) for n in (start, size if end is None else end))
    if axis not in changing(x) or out.shape[axis] == size:
        return out
    if given["step"] != 1:
        walk.shaped.append((x, (axis,), f"it goes through {given.what}, which takes every {given['step']}th"))
        return out
    for edge in (start, end):
        if 0 < edge < size:
            walk.sized.append((given.node, edge, x.narrow(axis, 0, edge), axis))
            if size % edge == 0:
                # a half, say, is one afterwards if both lose the same places
                parts = x.split(edge, axis)
                for part in parts[1:]:
                    walk.join(parts[0], part, f"{given.what} takes it beside one that stays")
    return out


def _picking(walk: "Walk", given: Given) -> Any:
    """select and unbind: places along an axis, by their number, so that none of them may go."""
    x, axis = given["self"], given["dim"] % given["self"].dim()
    if axis in changing(x):
        walk.shaped.append((x, (axis,), f"it goes through {given.what}, which picks it by its place"))
    return _moving(walk, given)


def _index(walk: "Walk", given: Given) -> Any:
    x = given["self"]
    held = given.held["indices"] if given.name == "index" else [None] * (given["dim"] % x.dim()) + [given.held["index"]]
    axes = [axis for axis, index in enumerate(held) if index is not None]
    values = [None if index is None else walk.constants.get(index) for index in held]
    if any(index is not None and value is None for index, value in zip(held, values, strict=True)):
        # which places are taken is not known: none is told from another
        if axes != list(range(len(axes))):
            raise Unknown("by indices that are computed")
        return walk.mixed(x, axes, given.what)[(0,) * len(axes)].expand(given.shape)
    if set(axes) & set(changing(x)):
        walk.shaped.append((x, tuple(axes), f"it goes through {given.what}, which picks it by its place"))
    out = torch.ops.aten.index.Tensor(x, values)
    if len(changing(out)) > 1:
        walk.shaped.append((out, (), given.what))
    return out


def _joined(walk: "Walk", given: Given) -> Any:
    """cat and stack. Along another axis than theirs, channels of one part stand where those of another do."""
    parts = given["tensors"]
    axis = given["dim"] % len(given.shape)
    if given.name == "stack":
        parts = [part.unsqueeze(axis) for part in parts]
    parts = [part for part in parts if part.dim() == len(given.shape)]
    if not any(axis in changing(part) for part in parts) and any(map(changing, parts)):
        return _combined(walk, [part.narrow(axis, 0, 1) for part in parts if part.shape[axis]], given).expand(
            given.shape
        )
    others = {a for part in parts for a in changing(part)} | {axis}
    still = [a for a in range(len(given.shape)) if a not in others]
    for a in still:
        parts = [part.narrow(a, 0, min(1, part.shape[a])) for part in parts]
    out = torch.cat(parts, axis).expand(given.shape)
    if len(changing(out)) > 1:
        walk.shaped.append((out, (), given.what))
    return out


def _pad(walk: "Walk", given: Given) -> Any:
    x, pads = given["self"], list(given["pad"])
    axes = [x.dim() - 1 - i // 2 for i, pad in enumerate(pads) if pad]
    if not set(axes) & set(changing(x)):
        for axis in axes:
            x = x.narrow(axis, 0, 1)
        return x.expand(given.shape)
    if given.held.get("mode", "constant") != "constant":
        raise Unknown("along channels")
    return torch.constant_pad_nd(x, pads, FREE)


# ---------------------------------------------------------------------------------- elements that are tied to each other


def _combined(walk: "Walk", parts: Sequence[Tensor], given: Given) -> Tensor:
    """Elements made of those of several tensors, in the same place."""
    out: Tensor | None = None
    for part in parts:
        if out is None:
            out = part
            continue
        shape = torch.broadcast_shapes(out.shape, part.shape)  # type: ignore[no-untyped-call]
        for one, many in ((part, out), (out, part)):
            if not changing(one) and one.numel() and _smaller(one, many):
                # one channel for all of the others
                walk.fix(one, f"{given.what} takes it with every one of several")
                out = many.expand(shape)
                break
        else:
            a, b = out.expand(shape), part.expand(shape)
            walk.join(a, b, f"{given.what} takes it together with one that stays")
            out = walk.numbers.find(either(a, b))
    assert out is not None
    return out


def _smaller(one: Tensor, many: Tensor) -> bool:
    """True if one tensor has one place wherever the numbers of another change."""
    missing = many.dim() - one.dim()
    axes = changing(many)
    return bool(axes) and all(axis < missing or one.shape[axis - missing] == 1 for axis in axes)


def _pointwise(walk: "Walk", given: Given) -> Any:
    parts = given.tensors()
    if not isinstance(given.node.meta["val"], Tensor):
        raise Unknown
    return _combined(walk, parts, given).expand(given.shape)


POINTWISE: Rule = _pointwise


def _along(count: int) -> Rule:
    """Operators that take the last `count` axes together, and leave them as axes."""

    def rule(walk: "Walk", given: Given) -> Any:
        first = given.tensors()[0]
        out = walk.mixed(first, range(-count, 0), given.what)
        found = given.node.meta["val"]
        shapes = [tuple(x.shape) for x in (found if isinstance(found, list | tuple) else [found])]
        outs = [out.expand(shape) for shape in shapes]
        return outs if isinstance(found, list | tuple) else outs[0]

    return rule


def _reducing(walk: "Walk", given: Given) -> Any:
    """Operators along `dim`, which may keep it or not; all axes where none is given."""
    if "other" in given.held:
        return _pointwise(walk, given)
    x = given["self"]
    dims = given.held.get("dim")
    axes = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    axes = [axis % max(x.dim(), 1) for axis in axes]
    out = walk.mixed(x, axes, given.what)
    found = given.node.meta["val"]

    def shaped(y: Tensor) -> Tensor:
        left = out
        if y.dim() < left.dim():
            for axis in sorted(axes, reverse=True):
                left = left.select(axis, 0)
        return left.expand(y.shape)

    return [shaped(y) for y in found] if isinstance(found, list | tuple) else shaped(found)


def _matmul(walk: "Walk", given: Given) -> Any:
    a, b = given["self"], given["mat2"] if "mat2" in given.held else given["other"]
    if a.dim() < 2 or b.dim() < 2:
        raise Unknown("of vectors")
    # what is summed over goes as a whole: a part of it would change the sum
    return _combined(walk, [walk.mixed(a, [-1], given.what), walk.mixed(b, [-2], given.what)], given).expand(
        given.shape
    )


def _einsum(walk: "Walk", given: Given) -> Any:
    inputs, _, output = given["equation"].replace(" ", "").partition("->")
    if "." in inputs or "->" not in given["equation"]:
        raise Unknown("without all of its letters")
    parts = []
    for letters, x in zip(inputs.split(","), given["tensors"], strict=True):
        if len(set(letters)) < len(letters):
            raise Unknown("of a diagonal")
        summed = [i for i, letter in enumerate(letters) if letter not in output]
        x = walk.mixed(x, summed, given.what)
        for i in reversed(summed):
            x = x.select(i, 0)
        left = [letter for letter in letters if letter in output]
        order = sorted(range(len(left)), key=lambda i: output.index(left[i]))
        x = x.permute(order)
        for i, letter in enumerate(output):
            if letter not in left:
                x = x.unsqueeze(i)
        parts.append(x)
    return _combined(walk, parts, given).expand(given.shape)


def _attention(walk: "Walk", given: Given) -> Any:
    q, k, v = given["query"], given["key"], given["value"]
    if q.shape[:-2] != k.shape[:-2]:
        raise Unknown("with fewer keys than heads")
    mask = given["attn_mask"]
    parts = [walk.mixed(q, [-1, -2], given.what), walk.mixed(k, [-1, -2], given.what), walk.mixed(v, [-2], given.what)]
    if mask is not None:
        parts.insert(0, walk.mixed(mask, [a for a in (-1, -2) if mask.dim() >= -a], given.what))
    return _combined(walk, parts, given).expand(given.shape)


def _copying(walk: "Walk", given: Given) -> Any:
    """Written into a tensor, whose numbers are those of everything that looks at it."""
    x, other = given["self"], given["src"]
    walk.join(x, other.expand(x.shape), f"{given.what} writes it over one that stays")
    return x


def _passing(walk: "Walk", given: Given) -> Any:
    return same(FREE, given.shape)


def names(rule: Rule, text: str) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


MOVES: dict[str, Rule] = {
    **names(_same, "alias clone contiguous detach to _to_copy type_as lift_fresh_copy lift_fresh dropout feature_dropout "
             "zeros_like ones_like full_like empty_like rand_like randn_like bernoulli float double half bfloat16 uniform normal"),
    **names(_moving, "permute transpose t mT numpy_T movedim moveaxis swapaxes swapdims squeeze unsqueeze flip roll repeat "
             "repeat_interleave tile pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle rot90 narrow"),
    **names(_shaping, "view reshape _unsafe_view flatten unflatten expand expand_as view_as reshape_as"),
    **names(_chunk, "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split"),
    **names(_glu, "glu"),
    **names(_slice, "slice"),
    **names(_picking, "select unbind"),
    **names(_index, "index index_select"),
    **names(_joined, "cat concat concatenate stack"),
    **names(_pad, "pad constant_pad_nd"),
    **names(_pointwise, "where masked_fill lerp addcmul addcdiv rsub gelu silu mish hardswish rrelu"),
    **names(_reducing, "mean sum amax amin max min std var std_mean var_mean prod norm linalg_vector_norm logsumexp any all "
             "argmax argmin softmax _softmax log_softmax cumsum cumprod sort topk median count_nonzero"),
    **names(_along(1), "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices upsample_nearest1d "
             "upsample_linear1d _upsample_nearest_exact1d reflection_pad1d replication_pad1d"),
    **names(_along(2), "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest2d "
             "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
             "reflection_pad2d replication_pad2d"),
    **names(_along(3), "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices upsample_nearest3d "
             "upsample_trilinear3d _upsample_nearest_exact3d reflection_pad3d replication_pad3d"),
    **names(_matmul, "matmul bmm mm"),
    **names(_einsum, "einsum"),
    **names(_attention, "scaled_dot_product_attention"),
    **names(_copying, "copy"),
    **names(_passing, "new_empty new_zeros new_ones new_full"),
}  # fmt: skip
