"""What a report adds up."""

from secateurs.prune.record import LayerRecord, Report


def test_totals_by_hand():
    layers = [
        LayerRecord("a", (2, 8), 0.75, 4),
        LayerRecord("b", (4, 4), 0.5, 10),
        LayerRecord("c", (4, 4), 0.0, 16, skipped="matches --skip c", skipped_by="plan"),
        *(LayerRecord(n, (3, 3), 0.0, 9, skipped="3 inputs are not a multiple of 4", skipped_by="shape") for n in "de"),
        LayerRecord("f", (5, 4), 0.0, 20, skipped="an embedding", skipped_by="kind"),
    ]
    assert Report({}, {}, layers).totals == {
        "layers_pruned": 2, "layers_skipped_by_plan": 1, "layers_skipped_by_shape": 2, "layers_skipped_by_kind": 1, "weights": 32, "zeros": 18,
        "sparsity": 18 / 32, "weights_on_grid": 0, "bits": None, "file_bits": None, "rounded_to_zero": 0,
    }  # fmt: skip
