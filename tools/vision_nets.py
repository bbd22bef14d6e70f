"""Small networks of known shapes, written here: what tools/vision_zoo.py prunes besides those of other packages.

Each follows the structure of the network that it is named after, with few channels. NETWORKS: {name: (builder,
    shape of one input)}.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(i: int, o: int, k: int = 1, s: int = 1, g: int = 1, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), act())


class Body(nn.Module):
    """Stages, a mean over places, a classifier."""

    def __init__(self, *stages: nn.Module, out: int) -> None:
        super().__init__()
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(out, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


class Residual(nn.Module):
    """A bottleneck (ResNet, ResNeXt with groups, MobileNetV2 and V3 with a depthwise convolution), with squeeze and excitation."""

    def __init__(
        self, i: int, o: int, mid: int, s: int = 1, g: int = 1, squeeze: bool = False, linear: bool = False
    ) -> None:
        super().__init__()
        last = nn.Sequential(nn.Conv2d(mid, o, 1, bias=False), nn.BatchNorm2d(o))
        self.a, self.b, self.c = conv(i, mid), conv(mid, mid, 3, s, g), last
        self.squeeze = (
            nn.Sequential(nn.Conv2d(mid, 8, 1), nn.ReLU(), nn.Conv2d(8, mid, 1), nn.Hardsigmoid()) if squeeze else None
        )
        self.linear, self.same = linear, i == o and s == 1
        self.skip = nn.Identity() if self.same or linear else conv(i, o, 1, s)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        if self.squeeze is not None:
            y = y * self.squeeze(y.mean((2, 3), keepdim=True))
        y = self.c(y)
        if self.linear:
            return x + y if self.same else y
        return F.relu(y + self.skip(x))


class Plain(nn.Module):
    """ResNet's block of two 3x3 convolutions."""

    def __init__(self, i: int, o: int, s: int = 1) -> None:
        super().__init__()
        self.a, self.b = conv(i, o, 3, s), conv(o, o, 3, act=nn.Identity)
        self.skip = nn.Identity() if i == o and s == 1 else conv(i, o, 1, s, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + self.skip(x))


