"""Building blocks of networks in use: which of their channels can go, and that the module without them is the module with zeros."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateurs.shrink import graph
from secateurs.shrink.proof import prove
from secateurs.shrink.trace import trace


def conv(i, o, k=1, **more):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(o), nn.SiLU())


class Head(nn.Module):
    """A body between a stem and a classifier."""

    def __init__(self, body, inside=8, outside=8):
        super().__init__()
        self.stem, self.body, self.head = conv(3, inside, 3), body, nn.Linear(outside, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class C2f(nn.Module):
    """Half of the channels through bottlenecks, all stages concatenated; the size of a half is an attribute where it is split."""

    def __init__(self, split):
        super().__init__()
        self.c, self.split = 6, split
        self.cv1, self.cv2 = conv(8, 12), conv(6 * 4, 8)
        self.m = nn.ModuleList(nn.Sequential(conv(6, 6, 3), conv(6, 6, 3)) for _ in range(2))

    def forward(self, x):
        y = list(self.cv1(x).split((self.c, self.c), 1)) if self.split else list(self.cv1(x).chunk(2, 1))
        y.extend(y[-1] + m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self):
        super().__init__()
        self.cv1, self.cv2, self.m = conv(8, 4), conv(16, 8), nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Detect(nn.Module):
    """Two levels, a head for boxes as distributions over distances and one for classes; a dict in evaluation, a list in training."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = conv(3, 8, 3, stride=2), conv(8, 12, 3, stride=2)
        self.box = nn.ModuleList(nn.Sequential(conv(c, 10, 3), nn.Conv2d(10, 16, 1)) for c in (8, 12))
        self.cls = nn.ModuleList(
            nn.Sequential(conv(c, c, 3, groups=c), conv(c, 10), nn.Conv2d(10, 5, 1)) for c in (8, 12)
        )
        self.no, self.nc = 21, 5
        self.dfl = nn.Conv2d(4, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(4.0).view(1, 4, 1, 1)

    def forward(self, x):
        a = self.stem(x)
        levels = [a, self.down(a)]
        y = [torch.cat([box(p), cls(p)], 1) for p, box, cls in zip(levels, self.box, self.cls, strict=True)]
        if self.training:
            return y
        box, cls = torch.cat([p.view(p.shape[0], self.no, -1) for p in y], 2).split((16, self.nc), 1)
        b, _, n = box.shape
        box = self.dfl(box.view(b, 4, 4, n).transpose(2, 1).softmax(1)).view(b, 4, n)
        return {"boxes": box, "scores": cls.sigmoid(), "levels": y}


class Coordinates(nn.Module):
    """Coordinate attention."""

    def __init__(self):
        super().__init__()
        self.down, self.h, self.w = conv(8, 4), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        _, _, h, w = x.size()
        y = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)], 2)
        a, b = torch.split(self.down(y), [h, w], 2)
        return x * self.h(a).sigmoid() * self.w(b.permute(0, 1, 3, 2)).sigmoid()


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(conv(4, 6), conv(6, 6, 3, groups=6), conv(6, 4))
        self.after = conv(8, 8)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.b(b)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.after(x)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(conv(8 + 4 * i, 4, 3) for i in range(3))
        self.last = conv(20, 8)

    def forward(self, x):
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.last(torch.cat(found, 1))


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        s = self.up(F.relu(self.down(x.mean((2, 3)))))
        return x * s.sigmoid()[:, :, None, None]


class Norms(nn.Module):
    """Instance norm, group norm of two channels, PReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.i = nn.Conv2d(8, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True)
        self.b, self.g, self.p = nn.Conv2d(6, 8, 1), nn.GroupNorm(4, 8), nn.PReLU(8)
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.c(self.p(self.g(self.b(self.i(self.a(x))))))


class Up(nn.Module):
    """Transposed, pixel shuffle, interpolation, a skip; control flow on shapes."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.more = conv(8, 12, 3, stride=2), nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(4 + 8, 8, 1)

    def forward(self, x):
        y = self.up(self.down(x))
        if y.shape[-2:] != x.shape[-2:]:
            y = F.interpolate(y, size=x.shape[-2:])
        y = F.interpolate(F.pixel_shuffle(self.more(x + y), 2), scale_factor=0.5, mode="bilinear")
        return self.last(torch.cat([y, F.pad(x, (1, 1))[..., 1:-1]], 1))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ConvTranspose3d(6, 4, 2, 2)
        self.c = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.c(self.b(F.max_pool3d(self.n(self.a(x)).relu(), 2)))


class Block(nn.Module):
    """An encoder block with sizes as attributes: heads and neurons can go, the residual's width is under a norm."""

    def __init__(self, kind, width=8, heads=4):
        super().__init__()
        self.kind, self.num_heads, self.head_dim, self.attn_dim = kind, heads, 3, heads * 3
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * self.attn_dim), nn.Linear(self.attn_dim, width)
        self.fc1, self.fc2 = nn.Linear(width, 16), nn.Linear(16, width)
        self.bias, self.scale = nn.Parameter(torch.randn(heads, 1, 1)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        elif self.kind == "einsum":
            y = torch.einsum("bhnm,bhmd->bhnd", (torch.einsum("bhnd,bhmd->bhnm", q, k) + self.bias).softmax(-1), v)
        else:
            y = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5 + self.bias).softmax(-1) @ v
        x = x + self.scale * self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))
        return x + self.fc2(F.dropout(F.gelu(self.fc1(self.norm2(x))), 0.5, self.training))


class ViT(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.patch, self.token, self.place = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 5, 8)),
        )
        self.blocks, self.head = nn.Sequential(Block(kind), Block(kind)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place)[:, 0])


