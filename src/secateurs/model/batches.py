"""Token windows as batches, the keyword arguments that a model is called with: {name: [B, S]}.

B sequences, S positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import CalibrationError, PlanError

Batch = dict[str, Tensor]

# tokens that are run together; more use the cores better and take more memory
TOKENS_PER_BATCH = 4096

# tokens that are run backward together: their logits and the gradients of these are in memory at once
TOKENS_BACK = 1024


def first_windows(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first windows that hold at least this many tokens, in batches small enough for their logits and gradients."""
    taken: list[Batch] = []
    for batch in batches:
        windows, each = next(iter(batch.values())).shape[:2]
        wanted = min(windows, -(-tokens // each))
        tokens -= wanted * each
        step = max(1, TOKENS_BACK // each)
        for start in range(0, wanted, step):
            part = slice(start, min(start + step, wanted))
            # what has no entry for each window goes with all of them
            cut = {key: value[part] if value.shape[0] == windows else value for key, value in batch.items()}
            taken.append(cut)
        if tokens <= 0:
            break
    return taken


def placed(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one that was made under torch.inference_mode() as a copy, since gradients cannot pass it."""
    moved = x.to(device)
    return moved.clone() if moved.is_inference() else moved


def batched(windows: Tensor, parts: int = 1) -> list[Batch]:
    """Token windows [N, S] as batches in order: at least `parts`, if there are as many windows.

    The same batches for as many parts as there are, since products of other batches have other last bits.
    """
    found = torch.split(windows, max(1, TOKENS_PER_BATCH // windows.shape[1]))
    if len(found) < parts:
        found = torch.tensor_split(windows, min(len(windows), parts))
    return [{"input_ids": some} for some in found]


def window_length(asked: int | None, model: nn.Module, usual: int, flag: str) -> int:
    """Tokens of a window: as asked by `flag`, else `usual` or what the model's positions allow. Raises PlanError for too many."""
    config: Any = model.config
    stated = getattr(text_config(config), "max_position_embeddings", None)
    # XLNet says -1 for no limit
    positions = stated if stated and stated > 0 else None
    if asked is not None and positions is not None and asked > positions:
        raise PlanError(f"windows of {asked} tokens were asked for, the model has {positions} positions; lower {flag}")
    return asked or min(usual, positions or 2048)


def check_vocabulary(windows: Tensor, model: nn.Module) -> None:
    """Raises CalibrationError if the windows hold a token that the model does not know."""
    config: Any = model.config
    words = getattr(text_config(config), "vocab_size", None)
    if words is not None and int(windows.max()) >= words:
        raise CalibrationError(
            f"the tokenizer gives token {int(windows.max())}, the model knows {words}; they do not belong together"
        )


def embeddings_of(model: Any) -> Tensor:
    """The matrix whose rows a model's tokens are looked up in, [V, D]; Perceiver's latents, which are a parameter of their own."""
    found = model.get_input_embeddings()
    return found if isinstance(found, Tensor) else found.weight


def text_config(config: Any) -> Any:
    """The part of a config that is about text; the config itself where it has no parts."""
    return getattr(config, "text_config", None) or config
