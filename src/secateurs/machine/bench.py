"""Tokens per second of whole models through generate(): each in its own process, run in turn; medians and spreads.

prefill: from the prompt to the first new token. decode: the new tokens after that. A variant is a folder and a way to
run it: 'packed' (as stored), 'dense' (its plain model, stock torch), 'accelerated dense' (our dense kernels where they are faster),
'compiled' and 'packed compiled' (under torch.compile, with a static cache), 'llama.cpp' (a GGUF file, where xllamacpp is
installed). Speedups are over the fastest dense variant: of those that run the dense model's weights as they are, in any engine.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from secateurs.base.device import machine, peak_memory
from secateurs.base.errors import CheckpointError, PlanError
from secateurs.base.precision import compute_dtype
from secateurs.base.progress import Progress, silent, ticker
from secateurs.base.run_directory import models_of
from secateurs.machine import llama_cpp
from secateurs.machine.profile import DeviceProfile
from secateurs.machine.timing import Timing
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.source import trusted

# tokens of the prompts that are measured where nobody says: a short one, and one whose cache is to be seen
PROMPTS = (64, 512)
# runs of the longer prompts: what a token of context costs is large beside their spread
_LONGER_RUNS = 3


@dataclass(frozen=True)
class Variant:
    """One way to run one folder.

    weights: the folder whose weights it runs as they are, where `folder` is another; None: its own. rival: where it does not run,
    it is left out with the reason.
    """

    name: str
    folder: str
    how: str
    dtype: str | None = None
    weights: str | None = None
    rival: bool = False

    def runs(self, folder: str) -> bool:
        """True if it runs the dense weights of a folder as they are."""
        return (self.weights or self.folder) == folder and not self.how.startswith("packed")


def variants_of(folder: Path, against: Path | None = None) -> list[Variant]:
    """The variants that `secateurs bench` compares.

    Of a run directory: its dense model and its packed or smaller one. Of a packed folder: itself and its dense weights. Or any
    two folders.
    """
    main, dense = folder, None
    if (folder / "plan.json").is_file():
        dense, left = models_of(folder)
        shrunk = "units" in json.loads((folder / "plan.json").read_text())
        if shrunk and against is None:
            # a smaller dense model is compared with the same dense variants as a packed one; it runs in the best way for its dtype
            how = "dense" if _wide(left) is None else "accelerated dense"
            return [*dense_variants(dense), Variant("shrunk", str(left), how)]
        main = left if shrunk else folder / "packed"
        if not (main / "config.json").is_file():
            raise CheckpointError(f"{folder} has no packed model; make one with `secateurs pack {folder}`")
    if against is not None:
        return [Variant(str(against), str(against), _how(against)), Variant(str(main), str(main), _how(main))]
    if _how(main) != "packed":
        raise PlanError(f"{main} is not packed: give a run, a packed folder, or a second folder with --against")
    other = str(dense or main)
    return [*dense_variants(other), Variant("packed", str(main), "packed")]


def dense_variants(folder: str) -> list[Variant]:
    """The ways to run a dense model of which one is the fastest here.

    As stored; or, where the CPU has no instructions for its 16-bit weights and torch emulates them, widened to fp32 and by our
    own dense kernels.
    """
    # of a model that is stored in another way, its plain copy
    folder = str(Checkpoint(folder, packed=True).folder)
    wide = _wide(Path(folder))
    if wide is None:
        return [Variant("dense", folder, "dense")]
    return [Variant("dense, fp32", folder, "dense", wide), Variant("dense, our kernels", folder, "accelerated dense")]


def _wide(folder: Path) -> str | None:
    """'float32' for a checkpoint of 16-bit weights for which this CPU has no instructions, else None."""
    stored = Checkpoint(folder, packed=True).dtype
    return None if compute_dtype(stored) == stored else "float32"


def _that_fit(variants: Sequence[Variant]) -> tuple[list[Variant], list[str]]:
    """The variants that fit into memory together, and sentences on rivals and fp32 ones that do not. All are in memory at once."""
    there = machine()["memory_bytes"]
    kept, left_out = list(variants), []
    for variant in variants:
        needed = sum(_nbytes(v) * (2 if v.dtype == "float32" else 1) for v in kept)
        others = [v for v in kept if v is not variant and v.folder == variant.folder]
        if needed > there and (variant.rival or (variant.dtype == "float32" and others)):
            kept.remove(variant)
            left_out.append(
                f"{variant.name} was not run: all ways together take {needed / 1e9:.1f} GB of memory, this machine has "
                f"{there / 1e9:.1f}"
            )
    return kept, left_out


def _nbytes(variant: Variant) -> int:
    """Bytes of a variant's weights as stored."""
    place = Path(variant.folder)
    return place.stat().st_size if place.is_file() else Checkpoint(variant.folder, packed=True).nbytes


