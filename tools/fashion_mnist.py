"""Fashion-MNIST (MIT, Xiao et al. 2017) from Debian's package dataset-fashion-mnist, and a small net that is trained on it here."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load(part: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """part: 'train' or 't10k' -> images [N, 1, 28, 28] with mean 0 and deviation 1, labels [N]."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; apt-get install dataset-fashion-mnist")
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    x = torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).copy()).reshape(-1, 1, 28, 28).float() / 255
    return (x - 0.286) / 0.353, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).copy()).long()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(self.second(F.relu(self.norm(self.first(x))))))


class Net(nn.Module):
    """A residual net of 0.3 million parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.low = Residual(width)
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.high = Residual(2 * width)
        self.hidden, self.out = nn.Linear(2 * width * 9, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.high(self.down(self.low(self.stem(x)))), 3)
        return self.out(F.relu(self.hidden(torch.flatten(x, 1))))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float = 2e-3, seed: int = 0) -> None:
    """Adam with a one-cycle rate, batches of 128, cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for part in order.split(128)[: len(x) // 128]:
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())