class Gated(nn.Module):
    """A gated linear unit: rows of both halves go together."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x):
        return self.b(F.glu(self.a(x), 1))


class Bias(nn.Module):
    """A table of biases, read by a method that leaves no trace in the graph: its size is an attribute of its own."""

    def __init__(self, heads):
        super().__init__()
        self.num_heads, self.table = heads, nn.Parameter(torch.randn(2, heads))

    def get(self):
        return self.table[torch.tensor([0, 1, 1, 0])].reshape(2, 2, self.num_heads).permute(2, 0, 1)


class Related(nn.Module):
    """Attention of two places, with a bias for each head and pair of places."""

    def __init__(self, heads=4):
        super().__init__()
        self.num_heads, self.bias = heads, Bias(heads)
        self.qkv, self.proj, self.head = nn.Linear(6, 3 * heads * 3), nn.Linear(heads * 3, 6), nn.Linear(6, 2)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) + self.bias.get()).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).reshape(b, n, -1)))


class Recurrent(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.embed, self.rnn, self.last = nn.Embedding(11, 6), make(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, ids):
        return self.last(self.rnn(self.embed(ids))[0])


class Encoder(nn.Module):
    """torch's own layer: neurons and heads can go."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.layer(x))


class Auxiliary(nn.Module):
    """A head that only training has: it reads channels, and its own are not followed in evaluation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = conv(3, 8, 3), conv(8, 6, 3), nn.Linear(6, 3)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))

    def forward(self, x):
        x = self.a(x)
        out = self.head(self.b(x).mean((2, 3)))
        return (out, self.aux(x)) if self.training else out


class Memory(Related):
    """It keeps its table of biases from pass to pass in evaluation, with its gradients and its number of heads."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def train(self, mode=True):
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return super().forward(x)
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.get()
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) + self.kept["bias"]).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).reshape(b, n, -1)))


torch.manual_seed(0)
IMAGE, SMALL = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
# the module, an input, and {group: units}
ALL = {
    "C2f-chunk": (Head(C2f(False)), IMAGE,
                  {"stem.0": 8, "body.cv1.0": 6, "body.m.0.0.0": 6, "body.m.1.0.0": 6, "body.cv2.0": 8}),
    "C2f-split": (Head(C2f(True)), IMAGE,
                  {"stem.0": 8, "body.cv1.0": 6, "body.m.0.0.0": 6, "body.m.1.0.0": 6, "body.cv2.0": 8}),
    "SPPF": (Head(SPPF()), IMAGE, {"stem.0": 8, "body.cv1.0": 4, "body.cv2.0": 8}),
    "detector": (Detect(), IMAGE, {"stem.0": 8, "down.0": 12, "box.0.0.0": 10, "box.1.0.0": 10, "cls.0.1.0": 10, "cls.1.1.0": 10}),
    "coordinate-attention": (Head(Coordinates()), IMAGE, {"stem.0": 8, "body.down.0": 4}),
    "shuffle": (Head(Shuffle()), IMAGE, {"stem.0": 4, "body.b.0.0": 6, "body.after.0": 8}),
    "dense": (Head(Dense()), IMAGE, {"stem.0": 8, "body.layers.0.0": 4, "body.layers.1.0": 4, "body.layers.2.0": 4, "body.last.0": 8}),
    "squeeze": (Head(Squeeze()), IMAGE, {"stem.0": 8, "body.down": 4}),
    "gated": (Head(Gated()), IMAGE, {"stem.0": 8, "body.a": 6, "body.b": 8}),
    "related": (Related(), torch.randn(2, 2, 6), {"qkv": 4, "proj": 6}),
    "norms": (Head(Norms()), IMAGE, {"stem.0": 8, "body.a": 6, "body.b": 4, "body.c": 8}),
    "up": (Head(Up()), IMAGE, {"stem.0": 8, "body.down.0": 12, "body.more": 4, "body.last": 8}),
    "volume": (Volume(), torch.randn(2, 1, 8, 4, 4), {"a": 6, "b": 4}),
    **{f"vit-{kind}": (ViT(kind), SMALL, {f"blocks.{i}.{layer}": n for i in (0, 1) for layer, n in (("qkv", 4), ("fc1", 16))})
       for kind in ("sdpa", "einsum", "matmul")},
    "gru": (Recurrent(nn.GRU), torch.randint(11, (2, 8)), {"embed": 6, "rnn": 5}),
    "lstm": (Recurrent(nn.LSTM), torch.randint(11, (2, 8)), {"embed": 6, "rnn": 5}),
    "encoder": (Encoder(), torch.randn(2, 6, 8), {"layer.linear1": 12, "layer.self_attn": 4}),
    "auxiliary": (Auxiliary(), SMALL, {"a.0": 8, "b.0": 6}),
    "memory": (Memory(), torch.randn(2, 2, 6), {"qkv": 4, "proj": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_these_channels_can_go_and_are_shown_to(name):
    model, x, expected = ALL[name]
    model = copy.deepcopy(model).eval()
    found = prove(model, trace(model, (x,)), (x,))
    assert {g.name: len(g.units) for g in found.groups} == expected, found.fixed
    assert found.proof["modes"] == ["eval", "train"]
    small = copy.deepcopy(model)
    graph.cut(small, found, [int(unit) for group in found.groups for unit in group.units[: len(group.units) // 2]])
    small(x)
    counts = {g.name: -(-len(g.units) // 2) for g in found.groups}
    assert found.parameters(model).at(counts) == sum(p.numel() for p in small.parameters())
    # what is left is a module whose channels can go
    again = trace(small, (x,))
    left = {g.name: len(g.units) for g in again.groups}
    assert sum(left.values()) == sum(counts.values())
    assert found.macs(model).at(counts) == again.macs(small).at(left)
