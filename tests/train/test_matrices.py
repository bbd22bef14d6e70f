"""Which matrices are pruned in training, and which weights stay."""

import pytest
import torch
from torch import nn, tensor

from secateurs.base.errors import PlanError
from secateurs.train.matrices import check_pattern, chosen, largest


def test_the_largest_of_all_by_hand():
    """Of seven, three go (0.4 of 7 is 2.8): of four that are alike the one with the lowest place stays."""
    scores = {"a": tensor([[5.0, 1.0], [1.0, 1.0]]), "b": tensor([[1.0, 7.0, 6.0]])}
    masks = largest(scores, 0.4)
    assert masks["a"].tolist() == [[True, True], [False, False]]
    assert masks["b"].tolist() == [[False, True, True]]


def test_what_is_skipped_is_not_chosen():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert list(chosen(model, ())) == ["0.weight", "2.weight"]
    assert list(chosen(model, ("0.weight",))) == ["2.weight"]
    with pytest.raises(PlanError, match="Sequential has no matrix to prune"):
        chosen(model, ("0.weight", "2.weight"))


def test_a_pattern_that_does_not_fit_is_refused_by_name():
    check_pattern("w", torch.ones(3, 8), "2:4")
    with pytest.raises(PlanError, match="w cannot take 2:4: .*; put it in skip"):
        check_pattern("w", torch.ones(3, 6), "2:4")


def test_skip_knows_every_name_of_a_matrix_and_no_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    assert list(chosen(model, ())) == ["0.weight", "1.weight"]
    assert list(chosen(model, ("2.weight",))) == ["0.weight"]
    with pytest.raises(PlanError, match="no parameter 1.wieght to skip; did you mean '1.weight'"):
        chosen(model, ("1.wieght",))
