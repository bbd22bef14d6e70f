"""The kernels for GPUs in Triton's interpreter, on tensors of the CPU, against slow products in float64."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from secateurs.base.errors import DeviceError, PackError
from secateurs.kernels import on_gpu
from secateurs.kernels.formats import layout_of, pack, parts_of, unpack
from secateurs.kernels.packed_linear import PackedLinear, tune_on_gpu
from secateurs.matrix.grids import Grid, Scales

BF16 = torch.bfloat16
PRODUCTS = ("few_tokens", "many_tokens")


def sparse(shape, dtype=BF16, share=0.5):
    return (torch.randn(shape) * (torch.rand(shape) < share)).to(dtype)


def two_four(shape, kept=2, of=4):
    """Exactly `kept` of every `of` inputs, in all their places."""
    order = torch.rand(shape[0], shape[1] // of, of).argsort(-1)
    return (torch.randn(shape).abs() + 0.1) * (order < kept).view(shape)


def on_grid(shape, grid, keep):
    """Weights on a grid with some zeros, and their scales."""
    groups = grid.groups(shape[1])
    scale_OG = (torch.rand(shape[0], groups) * 0.1 - 0.05).to(grid.scale_dtype)
    zero_OG = None if grid.symmetric else torch.randint(0, grid.levels, (shape[0], groups), dtype=torch.uint8)
    scales = Scales(grid, scale_OG, zero_OG)
    zero = grid.middle if zero_OG is None else grid.spread(zero_OG.to(torch.int16), shape[1])
    integer = (torch.randint(0, grid.levels, shape, dtype=torch.int16) - zero) * keep
    return scales.weights(integer) + 0.0, scales


def read(packed, dtype=None):
    return on_gpu.read(*parts_of(packed)[:4], packed.shape, packed.grid, dtype or packed.dtype)


def hold(weight_OI, matrix, tokens, ways=PRODUCTS, splits=None, bias=True):
    """Every way against float64, into outputs that are NaN; the matrix expanded against the weights, bit for bit.

    y is fp32, for the interpreter cuts bits off where a card rounds to bf16.
    """
    dtype, (outputs, inputs) = matrix.dtype, matrix.shape
    expanded = on_gpu.expand(matrix)
    assert torch.equal(expanded, weight_OI)
    # positive zeros, too
    assert torch.equal(expanded.signbit(), weight_OI.signbit())
    x_TI, bias_O = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs).to(dtype) if bias else None
    want = x_TI.double() @ weight_OI.double().T + (0 if bias_O is None else bias_O.double())
    size = x_TI.double().abs() @ weight_OI.double().abs().T + (0 if bias_O is None else bias_O.double().abs())
    # a sum in fp32 in any order (Higham 2002, sec. 4.2); a scale multiplies once more
    bound = size * (inputs + 8) * 2**-24
    for way in ways:
        y = torch.full((tokens + 1, outputs), torch.nan)
        on_gpu.WAYS[way](matrix, x_TI, bias_O, y[:tokens], *(() if splits is None else (splits,)))
        assert bool(((y[:tokens].double() - want).abs() <= bound).all()), (way, matrix.shape, tokens)
        assert bool(y[tokens:].isnan().all()), way


# around a panel of rows, a word and a block of inputs, and a tile of tokens
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 63), (4, 64), (5, 65), (15, 127), (17, 129), (4, 511), (4, 512), (4, 513)]
)
def test_a_bitmask_of_any_shape_is_multiplied(shape):
    weight = sparse(shape)
    hold(weight, read(pack(weight)), 2)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_any_number_of_tokens(tokens):
    weight = sparse((6, 140))
    hold(weight, read(pack(weight)), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floats(dtype):
    for weight in (sparse((9, 200), dtype), two_four((8, 128)).to(dtype)):
        hold(weight, read(pack(weight)), 3, bias=False)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.97, 1.0])
def test_few_and_many_survivors(share):
    weight = sparse((8, 192), share=share)
    hold(weight, read(pack(weight)), 2)


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_as_many_of_every_quad_needs_no_counting(kept):
    weight = two_four((8, 576), kept).to(BF16)
    matrix = read(pack(weight))
    assert (matrix.kept, matrix.starts) == (kept, None)
    hold(weight, matrix, 2)


def test_a_quad_that_keeps_less_is_counted():
    weight = two_four((8, 128)).to(BF16)
    weight[7, 126] = weight[7, 127] = weight[7, 125] = 0
    matrix = read(pack(weight))
    assert matrix.kept == 0
    hold(weight, matrix, 1)


def test_four_of_eight_is_a_bitmask():
    weight = two_four((8, 128), 4, 8).to(BF16)
    matrix = read(pack(weight))
    assert matrix.kept == 0
    hold(weight, matrix, 2)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_integers_of_any_width(bits, masked):
    for grid, shape in ((Grid(bits, 32), (6, 165)), (Grid(bits, 0, False), (3, 70))):
        weight, scales = on_grid(shape, grid, torch.rand(shape) < 0.5)
        matrix = read(pack(weight, "bitmask" if masked else "dense", scales))
        assert (matrix.mask is not None) == masked
        hold(weight, matrix, 2)


@pytest.mark.parametrize(
    "grid", [Grid(8, 128), Grid(4, 64), Grid(4, 64, False), Grid(8, 32, True, True), Grid(3, 64)], ids=str
)
def test_integers_of_two_of_four(grid):
    shape = (8, 128)
    keep = two_four(shape) != 0
    weight, scales = on_grid(shape, grid, keep)
    # an integer 0 is no survivor, so none may be
    while grid.symmetric and bool((weight[keep] == 0).any()):
        weight, scales = on_grid(shape, grid, keep)
        weight = torch.where(keep & (weight == 0), scales.weights(torch.ones(shape, dtype=torch.int16)), weight)
    matrix = read(pack(weight, "bitmask", scales))
    assert matrix.kept == (2 if grid.symmetric else matrix.kept)
    hold(weight, matrix, 2, ("few_tokens",))


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 100])
def test_splits_add_up_and_none_is_empty(splits):
    weight = sparse((5, 2304))
    hold(weight, read(pack(weight)), 2, splits=splits)
    made, each = on_gpu._split(1, 5, torch.device("cpu"), splits)
    assert (made - 1) * each < 5 <= made * each


def test_a_product_is_the_same_each_time():
    weight = sparse((5, 1100))
    matrix, x_TI = read(pack(weight)), torch.randn(2, 1100).to(BF16)
    for way in PRODUCTS:
        first, second = torch.empty(2, 5, dtype=BF16), torch.empty(2, 5, dtype=BF16)
        on_gpu.WAYS[way](matrix, x_TI, None, first, 3)
        on_gpu.WAYS[way](matrix, x_TI, None, second, 3)
        assert torch.equal(first, second), way


@pytest.mark.parametrize("off", [1, 2, 3])
def test_tensors_that_begin_anywhere(off):
    """As views of a file do; loads of several numbers want an aligned address."""
    shape = (8, 128)
    weight, scales = on_grid(shape, Grid(4, 64), torch.rand(shape) < 0.5)
    for packed in (pack(two_four(shape).to(BF16)), pack(weight, "dense", scales)):
        moved = torch.cat([packed.values.new_zeros(off), packed.values])[off:]
        assert moved.data_ptr() % 16
        matrix = read(replace(packed, values=moved))
        assert matrix.values.data_ptr() % 16 == 0
        hold(unpack(packed), matrix, 1, ("few_tokens",))


def test_what_follows_the_survivors_is_not_multiplied():
    """A quad's four loads reach past its survivors: NaN there must not show."""
    weight = sparse((4, 64))
    packed = pack(weight)
    packed.values[packed.survivors :] = torch.nan
    hold(weight, read(packed), 1)


