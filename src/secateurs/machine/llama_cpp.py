"""llama.cpp, which people would run instead: a GGUF file through the package xllamacpp, timed by llama.cpp's own clock."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from secateurs.base.device import cpu_flags
from secateurs.base.errors import PlanError

PACKAGE = "xllamacpp"


def installed() -> bool:
    return find_spec(PACKAGE) is not None


def load(file: str, new: int) -> tuple[Callable[[int, int], dict[str, float]], dict[str, Any]]:
    """(seconds of so many prompts of so many tokens and of `new` more, facts on the model), as `bench` asks its workers for them.

    On as many threads as torch has here. Of several prompts at once, which llama.cpp runs in one batch, the median sequence's
    seconds. Raises PlanError where the package is not installed.
    """
    if not installed():
        raise PlanError(f"{file} runs in llama.cpp, whose package {PACKAGE} is not installed; pip install {PACKAGE}")
    import torch

    xllamacpp: Any = import_module(PACKAGE)
    fields = _fields(Path(file))
    generator = torch.Generator().manual_seed(0)
    # a server for each number of prompts at once; the last one is kept
    servers: dict[int, Any] = {}

    def server(batch: int) -> Any:
        if batch not in servers:
            servers.clear()
            settings = xllamacpp.CommonParams()
            settings.model.path, settings.n_parallel, settings.warmup = file, batch, False
            settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
            settings.n_ctx = batch * min(4096, fields["positions"])
            servers[batch] = xllamacpp.Server(settings)
        return servers[batch]

    def one(running: Any, ids: list[int]) -> Any:
        request = {"prompt": ids, "n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        answer = running.handle_completions(request)
        return (json.loads(answer) if isinstance(answer, str) else answer)["timings"]

    def seconds(batch: int, prompt: int) -> dict[str, float]:
        running = server(batch)
        prompts = torch.randint(0, fields["words"], (batch, prompt), generator=generator).tolist()
        with ThreadPoolExecutor(batch) as threads:
            times = list(threads.map(lambda ids: one(running, ids), prompts))
        # the first new token comes with the prompt
        first = median(t["prompt_ms"] for t in times) / 1e3
        rest = median(t["predicted_ms"] / (t["predicted_n"] - 1) for t in times) / 1e3
        return {"first": first, "all": first + rest * (new - 1)}

    names = ("kv_bytes_per_token", "positions")
    return seconds, {**{name: fields[name] for name in names}, **_build(xllamacpp)}


def _build(package: Any) -> dict[str, Any]:
    """What it was built of and for: {"engine": in words, "note": what its build lacks of this CPU's instructions, or None}."""
    uses = re.findall(r"(\w+) = 1", str(package.get_system_info()))
    version = getattr(package, "__version__", "of unknown version")
    lacks = "avx512f" in cpu_flags() and not any(name.startswith("AVX512") for name in uses)
    note = (
        f"llama.cpp of {PACKAGE} {version} is built without AVX-512, which this CPU has: one built here may be faster"
        if lacks
        else None
    )
    return {"engine": f"llama.cpp of {PACKAGE} {version}, built with {', '.join(uses)}", "note": note}


def _fields(file: Path) -> dict[str, int]:
    """What a GGUF file says of its model: positions, words of its vocabulary, bytes of keys and values a token (fp16)."""
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def value(name: str) -> Any:
        return next((f.contents() for k, f in reader.fields.items() if k.endswith(name)), None)

    heads, width = value(".attention.head_count"), value(".embedding_length")
    kept = value(".attention.head_count_kv") or heads
    key = value(".attention.key_length") or width // heads
    words = next(int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight")
    return {
        "positions": int(value(".context_length")),
        "words": words,
        "kv_bytes_per_token": 2 * 2 * int(value(".block_count")) * int(kept) * int(key),
    }
