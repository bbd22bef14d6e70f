import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from secateurs import Stats
from secateurs.matrix.scores import SCORES

WEIGHT = tensor([[3.0, -2.0], [0.0, 4.0]])
# norms 5 and 2
STATS = Stats(3, tensor([25.0, 4.0]))

BY_HAND = {
    "magnitude": tensor([[3.0, 2.0], [0.0, 4.0]]),
    "wanda": tensor([[15.0, 4.0], [0.0, 8.0]]),
    # (3/5 + 3/3) sqrt 5, (2/5 + 2/6) sqrt 2; 0, (4/4 + 4/6) sqrt 2
    "ria": tensor([[1.6 * 5**0.5, (0.4 + 1 / 3) * 2**0.5], [0.0, (1 + 2 / 3) * 2**0.5]]),
}


@pytest.mark.parametrize("name", [n for n in SCORES if n != "random"])
def test_by_hand(name):
    assert_close(SCORES[name](WEIGHT, STATS), BY_HAND[name])


def test_random_is_uniform_and_follows_the_global_seed():
    torch.manual_seed(7)
    first = SCORES["random"](torch.zeros(100, 100), None)
    torch.manual_seed(7)
    assert torch.equal(first, SCORES["random"](torch.ones(100, 100), None))
    assert 0 <= first.min() < 0.01 < 0.99 < first.max() <= 1
    assert abs(float(first.mean()) - 0.5) < 0.02


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_scale_of_the_layer_changes_no_mask(name):
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    order = SCORES[name](weight, STATS).flatten().argsort()
    assert torch.equal(order, SCORES[name](weight * 8, STATS).flatten().argsort())


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_missing_calibration_is_said(name):
    with pytest.raises(ValueError, match="needs calibration"):
        SCORES[name](WEIGHT, None)
