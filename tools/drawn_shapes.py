"""A detector of the shape of YOLO's, trained here on drawn shapes: before a cut, after it, and after recover_module.

    .venv/bin/python tools/drawn_shapes.py [--steps 600] [--recover 300] [--budget macs=0.2x] [--out docs]

Draws discs, squares and triangles on noise, 64 x 64. Trains the network from nothing, cuts it by its own loss on 128 images, trains
what is left with the dense one as teacher, and writes detector.md and detector.png: mAP at IoU 0.5 on 256 other images, and
milliseconds for one image in torch and, where it is installed, ONNX Runtime. Minutes on one core.
"""

import argparse
import copy
import importlib.util
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

import secateurs as sc
from secateurs.base.device import machine
from secateurs.shrink.engines import Stopwatch

SIDE, CLASSES = 64, ("disc", "square", "triangle")
COLORS = ("#e6550d", "#3182bd", "#31a354")
# (images [N, 3, 64, 64], boxes [N, 3, 4] as left, top, right, bottom in pixels, classes [N, 3]; -1 where there is no shape)
Batch = tuple[Tensor, Tensor, Tensor]


def draw(count: int, seed: int) -> Batch:
    """Images of one to three shapes that do not overlap."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    images, boxes, classes = [], torch.zeros(count, 3, 4), torch.full((count, 3), -1)
    for i in range(count):
        picture = Image.new("RGB", (SIDE, SIDE), tuple(pick(0, 90) for _ in range(3)))
        pen = ImageDraw.Draw(picture)
        placed: list[tuple[int, int, int, int]] = []
        for _ in range(pick(1, 4)):
            size = pick(10, 30)
            left, top = pick(1, SIDE - size - 1), pick(1, SIDE - size - 1)
            box = (left, top, left + size, top + size)
            if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in placed):
                continue
            kind, color = pick(0, 3), tuple(pick(110, 256) for _ in range(3))
            if kind == 0:
                pen.ellipse(box, fill=color)
            elif kind == 1:
                pen.rectangle(box, fill=color)
            else:
                pen.polygon([(left, box[3]), (box[2], box[3]), (left + size // 2, top)], fill=color)
            boxes[i, len(placed)], classes[i, len(placed)] = torch.tensor(box).float(), kind
            placed.append(box)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1)
        images.append(pixels.float() / 127.5 - 1 + 0.15 * torch.randn(3, SIDE, SIDE, generator=generator))
    return torch.stack(images), boxes, classes


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class C2f(nn.Module):
    """Splits its channels, sends one half through two residual blocks and joins all."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = conv(inputs, outputs, 1), conv(outputs + half, outputs, 1)
        self.block = nn.Sequential(conv(half, half), conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, b + self.block(b)], 1))


class Pyramid(nn.Module):
    """Pools three times over 5 x 5 places and joins what it saw (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = conv(width, width // 2, 1), conv(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], 5, 1, 2))
        return self.last(torch.cat(found, 1))


class Head(nn.Module):
    """Scores and boxes of a level, each from a branch of its own."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.scores = nn.Sequential(conv(inputs, width), nn.Conv2d(width, len(CLASSES), 1))
        self.boxes = nn.Sequential(conv(inputs, width), nn.Conv2d(width, 4, 1))
        nn.init.constant_(self.scores[1].bias, -4.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x).flatten(2), (F.softplus(self.boxes(x)) * self.stride).flatten(2)