def record_of(folder: Path) -> Path | None:
    """The file for a run directory's measurement, which `fleet` and `report` read; None for other folders."""
    return folder / "bench.json" if (folder / "plan.json").is_file() else None


def _how(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face model")
    method = json.loads(config.read_text()).get("quantization_config", {}).get("quant_method")
    return "packed" if method == "secateurs" else "dense"


def bench(
    variants: list[Variant],
    prompts: Sequence[int] | None = None,
    new: int = 64,
    repeats: int = 5,
    progress: Progress = silent,
    batches: Sequence[int] = (1,),
    fit: bool = False,
) -> dict[str, Any]:
    """Time all variants, in turn: what bench.json holds. Speedups are over the fastest dense variant. Raises CheckpointError.

    Of several dense variants of the first one's folder, the fastest for one request comes first in the result. An fp32 variant
    for which memory has no room is left out, and `left_out` says so.

    prompts: tokens of a prompt. The first is what `batches` of the result are of; the others are in `longer`, from which `fleet`
    learns what a long context costs, in three runs at most. None: PROMPTS, or what the model's positions allow. fit: leave out
    longer prompts that they do not allow. batches: numbers of prompts at once; a
    variant's own prefill and decode are those of the first. Tokens a second are those of all prompts together.
    """
    if min(repeats, *batches, *(prompts or (1,))) < 1 or new < 2 or not batches:
        raise PlanError(
            f"prompt {', '.join(map(str, prompts or PROMPTS))}, new {new}, repeats {repeats}, batches {list(batches)}: give at "
            "least 1, 2, 1 and 1"
        )
    variants, left_out = _that_fit(variants)
    workers: list[_Worker] = []
    try:
        for variant in variants:
            workers.append(worker := _Worker(variant, new))
            with _or_left_out(worker, workers, left_out):
                worker.ready()
        positions = min((w.positions for w in workers if w.positions), default=None)
        if fit and prompts and positions:
            prompts = [prompts[0], *(p for p in prompts[1:] if p + new <= positions)]
        prompts = _within(positions, prompts, new)
        found = _timed(workers, prompts, new, repeats, batches, progress, left_out)
    finally:
        for worker in workers:
            worker.end()
    runs = [(worker.variant, worker, *found[worker]) for worker in workers]
    ways = [r for r in runs if r[0].runs(variants[0].folder)] or runs[:1]
    first = prompts[0]

    def request(run: Any) -> float:
        """Seconds of a prompt and its new tokens at the first batch size."""
        prefill, decode = (Timing.of(run[2][stage, batches[0], first]).seconds for stage in ("prefill", "decode"))
        return batches[0] * (first / prefill + (new - 1) / decode)

    fastest = min(ways, key=request)
    runs = [fastest, *(r for r in runs if r is not fastest)]
    base = fastest[2]
    rows = []
    for variant, worker, kept, peak in runs:
        measured = [
            {
                "batch": batch,
                "prompt": prompt,
                **{
                    stage: _rate(kept[stage, batch, prompt], base[stage, batch, prompt])
                    for stage in ("prefill", "decode")
                },
            }
            for prompt in prompts
            for batch in batches
        ]
        rows.append(
            {
                "name": variant.name,
                "folder": variant.folder,
                "how": variant.how,
                "rival": variant.rival,
                "same_weights": variant.runs(variants[0].folder),
                "engine": worker.engine,
                "first_run_seconds": worker.first_run_seconds,
                "peak_memory_bytes": peak,
                "weights_bytes": _nbytes(variant),
                "kv_bytes_per_token": worker.kv_bytes_per_token,
                "positions": worker.positions,
                "prefill": measured[0]["prefill"],
                "decode": measured[0]["decode"],
                "batches": measured[: len(batches)],
                "longer": measured[len(batches) :],
            }
        )
    left_out += dict.fromkeys(worker.note for worker in workers if worker.note)
    return {
        "machine": machine(),
        "bytes_per_second": DeviceProfile.bandwidth(),
        "prompt": first,
        "new": new,
        "repeats": repeats,
        "variants": rows,
        "left_out": left_out,
    }


def _within(positions: int | None, prompts: Sequence[int] | None, new: int) -> tuple[int, ...]:
    """The lengths of prompts to measure. Raises PlanError for a prompt that with its new tokens exceeds the model's positions."""
    if prompts is None:
        short, long = PROMPTS
        long = min(long, (positions or long + new) - new)
        # lengths that hardly differ would say nothing of what length costs
        prompts = (short, long) if long >= 2 * short else (short,)
    if positions and max(prompts) + new > positions:
        raise PlanError(
            f"a prompt of {max(prompts)} tokens and {new} new ones were asked for, the model has {positions} positions; lower "
            "--prompt or --new"
        )
    return tuple(dict.fromkeys(prompts))


@contextmanager
def _or_left_out(worker: "_Worker", workers: "list[_Worker]", left_out: list[str]) -> Iterator[None]:
    """A context in which a worker is ended and taken from the list, with the reason, if it is a rival's and does not run."""
    try:
        yield
    except CheckpointError as error:
        if not worker.variant.rival:
            raise
        worker.end()
        workers.remove(worker)
        left_out.append(f"{worker.variant.name} was not run: {error}")


def _timed(
    workers: "list[_Worker]",
    prompts: Sequence[int],
    new: int,
    repeats: int,
    batches: Sequence[int],
    progress: Progress,
    left_out: list[str],
) -> "dict[_Worker, tuple[dict[tuple[str, int, int], list[float]], int]]":
    """{worker: (tokens a second by (stage, batch, prompt), peak memory)}. A rival's worker that fails, whenever, is taken away."""
    cells = [(batch, prompt) for prompt in prompts for batch in batches]
    runs = {prompt: repeats if prompt == prompts[0] else min(repeats, _LONGER_RUNS) for prompt in prompts}
    tick = ticker(progress, "runs", len(workers) * len(batches) * sum(n + 1 for n in runs.values()))
    # the first run of each cell warms up: allocator, threads, compiler
    for worker in list(workers):
        with _or_left_out(worker, workers, left_out):
            begin = time.perf_counter()
            for cell in cells:
                worker.run(*cell)
                tick()
            worker.first_run_seconds = time.perf_counter() - begin
    samples: dict[_Worker, dict[tuple[str, int, int], list[float]]] = {
        worker: {(stage, *cell): [] for cell in cells for stage in ("prefill", "decode")} for worker in workers
    }
    for number in range(1, repeats + 1):
        for batch, prompt in cells:
            if number > runs[prompt]:
                continue
            for worker in list(workers):
                with _or_left_out(worker, workers, left_out):
                    run, kept = worker.run(batch, prompt), samples[worker]
                    kept["prefill", batch, prompt].append(batch * prompt / run["first"])
                    kept["decode", batch, prompt].append(batch * (new - 1) / (run["all"] - run["first"]))
                    tick()
    found = {}
    for worker in list(workers):
        with _or_left_out(worker, workers, left_out):
            found[worker] = samples[worker], worker.finish()
    return found


def _rate(values: list[float], base: list[float]) -> dict[str, Any]:
    timing = Timing.of(values)
    # each sample over the first variant's sample of the same moment
    speedups = Timing.of([a / b for a, b in zip(values, base, strict=True)])
    return {
        "tokens_per_second": timing.seconds, "low": timing.low, "high": timing.high, "samples": values,
        "speedup": speedups.seconds, "speedup_low": speedups.low, "speedup_high": speedups.high,
    }  # fmt: skip


class _Worker:
    """A process with one model, which runs when told to and sleeps otherwise."""

    def __init__(self, variant: Variant, new: int) -> None:
        self.variant, self.kv_bytes_per_token = variant, 0
        self.positions: int | None = None
        self.engine: str | None = None
        self.note: str | None = None
        # of one run of every cell, in which a compiler compiles
        self.first_run_seconds = 0.0
        request = json.dumps({**variant.__dict__, "new": new})
        # a file and no pipe: nobody reads while the model runs, and a full pipe would stop it
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "secateurs.machine.bench", request],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
        )  # fmt: skip

    def _ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        if word:
            # of one that has died, the end of its output and what it said are below
            with suppress(BrokenPipeError):
                self.process.stdin.write(word + "\n")
                self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self.process.wait()
        self.said.seek(0)
        said = self.said.read().strip().splitlines()
        why = said[-1] if said else "it died"
        if code == -signal.SIGKILL:
            # it could say nothing, and its last line is about something else
            why = "it was killed (signal 9), as the system does when memory runs out"
        raise CheckpointError(f"{self.variant.folder} ({self.variant.how}) does not run: {why}")

    def ready(self) -> None:
        said = self._ask("")
        self.kv_bytes_per_token, self.positions = int(said["kv_bytes_per_token"]), said["positions"]
        self.engine, self.note = said.get("engine"), said.get("note")

    def run(self, batch: int, prompt: int) -> dict[str, float]:
        return self._ask(f"{batch} {prompt}")

    def finish(self) -> int:
        return int(self._ask("finish")["peak"])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            assert stream
            # the first may hold a word that nobody reads any more
            with suppress(OSError):
                stream.close()


