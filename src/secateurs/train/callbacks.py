"""Callbacks that keep zeros, or prune, in the training loops of transformers and Lightning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.train.copies import Copy
from secateurs.train.held import Held, hold

# called when training begins, with the model and its optimizer: hold(), gradual(), dynamic()
Begin = Callable[[nn.Module, torch.optim.Optimizer], Any]


def trainer_callback(
    masks: Mapping[str, Tensor] | None = None, begin: Begin | None = None, copies: Sequence[Copy] = ()
) -> Any:
    """For transformers: Trainer(..., callbacks=[sc.train.trainer_callback()]). Calls hold() when training begins.

    begin: what to call instead, e.g. lambda model, optimizer: sc.train.gradual(model, optimizer, schedule); the callback's
    `pruner` is what it returned. copies: averages of the model that follow its masks (Held.follow()).
    masks: as for hold(). Raises ImportError without transformers; when training begins, what hold() or `begin` raises.

    Example:

        >>> import secateurs as sc
        >>> type(sc.train.trainer_callback()).__name__
        'HoldZeros'
    """
    from transformers import TrainerCallback

    class HoldZeros(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.pruner, self.held = _begun(_plain(model), _own(kwargs["optimizer"]), masks, begin)
            for copy in copies:
                self.held.follow(copy)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.held.release(*copies)

    return HoldZeros()


def lightning_callback(masks: Mapping[str, Tensor] | None = None, begin: Begin | None = None) -> Any:
    """For Lightning: Trainer(callbacks=[sc.train.lightning_callback()]). Calls hold() when training begins, or `begin` as above.

    What Lightning's StochasticWeightAveraging and WeightAveraging keep follows the masks, and so does the model that takes it over
    at the end. Each optimizer must own all parameters that are held; with several optimizers, call hold() yourself.
    masks: as for hold(). Raises ImportError without lightning; when training begins, what hold() or `begin` raises.

    Example:

        >>> import importlib.util, secateurs as sc
        >>> schedule = sc.train.cubic(0.8, begin=100, end=1000)
        >>> begin = lambda model, optimizer: sc.train.gradual(model, optimizer, schedule)
        >>> if importlib.util.find_spec("lightning"):
        ...     callback = sc.train.lightning_callback(begin=begin)
    """
    from lightning.pytorch import Callback

    class HoldZeros(Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            begun = [_begun(pl_module, optimizer, masks, begin) for optimizer in trainer.optimizers]
            self.pruners, self.held = [pruner for pruner, _ in begun], [held for _, held in begun]
            for other in trainer.callbacks:
                average = getattr(other, "_average_model", None)
                if isinstance(average, nn.Module):
                    for held in self.held:
                        held.follow(average)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for held in self.held:
                held.release()

    return HoldZeros()


def _begun(
    model: Any, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None, begin: Begin | None
) -> tuple[Any, Held]:
    """What begin() returns, or hold(); and the masks of that."""
    pruner = begin(model, optimizer) if begin else hold(model, optimizer, masks)
    return pruner, pruner if isinstance(pruner, Held) else pruner.held


def _own(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate's wrapper steps, whose hooks are called."""
    from accelerate.optimizer import AcceleratedOptimizer

    # by its class: an optimizer may have an attribute `optimizer` of its own
    found: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return found


def _plain(model: Any) -> Any:
    """The model inside a DDP or compiled one."""
    from accelerate.utils import extract_model_from_parallel

    while (inside := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inside
    return model
