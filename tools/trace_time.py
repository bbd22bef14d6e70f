"""Times the analysis of deep networks: which channels go together (trace) and that they can go (prove).

    OMP_NUM_THREADS=1 python tools/trace_time.py [--profile]

Seconds of the process's CPU and of the wall. With one thread, other work on the machine adds little to the former; threads that
wait for others spin, and count. The networks: ResNet-152 and ResNet-200 as they were published (64 to 2048 channels), on images of
64 x 64, and narrow ones of an eighth of their channels.
"""

import argparse
import cProfile
import itertools
import pstats
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.shrink.proof import prove
from secateurs.shrink.trace import trace

DEPTHS = {"ResNet-152": (3, 8, 36, 3), "ResNet-200": (3, 24, 36, 3)}


class Bottleneck(nn.Module):
    def __init__(self, i: int, mid: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Sequential(nn.Conv2d(x, y, k, s, k // 2, bias=False), nn.BatchNorm2d(y))
            for x, y, k, s in ((i, mid, 1, 1), (mid, mid, 3, stride), (mid, o, 1, 1))
        )
        same = i == o and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))) + self.skip(x))


def resnet(depths: tuple[int, ...], width: int) -> nn.Module:
    stages: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    last = width
    for stage, depth in enumerate(depths):
        mid = width * 2**stage
        for block in range(depth):
            stages.append(Bottleneck(last, mid, 4 * mid, 2 if stage and not block else 1))
            last = 4 * mid
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10)).eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest")
    given = parser.parse_args()
    x = torch.randn(2, 3, 64, 64)
    for name, depths in DEPTHS.items():
        for width in (8, 64):
            model = resnet(depths, width)
            layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
            profile = cProfile.Profile()
            if given.profile:
                profile.enable()
            times = [(time.process_time(), time.perf_counter())]
            found = trace(model, (x,))
            times.append((time.process_time(), time.perf_counter()))
            groups = prove(model, found, (x,)).groups
            times.append((time.process_time(), time.perf_counter()))
            profile.disable()
            cpu, wall = ([b[i] - a[i] for a, b in itertools.pairwise(times)] for i in (0, 1))
            size = sum(p.numel() for p in model.parameters())
            print(
                f"{name}, {width} channels first: {layers} layers, {size / 1e6:.1f}M parameters, {len(groups)} groups: CPU "
                f"{sum(cpu):.1f} s (trace {cpu[0]:.1f}, prove {cpu[1]:.1f}), wall {sum(wall):.1f} s",
                flush=True,
            )
            if given.profile:
                pstats.Stats(profile).sort_stats("cumulative").print_stats(40)
    return 0


if __name__ == "__main__":
    sys.exit(main())