def test_nan_and_infinity_come_through():
    weight = sparse((4, 128))
    weight[1, 3], weight[2, 5] = torch.nan, torch.inf
    matrix, x_TI = read(pack(weight)), torch.ones(1, 128).to(BF16)
    for way in PRODUCTS:
        y = torch.zeros(1, 4, dtype=BF16)
        on_gpu.WAYS[way](matrix, x_TI, None, y)
        assert y.isfinite().tolist() == [[True, False, False, True]], way


def test_starts_by_hand():
    """Rows 101, 0, 010, 11 of one word, in the second panel one weight: 5 survivors, rows begin after 0, 2, 2 and 3."""
    weight = torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, 3, 0], [4, 5, 0], [0, 0, 6]])
    matrix = read(pack(weight))
    assert matrix.starts.tolist() == [[0x03020200 << 32], [5 | 0x01010100 << 32]]
    assert (matrix.survivors, matrix.kept) == (6, 0)
    assert [n.tolist() for n in on_gpu.ones(torch.tensor([-1, 0x0F000301, -(1 << 31)], dtype=torch.int32))] == [
        [0x44444444, 0x04000201, 0x10000000], [32, 7, 1],
    ]  # fmt: skip


def test_starts_of_integers_are_bytes():
    shape = (4, 64)
    weight, scales = on_grid(shape, Grid(4, 64), torch.ones(shape, dtype=torch.bool))
    weight[:] = 0
    weight[0, :3] = weight[1, :1] = scales.weights(torch.ones(shape, dtype=torch.int16))[0, 0]
    weight[1, :1] = scales.weights(torch.ones(shape, dtype=torch.int16))[1, 0]
    matrix = read(pack(weight, "bitmask", scales))
    # three of four bits take two bytes, one takes one
    assert matrix.starts.tolist() == [[0x03030200 << 32]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v, m: (v[:-1], m), "the mask keeps .* weights, but .* are stored"),
        (lambda v, m: (v, m.int()), "the mask of a 6x70 matrix is int64"),
        (lambda v, m: (v.view(2, -1), m), "a vector of floats"),
        (lambda v, m: (v[:31], m), "with their padding"),
    ],
)
def test_what_is_wrong_is_said_before_a_kernel_follows_it(change, says):
    weight = sparse((6, 70))
    packed = pack(weight)
    values, mask = change(packed.values, packed.mask_PJ4)
    with pytest.raises(PackError, match=says):
        on_gpu.read(values, mask, None, None, (6, 70), None, BF16)


