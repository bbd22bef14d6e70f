"""The seed experiments of the field's textbook chapter on pruning, on one random layer, reproduced to the digit.

numpy default_rng(0): W [256, 256] standard normal / 16 first, then X [4096, 256] standard normal. The error is
||X W' - X W_pruned'||_F / ||X W'||_F over those X; held-out inputs are the next 4096 draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateurs.matrix import patterns, scores, solvers
from secateurs.matrix.stats import Stats

SPARSITIES = (0.25, 0.5, 0.75, 0.9)
# what the textbook prints for magnitude at SPARSITIES
TEXTBOOK = (0.0921, 0.2687, 0.5270, 0.7475)


def layer() -> tuple[Tensor, Tensor, Tensor]:
    """weight_OI [256, 256], x_TI [4096, 256] and as many held-out inputs, in fp64."""
    rng = np.random.default_rng(0)
    weight_OI = rng.standard_normal((256, 256)) / np.sqrt(256)
    x_TI = rng.standard_normal((4096, 256))
    held_out_TI = rng.standard_normal((4096, 256))
    return torch.from_numpy(weight_OI), torch.from_numpy(x_TI), torch.from_numpy(held_out_TI)


@dataclass(frozen=True)
class Magnitude:
    """One row: error with exact counts; error and zeros with the textbook's threshold, which keeps |w| > sort(|w|)[k]."""

    pattern: str
    sparsity: float
    error: float
    zeros: int
    threshold_error: float | None = None
    threshold_zeros: int | None = None
    textbook: float | None = None


def magnitude() -> list[Magnitude]:
    """Magnitude pruning of the layer, scope layer, at SPARSITIES and 2:4.

    The textbook's threshold is itself the (k+1)-th smallest magnitude and is not kept, so it drops one weight more.
    """
    weight_OI, x_TI, _ = layer()
    rows = []
    for sparsity, printed in zip(SPARSITIES, TEXTBOOK, strict=True):
        pruned = solvers.masked(weight_OI, None, patterns.Unstructured("layer"), sparsity, scores.magnitude)
        size = weight_OI.abs()
        threshold = size.flatten().sort().values[int(sparsity * size.numel())]
        cut = weight_OI * (size > threshold)
        rows.append(
            Magnitude(
                "unstructured", sparsity, _error(x_TI, weight_OI, pruned), int((pruned == 0).sum()),
                _error(x_TI, weight_OI, cut), int((cut == 0).sum()), printed,
            )
        )  # fmt: skip
    pruned = solvers.masked(weight_OI, None, patterns.NM(2, 4), 0.5, scores.magnitude)
    rows.append(Magnitude("2:4", 0.5, _error(x_TI, weight_OI, pruned), int((pruned == 0).sum())))
    return rows


@dataclass(frozen=True)
class Iterative:
    """One way to prune to 75%: relative error on the inputs that the refit saw, and on held-out ones."""

    inputs: str
    way: str
    calibration: float
    held_out: float


def iterative(rounds: int = 5, sparsity: float = 0.75) -> list[Iterative]:
    """One-shot magnitude against pruning in rounds with a least-squares refit after each, on two layers.

    Inputs: the textbook's isotropic X, and the same X mixed by a fixed matrix with 16 strong directions, so that
    channels are correlated as activations of trained networks are. Refit sees X; held-out inputs judge it.
    """
    weight_OI, x_TI, held_out_TI = layer()
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((256, 256)) / 16)
    mixing_II = torch.eye(256, dtype=torch.float64) * 0.3 + noise[:, :16] @ noise[:16] * 4
    rows = []
    for name, mix_II in (("isotropic", torch.eye(256, dtype=torch.float64)), ("correlated", mixing_II)):
        seen_TI, unseen_TI = x_TI @ mix_II, held_out_TI @ mix_II
        stats = Stats.of(seen_TI)
        pattern = patterns.Unstructured("layer")

        def pruned(weight: Tensor, amount: float, pattern: patterns.Unstructured = pattern) -> Tensor:
            return solvers.masked(weight, None, pattern, amount, scores.magnitude)

        def refitted(start: Tensor, stats: Stats = stats) -> Tensor:
            return solvers.refit_exact(weight_OI, start, stats, damping=1e-6).double()

        one_shot = pruned(weight_OI, sparsity)
        stepwise = weight_OI
        for r in range(1, rounds + 1):
            # every round removes the same fraction of what is left
            stepwise = refitted(pruned(stepwise, 1 - (1 - sparsity) ** (r / rounds)))
        ways = (
            ("one-shot", one_shot),
            ("one-shot + refit", refitted(one_shot)),
            (f"{rounds} rounds with refit", stepwise),
        )
        rows += [
            Iterative(name, way, _error(seen_TI, weight_OI, w), _error(unseen_TI, weight_OI, w)) for way, w in ways
        ]
    return rows


def _error(x_TI: Tensor, weight_OI: Tensor, new_OI: Tensor) -> float:
    return float((x_TI @ (new_OI - weight_OI).T).norm() / (x_TI @ weight_OI.T).norm())
