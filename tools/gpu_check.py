"""Check on a machine with a CUDA card what secateurs does there: packed layers against float64 and their speed against
dense products, masks against the CPU's, PyTorch's 2:4, zeros that stay in mixed precision.

    PYTHONPATH=src python tools/gpu_check.py [--out gpu_check.json] [--model FOLDER] [--minutes 7]

Needs torch and transformers, no network, no installation. One line a result; the JSON file is whole after every result, so a run
that is cut off keeps what it measured. Exits 1 if a check failed, 0 otherwise, and 0 with a sentence where there is no card.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.base.device import machine
from secateurs.base.errors import DeviceError
from secateurs.base.files import write_json
from secateurs.kernels import on_gpu, semi_structured
from secateurs.kernels.dispatch import multiply
from secateurs.kernels.formats import INTEGER_PADDING, bitmask_of, layout_of
from secateurs.matrix.grids import Grid, Scales
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


# ------------------------------------------------------------------------------------------------ packed layers on the card


def kinds() -> dict[str, tuple[Callable[[tuple[int, int]], Tensor], Grid | None, bool]]:
    """What a matrix is: which weights it keeps, its grid, and whether zeros are left out."""
    half, third = (lambda shape: torch.rand(shape) < 0.5), (lambda shape: torch.rand(shape) < 0.3)

    def two(shape: tuple[int, int]) -> Tensor:
        return (torch.rand(shape[0], shape[1] // 4, 4).argsort(-1) < 2).view(shape)

    return {
        "bf16 50%": (half, None, True), "bf16 70%": (third, None, True), "bf16 2:4": (two, None, True),
        "int8 50%": (half, Grid(8, 128), True), "int8 dense": (half, Grid(8, 128), False),
        "int4 2:4": (two, Grid(4, 64), True), "int4 dense": (half, Grid(4, 64), False),
    }  # fmt: skip


def stored(shape: tuple[int, int], kind: str) -> tuple[Tensor, list[Tensor | None], tuple[int, ...]]:
    """Random bf16 weights of a kind, and the tensors and numbers that the operator takes; made without the compiled library."""
    keep, grid, masked = kinds()[kind]
    kept_OI = keep(shape)
    if grid is None:
        weight_OI = (torch.randn(shape) * kept_OI).bfloat16()
        return weight_OI, [*bitmask_of(weight_OI), None, None, None], layout_of(shape, None)
    most = grid.middle - 1
    integer_OI = torch.randint(1, most + 1, shape, dtype=torch.int16) * (
        1 - 2 * torch.randint(0, 2, shape, dtype=torch.int16)
    )
    integer_OI *= kept_OI
    scales = Scales(grid, (torch.rand(shape[0], grid.groups(shape[1])) / most + 0.01).to(grid.scale_dtype), None)
    _, mask = bitmask_of(integer_OI.bfloat16())
    panels = -(-shape[0] // 4)
    padded = nn.functional.pad(scales.scale_OG.view(torch.int16), (0, 0, 0, 4 * panels - shape[0]))
    scale = padded.view(panels, 4, -1).transpose(1, 2).contiguous()
    values = integers(integer_OI + grid.middle, kept_OI if masked else torch.ones(shape, dtype=torch.bool), grid.bits)
    return (
        scales.weights(integer_OI).add_(0.0).bfloat16(), [values, mask if masked else None, scale, None, None],
        layout_of(shape, grid),
    )  # fmt: skip


def integers(code_OI: Tensor, kept_OI: Tensor, bits: int) -> Tensor:
    """The codes that are kept, of 8 or 4 bits, in runs of whole bytes, then padding. Shapes are multiples of 4 and 64."""
    outputs, inputs = code_OI.shape

    def ordered(matrix_OI: Tensor) -> Tensor:
        return matrix_OI.view(outputs // 4, 4, inputs // 64, 64).transpose(1, 2).reshape(-1, 64)

    code, kept = ordered(code_OI), ordered(kept_OI)
    bit = (kept.cumsum(1) - 1) * bits
    length = (kept.sum(1) * bits + 7) // 8
    at = (length.cumsum(0) - length)[:, None] + bit // 8
    values = torch.zeros(int(length.sum()) + INTEGER_PADDING, dtype=torch.int32)
    values.index_add_(0, at[kept], (code[kept].to(torch.int32) << (bit[kept] % 8).to(torch.int32)))
    return values.to(torch.uint8)


def on(device: str, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if p is None else p.to(device, copy=True) for p in parts]


def packed(
    log: Log, device: str, shapes: Sequence[tuple[int, int]] = ((132, 192), (1024, 4096)),
    counts: Sequence[int] = (1, 3, 16, 17, 64, 200),
) -> None:  # fmt: skip
    """Every kernel for every kind of matrix, against float64 on the CPU."""
    for shape in shapes:
        for kind in kinds():
            name = f"packed {kind} {shape[0]}x{shape[1]}"
            if log.late(name):
                return
            with log.going_on(name):
                weight_OI, parts, layouts = stored(shape, kind)
                (matrix,) = on_gpu.matrices_of(on(device, parts), layouts, torch.bfloat16)
                same = torch.equal(on_gpu.expand(matrix).cpu(), weight_OI) or on_gpu.interpreted()
                errors: dict[str, float] = {}
                for count in counts:
                    x_TI = torch.randn(count, shape[1]).bfloat16()
                    want_TO = x_TI.double() @ weight_OI.double().T
                    for way in ("few_tokens", "many_tokens", "expanded"):
                        if way == "few_tokens" and count > 17:
                            continue
                        y_TO = torch.full((count, shape[0]), torch.nan, dtype=torch.bfloat16, device=device)
                        on_gpu.WAYS[way](matrix, x_TI.to(device), None, y_TO)
                        error = float((y_TO.cpu().double() - want_TO).norm() / want_TO.norm())
                        # the worst, and NaN stays the worst
                        errors[way] = error if not error <= errors.get(way, 0.0) else errors[way]
                good = same and all(error < 0.01 for error in errors.values())
                texts = ", ".join(f"{way} {error:.1e}" for way, error in errors.items())
                # JSON has no NaN
                told = {way: error if math.isfinite(error) else None for way, error in errors.items()}
                log.check(
                    name,
                    good,
                    f"expanded {'bit for bit' if same else 'with other bits'}; errors {texts}",
                    errors=told,
                )


def packed_speed(
    log: Log, device: str, shapes: Sequence[tuple[int, int]] = SHAPES[::-1], counts: Sequence[int] = (1, 4, 16, 64, 256, 4096),
    graph: bool = True, rounds: int = 20,
) -> None:  # fmt: skip
    """Packed products against the library's of the dense bf16 matrix, weights rotated past the cache."""
    for shape in shapes:
        for kind in kinds():
            name = f"speed {kind} {shape[0]}x{shape[1]}"
            if log.late(name):
                return
            with log.going_on(name):
                weight_OI, parts, layouts = stored(shape, kind)
                (one,) = on_gpu.matrices_of(given := on(device, parts), layouts, torch.bfloat16)
                copies = 2 if device == "cpu" else -(-(160 << 20) // one.nbytes)
                kept = [given, *(on(device, parts) for _ in range(copies - 1))]
                matrices = [on_gpu.matrices_of(p, layouts, torch.bfloat16)[0] for p in kept]
                dense = [weight_OI.to(device, copy=True) for _ in range(copies)]
                for count in counts:
                    x_TI = torch.randn(count, shape[1]).bfloat16().to(device)
                    y_TO = torch.empty(count, shape[0], dtype=torch.bfloat16, device=device)
                    runs: dict[str, list[Callable[[], Any]]] = {
                        "dense": [partial(nn.functional.linear, x_TI, w) for w in dense],
                    }  # fmt: skip
                    for way in ("few_tokens", "many_tokens", "expanded"):
                        if (way, count <= 16) not in {("few_tokens", False), ("expanded", True)}:
                            runs[way] = [partial(on_gpu.WAYS[way], m, x_TI, None, y_TO) for m in matrices]
                    samples = semi_structured.interleaved(
                        runs, device, rounds if count < 4096 else 8, graph and count <= GRAPHED
                    )
                    seconds = {way: median(taken) for way, taken in samples.items()}
                    texts = [f"{way} {s * 1e6:.1f} us ({seconds['dense'] / s:.2f}x)" for way, s in seconds.items()]
                    log.add(
                        f"{name}, {count} tokens", "measured", f"{one.nbytes / weight_OI.nbytes:.2f}x bytes; {'; '.join(texts)}",
                        kind=kind, shape=shape, tokens=count, nbytes=one.nbytes, seconds=seconds, samples=samples,
                    )  # fmt: skip


def decode(
    log: Log, device: str, layers: int = 16, width: int = 2048, inner: int = 8192, graph: bool = True, rounds: int = 20
) -> None:
    """One token through the linear layers of a 1B shape by the operator, replayed as a CUDA graph, against dense ones."""
    name = f"decode {layers} x {width}, {inner}"
    if log.late(name):
        return
    shapes = [(width + width // 2, width), (width, width), (2 * inner, width), (width, inner)] * layers
    runs: dict[str, list[Callable[[], Any]]] = {"dense": [], "packed": []}
    unlike = []
    made = {shape: stored(shape, "bf16 50%") for shape in dict.fromkeys(shapes)}
    for shape in shapes:
        weight_OI, parts, layouts = made[shape]
        x, dense, given = (
            torch.randn(1, shape[1]).bfloat16().to(device),
            weight_OI.to(device, copy=True),
            on(device, parts),
        )
        call = torch.ops.secateurs.linear if device != "cpu" else on_gpu.linear
        runs["dense"].append(partial(nn.functional.linear, x, dense))
        runs["packed"].append(partial(call, x, given, layouts))
        want, got = runs["dense"][-1]().double().flatten(), runs["packed"][-1]().double()
        unlike.append(float((got - want).norm() / want.norm()))
    samples = semi_structured.interleaved(runs, device, rounds, graph)
    # a sample is of one layer
    seconds = {way: median(taken) * len(shapes) for way, taken in samples.items()}
    log.check(
        name, all(error < 0.01 for error in unlike),
        f"{seconds['packed'] * 1e3:.3f} ms a token, dense {seconds['dense'] * 1e3:.3f} ms "
        f"({seconds['dense'] / seconds['packed']:.2f}x), bf16 50%, linear layers alone, error {max(unlike):.1e}",
        seconds=seconds, samples=samples,
    )  # fmt: skip


def compiled(log: Log, device: str, **options: Any) -> None:
    """torch.compile of packed layers: no graph break, the same products, and gradients of the input."""
    name = "packed layers under torch.compile"
    if log.late(name):
        return
    weight_OI, parts, layouts = stored((256, 512), "bf16 50%")
    given, x = on(device, parts), torch.randn(3, 512).bfloat16().to(device)

    def product(x_TI: Tensor) -> Tensor:
        return multiply(x_TI, given, layouts).view(-1, 256).relu()

    want, got = product(x), torch.compile(product, fullgraph=True, **options)(x)
    by = x.clone().requires_grad_()
    product(by).sum().backward()
    assert by.grad is not None
    back = (product(x) > 0).to(x.dtype) @ weight_OI.to(device)
    error = float((by.grad - back).double().norm() / back.double().norm())
    same = torch.equal(want, got)
    log.check(name, same and error < 0.02, f"{'the same' if same else 'other'} bits; gradient's error {error:.1e}")


# ------------------------------------------------------------------------------------------------------------ the rest


def library(log: Log) -> None:
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
        ("packed", lambda: packed(log, device)),
        ("library", lambda: library(log)),
        ("speed", lambda: packed_speed(log, device)),
        ("decode", lambda: decode(log, device)),
        ("compiled", lambda: compiled(log, device)),
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
