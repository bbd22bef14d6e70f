"""Callbacks that keep zeros in the training loops of transformers and Lightning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateurs.train.held import hold


def trainer_callback(masks: Mapping[str, Tensor] | None = None) -> Any:
    """For transformers: Trainer(..., callbacks=[sc.train.trainer_callback()]). Calls hold() when training begins."""
    from transformers import TrainerCallback

    class HoldZeros(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.held = hold(_plain(model), _own(kwargs["optimizer"]), masks)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.held.release()

    return HoldZeros()


def lightning_callback(masks: Mapping[str, Tensor] | None = None) -> Any:
    """For Lightning: Trainer(callbacks=[sc.train.lightning_callback()]).

    Each optimizer must own all parameters that are held; with several optimizers, call hold() yourself.
    """
    from lightning.pytorch import Callback

    class HoldZeros(Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.held = [hold(pl_module, optimizer, masks) for optimizer in trainer.optimizers]

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for held in self.held:
                held.release()

    return HoldZeros()


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
