"""Trains pruned models and keeps their zeros, or prunes models while they train.

recover trains a pruned folder. For loops of your own: hold, schedules, gradual and dynamic pruning, SR-STE, masked modules, LoRA
and lottery tickets.
"""

from secateurs.train.callbacks import lightning_callback, trainer_callback
from secateurs.train.held import Held, hold, take_over
from secateurs.train.lora import Lora, lora
from secateurs.train.lottery import Rounds, iterative
from secateurs.train.masked import MaskedLinear, finish, sr_ste
from secateurs.train.peft_layers import mask_peft
from secateurs.train.pruning import SCORES, dynamic, gradual
from secateurs.train.recover import recover
from secateurs.train.recover_plan import RecoverPlan
from secateurs.train.schedules import Ramp, Schedule, Steps, cubic, linear, one_step, rounds

__all__ = [
    "SCORES",
    "Held",
    "Lora",
    "MaskedLinear",
    "Ramp",
    "RecoverPlan",
    "Rounds",
    "Schedule",
    "Steps",
    "cubic",
    "dynamic",
    "finish",
    "gradual",
    "hold",
    "iterative",
    "lightning_callback",
    "linear",
    "lora",
    "mask_peft",
    "one_step",
    "recover",
    "rounds",
    "sr_ste",
    "take_over",
    "trainer_callback",
]