class Detector(nn.Module):
    """[N, 3, 64, 64] -> {"scores": [N, 3, 320], "sides": [N, 4, 320]}.

    Logits, and pixels from a cell's centre to the sides of a box; cells of 4 pixels first, then of 8.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(conv(3, w, 3, 2), conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w))
        self.deep = nn.Sequential(conv(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w), Pyramid(4 * w))
        self.joined = C2f(6 * w, 2 * w)
        self.fine, self.coarse = Head(2 * w, 2 * w, 4), Head(4 * w, 2 * w, 8)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        low = self.stem(images)
        high = self.deep(low)
        low = self.joined(torch.cat([low, F.interpolate(high, scale_factor=2.0)], 1))
        levels = [self.fine(low), self.coarse(high)]
        scores, sides = (torch.cat(parts, 2) for parts in zip(*levels, strict=True))
        return {"scores": scores, "sides": sides}


def centres() -> Tensor:
    """[320, 2]: x and y of each cell's centre, in pixels."""
    found = []
    for stride in (4, 8):
        at = (torch.arange(SIDE // stride) + 0.5) * stride
        y, x = torch.meshgrid(at, at, indexing="ij")
        found.append(torch.stack([x.flatten(), y.flatten()], 1))
    return torch.cat(found)


STRIDES = torch.cat([torch.full((256,), 4.0), torch.full((64,), 8.0)])


def boxes_of(sides: Tensor) -> Tensor:
    """Sides [N, 4, cells] as boxes [N, cells, 4]."""
    at = centres()
    left, top, right, bottom = sides.unbind(1)
    return torch.stack([at[:, 0] - left, at[:, 1] - top, at[:, 0] + right, at[:, 1] + bottom], 2)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes, by broadcasting."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-9)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Focal loss of the scores and 1 - IoU of the boxes, over the cells whose centre lies within a cell of a shape's: small shapes
    (below 20 pixels) belong to small cells.
    """
    images, boxes, classes = batch
    out = model(images)
    at = centres()
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    near = ((at[None, None] - middle[:, :, None]).abs() <= STRIDES[:, None]).all(-1)
    small = (boxes[..., 2] - boxes[..., 0]) < 20
    mine = near & (classes >= 0)[..., None] & (small[..., None] == (STRIDES == 4))
    taken, which = mine.any(1), mine.float().argmax(1)
    target = torch.zeros_like(out["scores"])
    kinds = classes.gather(1, which)
    n, cell = taken.nonzero(as_tuple=True)
    target[n, kinds[n, cell], cell] = 1
    chance = out["scores"].sigmoid()
    miss = (chance - target).abs().square()
    of_scores = (F.binary_cross_entropy_with_logits(out["scores"], target, reduction="none") * miss).sum()
    wanted = boxes[n, which[n, cell]]
    of_boxes = (1 - overlap(boxes_of(out["sides"])[n, cell], wanted)).sum()
    found: Tensor = (of_scores + of_boxes) / taken.sum().clamp(min=1)
    return found


def detect(model: nn.Module, images: Tensor, least: float = 0.05) -> list[list[tuple[float, int, Tensor]]]:
    """(score, class, box) of what is found in each image, the best first, without those that overlap a better one by half."""
    with torch.no_grad():
        out = model(images)
    found = []
    for scores, boxes in zip(out["scores"].sigmoid(), boxes_of(out["sides"]), strict=True):
        best, kinds = scores.max(0)
        kept: list[tuple[float, int, Tensor]] = []
        for cell in best.argsort(descending=True)[:40].tolist():
            if best[cell] < least or len(kept) == 10:
                break
            if all(float(overlap(boxes[cell], box)) < 0.5 for _, _, box in kept):
                kept.append((float(best[cell]), int(kinds[cell]), boxes[cell]))
        found.append(kept)
    return found


def precision(model: nn.Module, batch: Batch) -> float:
    """mAP at IoU 0.5: the area under precision over recall (each precision the best at that recall or more), mean over classes."""
    images, boxes, classes = batch
    found = [one for part in images.split(64) for one in detect(model, part)]
    areas = []
    for kind in range(len(CLASSES)):
        ranked = sorted(((s, i, b) for i, one in enumerate(found) for s, k, b in one if k == kind), key=lambda x: -x[0])
        open_ = {(i, j) for i in range(len(images)) for j in range(3) if classes[i, j] == kind}
        count = len(open_)
        hits = []
        for _, i, box in ranked:
            near = [(float(overlap(box, boxes[i, j])), j) for j in range(3) if (i, j) in open_]
            best = max(near, default=(0.0, -1))
            hits.append(best[0] >= 0.5)
            if hits[-1]:
                open_.discard((i, best[1]))
        hit = torch.tensor(hits).double()
        sharp = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
        best_from_here = sharp.flip(0).cummax(0).values.flip(0) if len(hit) else sharp
        areas.append(float((best_from_here * hit).sum() / max(1, count)))
    return sum(areas) / len(areas)


def train(model: nn.Module, steps: int, seed: int = 0, rate: float = 2e-3) -> nn.Module:
    """AdamW with a one-cycle rate on new images in each step, 32 at a time."""
    pool = [draw(32, 1000 * (seed + 1) + i) for i in range(min(steps, 100))]
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for step in range(steps):
        images, boxes, classes = pool[step % len(pool)]
        value = loss(model, (images, boxes, classes))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def picture(models: dict[str, nn.Module], batch: Batch, file: Path, scale: int = 3) -> None:
    """A row of images for each model, with the boxes that it finds at a score of 0.3 and more."""
    images, edge = batch[0], SIDE * scale + 4
    sheet = Image.new("RGB", (edge * len(images), (edge + 14) * len(models)), "white")
    for row, (name, model) in enumerate(models.items()):
        ImageDraw.Draw(sheet).text((4, row * (edge + 14)), name, fill="black")
        for column, (image, found) in enumerate(zip(images, detect(model, images, 0.3), strict=True)):
            pixels = ((image.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().numpy()
            tile = Image.fromarray(pixels).resize((SIDE * scale, SIDE * scale), Image.Resampling.NEAREST)
            pen = ImageDraw.Draw(tile)
            for score, kind, box in found:
                at = [max(0.0, min(SIDE * scale - 1.0, x * scale)) for x in box.tolist()]
                if at[0] < at[2] and at[1] < at[3]:
                    pen.rectangle(at, outline=COLORS[kind], width=2)
                    pen.text((at[0] + 3, at[1] + 1), f"{CLASSES[kind]} {score:.2f}", fill="white")
            sheet.paste(tile, (column * edge, row * (edge + 14) + 14))
    sheet.save(file)


def rows(models: dict[str, nn.Module], test: Batch, report: dict) -> list[str]:
    dense = models["dense"]
    example = (test[0][:1],)
    engines = ["torch", *(["onnxruntime"] if importlib.util.find_spec("onnxruntime") else [])]
    watches = {engine: Stopwatch(dense, example, engine) for engine in engines}
    out = [
        "| | parameters | multiplications | mAP at IoU 0.5 | " + " | ".join(f"ms, {e}" for e in engines) + " |",
        "|---" * (4 + len(engines)) + "|",
    ]
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        macs = report["macs"]["dense" if model is dense else "left"]
        cells = []
        for watch in watches.values():
            _, seconds, ratio = watch.against(model, 3.0)
            cells.append(f"{1000 * seconds:.2f} ({ratio:.2f}x)")
        out.append(f"| {name} | {count:,} | {macs / 1e6:.1f}M | {precision(model, test):.3f} | {' | '.join(cells)} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--recover", type=int, default=300)
    parser.add_argument("--budget", default="macs=0.2x")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    dense = train(Detector(), arguments.steps)
    seconds = {"train": time.perf_counter() - began}
    calibration = [draw(16, 7000 + i) for i in range(8)]
    cut, report = sc.shrink_module(
        dense, calibration, arguments.budget, loss=loss, inputs=lambda batch: batch[:1], multiple=4
    )
    seconds["cut"] = report["seconds"]
    recovered = copy.deepcopy(cut)
    pool = [draw(32, 9000 + i) for i in range(50)]
    told = sc.recover_module(recovered, dense, pool, arguments.recover, rate=1e-3, loss=loss, inputs=lambda b: b[:1])
    seconds["recover"] = told["seconds"]
    test = draw(256, 1)
    models = {"dense": dense, f"cut, {arguments.budget}": cut, f"and {arguments.recover} steps after": recovered}
    table = rows(models, test, report)
    picture(models, tuple(x[:5] for x in draw(32, 2)), arguments.out / "detector.png")
    norms = report["batch_norms"]
    here = machine()
    asked = f"--steps {arguments.steps} --recover {arguments.recover} --budget {arguments.budget}"
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    text = f"""# A detector, cut

Written by `tools/drawn_shapes.py {asked}` on {here["processor"]} ({here["isa"]}), threads: {torch.get_num_threads()}.
[Guide 4](guide/04-smaller-not-sparser.md) has the calls.

The network has what YOLO's have: C2f blocks (split, residual, joined), a pooling pyramid, two levels, heads with a branch for
scores and one for boxes. It is trained here from nothing on drawn discs, squares and triangles, cut by its own loss on 128 images,
and trained a little more with the dense one as teacher. mAP is of 256 other images. Milliseconds are medians for one image; in
brackets the median ratio to the dense one, which ran in turn. With one thread they are those of the thread on its CPU.

{chr(10).join(table)}

Batch norms: {norms["count"]}, which took new statistics by a share of {norms["share"]:g}. Seconds: {took}.

![What each finds: boxes with class and score](detector.png)
"""
    (arguments.out / "detector.md").write_text(text)
    print("\n".join(table))


if __name__ == "__main__":
    main()
