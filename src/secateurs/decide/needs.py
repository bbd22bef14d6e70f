"""What a run of prune or shrink needs of a machine, step by step: memory, disk and time, from the model's config alone.

Sizes are those of the model on the meta device; which layers share their inputs, and so a Gram matrix, is seen on a small instance.
Memory is a process with its libraries (`base`) and what a step holds at its peak; see "How memory stays at one block" in
docs/design.md. Time is what is counted over what this machine does in a second (rates.py). I inputs, O outputs.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateurs.base.device import memory_bytes, peak_memory
from secateurs.base.errors import PlanError
from secateurs.decide.rates import Rates
from secateurs.model.batches import TOKENS_BACK, TOKENS_PER_BATCH, embeddings_of, text_config
from secateurs.model.blocks import LOGITS, inside
from secateurs.model.discover import Layout, layout_of
from secateurs.model.layers import EXPERTS, layers_of
from secateurs.model.miniature import inputs, small_instance
from secateurs.model.walk import OF_MEMORY, stream
from secateurs.prune.plan import Plan
from secateurs.shrink import experts, latency, refit_experts, units
from secateurs.shrink.config import flat
from secateurs.shrink.cuts import ACTIVE, cuts_of
from secateurs.shrink.plan import ShrinkPlan


@dataclass(frozen=True)
class Matrix:
    """Layers of one shape in a block. seen: how many have inputs of their own; used: the part of their products a token takes."""

    outputs: int
    inputs: int
    number: int = 1
    seen: int = 1
    expert: bool = False
    used: float = 1.0

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * self.number


@dataclass(frozen=True)
class Block:
    """A kind of block: how many there are, parameters of each, its matrices."""

    number: int
    parameters: int
    matrices: tuple[Matrix, ...]

    def multiplied(self) -> float:
        """Weights that a token is multiplied by."""
        return sum(m.weights * m.used for m in self.matrices)


@dataclass(frozen=True)
class Anatomy:
    """What a config says of a model. itemsize: bytes of a weight. outside: parameters outside the blocks. consumers: {kind of
    units: inputs of the layer that reads them in each block}.
    """

    itemsize: int
    outside: int
    hidden: int
    vocabulary: int
    blocks: tuple[Block, ...]
    consumers: dict[str, int]

    @property
    def parameters(self) -> int:
        return self.outside + sum(b.number * b.parameters for b in self.blocks)

    @property
    def layers(self) -> int:
        return sum(b.number for b in self.blocks)

    @classmethod
    def of(cls, model: Any, itemsize: int) -> "Anatomy":
        """That of a model without weights. itemsize: of its weights as stored. Raises PlanError if it has no list of blocks."""
        model.tie_weights()
        layout = layout_of(model)
        if not layout.lists:
            raise PlanError(
                f"{type(model).__name__} has no list of blocks: it is held as a whole, and needs twice its size"
            )
        sharing = _sharing(model, layout)
        text = text_config(model.config)
        active = next((x for n, x in flat(text) if ACTIVE.search(n) and type(x) is int), 0)
        kinds: dict[tuple[Any, ...], int] = {}
        made: dict[tuple[Any, ...], tuple[int, tuple[Matrix, ...]]] = {}
        inside_blocks = 0
        for name in inside(model, layout):
            block = model.get_submodule(name)
            key = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
            if key not in made:
                made[key] = sum(p.numel() for p in block.parameters()), _matrices(block, name, layout, sharing, active)
            kinds[key] = kinds.get(key, 0) + 1
            inside_blocks += made[key][0]
        blocks = tuple(Block(number, *made[key]) for key, number in kinds.items())
        table = embeddings_of(model)
        outside = sum(p.numel() for p in model.parameters()) - inside_blocks
        return cls(itemsize, outside, table.shape[1], table.shape[0], blocks, _consumers(model, layout))


def _consumers(model: Any, layout: Layout) -> dict[str, int]:
    if not layout.simple:
        return {}
    cuts = cuts_of(model)
    layers = cuts.layers(model.get_submodule(cuts.names[0]), cuts.names[0])
    found = {"mlp": cuts.neurons, "heads": cuts.attention, "queries": cuts.attention}
    return {kind: layers[rule.consumer].shape[1] for kind, rule in found.items() if rule}


def _sharing(model: Any, layout: Layout) -> dict[str, str]:
    """{a layer's name in its block: the one whose inputs it shares}, as seen on a small instance; of no use if none runs."""
    found: dict[str, str] = {}
    try:
        small: Any = small_instance(type(model), model.config)
        for step in stream(small, [inputs(small)[0]]):
            leader: dict[int, str] = {}
            for name, stats in step.observe(step.layers, gram=False).items():
                own = name.removeprefix(f"{step.name}.")
                found[own] = leader.setdefault(id(stats), own)
    # a class may raise anything; each layer then counts for itself, which is more
    except Exception:
        return {}
    return found


def _matrices(block: nn.Module, name: str, layout: Layout, sharing: dict[str, str], active: int) -> tuple[Matrix, ...]:
    found: dict[tuple[int, int, int, bool], list[int]] = {}
    number_of = 1
    for layer in layers_of(block, name, layout.experts):
        own = layer.name.removeprefix(f"{name}.")
        expert = layer.kind in EXPERTS
        leads = expert or sharing.get(own, own) == own
        if expert:
            number_of = layer.parameter.shape[0]
        entry = found.setdefault((*layer.shape, 0, expert), [0, 0])
        entry[0] += 1
        entry[1] += leads
    return tuple(
        Matrix(rows, columns, number, seen, expert, (active or number_of) / number_of if expert else 1.0)
        for (rows, columns, _, expert), (number, seen) in found.items()
    )


# ------------------------------------------------------------------------------------------------------------- what is needed


# bytes of a Gram matrix while it grows, by its inputs squared: fp32, and its upper half in fp64 (matrix/stats.py)
_GROWING = 8.7


@dataclass(frozen=True)
class Need:
    """What a step needs: bytes of memory at its peak, bytes of disk that it adds, seconds."""

    step: str
    memory: int
    disk: int
    seconds: float


@dataclass(frozen=True)
class _Machine:
    """base: bytes of a process that has imported everything; memory: bytes that there are."""

    base: int
    memory: int
    rates: Rates


def needs(anatomy: Anatomy, plan: Plan | ShrinkPlan, seqlen: int, evaluated: int, rates: Rates) -> list[Need]:
    """The steps of a run, in order. seqlen: tokens of a calibration window; evaluated: those of all evaluation windows."""
    here = _Machine(peak_memory(), memory_bytes(), rates)
    tokens = plan.calibration.count * seqlen
    steps = (
        _of_prune(anatomy, plan, tokens, here) if isinstance(plan, Plan) else _of_shrink(anatomy, plan, tokens, here)
    )
    if evaluated:
        steps.append(_evaluation(anatomy, evaluated, here))
    return steps


def _of_prune(a: Anatomy, plan: Plan, tokens: int, here: _Machine) -> list[Need]:
    found = [_sensitivity(a, min(tokens, plan.sensitivity), here)] if plan.sensitivity else []
    kind = plan.solver.needs
    memory, seconds, passes = 0, 0.0, 1
    for block in a.blocks:
        held, passes_here = _statistics(block, kind, here)
        passes = max(passes, passes_here)
        solving = max(_workspace(m, kind) for m in block.matrices)
        looking = _activations(a, block, min(tokens, TOKENS_PER_BATCH))
        tuned = 14 * block.parameters * a.itemsize // 2 if plan.reconstruct else 0
        growing = round(held * _GROWING / 8) if kind == "gram" else held
        memory = max(
            memory, here.base + 2 * block.parameters * a.itemsize + max(held + solving, growing + looking, tuned)
        )
        forward = 2 * block.multiplied() * tokens
        once = here.rates.products(forward * (1 + passes_here)) + here.rates.grams(_gram_flops(block, tokens, kind))
        solve = sum(m.number * here.rates.solve(plan.method or "", m.outputs, m.inputs, kind) for m in block.matrices)
        steps = here.rates.products(6 * block.multiplied() * tokens / plan.calibration.count * (plan.reconstruct or 0))
        seconds += block.number * (once + solve + steps)
    weights = a.parameters * a.itemsize
    states = tokens * a.hidden * a.itemsize
    stores = 2 + bool(plan.reconstruct) + 2 * bool(plan.blend)
    found.append(Need("pruning", memory, weights + stores * states, seconds + here.rates.moves(3 * weights)))
    if plan.distill:
        found.append(Need("tuning all blocks", here.base + weights + 16 * (a.parameters - a.outside), 0, 0.0))
    return found


def _of_shrink(a: Anatomy, plan: ShrinkPlan, tokens: int, here: _Machine) -> list[Need]:
    kinds = plan.units or units.USUAL
    found = [_sensitivity(a, min(tokens, 4096), here)]
    read = {a.consumers[kind] for kind in kinds if kind in a.consumers}
    weights, states = a.parameters * a.itemsize, tokens * a.hidden * a.itemsize
    # OBS holds the inverse and its products in fp64 beside the Gram matrix and its factor
    held = sum(4 * inputs**2 for inputs in read) + max((28 * inputs**2 for inputs in read), default=0)
    growing = round(sum(_GROWING * inputs**2 for inputs in read))
    memory, walk = 0, 0.0
    for block in a.blocks:
        looking = growing + _activations(a, block, min(tokens, TOKENS_PER_BATCH))
        if "experts" in kinds:
            number = min((m.number for m in block.matrices if m.expert), default=0)
            # inputs of the mixture, what it gave and gives, and what is missing; and what each expert makes of some of them
            fitted = min(tokens, refit_experts.TOKENS) * a.hidden * (a.itemsize + 12)
            looking = max(looking, experts.bytes_of(number, a.hidden) + fitted)
        memory = max(memory, here.base + 2 * block.parameters * a.itemsize + max(held, looking))
        walk += block.number * here.rates.products(2 * block.multiplied() * tokens)
    # one by one, a quarter of them; three quarters in rounds, for an estimate
    obs = a.layers * sum(here.rates.obs(inputs, inputs // 4, inputs // 4) for inputs in read)
    rough = a.layers * sum(here.rates.obs(inputs, 3 * inputs // 4, 144) for inputs in read)
    moves = here.rates.moves(weights)
    if read or "experts" in kinds:
        found.append(Need("what units cost", memory, 2 * states, walk + rough + moves))
    if "layers" in kinds:
        each = walk * 1024 / tokens / a.layers
        runs = a.layers**2 / 2 if plan.depth == "loss" else a.layers
        found.append(
            Need("what blocks cost", memory, (a.layers + 2) * 1024 * a.hidden * a.itemsize, runs * each + moves)
        )
    if len(kinds) > 1:
        inside = len([kind for kind in kinds if kind != "layers"])
        part = min(tokens, 8192) / tokens
        found.append(
            Need("checking the estimates", memory, weights, 2 * inside * (2 * part * walk + rough / 2 + 3 * moves))
        )
    found.append(Need("cutting", memory, weights + 2 * states, 2 * walk + obs + 3 * moves))
    # the dense model and the smaller one, a few blocks of each
    each = max(b.parameters for b in a.blocks) * a.itemsize
    timed = latency.depths(a.layers, each, weights, lambda: None)[-1] * each + a.outside * a.itemsize
    found.append(Need("timing", here.base + 2 * timed, 0, 12 * here.rates.moves(timed)))
    return found


def _sensitivity(a: Anatomy, tokens: int, here: _Machine) -> Need:
    largest = max(b.parameters for b in a.blocks) * a.itemsize
    activations = max(4 * _activations(a, b, TOKENS_BACK) for b in a.blocks)
    logits = min(TOKENS_BACK * a.vocabulary, LOGITS) * (3 * a.itemsize + 4) + a.outside * a.itemsize
    walked = sum(b.number * b.multiplied() for b in a.blocks)
    flops = 2 * tokens * (4 * walked + 3 * a.vocabulary * a.hidden)
    memory = here.base + max(2 * largest + activations, logits)
    disk = (a.layers + 1) * tokens * a.hidden * a.itemsize
    seconds = here.rates.products(flops) + here.rates.moves(2 * (a.parameters - a.outside) * a.itemsize)
    return Need("measuring sensitivity", memory, disk, seconds)


def _evaluation(a: Anatomy, tokens: int, here: _Machine) -> Need:
    largest = max(b.parameters for b in a.blocks) * a.itemsize
    logits = min(2048 * a.vocabulary, LOGITS) * (2 * a.itemsize + 8) + 2 * a.outside * a.itemsize
    states = 2 * 8 * 2048 * a.hidden * a.itemsize
    walked = sum(b.number * b.multiplied() for b in a.blocks) + a.vocabulary * a.hidden
    groups = -(-tokens // (8 * 2048))
    moves = here.rates.moves(2 * groups * a.parameters * a.itemsize)
    return Need(
        "evaluating", here.base + states + max(2 * largest, logits), 0, here.rates.products(4 * walked * tokens) + moves
    )


def _statistics(block: Block, kind: str, here: _Machine) -> tuple[int, int]:
    """Bytes of a block's statistics with their factors, and in how many passes they are collected."""
    if kind != "gram":
        return sum(4 * m.seen * m.inputs for m in block.matrices), 1
    plain, experts = (sum(8 * m.seen * m.inputs**2 for m in block.matrices if m.expert == e) for e in (False, True))
    room = here.memory // OF_MEMORY
    if experts <= room:
        return plain + experts, 1
    one = experts // max(m.number for m in block.matrices if m.expert)
    return plain + max(one, room), 1 + -(-experts // max(one, room // one * one))


def _workspace(m: Matrix, kind: str) -> int:
    """Bytes that one layer's solution takes beside its statistics: what factoring holds, and copies of the weights."""
    weights = m.outputs * m.inputs
    return max(12 * m.inputs**2 + 8 * weights if kind == "gram" else 0, 16 * weights)


def _activations(a: Anatomy, block: Block, tokens: int) -> int:
    """Bytes of what a batch is while a block runs: the widest layer's inputs and outputs, in fp32 where they are summed."""
    widest = max(m.inputs + m.outputs * m.used for m in block.matrices)
    return round(tokens * (widest * (a.itemsize + 2) + 4 * a.hidden))


def _gram_flops(block: Block, tokens: int, kind: str) -> float:
    return sum(1.2 * m.seen * m.used * tokens * m.inputs**2 for m in block.matrices) if kind == "gram" else 0.0
