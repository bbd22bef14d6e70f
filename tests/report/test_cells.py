"""Tables for a terminal."""

import io

from rich.console import Console

from secateurs.prune.record import LayerRecord, Report
from secateurs.report.run_tables import print_report


def test_a_cell_is_the_zeros_and_error_of_its_layers():
    """Experts of one parameter share a cell: 8 of 32 weights are left, and sqrt((0.3^2 + 0.1^2) / 2) = 0.224."""
    layers = [
        LayerRecord("model.layers.0.mlp.experts.down_proj.0", (4, 4), 0.75, 2, 0.3, "gram"),
        LayerRecord("model.layers.0.mlp.experts.down_proj.1", (4, 4), 0.75, 6, 0.1, "gram"),
        LayerRecord("model.layers.0.self_attn.q_proj", (4, 4), 0.0, 16, skipped="asked", skipped_by="plan"),
    ]
    plan = {"pattern": "unstructured", "method": "admm", "scope": "layer", "allocation": "global", "effort": "balanced"}
    console = Console(file=io.StringIO(), record=True, width=200)
    print_report(Report(plan, {}, layers), console, "run")
    text = console.export_text()
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("model.layers.0"))
    assert row == ["model.layers.0", "75.0%", "0.224", "dense"]
    assert "Pruned 2 layers to 75.00% zeros (24 of 32 weights)" in text


def printed(plan, records, **more):
    report = Report(
        {"pattern": "unstructured", "method": "gptq", "scope": "row", "allocation": "uniform", "effort": "fast", "budget": None, **plan},
        {}, list(records), **more,
    )  # fmt: skip
    out = io.StringIO()
    print_report(report, Console(file=out, width=400, color_system=None), "run")
    return out.getvalue()


def on_grid(name, kept, grid="int4/64", rounded=0):
    return LayerRecord(f"model.layers.0.{name}", (4, 64), 0.0, kept, 0.1, "gram", grid=grid, rounded_to_zero=rounded)


def test_plain_quantization_is_not_called_pruning():
    # 4 bits and a scale of 16 for 64: 4.25 a weight, of 512; 64 of them are zero
    text = printed(
        {"sparsity": 0.0}, [on_grid("a", 192), on_grid("b", 256)], compute={"stored": "bfloat16", "products": "float32", "why": None},
        bytes={"dense": 2048, "pruned": 2048, "stored": 1300},
    )  # fmt: skip
    assert "Quantized 2 layers to int4/64: 4.25 bits a weight, 12% of the integers are zero (64 of 512 weights)" in text
    assert "Pruned" not in text
    assert "zeros are still stored" not in text
    # 1300 of 2048 bytes, of 16 bits a weight
    assert "`secateurs pack run` stores them in 4.25 bits a weight, 10.16 in the whole file, about" in text


def test_a_budget_of_bytes_says_what_it_is_of():
    budget = {"asked": 3_000_000, "weights": 10_000_000, "rest": 1_200_000, "stored": 2_900_000}
    text = printed({"sparsity": 0.5, "budget": "bytes=0.3"}, [on_grid("a", 192)], budget=budget)
    said = "Budget bytes=0.3: 3.0 MB of the 10.0 MB that all weights take. They come to 2.9 MB, 1.2 MB of it outside the pruned layers"
    assert said in text
    assert "Budget" not in printed({"sparsity": 0.5, "budget": "bits=3.3"}, [on_grid("a", 192)])


def test_zeros_with_bits_say_which_rounding_made():
    text = printed({"sparsity": 0.5}, [on_grid("a", 64, rounded=8), on_grid("b", 64, "int8/64", rounded=3)])
    # a bit a position, a quarter of the weights, a scale: 1 + 1 + .25 and 1 + 2 + .25
    assert "Pruned 2 layers to 75.00% zeros (384 of 512 weights) and rounded what is left to" in text
    assert "1 layer int4/64, 1 layer int8/64: 2.75 bits a weight; 11 survivors became zero by rounding" in text
    # grids differ by layer
    assert "4b 75% 0.100" in text
    assert "8b 75% 0.100" in text
