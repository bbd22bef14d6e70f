"""What holding masks costs a training step: SmolLM2-135M at 50% zeros, AdamW, with and without, interleaved.

    .venv/bin/python bench/hold.py [MODEL] [--rounds 8] [--windows 2]

A step is forward, back and optimizer on --windows x 512 tokens, fp32. AdamW is torch's fused one; --unfused takes the default on
CPUs, whose square root of exact zeros is 10 times as slow as of other numbers. Fails above 2% of a step.
"""

import argparse
import time
from statistics import median

import torch
from methods import fetch

import secateurs as sc


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; default SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--unfused", action="store_true")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model or str(fetch()), dtype=torch.float32)
    masks = {n: p.detach().abs() > p.detach().abs().median() for n, p in model.named_parameters() if "proj" in n}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=not arguments.unfused)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (arguments.windows, 512), generator=generator)

    def step():
        began = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        before = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        return end - began, end - before

    step()
    taken = {"free": [], "held": []}
    for _ in range(arguments.rounds):
        taken["free"].append(step())
        held = sc.train.hold(model, optimizer, masks)
        # the first step also clears the optimizer's state of removed weights, once
        step()
        taken["held"].append(step())
        held.release()
    ratio = median(h[0] / f[0] for h, f in zip(taken["held"], taken["free"], strict=True))
    more = median(h[1] - f[1] for h, f in zip(taken["held"], taken["free"], strict=True))
    free = median(f[0] for f in taken["free"])
    print(
        f"a step takes {free:.2f} s, held {ratio - 1:+.2%} (optimizer.step() {more * 1e3:+.0f} ms, {more / free:.2%} of a step), "
        f"sparsity {held.sparsity:.1%}"
    )
    if more / free > 0.02:
        raise SystemExit("more than 2%")


if __name__ == "__main__":
    main()