class DenseBlock(nn.Module):
    def __init__(self, i: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(i + n * growth), nn.ReLU(), nn.Conv2d(i + n * growth, growth, 3, padding=1))
            for n in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Inception(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.ways = nn.ModuleList([
            conv(i, 16), nn.Sequential(conv(i, 12), conv(12, 16, 3)), nn.Sequential(conv(i, 8), conv(8, 8, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(i, 8)),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way(x) for way in self.ways], 1)


class ShuffleUnit(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.b = nn.Sequential(
            conv(c // 2, c // 2), conv(c // 2, c // 2, 3, g=c // 2, act=nn.Identity), conv(c // 2, c // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        n, c, h, w = x.shape
        return torch.cat([a, self.b(b)], 1).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Fire(nn.Module):
    def __init__(self, i: int, s: int, e: int) -> None:
        super().__init__()
        self.s, self.a, self.b = nn.Conv2d(i, s, 1), nn.Conv2d(s, e, 1), nn.Conv2d(s, e, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.s(x))
        return torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)


class Segment(nn.Module):
    """A backbone, and DeepLab's pyramid of dilated convolutions or FCN's two convolutions."""

    def __init__(self, pyramid: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16, 3, 2), Plain(16, 24, 2), Plain(24, 32))
        self.ways = nn.ModuleList(
            nn.Conv2d(32, 16, 3, padding=d, dilation=d, bias=False) for d in ((1, 2, 4) if pyramid else (1,))
        )
        self.whole = nn.Conv2d(32, 16, 1) if pyramid else None
        self.join, self.last = conv(16 * (len(self.ways) + pyramid), 24), nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, x = x.shape[2:], self.body(x)
        ways = [F.relu(way(x)) for way in self.ways]
        if self.whole is not None:
            ways.append(self.whole(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:]))
        return F.interpolate(self.last(self.join(torch.cat(ways, 1))), size=size, mode="bilinear", align_corners=False)


class UNet(nn.Module):
    def __init__(self, dims: int, transposed: bool, widths: tuple[int, ...] = (12, 24, 32)) -> None:
        super().__init__()
        conv_of, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        norm, self.pool = (nn.BatchNorm2d, nn.MaxPool2d(2)) if dims == 2 else (nn.BatchNorm3d, nn.MaxPool3d(2))

        def double(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(
                *(m for a in (i, o) for m in (conv_of(a, o, 3, padding=1, bias=False), norm(o), nn.ReLU()))
            )

        self.down = nn.ModuleList(double(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(
            up(a, b, 2, 2) if transposed else nn.Upsample(scale_factor=2)
            for a, b in zip(widths[:0:-1], widths[-2::-1], strict=False)
        )
        self.mix = nn.ModuleList(
            double((b if transposed else a) + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=False)
        )
        self.last = conv_of(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for n, stage in enumerate(self.down):
            x = stage(x if n == 0 else self.pool(x))
            kept.append(x)
        for up, mix, skip in zip(self.up, self.mix, kept[-2::-1], strict=False):
            x = mix(torch.cat([up(x), skip], 1))
        return self.last(x)


class SSD(nn.Module):
    """Heads on three levels; boxes and classes of all levels, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            [nn.Sequential(conv(3, 16, 3, 2), conv(16, 24, 3, 2)), conv(24, 32, 3, 2), conv(32, 32, 3, 2)]
        )
        self.box = nn.ModuleList(nn.Conv2d(c, 4 * 4, 3, padding=1) for c in (24, 32, 32))
        self.cls = nn.ModuleList(nn.Conv2d(c, 4 * 5, 3, padding=1) for c in (24, 32, 32))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes, classes = [], []
        for level, box, cls in zip(self.levels, self.box, self.cls, strict=False):
            x = level(x)
            boxes.append(box(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
            classes.append(cls(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 5)))
        return {"boxes": torch.cat(boxes, 1), "scores": torch.cat(classes, 1)}


class RetinaNet(nn.Module):
    """A feature pyramid, and one head for all of its levels."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Sequential(conv(3, 16, 3, 2), Plain(16, 16, 2)), Plain(16, 24, 2), Plain(24, 32, 2)
        self.side = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (16, 24, 32))
        self.out = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.cls = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 9 * 4, 3, padding=1)
        )
        self.box = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, 9 * 4, 3, padding=1),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        b = self.b(a)
        p = [side(y) for side, y in zip(self.side, (a, b, self.c(b)), strict=False)]
        for n in (1, 0):
            p[n] = p[n] + F.interpolate(p[n + 1], size=p[n].shape[2:], mode="nearest")
        p = [out(y) for out, y in zip(self.out, p, strict=False)]
        return [torch.cat([head(y).flatten(2) for y in p], 2) for head in (self.cls, self.box)]


class Bottle(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv(c, c), conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3(nn.Module):
    def __init__(self, i: int, o: int, n: int = 1) -> None:
        super().__init__()
        c = o // 2
        self.cv1, self.cv2, self.cv3 = conv(i, c), conv(i, c), conv(2 * c, o)
        self.m = nn.Sequential(*(Bottle(c) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class C2f(nn.Module):
    """Also C3k2, whose inner blocks are C3s. The size of a half is an attribute where it is split."""

    def __init__(self, i: int, o: int, n: int = 1, c3: bool = False) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = conv(i, 2 * self.c), conv((2 + n) * self.c, o)
        self.m = nn.ModuleList(C3(self.c, self.c, 2) if c3 else Bottle(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = conv(c, c // 2), conv(c * 2, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class C2PSA(nn.Module):
    """Attention over places beside a half of the channels, with a depthwise convolution for positions."""

    def __init__(self, c: int, heads: int = 4) -> None:
        super().__init__()
        self.c, self.num_heads, self.head_dim = c // 2, heads, c // 2 // heads
        self.key_dim, self.scale = self.head_dim // 2, (self.head_dim // 2) ** -0.5
        self.cv1, self.cv2 = conv(c, c), conv(c, c)
        self.qkv = conv(self.c, self.c + 2 * self.key_dim * heads, act=nn.Identity)
        self.proj, self.pe = conv(self.c, self.c, act=nn.Identity), conv(self.c, self.c, 3, g=self.c, act=nn.Identity)
        self.ffn = nn.Sequential(conv(self.c, 2 * self.c), conv(2 * self.c, self.c, act=nn.Identity))

    def attention(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (
            self.qkv(x)
            .view(b, self.num_heads, self.key_dim * 2 + self.head_dim, h * w)
            .split([self.key_dim, self.key_dim, self.head_dim], 2)
        )
        found = ((q.transpose(-2, -1) @ k) * self.scale).softmax(-1)
        y = (v @ found.transpose(-2, -1)).reshape(b, -1, h, w)
        return self.proj(y + self.pe(v.reshape(b, -1, h, w)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), 1)
        b = b + self.attention(b)
        return self.cv2(torch.cat([a, b + self.ffn(b)], 1))


class YOLO(nn.Module):
    """Backbone, top-down and bottom-up necks, and heads: v5's coupled, or v8's and v11's of boxes as distributions and classes."""

    def __init__(self, version: int) -> None:
        super().__init__()
        block = {5: C3, 8: C2f, 11: lambda i, o: C2f(i, o, 1, c3=True)}[version]
        self.stem, self.p3 = (
            nn.Sequential(conv(3, 12, 3, 2), conv(12, 16, 3, 2), block(16, 16)),
            nn.Sequential(conv(16, 24, 3, 2), block(24, 24)),
        )
        last = [C2PSA(32)] if version == 11 else []
        self.p4 = nn.Sequential(conv(24, 32, 3, 2), block(32, 32), SPPF(32), *last)
        self.up, self.td, self.down, self.bu = (
            nn.Upsample(scale_factor=2),
            block(56, 24),
            conv(24, 24, 3, 2),
            block(56, 32),
        )
        self.version, self.bins, self.nc = version, 8, 5
        if version == 5:
            self.detect = nn.ModuleList(nn.Conv2d(c, 3 * (5 + self.nc), 1) for c in (24, 32))
        else:
            self.box = nn.ModuleList(
                nn.Sequential(conv(c, 16, 3), conv(16, 16, 3), nn.Conv2d(16, 4 * self.bins, 1)) for c in (24, 32)
            )
            self.cls = nn.ModuleList(
                nn.Sequential(conv(c, c, 3, g=c), conv(c, 16), nn.Conv2d(16, self.nc, 1)) for c in (24, 32)
            )
            self.dfl = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
            self.dfl.weight.data[:] = torch.arange(float(self.bins)).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor]:
        a = self.p3(self.stem(x))
        b = self.p4(a)
        a = self.td(torch.cat([self.up(b), a], 1))
        levels = [a, self.bu(torch.cat([self.down(a), b], 1))]
        if self.version == 5:
            n = 5 + self.nc
            return [
                d(p).view(len(p), 3, n, *p.shape[2:]).permute(0, 1, 3, 4, 2)
                for d, p in zip(self.detect, levels, strict=False)
            ]
        found = [
            torch.cat([box(p), cls(p)], 1).flatten(2) for p, box, cls in zip(levels, self.box, self.cls, strict=False)
        ]
        box, cls = torch.cat(found, 2).split((4 * self.bins, self.nc), 1)
        b_, _, n = box.shape
        box = self.dfl(box.view(b_, 4, self.bins, n).transpose(2, 1).softmax(1)).view(b_, 4, n)
        return {"boxes": box, "scores": cls.sigmoid()}


class TCN(nn.Module):
    """Causal dilated convolutions with skips."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 24)) -> None:
        super().__init__()
        pairs = list(zip((8, *widths), widths, strict=False))
        self.a = nn.ModuleList(nn.Conv1d(i, o, 3, dilation=2**n) for n, (i, o) in enumerate(pairs))
        self.b = nn.ModuleList(nn.Conv1d(o, o, 3, dilation=2**n) for n, (_, o) in enumerate(pairs))
        self.skip = nn.ModuleList(nn.Conv1d(i, o, 1) if i != o else nn.Identity() for i, o in pairs)
        self.head = nn.Linear(widths[-1], 6)

    def forward(self, x: Tensor) -> Tensor:
        for n, (a, b, skip) in enumerate(zip(self.a, self.b, self.skip, strict=False)):
            left = (2 * 2**n, 0)
            x = F.relu(skip(x) + F.relu(b(F.pad(F.relu(a(F.pad(x, left))), left))))
        return self.head(x[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions, with residuals and skips that are added up."""

    def __init__(self, width: int = 24, count: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, width, 1)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**n) for n in range(count))
        self.res, self.skip = (nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(count)) for _ in range(2))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(width, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), None
        for n, (gated, res, skip) in enumerate(zip(self.gated, self.res, self.skip, strict=False)):
            a, b = gated(F.pad(x, (2**n, 0))).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            total = skip(y) if total is None else total + skip(y)
            x = x + res(y)
        assert total is not None
        return self.last(total)


class Conformer(nn.Module):
    """One block: half feed-forwards, attention, a gated depthwise convolution over time."""

    def __init__(self, width: int = 32, heads: int = 4, own: bool = False) -> None:
        super().__init__()
        self.ff1, self.ff2 = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96), nn.SiLU(), nn.Linear(96, width)) for _ in range(2)
        )
        self.norm, self.heads, self.dim = nn.LayerNorm(width), heads, width // heads
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True) if own else None
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.before = nn.Sequential(nn.LayerNorm(width))
        self.pw1, self.dw, self.bn, self.pw2 = (
            nn.Conv1d(width, 96, 1),
            nn.Conv1d(48, 48, 5, padding=2, groups=48),
            nn.BatchNorm1d(48),
            nn.Conv1d(48, width, 1),
        )
        self.first, self.last = nn.Linear(20, width), nn.Linear(width, 6)

    def attention(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            return self.attn(x, x, x, need_weights=False)[0]
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + 0.5 * self.ff1(x)
        x = x + self.attention(self.norm(x))
        y = F.glu(self.pw1(self.before(x).transpose(1, 2)), 1)
        x = x + self.pw2(F.silu(self.bn(self.dw(y)))).transpose(1, 2)
        return self.last(x + 0.5 * self.ff2(x))


class CRNN(nn.Module):
    """Convolutions over an image, and a GRU or LSTM over its columns."""

    def __init__(self, cell: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(1, 16, 3), nn.MaxPool2d(2), conv(16, 24, 3), nn.MaxPool2d((2, 1)), conv(24, 24, 3)
        )
        self.rnn, self.head = cell(24 * 8, 32, batch_first=True), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.body(x).flatten(1, 2).transpose(1, 2))[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.GRU(12, 32, batch_first=True), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)[0])[0][:, -1])


