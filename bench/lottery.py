"""Lottery tickets and pruning while training, on data that packages ship. Makes docs/lottery.md and its plots.

    .venv/bin/python bench/lottery.py [--only digits|fashion] [--pages-only]

digits: scikit-learn's 1797 images of 8 x 8, a third held out; a net of 64, 300, 100 and 10 units, Adam at 1.2e-3, 900 steps of
60 images. fashion: Fashion-MNIST's first 12,000 training images and all 10,000 test images; a residual convolution net
(tools/fashion_mnist.py, width 16), AdamW with a one-cycle rate, 3 epochs of batches of 128, rewound to step 30. Seeds 0, 1 and 2.
Each round removes a quarter of the weights that are left, over the whole net. Compared at 90% zeros: gradual pruning from scratch
(cubic schedule, from a tenth to two thirds of the steps); the trained dense net, pruned gradually (cubic) in a third as many
further steps; one-shot magnitude pruning of the dense net, without and with half as many further steps. Runs lie under
runs/lottery, and a run that was cut off goes on from there.
"""

import argparse
import copy
import json
import shutil
import sys
from statistics import mean

import torch
import torch.nn.functional as F
from methods import ROOT
from torch import nn

import secateurs as sc
from secateurs.train.matrices import prunable

sys.path.insert(0, str(ROOT / "tools"))
import fashion_mnist

SEEDS = (0, 1, 2)
AT = 0.9


class Digits:
    steps, batch = 900, 60
    name, skip, rewind, rounds = "digits", (), 0, 12

    def __init__(self):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
        self.x, self.y, self.test = x[:1198], y[:1198], (x[1198:], y[1198:])

    def make(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

    def optimizer(self, model):
        return torch.optim.Adam(model.parameters(), 1.2e-3)

    def rate(self, step):
        return 1.0

    def train(self, model, hold, start, stop, seed):
        optimizer = self.optimizer(model)
        hold(optimizer)
        base = [group["lr"] for group in optimizer.param_groups]
        model.train()
        order = self._order(seed)
        for step in range(start, stop):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * self.rate(step)
            part = order[step]
            F.cross_entropy(model(self.x[part]), self.y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    def _order(self, seed):
        """Step s of a training sees the same images whenever it begins."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        while len(parts) < self.steps:
            parts += torch.randperm(len(self.x), generator=generator).split(self.batch)[: len(self.x) // self.batch]
        return parts

    def score(self, model):
        x, y = self.test
        with torch.no_grad():
            return float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


class Fashion(Digits):
    batch, steps = 128, 3 * (12_000 // 128)
    name, rewind, rounds = "fashion", 30, 8

    def __init__(self):
        x, y = fashion_mnist.load("train")
        self.x, self.y, self.test = x[:12_000], y[:12_000], fashion_mnist.load("t10k")

    def make(self, seed):
        torch.manual_seed(seed)
        return fashion_mnist.Net(16)

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=1e-2)

    def rate(self, step):
        """One cycle: up for a third, then down to 0."""
        peak = self.steps // 3
        return (step + 1) / peak if step < peak else (self.steps - step) / (self.steps - peak)


def others(task):
    """{how: [score of every seed]} at 90%, beside iterative pruning."""
    found = {"gradual": [], "dense, then gradual": [], "one-shot": [], "one-shot, then half of the steps": []}
    for seed in SEEDS:
        model = task.make(seed)
        schedule = sc.train.cubic(AT, task.steps // 10, 2 * task.steps // 3, every=max(1, task.steps // 30))
        task.train(model, lambda o, m=model, s=schedule: sc.train.gradual(m, o, s, scope="global"), 0, task.steps, seed)
        found["gradual"].append(task.score(model))
        model = task.make(seed)
        task.train(model, lambda o: None, 0, task.steps, seed)
        trained = copy.deepcopy(model)
        again = sc.train.cubic(AT, 0, task.steps // 3, every=max(1, task.steps // 60))
        task.train(
            trained, lambda o, m=trained, s=again: sc.train.gradual(m, o, s, scope="global"), 0, task.steps, seed
        )
        found["dense, then gradual"].append(task.score(trained))
        flat = torch.cat([p.detach().abs().flatten() for _, p in prunable(model)])
        bar = flat.kthvalue(round(AT * len(flat))).values
        for _, p in prunable(model):
            p.data.masked_fill_(p.detach().abs() <= bar, 0)
        found["one-shot"].append(task.score(model))
        task.train(model, lambda o, m=model: sc.train.hold(m, o), task.steps // 2, task.steps, seed)
        found["one-shot, then half of the steps"].append(task.score(model))
    return found


def run(task, found):
    plan = sc.train.Rounds(task.rounds, 0.25, task.rewind, SEEDS)
    folder = ROOT / "runs" / "lottery" / task.name
    tickets = sc.train.iterative(
        task, folder, plan, lambda done, total: print(f"{task.name} {done}/{total}", flush=True)
    )
    shutil.copy(folder / "ticket.svg", ROOT / "docs" / f"lottery-{task.name}.svg")
    found[task.name] = {"plan": tickets["plan"], "summary": tickets["summary"], "others": others(task)}


def page(found):
    lines = [
        "# Lottery tickets and pruning while training",
        "",
        (__doc__ or "").split("\n\n", 2)[2].replace("\n", "\n").strip(),
        "",
        "Made by `bench/lottery.py`. Scores are accuracies on held-out images: mean over seeds, lowest to highest.",
        "",
    ]
    for name, data in found.items():
        lines += [
            f"## {name}",
            "",
            "| zeros | ticket | random mask | the ticket's mask, other weights |",
            "|---|---|---|---|",
        ]
        cells = {(r["round"], r["kind"]): r for r in data["summary"]}
        for number in range(data["plan"]["rounds"] + 1):
            ticket = cells[number, "ticket"]
            row = [f"{ticket['sparsity']:.1%}" if number else "dense"]
            for kind in ("ticket", "random", "reinit"):
                cell = cells.get((number, kind))
                row.append(f"{cell['mean']:.4f} ({cell['low']:.4f} to {cell['high']:.4f})" if cell else "")
            lines.append(f"| {' | '.join(row)} |")
        lines += ["", f"![Accuracy against the weights that are left](lottery-{name}.svg)", ""]
        lines += [f"At {AT:.0%} zeros over the whole net, beside it:", "", "| | accuracy |", "|---|---|"]
        lines += [f"| {how} | {mean(s):.4f} ({min(s):.4f} to {max(s):.4f}) |" for how, s in data["others"].items()]
        lines.append("")
    (ROOT / "docs" / "lottery.md").write_text("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("digits", "fashion"))
    parser.add_argument("--pages-only", action="store_true")
    arguments = parser.parse_args()
    file = ROOT / "bench" / "results" / "lottery.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for make in (Digits, Fashion):
        if not arguments.pages_only and arguments.only in (None, make.name):
            run(make(), found)
            file.write_text(json.dumps(found, indent=1) + "\n")
    page(found)


if __name__ == "__main__":
    main()
