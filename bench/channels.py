"""Channels of convolutions: one-shot, with and without least squares, beside Torch-Pruning at equal multiplications.

    .venv/bin/python bench/channels.py [--flops 0.75,0.5] [--only efficientnet|fashion]
    .venv/bin/python bench/channels.py --latency 0.7 [--engine onnxruntime]

EfficientNet-Lite0, calibrated on 256 crops of four photographs, measured on 256 crops of four others: how often the most likely
class is the dense net's, and KL to it. A residual net trained here for 3 epochs on Fashion-MNIST, calibrated on 2,048 training
images, accuracy on the 10,000 test images. Latency: batch 1, in turn with the dense net, median ratio. Torch-Pruning's rows need
`pip install torch-pruning==1.6.1`, and are left out by name without it. Nothing is trained after pruning.

--latency: EfficientNet-Lite0 under a budget of time, calibrated on 32 crops: what was predicted, and five measurements of what was
made, each with sessions of its own, in turn with the dense net's.
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
import time
from functools import partial

import torch
from methods import ROOT
from torch import nn

import secateurs as sc
from secateurs.shrink.engines import Stopwatch, measure
from secateurs.shrink.trace import trace

sys.path.insert(0, str(ROOT / "tools"))
import efficientnet_lite0
import fashion_mnist

OURS = [("obs", True), ("obs", False), ("magnitude", True), ("magnitude", False), ("taylor", True)]


def macs(model, example):
    found = trace(model, example)
    return found.macs(model).at({g.name: len(g.units) for g in found.groups})


def ours(model, batches, share, criterion, refit):
    return sc.shrink_module(model, batches, f"flops={share}x", criterion, refit)[0]


def peer(model, batches, share, kind):
    """Torch-Pruning's global pruning at the ratio that leaves `share` of the multiplications, found by bisection."""
    import torch_pruning as tp

    example = batches[0][0][:1]
    low, high, best = 0.0, 0.95, None
    for _ in range(9):
        ratio = (low + high) / 2
        small = copy.deepcopy(model)
        importance = {
            "magnitude": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
        }[kind]()
        last = [m for m in small.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.BasePruner(
            small, example, importance, global_pruning=True, pruning_ratio=ratio, ignored_layers=[last], round_to=8
        )
        if kind == "taylor":
            small.zero_grad()
            for (x,) in batches:
                out = small(x)
                nn.functional.cross_entropy(out, out.detach().argmax(1)).backward()
        pruner.step()
        if macs(small, (example,)) <= share * macs(model, (example,)):
            best, high = small, ratio
        else:
            low = ratio
    return best


def agreement(model, dense, x):
    with torch.no_grad():
        a, b = (torch.cat([m(part) for part in x.split(32)]).log_softmax(1) for m in (model, dense))
    return {
        "agrees": float(a.argmax(1).eq(b.argmax(1)).float().mean()),
        "kl": float((b.exp() * (b - a)).sum(1).mean()),
    }


def rows(name, model, batches, shares, score):
    example = (batches[0][0][:1],)
    whole = macs(model, example)
    out = []
    for share in shares:
        jobs = [(c + ("+refit" if r else ""), partial(ours, model, batches, share, c, r)) for c, r in OURS]
        if importlib.util.find_spec("torch_pruning"):
            jobs += [(f"torch-pruning {k}", partial(peer, model, batches, share, k)) for k in ("magnitude", "taylor")]
        else:
            print("torch-pruning is not installed: its rows are left out", file=sys.stderr)
        for method, job in jobs:
            began = time.perf_counter()
            small = job()
            seconds = time.perf_counter() - began
            row = {
                "model": name, "flops": share, "method": method, "macs": macs(small, example) / whole,
                "params": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()),
                "latency": measure(model, small, example)[2], "seconds": seconds, **score(small),
            }  # fmt: skip
            out.append(row)
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
    return out


def timed(share, engine):
    """A budget of time: what was predicted, and what fresh sessions measure."""
    dense = efficientnet_lite0.load()
    seen = efficientnet_lite0.crops(list(efficientnet_lite0.photographs())[::2], 32, 0)
    began = time.perf_counter()
    small, report = sc.shrink_module(dense, [(x,) for x in seen.split(16)], f"latency={share}x", engine=engine)
    seconds = time.perf_counter() - began
    example = (seen[:1],)
    again = [Stopwatch(dense, example, engine).against(small, 5.0) for _ in range(5)]
    found = {
        **report["latency"], "budget": share, "tried": [t["ratio"] for t in report["tried"]], "seconds": seconds,
        "macs": report["macs"]["left"] / report["macs"]["dense"], "again": again,
    }  # fmt: skip
    ratios = sorted(ratio for _, _, ratio in again)
    print(json.dumps(found))
    print(f"predicted {found['predicted']:.3f}, measured {ratios[2]:.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]: ", end="")
    print(f"{abs(ratios[2] / found['predicted'] - 1):.1%} apart")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", default="0.75,0.5")
    parser.add_argument("--only", choices=("efficientnet", "fashion"))
    parser.add_argument("--latency", type=float)
    parser.add_argument("--engine", default="onnxruntime")
    arguments = parser.parse_args()
    shares = [float(x) for x in arguments.flops.split(",")]
    torch.manual_seed(0)
    file = ROOT / "bench" / "results" / "channels.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if arguments.latency:
        found["latency"] = timed(arguments.latency, arguments.engine)
        file.write_text(json.dumps(found, indent=1) + "\n")
        return
    if arguments.only != "fashion":
        dense = efficientnet_lite0.load()
        names = list(efficientnet_lite0.photographs())
        seen, unseen = efficientnet_lite0.crops(names[::2], 256, 0), efficientnet_lite0.crops(names[1::2], 256, 1)
        batches = [(x,) for x in seen.split(16)]
        found["efficientnet"] = rows(
            "EfficientNet-Lite0", dense, batches, shares, lambda m: agreement(m, dense, unseen)
        )
    if arguments.only != "efficientnet":
        x, y = fashion_mnist.load("train")
        test = fashion_mnist.load("t10k")
        dense = fashion_mnist.Net()
        fashion_mnist.train(dense, x, y, 3)
        accuracy = fashion_mnist.accuracy(dense, *test)
        spread = math.sqrt(accuracy * (1 - accuracy) / len(test[0]))
        print(f"Fashion-MNIST, dense: {accuracy:.4f} +- {spread:.4f}")
        batches = [(part,) for part in x[:2048].split(128)]
        kept = rows("Fashion-MNIST", dense, batches, shares, lambda m: {"accuracy": fashion_mnist.accuracy(m, *test)})
        found["fashion"] = [{"model": "Fashion-MNIST", "method": "dense", "accuracy": accuracy}, *kept]
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
