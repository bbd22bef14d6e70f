"""How long a run takes on more ranks, and what it needs: formulas held against measurements, and a simulation.

    .venv/bin/python bench/scale.py --measure [--shared SHARED]     # writes results/scale.json, minutes on one thread
    .venv/bin/python bench/scale.py                                 # prints the tables of docs/scale.md from it

Measured are CPU seconds of one thread: of a batch's passes through each block of a small model, of each of its layers' solvers, of
what no rank shares; and of one solver and one pass at several widths. A block takes, as prune/run.py runs it,

    ceil(batches / ranks) * pass + the busiest rank's layers (model/sharing.py deals them) + unshared + messages

Messages: their bytes over a bandwidth, and a latency for each.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "scale.json"
BATCH = 4096
# of the products of a Gram matrix this part is formed and held, in 8 bytes
HALF = 0.583
# layers on one input
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


# ---------------------------------------------------------------------------------------------------------- measurements


def timed(do, repeats: int = 3) -> float:
    """The least CPU seconds of several runs."""
    found = []
    for _ in range(repeats):
        began = time.thread_time()
        do()
        found.append(time.thread_time() - began)
    return min(found)


def measure_model(arguments) -> dict:
    """Prune a model with one thread: CPU seconds between ticks of progress, bytes on disk."""
    sys.path.insert(0, str(ROOT / "tests"))
    from plans import asked

    from secateurs.model.checkpoint import Checkpoint
    from secateurs.model.walk import layers_at
    from secateurs.prune import block as module
    from secateurs.prune.plan import Plan
    from secateurs.prune.run import Run

    plan = asked(
        Plan, str(arguments.model), method="sparsegpt", calibration=str(arguments.shared / "data" / "tinyshakespeare.txt"),
        samples=arguments.samples, seqlen=256, eval_windows=0,
    )  # fmt: skip
    times: list[float] = []
    seconds: dict[str, float] = {}
    most, solve_one = 0, module.prune_layer

    def prune_layer(layer, *given):
        began = time.thread_time()
        found = solve_one(layer, *given)
        seconds[layer.name] = time.thread_time() - began
        return found

    module.prune_layer = prune_layer
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "run" / "work"

        def progress(label: str, done: int, total: int) -> None:
            nonlocal most
            if label == "pruning":
                times.append(time.thread_time())
                most = max(most, sum(f.stat().st_size for f in (work / "activations").rglob("*.safetensors")))

        source = Checkpoint(arguments.model)
        model = source.skeleton()
        shapes = [[(y.name, *y.shape) for y in layers_at(model, name)] for name in source.block_names(model)]
        width = model.get_input_embeddings().weight.shape[1]
        Run(plan, Path(folder) / "run", progress).complete()
    batches = -(-arguments.samples * 256 // BATCH)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    blocks = []
    # the last block goes on to nothing
    for i, layers in enumerate(shapes[:-1]):
        # a tick for each batch that is observed, then one for each that goes on; the first of each has what comes before it
        here = gaps[2 * batches * i : 2 * batches * (i + 1)]
        passes = statistics.median(here[1:batches]) + statistics.median(here[batches + 1 :])
        solve = [[name, outputs, inputs, seconds[name]] for name, outputs, inputs in layers]
        rest = sum(here) - batches * passes - sum(x[3] for x in solve)
        blocks.append({"pass": passes, "layers": solve, "unshared": max(0.0, rest)})
    tokens = arguments.samples * 256
    return {"batches": batches, "tokens": tokens, "width": width, "activations": most, "blocks": blocks}


def measure_widths() -> list[dict]:
    """One layer's solver and one batch's products at several widths."""
    import torch

    from secateurs.matrix import solvers
    from secateurs.matrix.patterns import Unstructured
    from secateurs.matrix.stats import Stats

    found = []
    for width in (256, 512, 1024, 2048):
        x_TI, weight_OI = torch.randn(BATCH, width), torch.randn(width, width)
        stats = Stats.of(x_TI)
        solver = solvers.find("sparsegpt")

        def solve(weight_OI=weight_OI, stats=stats, solver=solver):
            solver.solve(weight_OI, Stats(stats.tokens, stats.sqnorm_I, stats.gram_II), Unstructured(), 0.5, 0.01)

        row = {"width": width, "solve": timed(solve), "product": timed(lambda x=x_TI, w=weight_OI: x @ w.T)}
        grown = Stats.zeros(width, True)
        row["gram"] = timed(lambda x=x_TI, grown=grown: grown.add_(x))
        row["gram_bytes"] = 8 * sum(panel.numel() for panel in _grown(x_TI)) / width**2
        found.append(row)
        print(row, flush=True)
    return found


def _grown(x_TI):
    from secateurs.matrix.stats import Stats

    stats = Stats.zeros(x_TI.shape[1], True)
    stats.add_(x_TI)
    return stats._growing.panels


# ------------------------------------------------------------------------------------------------------------ simulation


def groups_of(layers: list) -> list[list]:
    """Layers that share a Gram matrix."""
    found: dict[str, list] = {}
    for layer in layers:
        parent, _, kind = layer[0].rpartition(".")
        found.setdefault(f"{parent}.{SHARED.get(kind, kind)}", []).append(layer)
    return list(found.values())


class _Layer:
    def __init__(self, name: str, outputs: int, inputs: int, *_: float) -> None:
        self.name, self.shape = name, (outputs, inputs)


def busiest(layers: list, ranks: int) -> float:
    from secateurs.model.sharing import dealt

    owner = dealt([[_Layer(*layer) for layer in group] for group in groups_of(layers)], ranks)
    load = [0.0] * ranks
    for name, _, _, seconds in layers:
        load[owner[name]] += seconds
    return max(load)


def traffic(layers: list, itemsize: int) -> tuple[float, float]:
    """Bytes of a block's sums, each to one rank, and of its weights, to all."""
    sums = sum(8 * HALF * group[0][2] ** 2 for group in groups_of(layers))
    return sums, float(sum(itemsize * outputs * inputs for _, outputs, inputs, _ in layers))


