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
