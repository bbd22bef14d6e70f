"""What zoo.py holds against a small model of a type: a run of the product, and the same worked out by hand on the whole model.

A check returns a note, raises SecateursError where the product refuses, and Wrong where it gives something else than by hand.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.base.errors import SecateursError, said
from secateurs.model.activations import InMemory
from secateurs.model.blocks import blocks_of
from secateurs.model.discover import layout_of
from secateurs.model.layers import kind_of
from secateurs.model.made_up import inputs, uncached
from secateurs.model.walk import stream
from secateurs.pack.folder import pack
from secateurs.shrink.mixture import Mixture, never

# floats may differ by so much of the largest: sums in another order, through a few layers
CLOSE = 5e-5
# the least share of a mask that is alike where two Gram matrices are summed in another order; all of it in the types looked at
ALIKE = 0.995


class Wrong(Exception):
    """The product's result is not what was worked out by hand, and it said nothing."""


class NotHere(Exception):
    """What is checked does not occur in this type, or transformers itself cannot do it."""


@dataclass
class Case:
    """A small model as a folder, as a whole in memory, inputs for it, and what calibrates it. runs: reports by name. more: inputs
    with images in a text, where it takes those.
    """

    model: Any
    folder: Path
    batches: list[dict[str, Tensor]]
    calibration: str
    text: str
    work: Path
    runs: dict[str, Any] = field(default_factory=dict)
    more: list[dict[str, Tensor]] = field(default_factory=list)

    def plan(self, **options: Any) -> sc.Plan:
        asked = sc.Calibration(self.calibration, samples=8, seqlen=32)
        return sc.Plan(calibration=asked, evaluation=sc.Evaluation(self.text, windows=0), **options)

    def prune(self, name: str, **options: Any) -> sc.Report:
        return sc.prune(self.folder, self.plan(**options), self.work / name)

    def load(self, folder: Path) -> Any:
        cls = type(self.model)
        found, info = cls.from_pretrained(folder, output_loading_info=True)
        wrong = {k: info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)}
        if wrong:
            raise Wrong(f"the saved folder loads with {wrong}"[:300])
        return found.eval()


# ---------------------------------------------------------------------------------------------------------------- outputs


