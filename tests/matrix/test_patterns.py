import pytest
import torch
from torch import tensor

from secateurs.matrix.patterns import NM, Block, Unstructured, count_zeros, parse, top

ALL = [
    Unstructured("row"), Unstructured("layer"), NM(2, 4), NM(1, 4), NM(4, 8), NM(8, 16), NM(16, 32),
    Block(4, 4), Block(16, 16, "row"),
]  # fmt: skip
SHAPES = [(32, 64), (64, 32)]


def expected_kept(pattern, shape, sparsity):
    rows, columns = shape
    if isinstance(pattern, NM):
        return rows * columns * pattern.n // pattern.m
    if isinstance(pattern, Block):
        height, width = rows // pattern.rows, columns // pattern.columns
        each = Unstructured(pattern.scope)
        return expected_kept(each, (height, width), sparsity) * pattern.rows * pattern.columns
    if pattern.scope == "row":
        return rows * (columns - round(columns * sparsity))
    return rows * columns - round(rows * columns * sparsity)


@pytest.mark.parametrize("pattern", ALL, ids=lambda p: f"{p}-{getattr(p, 'scope', '')}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scores", ["random", "tied", "mostly zero"])
def test_kept_count_is_exact(pattern, shape, sparsity, scores):
    score = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    if scores == "tied":
        score = torch.ones(shape)
    if scores == "mostly zero":
        score = (score > 0.9).float()
    mask = pattern.keep(score, sparsity)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == expected_kept(pattern, shape, sparsity)
    assert pattern.zeros(*shape, sparsity) == mask.numel() - int(mask.sum())
    assert pattern.violation(mask, sparsity) is None


@pytest.mark.parametrize("pattern", ALL, ids=lambda p: f"{p}-{getattr(p, 'scope', '')}")
def test_one_weight_too_many_is_a_violation(pattern):
    mask = pattern.keep(torch.rand(32, 64, generator=torch.Generator().manual_seed(2)), 0.5)
    row, column = (~mask).nonzero()[0].tolist()
    mask[row, column] = True
    assert pattern.violation(mask, 0.5) is not None


def test_violation_says_where():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[1, 4:7] = True
    assert NM(2, 4).violation(mask, 0.5) == ("1 of 8 groups keep more than 2; first at row 1, inputs 4..7 keeps 3")


def test_highest_scores_stay_and_ties_go_to_the_lower_index():
    assert top(tensor([3.0, 1.0, 2.0, 2.0]), 2).tolist() == [True, False, True, False]
    assert top(tensor([0.0, 0.0, 0.0, 5.0]), 3).tolist() == [True, True, False, True]
    assert NM(2, 4).keep(tensor([[1.0, 1.0, 1.0, 1.0]]), 0.5).tolist() == [[True, True, False, False]]
    assert NM(1, 4).keep(tensor([[0.0, 2.0, 5.0, 5.0]]), 0.75).tolist() == [[False, False, True, False]]


def test_infinite_scores_are_ordered_and_nan_is_refused():
    assert top(tensor([float("inf"), 1.0, float("-inf")]), 2).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        top(tensor([float("nan"), 1.0]), 1)
    with pytest.raises(ValueError, match="NaN"):
        NM(2, 4).keep(torch.full((1, 4), float("nan")), 0.5)


def test_block_keeps_the_heavier_tiles():
    score = torch.zeros(4, 4)
    score[0, 0] = 10
    score[2:, 2:] = 1
    mask = Block(2, 2).keep(score, 0.5)
    assert mask.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2


def test_more_than_sixteen_million_scores():
    # torch.quantile refuses more than 2^24
    score = torch.arange(2**24 + 8, dtype=torch.float32).reshape(8, -1)
    assert int(Unstructured("layer").keep(score, 0.5).sum()) == 2**23 + 4


def test_zeros_round_half_to_even():
    assert [count_zeros(n, 0.5) for n in (1, 2, 3, 4)] == [0, 1, 2, 2]


def test_parse_reads_what_patterns_print():
    for text in ("unstructured", "2:4", "16:32", "16x16"):
        assert str(parse(text)) == text
    assert parse("unstructured", "layer") == Unstructured("layer")


@pytest.mark.parametrize("text", ["blok_4,4", "4:4", "0:4", "5:4", "0x4", "", "2:4:8", "x"])
def test_parse_refuses_with_a_sentence(text):
    with pytest.raises(ValueError, match="unknown pattern"):
        parse(text)


def test_refusal_names_the_width():
    assert NM(2, 4).refuses(8, 30) == "30 inputs are not a multiple of 4"
    assert Block(16, 16).refuses(24, 32) == "24x32 is not a whole number of 16x16 tiles"
    assert NM(2, 4).refuses(7, 32) is None


@pytest.mark.parametrize("kind", ["random", "tied", "sorted", "one value", "infinite", "few above"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.5, 0.9, 0.9999, 1.0])
def test_long_vectors_keep_what_one_stable_sort_keeps(kind, share):
    """Above 8192 scores a sample brackets the threshold; it must not show."""
    size = 50_021
    score = torch.rand(size, generator=torch.Generator().manual_seed(3))
    if kind == "tied":
        score = (score * 7).round()
    if kind == "sorted":
        score = score.sort().values
    if kind == "one value":
        score = torch.ones(size)
    if kind == "infinite":
        score[::3] = float("inf")
        score[1::3] = -float("inf")
    if kind == "few above":
        # the sample cannot know of them
        score = torch.zeros(size)
        score[1:40] = torch.arange(39.0) + 1
    kept = round(size * share)
    want = torch.zeros(size, dtype=torch.bool)
    want[score.argsort(descending=True, stable=True)[:kept]] = True
    assert torch.equal(top(score, kept), want)