def load(folder: str, how: str, dtype: str | None = None) -> Any:
    """The model as a variant asks for it, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from secateurs.kernels.packed_experts import run_one_by_one
    from secateurs.kernels.packed_linear import DenseLinear
    from secateurs.model.fused import packable_experts, split_experts

    precision = {"dtype": getattr(torch, dtype)} if dtype else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted(), **precision)
    packed = hasattr(model, "hf_quantizer")
    if not how.startswith("packed") and packed:
        model = model.dequantize()
    if how == "accelerated dense":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = DenseLinear
        able, _ = packable_experts(model)
        for name, transposed in able.items():
            owner, _, leaf = name.rpartition(".")
            split_experts(model.get_submodule(owner), leaf, transposed)
        run_one_by_one(model)
    if how in ("compiled", "packed compiled"):
        import torch._inductor.config as inductor

        inductor.freezing = True
        model.forward = torch.compile(model.forward, dynamic=False)
    return model.eval()


def _work(request: dict[str, Any]) -> None:
    run = llama_cpp.load if request["how"] == "llama.cpp" else partial(_in_transformers, request)
    seconds, facts = run(request["folder"], request["new"])
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() == "finish":
            print(json.dumps({"peak": peak_memory()}), flush=True)
            return
        print(json.dumps(seconds(*map(int, line.split()))), flush=True)


def _in_transformers(
    request: dict[str, Any], folder: str, new: int
) -> tuple[Callable[[int, int], dict[str, float]], dict[str, Any]]:
    """(seconds of so many prompts of so many tokens, facts on the model), through generate."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Clock(LogitsProcessor):  # type: ignore[misc]
        """Notes the time at which the logits of every new token are there."""

        def __init__(self) -> None:
            self.ticks: list[float] = []

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.ticks.append(time.perf_counter())
            return scores

    model = load(folder, request["how"], request["dtype"])
    words = model.get_input_embeddings()
    # the weight of a packed one is not a matrix
    vocabulary = getattr(words, "num_embeddings", None) or words.weight.shape[0]
    # an end that never comes; min_new_tokens would go through all logits of every token
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": vocabulary}
    if "compiled" in request["how"]:
        settings["cache_implementation"] = "static"

    def seconds(batch: int, prompt: int) -> dict[str, float]:
        """Seconds until the first new token, and until the last."""
        ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
        prompts = ids.expand(batch, -1).contiguous()
        clock = Clock()
        begin = time.perf_counter()
        with torch.no_grad():
            model.generate(
                prompts, max_new_tokens=new, attention_mask=torch.ones_like(prompts),
                logits_processor=LogitsProcessorList([clock]), **settings,
            )  # fmt: skip
        return {"first": clock.ticks[0] - begin, "all": clock.ticks[-1] - begin}

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    facts = {"kv_bytes_per_token": _kv_bytes_per_token(model), "positions": positions}
    if request["how"] == "packed" and (why := getattr(model.hf_quantizer, "why_not_fused", None)):
        facts["note"] = f"{request['name']} decodes module by module, where other models take one call a block: {why}"
    return seconds, facts


def _kv_bytes_per_token(model: Any) -> int:
    """Keys and values of all blocks for one token, in the model's dtype."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kept * width * model.dtype.itemsize)


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
