"""Secateurs prunes neural networks to the sparsity that their hardware can cash in, and proves it."""

# importing the plugin registers the packed format with transformers
from secateurs import kernels, train
from secateurs.base.errors import SecateursError
from secateurs.decide.decide import decide
from secateurs.decide.plan import DecidePlan
from secateurs.kernels import formats
from secateurs.matrix import patterns, scores, solvers
from secateurs.matrix.stats import Stats
from secateurs.pack import plugin as _plugin  # noqa: F401
from secateurs.pack.folder import pack_run
from secateurs.pack.live import accelerate
from secateurs.prune.plan import Plan
from secateurs.prune.prune import prune
from secateurs.prune.record import Report
from secateurs.prune.verify import verify
from secateurs.quality.settings import Calibration, Evaluation
from secateurs.shrink.channels import shrink_module
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink
from secateurs.shrink.saved import load_shrunk, save_shrunk
from secateurs.train.recover_module import recover_module

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "DecidePlan",
    "Evaluation",
    "Plan",
    "Report",
    "SecateursError",
    "ShrinkPlan",
    "Stats",
    "accelerate",
    "decide",
    "formats",
    "kernels",
    "load_shrunk",
    "pack_run",
    "patterns",
    "prune",
    "recover_module",
    "save_shrunk",
    "scores",
    "shrink",
    "shrink_module",
    "solvers",
    "train",
    "verify",
]