def test_bits_outside_of_the_matrix_are_refused():
    packed = pack(sparse((6, 70)))
    beyond = packed.mask_PJ4.clone()
    beyond[0, 1, 2] |= 1 << 6
    with pytest.raises(PackError, match="an input beyond 70 of row 2"):
        on_gpu.read(packed.values, beyond, None, None, (6, 70), None, BF16)
    beyond = packed.mask_PJ4.clone()
    beyond[1, 0, 2] |= 1
    with pytest.raises(PackError, match="rows beyond 6"):
        on_gpu.read(packed.values, beyond, None, None, (6, 70), None, BF16)


def test_scales_are_checked():
    weight, scales = on_grid((4, 64), Grid(4, 64, False), torch.rand(4, 64) < 0.5)
    values, mask, scale, zero, _ = parts_of(pack(weight, "bitmask", scales))

    def refused(says, *parts):
        with pytest.raises(PackError, match=says):
            on_gpu.read(*parts, (4, 64), scales.grid, BF16)

    refused("scales of int4/64", values, mask, None, zero)
    refused("scales of int4/64", values, mask, scale[:, :, :2], zero)
    refused("not finite", values, mask, torch.full_like(scale, 0x7F80), zero)
    refused("zeros, found them otherwise", values, mask, scale, None)
    refused("zeros of .* below 16", values, mask, scale, torch.full_like(zero, 16))
    refused("all integers of 4x64", values[:-1], None, scale, zero)


