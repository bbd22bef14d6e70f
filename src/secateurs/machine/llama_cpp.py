"""llama.cpp, which people would run instead: a GGUF file through the package xllamacpp, timed by llama.cpp's own clock."""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateurs.base.errors import PlanError

PACKAGE = "xllamacpp"


def load(file: str, new: int) -> tuple[Callable[[int, int], dict[str, float]], dict[str, Any]]:
    """(seconds of a prompt of so many tokens and of `new` more, facts on the model), as `bench` asks its workers for them.

    One request at a time, on as many threads as torch has here. Raises PlanError where the package is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise PlanError(f"{file} runs in llama.cpp, whose package {PACKAGE} is not installed; pip install {PACKAGE}")
    import torch

    xllamacpp: Any = import_module(PACKAGE)
    fields = _fields(Path(file))
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_parallel, settings.warmup = file, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.n_ctx = min(4096, fields["positions"])
    server = xllamacpp.Server(settings)
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, prompt: int) -> dict[str, float]:
        if batch != 1:
            raise PlanError(f"llama.cpp was asked for {batch} prompts at once; here it runs one")
        ids = torch.randint(0, fields["words"], (prompt,), generator=generator).tolist()
        request = {"prompt": ids, "n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(request)
        times = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        # the first new token comes with the prompt
        first, rest = times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3
        return {"first": first, "all": first + rest * (new - 1) / (times["predicted_n"] - 1)}

    return seconds, {"kv_bytes_per_token": fields["kv_bytes_per_token"], "positions": fields["positions"]}


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
