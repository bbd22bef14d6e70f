"""bench/fronts.py: what its points ask for, and which of them are on the front."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import fronts

POINTS = [point for subject in fronts.SUBJECTS.values() for point in subject.points]


def point(bits, losses, zeros=0):
    excess_W = torch.tensor(losses, dtype=torch.float64)
    excess = fronts.asdict(fronts.estimate(excess_W))
    return {"bits": bits, "excess": excess, "excess_by_window": losses, "layers_with_zeros": zeros}


@pytest.mark.parametrize(
    ("name", "pattern", "sparsity", "bits", "group", "effort", "budget"),
    [
        ("int2/32", "unstructured", 0.0, "2", "32", "balanced", None),
        ("int2/row", "unstructured", 0.0, "2", "row", "balanced", None),
        ("0.6+int3", "unstructured", 0.6, "3", "64", "balanced", None),
        ("0.5+int3, best", "unstructured", 0.5, "3", "64", "best", None),
        ("2:4+int8", "2:4", 0.5, "8", "64", "balanced", None),
        ("0.7", "unstructured", 0.7, None, None, "balanced", None),
        ("bits=2.5", "unstructured", 0.5, "8,6,5,4,3,2", "64", "balanced", "bits=2.5"),
        ("bits=2.5, dense", "unstructured", 0.0, "8,6,5,4,3,2", "64", "balanced", "bits=2.5"),
        ("gptq int3", "unstructured", 0.0, None, None, "plain", None),
        ("wanda mask, gptq 2:4+int4", "2:4", 0.5, None, None, "plain", None),
    ],
)
def test_a_point_asks_for_what_its_name_says(monkeypatch, name, pattern, sparsity, bits, group, effort, budget):
    monkeypatch.setattr(fronts.solvers, "SOLVERS", dict(fronts.solvers.SOLVERS))
    plan = fronts.plan_of(name, 64)
    found = (plan.pattern, plan.sparsity, plan.bits, plan.group, plan.effort, plan.budget)
    assert found == (pattern, sparsity, bits, group, effort, budget)
    if name.endswith("dense"):
        assert plan.bounds == (0, 0)


@pytest.mark.parametrize("name", sorted(set(POINTS)))
def test_every_point_has_a_plan(monkeypatch, name):
    monkeypatch.setattr(fronts.solvers, "SOLVERS", dict(fronts.solvers.SOLVERS))
    assert fronts.plan_of(name, 128).calibrated


def test_the_front_holds_what_no_other_point_beats():
    points = {
        "int4": point(4.25, [0.1, 0.1]), "0.5+int4": point(3.25, [0.5, 0.5], 7), "int3": point(3.25, [0.4, 0.4]),
        "int2": point(2.25, [2.0, 2.0]), "0.6+int3": point(2.45, [1.8, 1.8], 7), "0.5": point(9.0, [0.3, 0.3], 7),
    }  # fmt: skip
    assert fronts.front(points) == ["int4", "int3", "0.6+int3", "int2"]
    assert fronts.front(fronts.of_kind(points, "zeros")) == ["0.5", "0.5+int4", "0.6+int3"]


def test_zeros_are_held_against_the_best_dense_point_that_is_no_larger():
    points = {
        "int4": point(4.25, [0.1, 0.3, 0.2]), "int3": point(3.25, [0.5, 0.7, 0.6]), "int2": point(2.25, [2.0, 2.0, 2.0]),
        "gptq int3": point(3.25, [0.0, 0.0, 0.0]),
    }  # fmt: skip
    assert fronts.dense_beside(points, 4.0) == "int3"
    assert fronts.dense_beside(points, 3.23) == "int3"
    assert fronts.dense_beside(points, 3.2) == "int2"
    assert fronts.dense_beside(points, 2.2) is None
    # on the same windows each differs by the same 0.1, so that nothing is left to chance
    gap = fronts.less(point(4.0, [0.4, 0.6, 0.5], 7), points["int3"])
    assert (gap.value, gap.low, gap.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert fronts.beside_dense(points, point(4.0, [0.4, 0.6, 0.5], 7)).endswith("pay")
    assert fronts.beside_dense(points, point(4.0, [0.6, 0.8, 0.7], 7)).endswith("lose")
    assert fronts.beside_dense(points, point(2.0, [0.6, 0.8, 0.7], 7)).endswith("alone")


def test_a_rival_leaves_every_group_on_its_grid():
    model = torch.nn.Sequential(torch.nn.Linear(128, 8, bias=False))
    report = fronts.Report({}, {}, [fronts_record("0", (8, 128), int((model[0].weight != 0).sum()))])
    with pytest.raises(SystemExit, match="a group has 64 values"):
        fronts.checked(model, report, fronts.grids.Grid(4), "gptq int4")
    rounded = fronts.gptq.rounded(model[0].weight.detach(), 4, 64).float()
    model[0].weight.data = rounded
    report.layers[0] = fronts_record("0", (8, 128), int((rounded != 0).sum()))
    fronts.checked(model, report, fronts.grids.Grid(4), "gptq int4")
    # 4 bits and a bf16 scale for 64
    assert fronts.stored_bits(report, fronts.grids.Grid(4)) == 4.25


def fronts_record(name, shape, kept):
    from secateurs.prune.record import LayerRecord

    return LayerRecord(name, shape, 0.0, kept, pattern="unstructured")
