import pytest
import torch

from secateurs.allocate import ALLOCATIONS, LayerSummary, global_threshold, uniform


def summaries(*scores):
    return {
        f"layer{i}": LayerSummary(s.numel(), lambda s=s: iter(s.reshape(-1).split(37))) for i, s in enumerate(scores)
    }


def zeros(layers, sparsities):
    return {name: round(sparsities[name] * layer.numel) for name, layer in layers.items()}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.93])
def test_the_whole_gets_its_count(name, sparsity):
    layers = summaries(torch.rand(100), torch.rand(40, 10), torch.rand(300))
    found = zeros(layers, ALLOCATIONS[name](layers, sparsity, (0.0, 1.0)))
    assert sum(found.values()) == round(800 * sparsity)


def test_uniform_is_the_same_everywhere():
    assert uniform(summaries(torch.rand(3), torch.rand(5)), 0.4, (0, 1)) == {"layer0": 0.4, "layer1": 0.4}


@pytest.mark.parametrize("kind", ["random", "tied", "tiny and huge", "zeros"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_global_threshold_equals_one_stable_sort(kind, sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) for n in (200, 1000, 57)]
    if kind == "tied":
        scores = [(s * 4).round() for s in scores]
    if kind == "tiny and huge":
        scores = [s * 10.0**e for s, e in zip(scores, (-40, 0, 37), strict=True)]
    if kind == "zeros":
        scores = [s * (s > 0.7) for s in scores]
    layers = summaries(*scores)
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    gone = owner[torch.cat(scores).argsort(stable=True)[: round(1257 * sparsity)]]
    want = {f"layer{i}": int((gone == i).sum()) for i in range(3)}
    assert zeros(layers, global_threshold(layers, sparsity, (0.0, 1.0))) == want


def test_bounds_hold_and_the_rest_makes_up_for_them():
    layers = summaries(torch.linspace(0, 0.01, 100), torch.linspace(2, 3, 100), torch.linspace(0.5, 1.5, 200))
    free = zeros(layers, global_threshold(layers, 0.5, (0.0, 1.0)))
    assert free["layer0"] == 100
    assert free["layer1"] == 0
    bound = zeros(layers, global_threshold(layers, 0.5, (0.2, 0.7)))
    assert bound["layer0"] == 70
    assert bound["layer1"] == 20
    assert sum(bound.values()) == 200


def test_impossible_bounds_and_bad_scores_are_refused():
    with pytest.raises(ValueError, match="50 zeros do not fit between the layers' bounds, 0 and 30"):
        global_threshold(summaries(torch.rand(100)), 0.5, (0.0, 0.3))
    with pytest.raises(ValueError, match="not negative"):
        global_threshold(summaries(-torch.ones(10)), 0.5, (0.0, 1.0))
