"""The GPTQ of gptq.py, which others are held against: by hand, and the table of an independent script."""

import sys
from pathlib import Path

import gptq
import pytest
import torch
from torch.testing import assert_close

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# inputs 1 and 2 correlate; damping adds 0.02 to the diagonal, so input 2 takes on 1/2.02 of what input 1 loses
GRAM = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])


def double(*rows):
    return torch.tensor(rows, dtype=torch.double)


def test_by_hand_what_a_column_loses_is_made_up_for_by_the_next():
    # scale 3 / 3; 2.301 + .4 / 2.02 = 2.49902 and 2.303 + .4 / 2.02 = 2.50102; without damping both were above 2.5
    weight_OI = double([3, 0.4, 2.301], [3, 0.4, 2.303])
    assert_close(gptq.gptq(weight_OI, GRAM, 3, 3), double([3, 0, 2], [3, 0, 3]))
    assert_close(gptq.rounded(weight_OI, 3, 3), double([3, 0, 2], [3, 0, 2]))


def test_by_hand_a_group_s_scale_is_that_of_the_weights_as_they_are_when_it_begins():
    # 2.301 becomes 2.49902, and is the greatest of its group
    new_OI = gptq.gptq(double([3, 0.4, 2.301]), GRAM, 3, 2)
    assert_close(new_OI, double([3, 0, 2.301 + 0.4 / 2.02]))


def test_by_hand_what_the_mask_removes_is_made_up_for_and_has_no_part_in_the_scale():
    weight_OI, mask_OI = double([3, 5, 1.2]), torch.tensor([[True, False, True]])
    # 1.2 + 5 / 2.02 = 3.675, and the greatest integer is 3; with 5 in the scale 1.2 would become 3 * 5 / 3
    assert_close(gptq.gptq(weight_OI, GRAM, 3, 3, mask_OI), double([3, 0, 3]))


def test_by_hand_wanda_then_gptq_makes_up_for_nothing_that_wanda_removed():
    gram_II = torch.block_diag(GRAM, torch.tensor([[2.0]]))
    weight_OI = double([0.5, 1, 1.2, 3])
    # else 1.2 + 1 / 2.02 = 1.695 would become 2
    assert_close(gptq.wanda_gptq(weight_OI, gram_II, 3, 4, 2, 4), double([0, 0, 1, 3]))
    assert_close(gptq.gptq(weight_OI, gram_II, 3, 4, weight_OI > 1), double([0, 0, 2, 3]))


def test_wanda_s_score_is_the_weight_times_its_input_s_norm_and_ties_keep_the_lower_input():
    gram_II = torch.diag(torch.tensor([1.0, 4.0, 1.0, 1.0]))
    # scores 1, 1.2, 1, 1 and 1, 1.2, 2, 1.3
    weight_OI = double([1, -0.6, 1, 1], [1, 0.6, 2, 1.3])
    wanted_OI = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert_close(gptq.wanda_mask(weight_OI, gram_II, 2, 4), wanted_OI)


def test_integers_end_at_minus_2_to_the_bits_minus_1_and_one_less_above():
    assert_close(gptq.nearest(double([9, -9, 2.4])[0], double([1, 1, 1])[0], 3), double([3, -4, 2])[0])
    assert_close(gptq.rounded(torch.zeros(2, 4), 4, 4), torch.zeros(2, 4, dtype=torch.double))


def test_a_layer_that_saw_nothing_is_rounded_to_nearest():
    weight_OI = torch.randn(5, 8)
    assert_close(gptq.gptq(weight_OI, torch.zeros(8, 8), 4, 4), gptq.rounded(weight_OI, 4, 4))


@pytest.fixture(scope="module")
def anchor():
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is absent")
    sys.path.insert(0, str(DATA))
    import anchor_layer

    sys.path.remove(str(DATA))
    weight_OI, x_TI, _ = anchor_layer.make(0)
    return weight_OI, x_TI.double().T @ x_TI.double()


@pytest.mark.real
@pytest.mark.parametrize(("bits", "group", "error"), [(4, 128, 0.2074), (4, 32, 0.1522), (8, 128, 0.0125)])
def test_the_anchor_layer_s_table_is_reproduced_and_rounding_beaten(anchor, bits, group, error):
    weight_OI, gram_II = anchor
    found = gptq.relative_error(gptq.gptq(weight_OI, gram_II, bits, group), weight_OI, gram_II)
    assert found == pytest.approx(error, rel=0.005)
    assert found < 0.6 * gptq.relative_error(gptq.rounded(weight_OI, bits, group), weight_OI, gram_II)


@pytest.mark.real
def test_the_anchor_layer_s_table_with_wanda_s_2_of_4_is_reproduced(anchor):
    weight_OI, gram_II = anchor
    mask_OI = gptq.wanda_mask(weight_OI, gram_II, 2, 4)

    def error(new_OI):
        return gptq.relative_error(new_OI, weight_OI, gram_II)

    assert error(weight_OI * mask_OI) == pytest.approx(0.2083, rel=0.005)
    assert error(gptq.rounded(weight_OI * mask_OI, 4, 128)) == pytest.approx(0.4252, rel=0.005)
    assert error(gptq.wanda_gptq(weight_OI, gram_II, 4, 128, 2, 4)) == pytest.approx(0.3145, rel=0.005)
    assert error(gptq.gptq(weight_OI, gram_II, 4, 128, mask_OI)) == pytest.approx(0.2810, rel=0.005)
