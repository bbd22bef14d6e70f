"""Cut and stacked packed matrices unpack to the rows and inputs of the plain ones, bit for bit."""

import pytest
import torch

from secateurs.base.errors import PackError
from secateurs.kernels.formats import INTEGER_PADDING, PADDING, pack, unpack
from secateurs.kernels.shards import inputs, rows, stacked
from secateurs.matrix.grids import parse
from secateurs.matrix.quantize import fit

KINDS = {
    "bitmask bf16": ("bitmask", None, torch.bfloat16),
    "bitmask fp32": ("bitmask", None, torch.float32),
    "dense bf16": ("dense", None, torch.bfloat16),
    "bitmask int4": ("bitmask", "int4/64", torch.bfloat16),
    "bitmask int3 by row": ("bitmask", "int3/row", torch.bfloat16),
    "dense int8": ("dense", "int8/64", torch.bfloat16),
    "dense int5, asymmetric": ("dense", "int5/32/asymmetric", torch.bfloat16),
    "bitmask q4_0": ("bitmask", "q4_0", torch.float16),
}


def matrix(kind, outputs=22, width=192, seed=0):
    """A packed matrix with random zeros, and the plain one."""
    format, grid, dtype = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, width, generator=generator)
    weight_OI[torch.rand(outputs, width, generator=generator) < 0.5] = 0
    scales = None
    if grid:
        scales = fit(weight_OI, parse(grid))
        weight_OI = scales.rounded(weight_OI)
    weight_OI = weight_OI.to(dtype)
    return pack(weight_OI, format, scales), weight_OI


def same(packed, weight_OI):
    assert packed.shape == tuple(weight_OI.shape)
    assert torch.equal(unpack(packed), weight_OI)
    assert packed.survivors == (weight_OI.numel() if packed.format == "dense" else int((weight_OI != 0).sum()))
    if packed.values.ndim == 1:
        padding = PADDING if packed.grid is None else INTEGER_PADDING
        assert not packed.values[-padding:].any()


# whole panels, the last one, which is not full, within a panel, across one, all
@pytest.mark.parametrize("span", [(0, 8), (12, 22), (1, 3), (3, 9), (0, 22)])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_plain_matrix(kind, span):
    packed, weight_OI = matrix(kind)
    found = rows(packed, *span)
    same(found, weight_OI[slice(*span)])
    assert (found.format, found.grid, found.dtype) == (packed.format, packed.grid, packed.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_inputs_add_up_to_the_product(kind):
    packed, weight_OI = matrix(kind)
    left, right = inputs(packed, 0, 64), inputs(packed, 64, 192)
    same(left, weight_OI[:, :64])
    same(right, weight_OI[:, 64:])


def test_floats_are_cut_at_any_input():
    packed, weight_OI = matrix("bitmask bf16")
    same(inputs(packed, 3, 77), weight_OI[:, 3:77])


def test_a_cut_never_parts_a_group_of_integers():
    packed, _ = matrix("bitmask int4")
    with pytest.raises(PackError, match=r"inputs 0\.\.95 of 192 would part a group of 64 integers of the grid int4/64"):
        inputs(packed, 0, 96)
    by_row, weight_OI = matrix("bitmask int3 by row")
    same(inputs(by_row, 5, 96), weight_OI[:, 5:96])


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_a_kind_become_one(kind):
    parts = [matrix(kind, outputs, seed=seed) for seed, outputs in enumerate((8, 4, 6))]
    (found,) = stacked([packed for packed, _ in parts])
    same(found, torch.cat([weight_OI for _, weight_OI in parts]))


def test_other_kinds_and_rows_that_end_within_a_panel_stay_apart():
    (a, _), (b, _), (c, _) = matrix("bitmask bf16", 8), matrix("bitmask bf16", 6), matrix("bitmask bf16", 8)
    (d, _) = matrix("bitmask int4", 8)
    assert [m.shape[0] for m in stacked([a, b, c])] == [14, 8]
    assert [m.shape[0] for m in stacked([a, d, c])] == [8, 8, 8]


def test_what_a_matrix_does_not_have_is_refused():
    packed, _ = matrix("bitmask bf16")
    for cut in (rows, inputs):
        for span in ((-1, 4), (4, 4), (0, 193)):
            with pytest.raises(PackError, match="were asked of a matrix of"):
                cut(packed, *span)