class Encoder(nn.Module):
    """torch's TransformerEncoder over patches."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.patch, self.pos = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 64, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 96, 0.0, activation="gelu", batch_first=True, norm_first=first)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.body(x + self.pos[:, : x.shape[1]]).mean(1))


def _resnet() -> nn.Module:
    return Body(conv(3, 16, 3), Plain(16, 16), Plain(16, 24, 2), Plain(24, 32, 2), out=32)


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)
    )


_IMAGE, _SMALL = (3, 64, 64), (3, 32, 32)
NETWORKS = {
    "ResNet": (_resnet, _SMALL),
    "ResNeXt": (lambda: Body(conv(3, 16, 3), Residual(16, 32, 24, 2, 4), Residual(32, 32, 24, 1, 4), out=32), _SMALL),
    "SE-ResNet": (lambda: Body(conv(3, 16, 3), Residual(16, 32, 16, 2, squeeze=True), Residual(32, 32, 16, squeeze=True),
        out=32), _SMALL),
    "DenseNet": (lambda: Body(conv(3, 16, 3), DenseBlock(16, 8, 4), conv(48, 24), nn.AvgPool2d(2), DenseBlock(24, 8, 4),
        out=56), _SMALL),
    "GoogLeNet": (lambda: Body(conv(3, 24, 3, 2), Inception(24), nn.MaxPool2d(2), Inception(48), out=48), _SMALL),
    "ShuffleNetV2": (lambda: Body(conv(3, 24, 3, 2), ShuffleUnit(24), conv(24, 32, 3, 2), ShuffleUnit(32), conv(32, 48),
        out=48), _SMALL),
    "SqueezeNet": (lambda: Body(conv(3, 16, 3, 2), Fire(16, 8, 16), nn.MaxPool2d(2), Fire(32, 8, 24), out=48), _SMALL),
    "VGG": (_vgg, _SMALL),
    "MobileNetV2": (lambda: Body(conv(3, 16, 3, 2), Residual(16, 24, 48, 2, 48, linear=True), Residual(24, 24, 72, 1, 72,
        linear=True), conv(24, 64), out=64), _SMALL),
    "MobileNetV3": (lambda: Body(conv(3, 16, 3, 2, act=nn.Hardswish), Residual(16, 24, 48, 2, 48, True, True),
        Residual(24, 24, 72, 1, 72, True, True), out=24), _SMALL),
    "DeepLab": (lambda: Segment(True), _IMAGE),
    "FCN": (lambda: Segment(False), _IMAGE),
    "U-Net 2d": (lambda: UNet(2, True), (1, 32, 32)),
    "U-Net 2d, upsampling": (lambda: UNet(2, False), (1, 32, 32)),
    "U-Net 3d": (lambda: UNet(3, True, (8, 12, 16)), (1, 16, 16, 16)),
    "SSD": (SSD, _IMAGE),
    "RetinaNet": (RetinaNet, _IMAGE),
    "YOLOv5": (lambda: YOLO(5), _IMAGE),
    "YOLOv8": (lambda: YOLO(8), _IMAGE),
    "YOLO11": (lambda: YOLO(11), _IMAGE),
    "TCN": (TCN, (8, 48)),
    "WaveNet": (WaveNet, (4, 48)),
    "Conformer": (Conformer, (24, 20)),
    "Conformer, torch's attention": (lambda: Conformer(own=True), (24, 20)),
    "CRNN, GRU": (lambda: CRNN(nn.GRU), (1, 32, 64)),
    "CRNN, LSTM": (lambda: CRNN(nn.LSTM), (1, 32, 64)),
    "GRU": (Recurrent, (24, 12)),
    "TransformerEncoder": (lambda: Encoder(False), _IMAGE),
    "TransformerEncoder, norm first": (lambda: Encoder(True), _IMAGE),
}  # fmt: skip