def test_matrices_that_share_an_input_with_biases_and_gradients():
    """The bodies of both operators, called as the dispatcher calls them for tensors on a card."""
    one, other = sparse((5, 96), torch.float32), sparse((8, 96), torch.float32)
    packed, bias = [pack(one), pack(other)], torch.randn(8)
    parts = [*parts_of(packed[0]), *parts_of(packed[1], bias)]
    layouts = [*layout_of((5, 96), None), *layout_of((8, 96), None)]
    x = torch.randn(2, 3, 96)
    y = on_gpu.linear(x, parts, layouts)
    torch.testing.assert_close(y[:30].view(2, 3, 5), x @ one.T)
    torch.testing.assert_close(y[30:].view(2, 3, 8), x @ other.T + bias)
    by_y = torch.randn_like(y)
    want = by_y[:30].view(6, 5) @ one + by_y[30:].view(6, 8) @ other
    torch.testing.assert_close(on_gpu.linear_back(by_y, parts, layouts).view(6, 96), want)
    assert on_gpu.linear(x[:0], parts, layouts).shape == (0,)


def test_a_matrix_is_read_once_and_again_when_it_changes():
    packed = pack(sparse((4, 64)))
    parts = parts_of(packed)
    layouts = layout_of((4, 64), None)
    (first,) = on_gpu.matrices_of(parts, layouts, BF16)
    assert on_gpu.matrices_of(parts, layouts, BF16)[0] is first
    packed.mask_PJ4[0, 0, 0] = 0
    with pytest.raises(PackError, match="are stored"):
        on_gpu.matrices_of(parts, layouts, BF16)
    before = len(on_gpu._matrices)
    del first, parts, packed
    assert len(on_gpu._matrices) == before - 1


def test_refusals_of_a_product_name_both_sides():
    packed = pack(sparse((4, 64)))
    parts, layouts = parts_of(packed), layout_of((4, 64), None)
    with pytest.raises(DeviceError, match="64 torch.bfloat16 inputs on cpu was given torch.float32"):
        on_gpu.linear(torch.ones(1, 64), parts, layouts)
    with pytest.raises(DeviceError, match=r"of shape \[1, 32\]"):
        on_gpu.linear(torch.ones(1, 32).to(BF16), parts, layouts)
    with pytest.raises(DeviceError, match="the bias of 4 outputs"):
        on_gpu.linear(torch.ones(1, 64).to(BF16), parts_of(packed, torch.ones(3).to(BF16)), layouts)


def test_every_number_of_tokens_has_a_way_and_measured_ones_come_first():
    matrix = read(pack(sparse((4, 64))))
    assert [matrix.way(t) for t in (1, 4, 5, 64, 65)] == [
        "few_tokens", "few_tokens", "many_tokens", "many_tokens", "expanded",
    ]  # fmt: skip
    matrix.ways = ((2, "expanded"), (8, "few_tokens"))
    assert [matrix.way(t) for t in (1, 2, 3, 8, 9)] == [
        "expanded",
        "expanded",
        "few_tokens",
        "few_tokens",
        "few_tokens",
    ]
    assert on_gpu.default_way(16, torch.float32) == "few_tokens"


def test_tuning_takes_the_fastest_and_a_copy_where_memory_is_allowed(monkeypatch):
    seconds = {
        1: {"few_tokens": 1.0, "many_tokens": 2.0, "expanded": 9.0, "dense": 1.5},
        64: {"many_tokens": 3.0, "expanded": 4.0, "dense": 2.0},
    }  # fmt: skip
    model = torch.nn.Sequential(*(PackedLinear.of(pack(sparse((4, 64)))) for _ in range(2)))
    monkeypatch.setattr(on_gpu, "_timed", lambda same, tokens: seconds[tokens])
    # memory for one of two
    found = tune_on_gpu(model, (64, 1), copies_nbytes=4 * 64 * 2 + 100)
    assert found["0"].ways == ((1, "few_tokens"), (64, "dense"))
    assert found["1"].ways == ((1, "few_tokens"), (64, "many_tokens"))
    assert (found["0"].slower, found["1"].slower) == ((), (64,))
    for layer in model:
        (matrix,) = on_gpu.matrices_of(*PackedLinear.given([layer]), BF16)
        y, x_TI = torch.full((64, 4), torch.nan, dtype=BF16), torch.randn(64, 64).to(BF16)
        assert matrix.way(64) == found["0" if layer is model[0] else "1"].ways[1][1]
        on_gpu.WAYS[matrix.way(64)](matrix, x_TI, None, y)
        torch.testing.assert_close(y, x_TI @ layer.dense().weight.T, atol=0.1, rtol=0.02)


