"""Check on a machine with a CUDA card what secateurs does there: masks against the CPU's, PyTorch's 2:4 against dense products,
zeros that stay in mixed precision.

    PYTHONPATH=src python tools/gpu_check.py [--out gpu_check.json] [--model FOLDER] [--minutes 7]

Needs torch and transformers, no network, no installation. One line a result; the JSON file is whole after every result, so a run
that is cut off keeps what it measured. Exits 1 if a check failed, 0 otherwise, and 0 with a sentence where there is no card.
"""

import argparse
import copy
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.base.device import machine
from secateurs.base.errors import DeviceError
from secateurs.base.files import write_json
from secateurs.kernels import semi_structured
from secateurs.train.matrices import prunable

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((11008, 4096), (4096, 4096))
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
# shorter than this, launching a kernel takes longer than the kernel
GRAPHED = 256
# the least share of mask entries that are alike on both devices. Magnitude has no sums; in the others a sum's rounding decides
# between neighbours, and balanced tunes and shares out on top of that
ALIKE = {"magnitude": 1.0, "wanda": 0.999, "sparsegpt": 0.95, "balanced": 0.85}
# by how much a layer's error may be larger than the CPU's
WORSE = 1.02


class Log:
    """Results, printed and written as they come."""

    def __init__(self, file: Path | None, facts: dict[str, Any], minutes: float = 7.0) -> None:
        self.file, self.facts = file, facts
        self.results: list[dict[str, Any]] = []
        self.end = time.monotonic() + 60 * minutes
        self._write()

    def add(self, name: str, status: str, text: str, **found: Any) -> None:
        """status: passed, failed, skipped or measured."""
        self.results.append({"name": name, "status": status, "text": text, **found})
        print(f"{status:9}{name}: {text}", flush=True)
        self._write()

    def check(self, name: str, good: bool, text: str, **found: Any) -> None:
        self.add(name, "passed" if good else "failed", text, **found)

    def late(self, name: str) -> bool:
        """Whether the time is up; then that is a result."""
        if time.monotonic() < self.end:
            return False
        self.add(name, "skipped", "the time was up; give more --minutes")
        return True

    @contextmanager
    def going_on(self, name: str) -> Iterator[None]:
        """What fails inside is a result, and no end."""
        try:
            yield
        except Exception as error:
            last = traceback.format_exc().strip().splitlines()[-6:]
            self.add(name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", traceback=last)

    @property
    def failed(self) -> bool:
        return any(r["status"] == "failed" for r in self.results)

    def _write(self) -> None:
        if self.file is not None:
            write_json(self.file, {**self.facts, "results": self.results})


# ---------------------------------------------------------------------------------------------------------------- masks


def masks(
    log: Log, device: str, folder: Path | None, windows: int = 16, seqlen: int = 256, methods: Sequence[str] = tuple(ALIKE)
) -> None:  # fmt: skip
    """prune() of a live stories260K on the device against the same on the CPU."""
    model, ids, what = stories(folder, windows, seqlen)
    for method in methods:
        for pattern in ("unstructured", "2:4"):
            name = f"masks {method} {pattern}"
            if log.late(name):
                return
            with log.going_on(name):
                plan = sc.Plan(pattern=pattern, **({"effort": method} if method == "balanced" else {"method": method}))
                compare(log, name, model, ids, plan, device, ALIKE[method], what)


def block_pair(log: Log, device: str, hidden: int = 2048, mlp: int = 8192, windows: int = 8, seqlen: int = 512) -> None:
    """Two random blocks of a 1B-shaped Llama."""
    model = llama(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=2, head_dim=max(8, hidden // 32))
    ids = tokens(windows, seqlen, 512)
    for method, pattern in (("wanda", "2:4"), ("sparsegpt", "2:4"), ("admm", "unstructured")):
        name = f"block pair {method} {pattern}"
        if log.late(name):
            return
        with log.going_on(name):
            plan = sc.Plan(method=method, pattern=pattern)
            what = f"{hidden}x{mlp}, {ids.numel()} tokens"
            compare(log, name, model, ids, plan, device, ALIKE.get(method, 0.9), what)


def compare(
    log: Log, name: str, model: nn.Module, ids: Tensor, plan: sc.Plan, device: str, alike: float, what: str
) -> None:
    """Prune copies of a model on both devices, and hold masks and errors against each other."""
    there, errors, seconds = pruned(model, ids, plan, device)
    here, errors_cpu, seconds_cpu = pruned(model, ids, plan, "cpu")
    same = sum(int((there[n] == here[n]).sum()) for n in here)
    share = same / sum(m.numel() for m in here.values())
    ratio = max(a / b if b else 1.0 for a, b in zip(errors, errors_cpu, strict=True))
    mean, mean_cpu = (sum(e) / len(e) for e in (errors, errors_cpu))
    log.check(
        name, share >= alike and mean <= WORSE * mean_cpu,
        f"{share:.4%} of the masks alike (at least {alike:.1%}), mean error {mean:.4f} and {mean_cpu:.4f} on the CPU, "
        f"{seconds:.2f} s and {seconds_cpu:.2f} s ({what})",
        alike=share, worst_layer_ratio=ratio, error=mean, error_cpu=mean_cpu, seconds=seconds, seconds_cpu=seconds_cpu,
    )  # fmt: skip


def pruned(model: nn.Module, ids: Tensor, plan: sc.Plan, device: str) -> tuple[dict[str, Tensor], list[float], float]:
    """Masks by name, relative errors by layer, and seconds."""
    copied = copy.deepcopy(model).to(device)
    settle(device)
    began = time.perf_counter()
    report = sc.prune(copied, plan, calibration=ids)
    settle(device)
    seconds = time.perf_counter() - began
    found = {n: (p.detach() != 0).cpu() for n, p in prunable(copied)}
    return found, [r.error or 0.0 for r in report.layers], seconds


def settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def llama(**sizes: Any) -> nn.Module:
    """A random Llama with weights large enough that layers matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given: dict[str, Any] = {
        "vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**{**given, **sizes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


def tokens(windows: int, seqlen: int, words: int) -> Tensor:
    return torch.randint(0, words, (windows, seqlen), generator=torch.Generator().manual_seed(0))


def stories(folder: Path | None, windows: int, seqlen: int) -> tuple[nn.Module, Tensor, str]:
    """The model, token windows and what they are; random ones of its shape where the folder is missing."""
    if folder is None:
        model = llama(hidden_size=64, intermediate_size=172, num_hidden_layers=5, head_dim=8)
        return model, tokens(windows, seqlen, 512), "random weights of stories260K's shape"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokens(windows, 1, model.config.vocab_size)
    # the model's own text: no tokenizer is needed
    made = model.generate(ids, max_new_tokens=seqlen - 1, min_new_tokens=seqlen - 1, do_sample=False, pad_token_id=0)
    return model, made, folder.name


# ------------------------------------------------------------------------------------------------------------------ 2:4


def two_four(
    log: Log, device: str, shapes: Sequence[tuple[int, int]] = SHAPES, counts: Sequence[int] = TOKENS, graph: bool = False
) -> None:  # fmt: skip
    """PyTorch's 2:4 against dense products."""
    for dtype in semi_structured.DTYPES:
        for o, i in shapes:
            for count in counts:
                short = str(dtype).removeprefix("torch.")
                name = f"2:4 {short} {o}x{i}, {count} tokens{', CUDA graph' if graph else ''}"
                if log.late(name):
                    return
                with log.going_on(name):
                    found = semi_structured.measure((o, i), count, dtype, 20 if count < 4096 else 8, device, graph)
                    texts = []
                    for kernel, seconds in found.seconds.items():
                        speedup = found.speedup(kernel)
                        faster = f" ({speedup:.2f}x)" if speedup and kernel != "dense" else ""
                        texts.append(f"{kernel} {seconds * 1e6:.1f} us{faster}")
                    texts += [f"{kernel}: {why}" for kernel, why in found.why_not.items()]
                    wrong = any("is wrong" in why for why in found.why_not.values())
                    status = "failed" if wrong else "measured" if found.seconds else "skipped"
                    log.add(
                        name, status, "; ".join(texts), dtype=short, shape=[o, i], tokens=count, graph=graph,
                        **dataclasses.asdict(found),
                    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- held masks


def held(log: Log, device: str, width: int = 2048, steps: int = 40) -> None:
    """Zeros under autocast, with and without a fused optimizer and a GradScaler; and what holding them takes."""
    for dtype, scaled in ((torch.bfloat16, False), (torch.float16, True)):
        for fused in (False, True):
            short = str(dtype).removeprefix("torch.")
            name = f"held {short}{' GradScaler' if scaled else ''} AdamW{' fused' if fused else ''}"
            if log.late(name):
                return
            with log.going_on(name):
                first, last, broken, taken = trained(device, width, steps, dtype, scaled, fused, True)
                *_, plain = trained(device, width, steps, dtype, scaled, fused, False)
                log.check(
                    name, broken == 0 and last < 0.9 * first,
                    f"{broken} of {steps} steps moved a zero, loss {first:.4f} to {last:.4f}, {taken * 1e3:.2f} ms a step, "
                    f"{plain * 1e3:.2f} without ({taken / plain:.2f}x)",
                    broken=broken, first=first, last=last, seconds=taken, seconds_without=plain,
                )  # fmt: skip


def trained(
    device: str, width: int, steps: int, dtype: torch.dtype, scaled: bool, fused: bool, hold: bool
) -> tuple[float, float, int, float]:
    """First and last loss, steps after which a removed weight was not zero, median seconds of a step."""
    torch.manual_seed(0)
    teacher = nn.Linear(width, width).to(device)
    model = nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width)
    ).to(device)
    for _, p in prunable(model):
        p.data.mul_(torch.rand(p.shape).to(device) > 0.5)
    removed = {n: p.detach() == 0 for n, p in prunable(model)}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, fused=fused)
    if hold:
        sc.train.hold(model, optimizer)
    scaler: Any = torch.amp.GradScaler(device, enabled=scaled)
    x = torch.randn(256, width, device=device)
    with torch.no_grad():
        y = teacher(x)
    losses, seconds, broken = [], [], 0
    for _ in range(steps):
        settle(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        settle(device)
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
        broken += any(bool((p.detach()[removed[n]] != 0).any()) for n, p in prunable(model))
    return losses[0], losses[-1], broken, median(seconds)


# ------------------------------------------------------------------------------------------------------------ the rest


def library(log: Log, device: str) -> None:
    """The compiled kernels: not needed by any of the above, and said in a sentence where they are not built."""
    linear = nn.Sequential(nn.Linear(64, 64, bias=False))
    linear[0].weight.data.mul_(torch.rand(64, 64) > 0.5)
    x = torch.randn(3, 64)
    want = linear(x).detach()
    try:
        sc.accelerate(linear)
        got = linear(x)
    except DeviceError as error:
        log.add("packed layers on the CPU", "skipped", str(error))
        return
    error = float((got - want).norm() / want.norm())
    log.check("packed layers on the CPU", error < 1e-5, f"relative error {error:.1e}")
    if device != "cpu":
        try:
            linear.to(device)(x.to(device))
        except DeviceError as refused:
            log.check("packed layers on the card", True, f"refused: {refused}")
        else:
            log.check("packed layers on the card", False, "ran, though their kernels run on the CPU")


def found_model(given: Path | None) -> Path | None:
    """The folder of stories260K: as given, or beside the checkout, or inside it."""
    places = [given] if given else [base / "shared" / "data" / "stories260K" for base in (ROOT.parent, ROOT)]
    return next((p for p in places if (p / "config.json").is_file()), None)


def run(log: Log, device: str, sections: Sequence[tuple[str, Callable[[], None]]]) -> int:
    """Every section, whatever becomes of the others; the exit code."""
    for name, section in sections:
        began = time.monotonic()
        with log.going_on(name):
            section()
        log.facts["seconds"] = {**log.facts.get("seconds", {}), name: time.monotonic() - began}
    counts = {s: sum(r["status"] == s for r in log.results) for s in ("passed", "measured", "skipped", "failed")}
    log.facts["counts"] = counts
    log._write()
    print(", ".join(f"{n} {s}" for s, n in counts.items()))
    return int(log.failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check.json"), help="Where results go. Default: gpu_check.json."
    )
    parser.add_argument("--model", type=Path, help="stories260K's folder. Default: shared/data beside the checkout.")
    parser.add_argument("--minutes", type=float, default=7.0, help="No check begins after so many. Default: 7.")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"Nothing was checked: {semi_structured.lacks()}.")
        return 0
    device = "cuda"
    model = found_model(options.model)
    if options.model and model is None:
        parser.error(f"{options.model} has no config.json")
    facts = {
        "machine": machine(device), "cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version(),
        "two_four": semi_structured.lacks(),
    }  # fmt: skip
    log = Log(options.out, facts, options.minutes)
    few = tuple(t for t in TOKENS if t <= GRAPHED)
    sections = [
        ("library", lambda: library(log, device)),
        ("2:4", lambda: two_four(log, device)),
        ("held", lambda: held(log, device)),
        ("masks", lambda: masks(log, device, model)),
        ("block pair", lambda: block_pair(log, device)),
        # last: what a failed capture leaves of a CUDA context is not known
        ("2:4 graphs", lambda: two_four(log, device, counts=few, graph=True)),
    ]
    return run(log, device, sections)


if __name__ == "__main__":
    sys.exit(main())
