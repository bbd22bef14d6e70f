"""Secateurs prunes neural networks to the sparsity that their hardware can cash in, and proves it."""

from secateurs import patterns, scores, solvers
from secateurs.errors import SecateursError
from secateurs.plan import Plan
from secateurs.prune import prune
from secateurs.report import Report
from secateurs.stats import Stats
from secateurs.verify import verify

__all__ = ["Plan", "Report", "SecateursError", "Stats", "patterns", "prune", "scores", "solvers", "verify"]
