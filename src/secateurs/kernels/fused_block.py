"""Blocks of decoders that are computed for one token in one call of csrc/block.cc, or the attention of a block alone.

Where each norm, rotation and copy of the cache is a call of its own, a token of a small model takes as long between the products as
in them. fuse() changes a module's class, so that one token of one sequence takes the short way where all is as _Parts expects it;
everything else runs the class's own forward. That both compute the same is for the caller to prove (pack/decoding.py).
"""

import copy
import ctypes
import functools
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import DeviceError
from secateurs.kernels.dispatch import CODES, call_of, wants_gradient
from secateurs.kernels.formats import DTYPES
from secateurs.kernels.library import Block, Product, Products, library
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear

# the modules of a block, by the names that transformers gives them: its norms before and after attention, before and after the MLP
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
# what does nothing in evaluation
_IDLE = ("resid_attn_dropout", "resid_mlp_dropout")
_QKV = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)
_GATE_UP = ("gate_proj", "up_proj"), ("gate_up_proj",)
_OF_HEADS = ("q_norm", "k_norm")
_ACT = ("act_fn", "activation_fn")
# what csrc/secateurs.h calls activations
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    functools.partial(nn.functional.gelu, approximate="tanh"),
)
# arguments of a block that are looked at, and those that change nothing for one token
_KNOWN = {"attention_mask", "past_key_values", "position_embeddings"} | {"position_ids", "use_cache", "cache_position"}
_FP32 = CODES[torch.float32]


class Fused(nn.Module):
    """What goes before a class. Its state is found again by a copy."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # a compiler sees the class's own code
        if not (args or self.training or torch.compiler.is_compiling()):
            decoded = _decode(self, hidden_states, kwargs)
            if decoded is not None:
                return self.given(decoded)
            _forget(self, kwargs.get("past_key_values"))
        return super().forward(hidden_states, *args, **kwargs)

    def given(self, decoded: Tensor) -> Any:
        """What the class's own forward returns; a block's is one tensor."""
        return decoded

    def __reduce_ex__(self, _: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != "parts"}
        return _again, (type(self).__bases__[0], plain_class(self)), state


class FusedBlock(Fused):
    """What goes before a block's class."""


class FusedAttention(Fused):
    """What goes before the class of a block's attention; its weights of places are not made, as `sdpa` does not make them."""

    def given(self, decoded: Tensor) -> Any:
        return decoded, None


def _again(front: Any, cls: Any) -> nn.Module:
    """A module of that class, fused, without state."""
    fused = _fused_class(front, cls)
    return fused.__new__(fused)


