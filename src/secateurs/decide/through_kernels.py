"""Quality of a packed folder through the kernels that multiply it, with few tokens at once and with many, on a few windows.

Evaluation reads a folder's plain weights. Kernels of integers round their inputs to 8 bits, too, which this measures.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateurs.base.files import write_json
from secateurs.base.progress import Progress, no_bars, silent, ticker
from secateurs.kernels.dispatch import select
from secateurs.kernels.packed_linear import PackedLinear
from secateurs.machine.bench import load
from secateurs.model.checkpoint import Checkpoint
from secateurs.quality import texts
from secateurs.quality.settings import Evaluation

WINDOWS = 4
# of a window
TOKENS = 128
# up to so many tokens at once every instruction set has kernels for few
FEW = 4


def of_run(run: Path, dense: str, asked: Evaluation, progress: Progress = silent) -> dict[str, Any] | None:
    """What run/packed predicts beside the dense model, in run/through.json: {"windows", "tokens", "plain", "few", "many"}.

    plain: the same weights without kernels. Each has kl and ppl_ratio (means over all tokens), few and many also tokens (at once)
    and kernels. None where nothing is measured on text, or the model keeps no cache of keys and values.
    """
    file = run / "through.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    if not asked.windows:
        return None
    source = Checkpoint(dense)
    length = min(TOKENS, asked.length(source.skeleton()))
    text = texts.load(asked.text, source.tokenizer(), min(WINDOWS, asked.windows), length, None, "held-out")
    models = {"dense": (dense, length), "plain": (str(run / "model"), length)}
    models |= {"few": (str(run / "packed"), FEW), "many": (str(run / "packed"), length)}
    tick = ticker(progress, "through the kernels", len(models) * len(text.windows))
    logits: dict[str, list[Tensor]] = {}
    used: dict[str, list[str]] = {}
    for name, (folder, at_once) in models.items():
        with no_bars():
            model = load(folder, "packed" if name in ("few", "many") else "dense")
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            return None
        used[name] = _kernels(model, at_once)
        logits[name] = []
        for ids in text.windows:
            logits[name].append(predict(model, ids, at_once))
            tick()
        # before the next one is loaded
        del model
    told: dict[str, Any] = {"windows": len(text.windows), "tokens": length}
    for name in ("plain", "few", "many"):
        told[name] = difference(logits["dense"], logits[name], list(text.windows))
        if name != "plain":
            told[name] |= {"at_once": models[name][1], "kernels": used[name]}
    write_json(file, told)
    return told


def predict(model: Any, ids: Tensor, at_once: int) -> Tensor:
    """Logits [S, V] in fp32 of one window [S], with so many tokens in a call; what came before is in the cache."""
    cache, found = None, []
    with torch.no_grad():
        for part in torch.split(ids[None], at_once, 1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0].float())
    return torch.cat(found)


def difference(dense: list[Tensor], ours: list[Tensor], windows: list[Tensor]) -> dict[str, float]:
    """KL of predictions to the dense model's, and perplexity over its, over all tokens but the first of each window."""
    kl = nats = 0.0
    count = 0
    for p, q, ids in zip(dense, ours, windows, strict=True):
        p, q = p[:-1].double().log_softmax(-1), q[:-1].double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        nats += float((p - q).gather(1, ids[1:, None]).sum())
        count += len(ids) - 1
    return {"kl": kl / count, "ppl_ratio": float(torch.tensor(nats / count).exp())}


def _kernels(model: Any, tokens: int) -> list[str]:
    """The kernels that multiply its packed layers, so many tokens at once."""
    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            found.setdefault(select(module.packed(), tokens).name)
    return list(found)
