import pytest
import torch

from secateurs.base.errors import PackError
from secateurs.kernels.formats import (
    DTYPES,
    FORMATS,
    PADDING,
    bitmask_nbytes,
    count_stored,
    pack,
    read_bitmask,
    unpack,
)

SHAPES = [(1, 1), (3, 63), (4, 64), (5, 65), (7, 130), (64, 256)]


def bits(weight):
    return weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)


def sparse(shape, dtype, sparsity=0.5):
    weight = torch.randn(shape).to(dtype)
    return weight.masked_fill(torch.rand(shape) < sparsity, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_keeps_every_bit(format, dtype, shape):
    for sparsity in (0.0, 0.5, 0.97, 1.0):
        weight = sparse(shape, dtype, sparsity)
        back = unpack(pack(weight, format))
        assert back.dtype == dtype
        assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_negative_zero_and_nan_payloads_survive(dtype):
    whole = torch.tensor([0, 1, -1], dtype=torch.int16 if dtype.itemsize == 2 else torch.int32)
    top = 1 << (8 * dtype.itemsize - 1)
    patterns = [-top, top - 1, top - 3, -2, 1, 0]  # negative zero, NaNs of several payloads, the least subnormal, zero
    weight = torch.tensor([patterns] * 5, dtype=whole.dtype).view(dtype)
    packed = pack(weight)
    assert packed.survivors == 25
    assert torch.equal(bits(unpack(packed)), bits(weight))


# docs/format.md, "An example": rows 1 0 2 / 0 0 0 / 0 -3 0 / 4 5 0 / 0 0 6 as fp32
GOLDEN_MASK = [0b101, 0b000, 0b010, 0b011, 0b100, 0, 0, 0]
GOLDEN_VALUES = [1.0, 2.0, -3.0, 4.0, 5.0, 6.0]


def test_golden_bytes_of_version_1():
    weight = torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, -3, 0], [4, 5, 0], [0, 0, 6]])
    packed = pack(weight)
    assert packed.mask_PJ4.shape == (2, 1, 4)
    assert packed.mask_PJ4.flatten().tolist() == GOLDEN_MASK
    assert packed.values.tolist() == GOLDEN_VALUES + [0.0] * 32
    assert packed.values.numpy().tobytes()[:8] == b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    assert packed.starts.tolist() == [0, 5, 6]


def test_the_order_is_panel_word_row_input():
    weight = torch.arange(1.0, 8 * 128 + 1).view(8, 128)
    values = pack(weight).values
    # row 0 of word 0, row 1 of word 0, ..., row 3 of word 0, row 0 of word 1
    assert values[:2].tolist() == [1, 2]
    assert values[64].item() == 129
    assert values[256].item() == 65
    assert values[512].item() == 513


def test_bytes_are_counted_with_mask_and_padding():
    weight = sparse((8, 128), torch.bfloat16)
    packed = pack(weight)
    survivors = int((weight != 0).sum())
    assert packed.nbytes == 2 * survivors + 8 * 128 // 8 + 64
    assert bitmask_nbytes((8, 128), survivors, torch.bfloat16) == packed.nbytes
    assert packed.dense_nbytes == 2 * 8 * 128
    # 9 bits a weight at 50%
    half = pack(torch.ones(1024, 1024, dtype=torch.bfloat16).tril())
    assert half.nbytes / half.dense_nbytes == pytest.approx(9 / 16, abs=1e-3)


def test_pack_refuses_what_it_would_lose():
    for weight, words in (
        (torch.ones(3), r"shape \[3\]"),
        (torch.ones(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.ones(0, 4), r"shape \[0, 4\]"),
        (torch.ones(2, 2, dtype=torch.float64), "float64"),
        (torch.ones(2, 2, dtype=torch.int8), "int8"),
    ):
        with pytest.raises(PackError, match=words):
            pack(weight)
    with pytest.raises(PackError, match="unknown format 'csr'; known: bitmask, dense"):
        pack(torch.ones(2, 2), "csr")


def test_the_reader_trusts_nothing():
    packed = pack(sparse((6, 70), torch.float16))
    values, mask, shape = packed.values, packed.mask_PJ4, (6, 70)
    beyond_input = mask.clone()
    beyond_input[0, 1, 2] |= 1 << 6
    beyond_row = mask.clone()
    beyond_row[1, 0, 3] = 1
    flipped = mask.clone()
    flipped[0, 0, 0] ^= 1
    for got, words in (
        ((values, beyond_input, shape), "keeps input 70 of row 2, of 70 inputs"),
        ((values, beyond_row, shape), "keeps input 0 of row 7, of 6 rows"),
        ((values, flipped, shape), r"keeps \d+ weights, but \d+ are stored"),
        ((values[:-1], mask, shape), "are stored"),
        ((values[:5], mask, shape), "end with 32 zeros"),
        ((values, mask, (6, 200)), r"int64 of shape \[2, 4, 4\]"),
        ((values, mask, (900, 70)), "int64 of shape"),
        ((values, mask.to(torch.int32), shape), "found int32"),
        ((values.double(), mask, shape), "found float64"),
        ((values.view(1, -1), mask, shape), "are a vector"),
        ((values, mask, (0, 70)), "at least one output"),
        ((values.to("meta"), mask, shape), "read on the CPU"),
    ):
        with pytest.raises(PackError, match=words):
            read_bitmask(*got)


def test_hostile_tensors_are_refused_or_sound():
    generator = torch.Generator().manual_seed(3)
    accepted = 0
    for _ in range(400):
        shape = tuple(torch.randint(1, 90, (2,), generator=generator).tolist())
        mask_shape = (-(-shape[0] // 4), -(-shape[1] // 64), 4)
        mask = torch.randint(-(2**63), 2**63 - 1, mask_shape, generator=generator)
        if torch.rand(1, generator=generator) < 0.5:
            mask &= (1 << min(62, shape[1])) - 1
        values = torch.zeros(int(torch.randint(0, 400, (1,), generator=generator)) + PADDING)
        try:
            packed = read_bitmask(values, mask, shape)
        except PackError as error:
            assert str(error)  # noqa: PT017
            continue
        accepted += 1
        assert unpack(packed).shape == shape
    assert accepted < 400


def test_what_is_counted_is_what_is_stored():
    # a negative zero is stored, so it is counted
    weight = torch.tensor([[0.0, -0.0, 1.0, float("nan")]])
    assert count_stored(weight) == pack(weight).survivors == 3