@functools.cache
def _fused_class(front: Any, cls: Any) -> type[nn.Module]:
    # by the same name, by which transformers knows what not to split
    return type(cls.__name__, (front, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a fused module had."""
    return type(module).__bases__[1]


def fuse(module: nn.Module) -> None:
    """Let a block, or the attention of one, take one call for one token, where it can."""
    plain: Any = type(module)
    for part in module.modules():
        _forwards.setdefault(type(part), type(part).forward)
    module.__class__ = _fused_class(FusedAttention if _attention_of(module) is module else FusedBlock, plain)


def separate(module: nn.Module) -> None:
    """Undo fuse()."""
    module.__class__ = plain_class(module)
    module.__dict__.pop("parts", None)


def fusible(model: nn.Module, whole: bool = True) -> list[nn.Module]:
    """The blocks that have the modules of one that fuse() may speed up, and of other blocks the attention; with whole=False the
    attention of all.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        attention = module._modules.get("self_attn")
        if attention is None or not any(_has(attention, (*qkv, "o_proj"), _OF_HEADS) for qkv in _QKV):
            continue
        found.append(module if whole and _whole(module) else attention)
    return found


def _whole(block: nn.Module) -> bool:
    mlp = block._modules.get("mlp")
    norms = any(_has(block, ("self_attn", "mlp", *filter(None, names)), _IDLE) for names in _NORMS)
    return norms and mlp is not None and any(_has(mlp, (*gate_up, "down_proj"), _ACT) for gate_up in _GATE_UP)


def _has(module: nn.Module, needed: tuple[str, ...], allowed: tuple[str, ...]) -> bool:
    """True if a module has the modules `needed`, perhaps those `allowed`, and neither others nor tensors of its own."""
    here = {name for name, child in module._modules.items() if child is not None}
    return set(needed) <= here <= {*needed, *allowed} and not module._parameters and not module._buffers


def _attention_of(module: Any) -> Any:
    """That of a block, or the module itself."""
    return module._modules.get("self_attn", module)


def _those(module: Any, choices: tuple[tuple[str, ...], ...]) -> list[Any]:
    """The modules that it has of one of the choices."""
    names = next(names for names in choices if names[0] in module._modules)
    return [module._modules[name] for name in names]


def _norms(module: Any) -> list[Any]:
    """The norms of a block before and after attention, before and after the MLP, and those of heads; None where there is none."""
    found = module._modules
    names = next(
        (n for n in _NORMS if {*filter(None, n)} == {name for name in found if name.endswith("norm")}), (None,) * 4
    )
    of_heads = map(_attention_of(module)._modules.get, _OF_HEADS)
    return [*(None if name is None else found[name] for name in names), *of_heads]


# of each class of a part when it was first met
_forwards: "weakref.WeakKeyDictionary[type[nn.Module], Any]" = weakref.WeakKeyDictionary()


class _Unfit(Exception):
    """A block that has another form than csrc/block.cc computes."""


class _Parts:
    """What csrc/block.cc takes of a block, for hidden states of one dtype, and whether it is still so.

    fits: False for a block of another form, which need not be looked at again while it is still so.
    """

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        self.taken = 0
        self.dtype = dtype
        # what must stay as it is: the modules and tensors, where these lie, and that no part has hooks or another forward
        modules = [m for m in block.modules() if m is not block]
        self.attributes = [m.__dict__ for m in modules]
        classes: list[type[nn.Module]] = [type(m) for m in modules]
        self.forwards = [(cls, _forwards.setdefault(cls, cls.forward)) for cls in classes]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.held = [of for m in (block, *modules) for of in (m._modules, m._parameters, m._buffers)]
        self.there = [x for of in self.held for x in of.values()]
        self.tensors = [x for x in self.there if isinstance(x, Tensor)]
        # an inference tensor has no version: nobody may write to it outside of inference
        self.counted = [x for x in self.tensors if not x.is_inference()]
        self.said = _said(block)
        self.numbers = [of.get(name) for of, name in self.said]
        self.state = self._state()
        self.kept: list[Any] = []
        try:
            self._fill(block)
            self.fits = True
        # a part may raise anything for what it does not expect; the class's own forward is always right
        except Exception:
            self.fits = False

    def _fill(self, block: Any) -> None:
        """Make what the library is given. Raises _Unfit."""
        attention, mlp, dtype = _attention_of(block), block._modules.get("mlp"), self.dtype
        if dtype not in CODES or not all(t.is_contiguous() for t in self.tensors):
            raise _Unfit
        # some blocks of a class may turn nothing
        self.turns = bool(getattr(attention, "use_rope", True))
        self.dim, self.layer = int(attention.head_dim), int(attention.layer_idx)
        qkv, out = _those(attention, _QKV), attention.o_proj
        gate_up, down = ([], None) if mlp is None else (_those(mlp, _GATE_UP), mlp.down_proj)
        self.width, q = int(out.out_features), int(out.in_features)
        kv = (sum(p.out_features for p in qkv) - q) // 2
        inner = 0 if down is None else int(down.in_features)
        heads, self.kv_heads = q // self.dim, kv // self.dim
        norms = _norms(block)
        together = norms[4] is not None and norms[4].weight.shape == (q,)
        shapes = [(p.in_features, p.out_features) for p in (*qkv, *gate_up)]
        wanted = [(self.width, n) for n in ((q, kv, kv) if len(qkv) == 3 else (q + 2 * kv,))]
        wanted += [(self.width, 2 * inner // len(gate_up)) for _ in gate_up]
        # one with modules of its own computes its weights
        if any(norm is not None and norm._modules for norm in norms) or (norms[4] is None) != (norms[5] is None):
            raise _Unfit
        widths = [self.width] * 4 + ([q, kv] if together else [self.dim, self.dim])
        there = [(norm, n) for norm, n in zip(norms, widths, strict=True) if norm is not None]
        plus = {_plus(norm, n, dtype) for norm, n in there} or {0.0}
        of_block, of_heads = (
            {_eps(norm) for norm in some if norm is not None} or {0.0} for some in (norms[:4], norms[4:])
        )
        if (
            shapes != wanted
            or (down is not None and down.out_features != self.width)
            or (heads * self.dim, self.kv_heads * self.dim) != (q, kv)
            or heads % self.kv_heads
            or max(map(len, (of_block, of_heads, plus))) > 1
        ):
            raise _Unfit
        activation = 0 if mlp is None else _activation(next(getattr(mlp, name) for name in _ACT if hasattr(mlp, name)))
        struct = Block(
            CODES[dtype], activation, self.width, heads, self.kv_heads, self.dim, inner, float(attention.scaling),
            float(getattr(block, "residual_multiplier", 1)), of_block.pop(), of_heads.pop(), plus.pop(), together,
            *(None if norm is None else norm.weight.data_ptr() for norm in norms),
        )  # fmt: skip
        self._products(struct.qkv, qkv)
        self._products(struct.out, [out])
        self._products(struct.gate_up, gate_up)
        self._products(struct.down, [] if down is None else [down])
        self.struct, self.address = struct, ctypes.addressof(struct)

    def _state(self) -> list[int]:
        return [t.data_ptr() for t in self.tensors] + [t._version for t in self.counted]

    def still(self, dtype: torch.dtype) -> bool:
        """True if no module, tensor or number was replaced or written to."""
        now = [x for of in self.held for x in of.values()]
        same = len(now) == len(self.there) and all(map(operator.is_, now, self.there))
        same = same and dtype == self.dtype and self._state() == self.state
        return same and [of.get(name) for of, name in self.said] == self.numbers

    def watched(self) -> bool:
        """True if a hook wants to see a part, or a part or its class was given another forward."""
        others = any(cls.forward is not own for cls, own in self.forwards)
        return others or any(self.hooks) or any("forward" in of for of in self.attributes)

    def _products(self, to: Any, layers: list[Any]) -> None:
        """Fill calls of one kernel each, with layers that share one as they do in their own forward."""
        filled, left = 0, list(layers)
        while left:
            group = left[0].__dict__.get("group") if isinstance(left[0], PackedLinear) else None
            together = [left[0]] if group is None else group.layers
            if together != left[: len(together)]:
                together = [left[0]]
            left = left[len(together) :]
            parts: Any
            layouts: Any
            if all(type(layer) is PackedLinear for layer in together):
                parts, layouts = PackedLinear.given(together)
            elif type(together[0]) is DenseLinear and together[0].weight.dtype in DTYPES:
                parts, layouts = together[0].given()
            else:
                raise _Unfit
            call = call_of(parts, layouts, self.dtype)
            if call.packed[0].dtype != self.dtype:
                raise _Unfit
            # integers take x as it is
            code = CODES[self.dtype] if call.packed[0].grid is None else _FP32
            kernel = call.ready(1)
            products = (Product * len(together))()
            for product, made in zip(products, call.products, strict=True):
                product.weight = made.weight
            biases = (ctypes.c_void_p * len(together))(*(made.bias for made in call.products))
            self.kept += [call, products, biases]
            to[filled] = Products(products, biases, len(together), kernel, code, call.width)
            filled += 1


def _said(block: Any) -> list[tuple[dict[str, Any], str]]:
    """Where a block says, beside modules and tensors, what csrc/block.cc is told: attributes of its parts, and their names."""
    attention, mlp = _attention_of(block), block._modules.get("mlp")
    found = [(attention, name) for name in ("layer_idx", "head_dim", "scaling", "use_rope")]
    found += [(norm, name) for norm in _norms(block) if norm is not None for name in ("variance_epsilon", "eps")]
    found += [(mlp, name) for name in _ACT if mlp is not None]
    return [(of.__dict__, name) for of, name in (*found, (block, "residual_multiplier"))]


def _eps(norm: Any) -> float:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(found, float):
        raise _Unfit
    return found


def _plus(norm: Any, n: int, dtype: torch.dtype) -> float:
    """What a norm adds to its weights before it multiplies with them: Gemma's 1, or 0."""
    weight: Tensor = norm.weight
    with torch.no_grad():
        of_ones = copy.deepcopy(norm).float()(torch.ones(1, 1, n)).flatten()
    added = of_ones * (1 + _eps(norm)) ** 0.5 - weight.float()
    found = round(float(added[0]))
    if (
        weight.shape != (n,)
        or weight.dtype != dtype
        or not torch.allclose(added, torch.tensor(float(found)), atol=1e-3)
    ):
        raise _Unfit
    return float(found)


def _activation(act: Callable[[Tensor], Tensor]) -> int:
    """The number of an activation, by what it computes."""
    x = torch.linspace(-8, 8, 129)
    for code, known in enumerate(ACTIVATIONS):
        if torch.allclose(act(x), known(x), rtol=1e-5, atol=1e-6):
            return code
    raise _Unfit


# ------------------------------------------------------------------------------------------------------------------ cache


class _Room:
    """A cache layer's keys and values in tensors with room behind them, in which a new token is written where it belongs.

    keys, values: what the cache layer then holds, views of these tensors. A layer that holds others was changed by someone else.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        _, heads, tokens, dim = keys.shape
        self.room = tokens + max(64, tokens // 4)
        self.all = keys.new_empty(2, 1, heads, self.room, dim)
        self.all[0, :, :, :tokens] = keys
        self.all[1, :, :, :tokens] = values
        self.addresses = self.all[0].data_ptr(), self.all[1].data_ptr()
        self.keys, self.values = keys, values

    def grow(self, tokens: int) -> None:
        self.keys, self.values = self.all.narrow(3, 0, tokens).unbind(0)


# a copy of a cache layer has none, so two never write to one place
_rooms: "weakref.WeakKeyDictionary[Any, _Room]" = weakref.WeakKeyDictionary()


# ----------------------------------------------------------------------------------------------------------------- a token


def taken(block: nn.Module) -> int:
    """How many tokens a block computed in one call each, since its parts last changed."""
    parts: _Parts | None = block.__dict__.get("parts")
    return 0 if parts is None else parts.taken


def _decode(block: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """What a block makes of one token, or None where that is for its own forward."""
    cache, turns = given.get("past_key_values"), given.get("position_embeddings")
    if hidden.numel() != hidden.shape[-1] or cache is None or given.get("attention_mask") is not None:
        return None
    # other kinds of attention may be anyone's, and other caches may keep something else than they are given
    config = getattr(_attention_of(block), "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or type(cache) is not _kinds()[0]:
        return None
    if not isinstance(turns, tuple) or any(
        v is not None and v is not False for k, v in given.items() if k not in _KNOWN
    ):
        return None
    parts: _Parts | None = block.__dict__.get("parts")
    if parts is None or not parts.still(hidden.dtype):
        parts = block.__dict__["parts"] = _Parts(block, hidden.dtype)
    if not parts.fits or parts.watched():
        return None
    cos, sin = turns
    layer = _layer_of(cache, parts.layer)
    if layer is None or hidden.shape[-1] != parts.width or hidden.device.type != "cpu":
        return None
    if wants_gradient(hidden, *parts.tensors, layer.keys, layer.values):
        return None
    keys: Tensor = layer.keys
    heads, dim, tokens = parts.kv_heads, parts.dim, keys.shape[2]
    if keys.shape[0] != 1 or keys.shape[1] != heads or keys.shape[3] != dim or layer.values.shape != keys.shape:
        return None
    rotated = cos.numel() if parts.turns else 0
    if cos.dtype != sin.dtype or cos.dtype not in CODES or not keys.dtype == layer.values.dtype == hidden.dtype:
        return None
    if cos.numel() != cos.shape[-1] or sin.numel() != cos.numel() or rotated > dim or rotated % 2:
        return None
    if not (cos.is_contiguous() and sin.is_contiguous() and hidden.is_contiguous()):
        return None
    room = _rooms.get(layer)
    if room is None or room.keys is not keys or room.values is not layer.values or tokens == room.room:
        room = _rooms[layer] = _Room(keys, layer.values)
    made = torch.empty_like(hidden)
    wrong = library().secateurs_decode(
        parts.address, hidden.data_ptr(), made.data_ptr(), cos.data_ptr(), sin.data_ptr(), CODES[cos.dtype], rotated,
        *room.addresses, room.room, tokens, torch.get_num_threads(),
    )  # fmt: skip
    if wrong:
        raise DeviceError(f"a block of {parts.width} inputs was refused: code {wrong} of csrc/secateurs.h")
    room.grow(tokens + 1)
    layer.keys, layer.values = room.keys, room.values
    if layer.is_sliding:
        layer.cumulative_length += 1
    parts.taken += 1
    return made


def _forget(block: Any, cache: Any) -> None:
    """Let go of the room of a block's cache layer, whose keys the block's own forward copies elsewhere."""
    layers, index = getattr(cache, "layers", ()), getattr(_attention_of(block), "layer_idx", None)
    if isinstance(index, int) and index < len(layers):
        _rooms.pop(layers[index], None)


@functools.cache
def _kinds() -> tuple[Any, Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def _layer_of(cache: Any, index: int) -> Any:
    """The cache's layer of a block if it holds tokens and will only grow by one, else None."""
    layers = getattr(cache, "layers", ())
    layer: Any = layers[index] if index < len(layers) else None
    _, grows, slides = _kinds()
    if type(layer) is slides:
        # from its window on it lets go of the oldest token
        inside = layer.is_initialized and layer.keys.shape[-2] == layer.cumulative_length < layer.sliding_window - 1
        return layer if inside and not layer.record_past else None
    return layer if type(layer) is grows and layer.is_initialized and layer.keys.dim() == 4 else None