def test_every_way_is_timed():
    matrix = read(pack(sparse((4, 64))))
    assert set(on_gpu._timed([matrix], 1)) == set(on_gpu.WAYS)
    assert set(on_gpu._timed([matrix], 17)) == {*on_gpu.WAYS} - {"few_tokens"}
    assert not matrix.copies


def test_the_library_multiplies_what_is_expanded():
    weight, bias = sparse((5, 70), torch.float32), torch.randn(5)
    matrix, x_TI = read(pack(weight)), torch.randn(3, 70)
    for given in (None, bias):
        y = torch.full((3, 5), torch.nan)
        on_gpu.WAYS["expanded"](matrix, x_TI, given, y)
        torch.testing.assert_close(y, torch.nn.functional.linear(x_TI, weight, given))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_outputs_of_x_s_dtype(dtype):
    """Within a unit in the last place: the interpreter does not round to bf16 but cuts off."""
    weight = sparse((9, 65), dtype)
    matrix, x_TI = read(pack(weight)), torch.randn(3, 65).to(dtype)
    want = x_TI.double() @ weight.double().T
    for way in PRODUCTS:
        y = torch.full((3, 9), torch.nan, dtype=dtype)
        on_gpu.WAYS[way](matrix, x_TI, None, y)
        assert bool(((y.double() - want).abs() <= want.abs() * torch.finfo(dtype).eps + 1e-5).all()), way


def test_without_triton_a_sentence(monkeypatch):
    on_gpu._kernels.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    packed = pack(sparse((4, 64)))
    with pytest.raises(
        DeviceError, match=r"Triton, which is not installed: pip install 'secateurs\[gpu\]', or model.cpu\(\) first"
    ):
        on_gpu.linear(torch.ones(1, 64).to(BF16), parts_of(packed), layout_of((4, 64), None))


def test_on_a_card_a_compiler_sees_one_call():
    """Tensors that pretend to be on a card: the operators' shapes and devices, and one node each."""
    packed = pack(sparse((6, 64), torch.float32))
    layouts = layout_of((6, 64), None)

    def product(x, values, mask):
        y = torch.ops.secateurs.linear(x, [values, mask, None, None, None], layouts)
        return y, torch.ops.secateurs.linear_back(y, [values, mask, None, None, None], layouts)

    with FakeTensorMode():
        given = [torch.empty(t.shape, dtype=t.dtype, device="cuda:0") for t in (packed.values, packed.mask_PJ4)]
        x = torch.empty(2, 64, device="cuda:0")
        y, by_x = product(x, *given)
        assert (y.shape, by_x.shape, y.device.type, by_x.device.type) == ((12,), (128,), "cuda", "cuda")
        graph = make_fx(product)(x, *given).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["secateurs.linear.default", "secateurs.linear_back.default"]


def test_kernels_compile_for_a_card_that_is_not_here(tmp_path):
    """The two that decode a bitmask on H100: no register spills, and the bits are counted by the instruction for it."""
    tool = Path(__file__).parents[2] / "tools" / "gpu_kernels.py"
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, tool, "--targets", "90", "--only", "bf16 bitmask, 1 tokens", "--out", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 spilled" in done.stdout
    assert json.loads(out.read_text())["found"][0]["popc"] >= 8