def seconds_of(blocks: list[dict], batches: int, ranks: int, gigabytes: float, latency: float) -> dict[str, float]:
    total = dict.fromkeys(("passes", "solvers", "unshared", "messages"), 0.0)
    for block in blocks:
        times = block.get("times", 1)
        total["passes"] += times * -(-batches // ranks) * block["pass"]
        total["solvers"] += times * busiest(block["layers"], ranks)
        total["unshared"] += times * block["unshared"]
        if ranks > 1:
            sums, weights = traffic(block["layers"], 2)
            # two for each layer's weights and sums, and some that agree
            total["messages"] += times * (
                (sums + weights) / (gigabytes * 1e9) + latency * (2 * len(block["layers"]) + 8)
            )
    return total


def llama(width: int, inner: int, keys: int) -> list[tuple[str, int, int]]:
    return [
        ("attn.q_proj", width, width), ("attn.k_proj", keys, width), ("attn.v_proj", keys, width), ("attn.o_proj", width, width),
        ("mlp.gate_proj", inner, width), ("mlp.up_proj", inner, width), ("mlp.down_proj", width, inner),
    ]  # fmt: skip


def experts(width: int, inner: int, count: int, attention: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return attention + [
        (f"experts.{i}.{name}", *shape)
        for i in range(count)
        for name, shape in (("gate_up", (2 * inner, width)), ("down_proj", (width, inner)))
    ]


# as config.json says: blocks, layers of one, (experts, those that a token meets)
MODELS = {
    "Llama-3-8B": (32, llama(4096, 14336, 1024), None),
    "Llama-3-70B": (80, llama(8192, 28672, 1024), None),
    "Llama-3-405B": (126, llama(16384, 53248, 1024), None),
    "Qwen3-235B-A22B": (
        94, experts(4096, 1536, 128, [("attn.q_proj", 8192, 4096), ("attn.k_proj", 512, 4096), ("attn.v_proj", 512, 4096),
                                       ("attn.o_proj", 4096, 8192)]), (128, 8),
    ),
    "1000B-A32B, as Kimi-K2": (
        61, experts(7168, 2048, 384, [("attn.q_a_proj", 1536, 7168), ("attn.q_b_proj", 12288, 1536),
                                       ("attn.kv_a_proj", 576, 7168), ("attn.o_proj", 7168, 8192)]), (384, 8),
    ),
}  # fmt: skip


def arithmetic(name: str, tokens: int, rate: float, disk: float) -> tuple[list[dict], dict[str, float]]:
    """A model's blocks as seconds on a rank of `rate` FLOP/s, by the formulas, and what a rank needs. disk: bytes a second."""
    count, layers, routed = MODELS[name]
    share = 1.0 if routed is None else routed[1] / routed[0]

    def met(layer: tuple[str, int, int]) -> float:
        return share if layer[0].startswith("experts") else 1.0

    weights = sum(o * i for _, o, i in layers)
    active = sum(met(layer) * layer[1] * layer[2] for layer in layers)
    groups = groups_of([[*layer, 0.0] for layer in layers])
    gram = sum(met(tuple(group[0][:3])) * 2 * HALF * group[0][2] ** 2 for group in groups)
    # two passes forward, and the Gram matrices
    each = BATCH * (4 * active + gram) / rate
    solve = [[n, o, i, 2 * (o * i * i + i**3) / rate] for n, o, i in layers]
    block = {"pass": each, "layers": solve, "unshared": 2 * 2 * weights / disk, "times": count}
    widest = max(i for _, _, i in layers)
    needs = {
        "weights of a block": 2 * weights,
        "sums": sum(8 * HALF * group[0][2] ** 2 for group in groups),
        "norms alone": sum(8 * group[0][2] for group in groups),
        "solver": max(4 * (3 * o * i + 3 * i * i) for _, o, i in layers),
        "activations on disk": 2 * 2 * tokens * (layers[0][2]),
        "model": 2 * count * weights,
        "widest": widest,
    }
    return [block], needs


# ---------------------------------------------------------------------------------------------------------------- tables


def table(blocks: list[dict], batches: int, gigabytes: float, latency: float, unit: float, digits: int) -> None:
    print("| ranks | passes | solvers | unshared | messages | whole | times as fast |")
    print("|---|---|---|---|---|---|---|")
    one = None
    for ranks in (1, 2, 8, 64):
        parts = seconds_of(blocks, batches, ranks, gigabytes, latency)
        whole = sum(parts.values())
        one = one or whole
        cells = " | ".join(f"{value / unit:.{digits}f}" for value in (*parts.values(), whole))
        print(f"| {ranks} | {cells} | {one / whole:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "secateurs" / "small-lm" / "model"))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--gigabytes", type=float, default=1.25, help="a second between two ranks; 1.25 is 10 Gbit/s")
    parser.add_argument("--latency", type=float, default=5e-4, help="seconds of a message")
    parser.add_argument("--rate", type=float, default=3.2e12, help="FLOP/s of a rank of the large models")
    parser.add_argument("--disk", type=float, default=2e9, help="bytes a second, of every rank")
    arguments = parser.parse_args()
    if arguments.measure:
        import torch

        torch.set_num_threads(1)
        found = {"widths": measure_widths(), "model": measure_model(arguments)}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    print(
        "\nwidth, GFLOP/s of 2 (I^3 + O I^2), of a product, of a Gram matrix; bytes a number of a growing Gram matrix"
    )
    for row in found["widths"]:
        cube = 2 * row["width"] ** 3
        rates = (
            2 * cube / row["solve"],
            2 * BATCH * row["width"] ** 2 / row["product"],
            2 * HALF * BATCH * row["width"] ** 2 / row["gram"],
        )
        print(row["width"], *(f"{rate / 1e9:.1f}" for rate in rates), f"{row['gram_bytes']:.2f}")
    model = found["model"]
    print(f"\nactivations on disk: {model['activations']} bytes, formula {2 * 2 * model['tokens'] * model['width']}")
    for batches in (model["batches"], 512):
        print(f"\nthe small model, {batches} batches, seconds")
        table(model["blocks"], batches, arguments.gigabytes, arguments.latency, 1.0, 2)
    tokens = 512 * 2048
    for name in MODELS:
        blocks, needs = arithmetic(name, tokens, arguments.rate, arguments.disk)
        print(
            f"\n{name}: "
            + ", ".join(f"{what} {value / 1e9:.2f} GB" for what, value in needs.items() if what != "widest")
        )
        table(blocks, tokens // BATCH, arguments.gigabytes, arguments.latency, 3600.0, 2)


if __name__ == "__main__":
    main()
