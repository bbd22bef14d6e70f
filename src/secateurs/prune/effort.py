"""How much work one-shot pruning does for accuracy: presets, as data. `secateurs methods` prints this table.

A plan's own choices win over its effort's. Costs are times of the pruning stage over plain SparseGPT's of 64 windows, measured on
SmolLM2-135M with 64 windows of 512 tokens, `best` with 384 (docs/quality.md).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """method, sensitivity, blend, permute, reconstruct, distill, allocation: as in Plan; fixed_*: where the pattern fixes every
    layer's zeros (N:M), so that there is nothing to share out. cost, fixed_cost: as measured; empty where nobody did. memory:
    what is held.
    """

    name: str
    method: str
    about: str
    sensitivity: int = 0
    blend: float = 0.0
    permute: bool = False
    reconstruct: int = 0
    fixed_reconstruct: int = 0
    distill: int = 0
    allocation: str = "uniform"
    cost: str = ""
    fixed_cost: str = ""
    memory: str = "a block"


# what a plan that names its method gets: that, and nothing else
PLAIN = Effort("plain", "", "the method that was named and nothing else")

EFFORTS: dict[str, Effort] = {
    e.name: e
    for e in (
        Effort("fast", "wanda+refit", "Wanda's mask, survivors refit", cost="1.2 to 1.5x", fixed_cost="1.1 to 1.4x"),
        Effort(
            "balanced", "admm",
            "ADMM; zeros go where the model's loss depends least on them; with N:M inputs are reordered, blocks tuned",
            sensitivity=4096, permute=True, fixed_reconstruct=24, allocation="global", cost="1.5 to 1.7x", fixed_cost="1.8 to 2.0x",
        ),
        Effort(
            "best", "alps",
            "ALPS; every block tuned against the dense one, then all together against its predictions (16 bytes a weight)",
            sensitivity=8192, permute=True, reconstruct=32, fixed_reconstruct=32, distill=384,
            allocation="global", cost="18 to 24x", fixed_cost="19 to 23x", memory="the model",
        ),
    )
}  # fmt: skip