def outputs(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """All tensors of numbers that the model gives."""
    from torch.utils._pytree import tree_leaves

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = model(**batch, **uncached(model))
    leaves = tree_leaves(tuple(found.values()) if isinstance(found, dict) else found)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def same(got: list[Tensor], want: list[Tensor], what: str) -> None:
    if len(got) != len(want):
        raise Wrong(f"{what}: {len(got)} outputs, not {len(want)}")
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        if x.shape != y.shape:
            raise Wrong(f"{what}: output {i} has shape {list(x.shape)}, not {list(y.shape)}")
        finite = torch.isfinite(y)
        size = float(y[finite].abs().max()) if finite.any() else 0.0
        gap = float((x - y)[finite].abs().max()) if finite.any() else 0.0
        if not torch.equal(finite, torch.isfinite(x)) or not gap <= CLOSE * max(size, 1e-6):
            raise Wrong(f"{what}: output {i} is off by {gap:.2g} of {size:.2g}")


def same_model(got: Any, want: Any, case: Case, what: str) -> None:
    for batch in (*case.batches, *case.more):
        same(outputs(got, batch), outputs(want, batch), what)


# -------------------------------------------------------------------------------------------------------------- parameters


def weight_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The part of a parameter that a record of report.json names; a view of it."""
    for whole in (f"{name}.weight", name):
        if whole in tensors:
            return tensors[whole]
    whole, _, part = name.rpartition(".")
    if whole in tensors and part.isdigit():
        return tensors[whole][int(part)]
    if whole in tensors and part in ("query", "key", "value"):
        return tensors[whole].chunk(3)[("query", "key", "value").index(part)]
    raise Wrong(f"the report names {name}, and the model has no such parameter")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def counts(case: Case, report: sc.Report, loaded: Any) -> str:
    """The zeros of every layer are exactly as many as asked, and nothing is left out of the report."""
    tensors = parameters(loaded)
    named = set()
    for record in report.layers:
        weight = weight_of(tensors, record.name)
        if record.skipped is not None:
            continue
        zeros, want = int((weight == 0).sum()), round(record.sparsity * weight.numel())
        if abs(zeros - want) > 0 or record.kept != weight.numel() - zeros:
            raise Wrong(
                f"{record.name} has {zeros} zeros, {want} were asked, the report says {weight.numel() - record.kept}"
            )
    for record in report.layers:
        named.add(weight_of(tensors, record.name).untyped_storage().data_ptr())
    left = [n for n, p in tensors.items() if p.dim() > 1 and p.numel() and p.untyped_storage().data_ptr() not in named]
    if left:
        raise Wrong(f"{left[0]} is not in the report, pruned or skipped")
    weights = sum({p.data_ptr(): p.numel() for p in tensors.values() if p.dim() > 1}.values())
    return f"{sum(r.numel for r in report.pruned) / weights:.0%} of the weights"


@contextmanager
def edited(model: nn.Module) -> Iterator[Any]:
    """A copy of the whole model, to be edited in place."""
    with torch.no_grad():
        yield copy.deepcopy(model)


# ------------------------------------------------------------------------------------------------------------------ checks


def saved(case: Case) -> str:
    """transformers itself saves and loads it."""
    try:
        loaded = case.load(case.folder)
    except Exception as error:
        raise NotHere(f"transformers itself does not load what it saved: {said(error)}"[:300]) from None
    try:
        same_model(loaded, case.model, case, "loaded from its own folder")
    except Wrong as error:
        # what it loads is what the product is held to
        case.model = loaded
        raise NotHere(f"transformers itself loads another model than it saved: {error}") from None
    return ""


def streamed(case: Case) -> str:
    """What enters every block of a walk is what enters it in the whole model."""
    names, _ = blocks_of(case.model)
    if names == [""]:
        return "as a whole"
    for batch in (*case.batches, *case.more):
        entered: dict[str, list[Tensor]] = {name: [] for name in names}

        def see(name: str) -> Callable[..., None]:
            def hook(_: Any, args: Any, kwargs: Any) -> None:
                found = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
                hidden = kwargs.get("hidden_states")
                entered[name].append((found[0] if args or hidden is None else hidden).clone())  # noqa: B023

            return hook

        handles = [case.model.get_submodule(n).register_forward_pre_hook(see(n), with_kwargs=True) for n in names]
        try:
            outputs(case.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        store = InMemory()
        for step in stream(case.model, [batch], store=store):
            if entered[step.name]:
                same([step.inputs(0)], entered[step.name][:1], f"what enters {step.name}")
    return ""


def magnitude(case: Case) -> str:
    """The smallest half of every layer, masked by hand in the whole model."""
    report = case.prune("magnitude", method="magnitude", scope="layer")
    case.runs["magnitude"] = report
    loaded = case.load(case.work / "magnitude" / "model")
    note = counts(case, report, loaded)
    with edited(case.model) as hand:
        tensors = parameters(hand)
        for record in report.pruned:
            weight = weight_of(tensors, record.name)
            flat = weight.abs().flatten()
            smallest = flat.argsort(stable=True)[: round(record.sparsity * flat.numel())]
            weight.copy_(torch.where(_chosen(smallest, weight), 0.0, weight))
        _same_parameters(loaded, hand)
        same_model(loaded, hand, case, "pruned by magnitude")
    return note


def _chosen(places: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.reshape(like.shape)


def _same_parameters(got: nn.Module, want: nn.Module) -> None:
    mine = parameters(got)
    for name, tensor in parameters(want).items():
        if not torch.equal(mine[name], tensor):
            raise Wrong(f"{name} in the saved folder is not what was masked by hand")


def sparsegpt(case: Case) -> str:
    """The saved values in the whole model; and first and last block solved again from hooks on the whole model."""
    report = case.prune("sparsegpt", method="sparsegpt")
    loaded = case.load(case.work / "sparsegpt" / "model")
    note = counts(case, report, loaded)
    after = parameters(loaded)
    with edited(case.model) as hand:
        before = parameters(hand)
        pruned = {record.name for record in report.pruned}
        for name in pruned:
            weight_of(before, name).copy_(weight_of(after, name))
        _same_parameters(loaded, hand)
        same_model(loaded, hand, case, "pruned by sparsegpt")
    return note


def solved_in_memory(case: Case) -> str:
    """sparsegpt on the module in memory: every block's statistics from hooks on the whole model, solved again by hand."""
    live = copy.deepcopy(case.model)
    batches = [{k: v.clone() for k, v in batch.items()} for batch in case.batches]
    report = sc.prune(live, case.plan(method="sparsegpt", damping=0.1), calibration=batches)
    note = counts(case, report, live)
    names, _ = blocks_of(case.model)
    pruned = [r.name for r in report.pruned]
    owner = {
        name: max((b for b in names if b == "" or name.startswith(f"{b}.")), key=len, default=None) for name in pruned
    }
    order = list(dict.fromkeys(owner[name] for name in pruned))
    after = parameters(live)
    for block in {order[0], order[-1]}:
        with edited(case.model) as hand:
            # the walk solves block after block, on what the blocks before were left as
            before = parameters(hand)
            for name in pruned:
                if order.index(owner[name]) < order.index(block):
                    weight_of(before, name).copy_(weight_of(after, name))
            _solve_by_hand(hand, [n for n in pruned if owner[n] == block], batches, after)
    return note


def _solve_by_hand(model: Any, names: list[str], batches: list[dict[str, Tensor]], after: Mapping[str, Tensor]) -> None:
    modules = {n: model.get_submodule(n) for n in names if f"{n}.weight" in parameters(model)}
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) and m.weight.dim() == 2}
    seen: dict[str, list[Tensor]] = {n: [] for n in linear}
    handles = []
    for name, module in linear.items():

        def look(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen[name].append(x.reshape(-1, x.shape[-1]).clone())

        # a weight is met wherever a module holds it
        places = [m for m in model.modules() if getattr(m, "weight", None) is module.weight and kind_of(m)]
        handles += [place.register_forward_pre_hook(look, with_kwargs=True) for place in places]
    try:
        for batch in batches:
            outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in linear.items():
        if not seen[name]:
            continue
        x_TI = torch.cat(seen[name])
        want = sc.solvers.find("sparsegpt").solve(
            module.weight.detach().clone(), sc.Stats.of(x_TI), sc.patterns.parse("unstructured", "layer"), 0.5, 0.1
        )
        got = weight_of(after, name)
        alike = float(((got != 0) == (want != 0)).float().mean())
        if alike < ALIKE:
            raise Wrong(f"{name}: {alike:.0%} of the mask is that of hooks on the whole model")


def two_of_four(case: Case) -> str:
    """At most two of four neighbours in every row."""
    report = case.prune("2:4", method="wanda", pattern="2:4", allow_skips=True)
    loaded = case.load(case.work / "2:4" / "model")
    tensors = parameters(loaded)
    for record in report.pruned:
        weight = weight_of(tensors, record.name)
        if not any(_holds(x) for x in _rows_of(weight, record.shape)):
            raise Wrong(f"{record.name} keeps more than two of four")
    if not report.pruned:
        raise NotHere("no layer has a multiple of four inputs")
    return ""


def _rows_of(weight: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    if weight.dim() > 2:
        weight = weight.movedim(1, -1).flatten(1)
    return [x for x in (weight, weight.T) if tuple(x.shape) == tuple(shape)]


def _holds(weight_OI: Tensor) -> bool:
    return bool(((weight_OI.reshape(-1, 4) != 0).sum(1) <= 2).all())


def reordered(case: Case) -> str:
    """What is left of a reordered model, put back in its old places, gives the same."""
    report = case.prune("reordered", method="wanda", pattern="2:4", permute=True, allow_skips=True)
    loaded = case.load(case.work / "reordered" / "model")
    moved = [r for r in report.pruned if (r.note or "").startswith("inputs reordered")]
    if not moved:
        notes = [r.note for r in report.pruned if r.note]
        raise NotHere(notes[0] if notes else "no layer's inputs were reordered")
    with edited(case.model) as hand:
        _keep_what_is_left(hand, loaded, [r.name for r in report.pruned])
        same_model(loaded, hand, case, "reordered")
    return f"{len(moved)} layers"


def _keep_what_is_left(hand: nn.Module, loaded: nn.Module, names: list[str]) -> None:
    """Zero, in their old places, the weights whose values are gone."""
    before, after = parameters(hand), parameters(loaded)
    for name in names:
        weight, left = weight_of(before, name), weight_of(after, name)
        kept = torch.isin(weight, left[left != 0])
        if int(kept.sum()) != int((left != 0).sum()):
            raise Wrong(f"{name} has values that the dense model has not")
        weight.copy_(torch.where(kept, weight, 0.0))


def shrunk(case: Case, unit: str, budget: str) -> str:
    """The smaller model gives what the dense one gives without those units."""
    asked = sc.Calibration(case.calibration, samples=8, seqlen=32)
    plan = sc.ShrinkPlan(
        str(case.folder), budget, (unit,), "magnitude", refit=False, multiple=4, prompt=8, new=2,
        calibration=asked, evaluation=sc.Evaluation(case.text, windows=0),
    )  # fmt: skip
    report = sc.shrink(plan, case.work / f"shrunk {unit}")
    loaded = case.load(case.work / f"shrunk {unit}" / "model")
    size = sum(p.numel() for p in loaded.parameters())
    if size >= sum(p.numel() for p in case.model.parameters()):
        raise Wrong("the shrunk model is not smaller")
    kept = report["left"]["kept_layers"]
    with edited(case.model) as hand:
        names, _ = blocks_of(hand)
        if unit == "layers":
            _skip(hand, [n for i, n in enumerate(names) if i not in kept], case)
        else:
            after = parameters(loaded)
            for name, weight in parameters(hand).items():
                if weight.dim() > 1 and weight.shape != after[name].shape:
                    weight.copy_(torch.where(torch.isin(weight, after[name]), weight, 0.0))
        same_model(loaded, hand, case, f"shrunk by {unit}")
    return f"{size / sum(p.numel() for p in case.model.parameters()):.2f}x"


def without_experts(case: Case) -> str:
    """The smaller model gives what the dense one gives if it never chooses the experts that went."""
    asked = sc.Calibration(case.calibration, samples=8, seqlen=32)
    plan = sc.ShrinkPlan(
        str(case.folder), "params=0.97x", ("experts",), refit=False, prompt=8, new=2, calibration=asked,
        evaluation=sc.Evaluation(case.text, windows=0),
    )  # fmt: skip
    report = sc.shrink(plan, case.work / "shrunk experts")
    loaded = case.load(case.work / "shrunk experts" / "model")
    fused = layout_of(case.model).experts
    gone = {b["block"]: b["units"]["experts"]["removed"] for b in report["blocks"] if b["units"]}
    if not gone or not all(gone.values()):
        raise Wrong("a block with a mixture has lost no expert")
    with edited(case.model) as hand, ExitStack() as stack:
        for name, removed in gone.items():
            stack.enter_context(never([Mixture(hand.get_submodule(name), fused)], removed))
        same_model(loaded, hand, case, "without experts")
    return f"{report['left']['experts']} of {report['dense']['experts']} experts"


def _skip(model: Any, names: list[str], case: Case) -> None:
    """Make blocks hand on what they get."""
    for name in names:
        block = model.get_submodule(name)

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        block.register_forward_hook(hook, with_kwargs=True)


def packed(case: Case) -> str:
    """The packed folder loads in transformers and gives the same."""
    source = case.work / "magnitude" / "model"
    if "magnitude" not in case.runs:
        raise NotHere("nothing was pruned")
    result = pack(source, case.work / "packed")
    if not result["totals"]["layers_packed"]:
        raise NotHere(next((r["reason"] for r in result["layers"] if r.get("reason")), "no layer is a Linear"))
    same_model(case.load(case.work / "packed"), case.load(source), case, "packed")
    return f"{result['totals']['layers_packed']} layers"


CHECKS: dict[str, Callable[[Case], str]] = {
    "saved": saved,
    "streamed": streamed,
    "magnitude": magnitude,
    "sparsegpt": sparsegpt,
    "in memory": solved_in_memory,
    "2:4": two_of_four,
    "reordered": reordered,
    "neurons": lambda case: shrunk(case, "mlp", "params=0.93x"),
    "heads": lambda case: shrunk(case, "heads", "params=0.97x"),
    "layers": lambda case: shrunk(case, "layers", "params=0.85x"),
    "experts": without_experts,
    "packed": packed,
}


def check(name: str, case: Case) -> dict[str, str]:
    """{result: 'yes', 'refused', 'not here', 'wrong' or 'crash'; note}."""
    try:
        return {"result": "yes", "note": CHECKS[name](case)}
    except Wrong as error:
        return {"result": "wrong", "note": str(error)}
    except NotHere as error:
        return {"result": "not here", "note": str(error)}
    except SecateursError as error:
        return {
            "result": "refused",
            "note": str(error).replace(str(case.folder), "MODEL").replace(str(case.work), "DIR"),
        }
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)
        ours = next((f for f in reversed(where) if "secateurs/" in f.filename), where[-1])
        line = (str(error).strip().splitlines() or [""])[0]
        return {
            "result": "crash",
            "note": f"{type(error).__name__}: {line[:200]} ({Path(ours.filename).name}:{ours.lineno})",
        }


def case_of(model: Any, folder: Path, calibration: str, text: str, work: Path) -> Case:
    """A case with every kind of made-up input that the model runs on; the first kind alone calibrates it in memory."""
    batches, more = inputs(model), []
    with suppress(ValueError):
        more = inputs(model, "images and text")
    return Case(model, folder, batches, calibration, text, work, more=more)
