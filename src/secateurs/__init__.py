"""Secateurs prunes neural networks to the sparsity that their hardware can cash in, and proves it."""

# importing hf registers the packed format with transformers
from secateurs import formats, hf, kernels, patterns, scores, solvers, train
from secateurs.decide import DecidePlan, decide
from secateurs.errors import SecateursError
from secateurs.linear import accelerate
from secateurs.pack import pack_run
from secateurs.plan import Plan
from secateurs.prune import prune
from secateurs.report import Report
from secateurs.stats import Stats
from secateurs.structured.channels import shrink_module
from secateurs.structured.shrink import ShrinkPlan, shrink
from secateurs.verify import verify

__all__ = [
    "DecidePlan",
    "Plan",
    "Report",
    "SecateursError",
    "ShrinkPlan",
    "Stats",
    "accelerate",
    "decide",
    "formats",
    "hf",
    "kernels",
    "pack_run",
    "patterns",
    "prune",
    "scores",
    "shrink",
    "shrink_module",
    "solvers",
    "train",
    "verify",
]
