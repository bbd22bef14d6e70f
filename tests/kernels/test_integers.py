"""Matrices that are stored as integers: bytes, checks, kernels, layers."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.library import opcheck

from secateurs.base.errors import DeviceError, PackError
from secateurs.kernels import dispatch, packed_linear
from secateurs.kernels.dispatch import Call, layout_of, linear, parts_of, select
from secateurs.kernels.formats import DTYPES, FORMATS, pack, packed_nbytes, read_integers, unpack
from secateurs.kernels.packed_linear import PackedLinear, choose, group_shared_inputs
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.grids import BITS, Grid, Scales, parse

GRIDS = [
    *(f"int{bits}/{group}" for bits in BITS for group in (32, 64, 128, "row")),
    *(f"int{bits}/64/asymmetric" for bits in BITS), "int4/32/asymmetric", "int3/row/asymmetric", "q4_0", "q8_0",
]  # fmt: skip
RUNNABLE = [k for k in dispatch.kernels() if not k.lacks and k.dtype.startswith("int")]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}


def on_grid(shape, grid, sparsity=0.5, dtype=torch.bfloat16):
    """Random weights rounded to a grid, and their scales; every other row of a symmetric grid has negative ones."""
    grid = parse(grid)
    weight_OI = torch.randn(shape)
    parts = grid.grouped(weight_OI)
    zero = None
    if grid.symmetric:
        scale = parts.abs().amax(-1) / max(1, grid.middle - 1)
        scale[::2] *= -1
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / (grid.levels - 1)
        zero = (-low / scale).round().clamp(0, grid.levels - 1).to(torch.uint8)
    scales = Scales(grid, scale.to(grid.scale_dtype), zero)
    weight_OI = scales.rounded(weight_OI).masked_fill(torch.rand(shape) < sparsity, 0)
    return weight_OI.add(0.0).to(dtype), scales


def two_of_four(weight):
    """The same with none to two of each four inputs."""
    outputs, inputs = weight.shape
    ranks = torch.rand(outputs, -(-inputs // 4), 4).argsort(-1).argsort(-1) < torch.randint(
        3, (outputs, -(-inputs // 4), 1)
    )
    return weight.masked_fill(~ranks.view(outputs, -1)[:, :inputs], 0)


def bits(weight):
    return weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_keeps_every_bit(format, grid):
    for shape, sparsity in (((1, 1), 0.0), ((5, 65), 0.5), ((7, 130), 0.97), ((4, 64), 1.0), ((13, 31), 0.5)):
        for dtype in DTYPES:
            weight, scales = on_grid(shape, grid, sparsity, dtype)
            packed = pack(weight, format, scales)
            assert packed.stored == f"int{scales.grid.bits}"
            assert packed.scales.grid == scales.grid
            assert torch.equal(packed.scales.scale_OG, scales.scale_OG)
            back = unpack(packed)
            assert back.dtype == packed.dtype == dtype
            assert torch.equal(bits(back), bits(weight))
            # as a reader of files finds it
            again = read_integers(*parts_of(packed)[:4], shape, scales.grid, dtype)
            assert (
                again.survivors
                == packed.survivors
                == (int((weight != 0).sum()) if format == "bitmask" else weight.numel())
            )
            assert torch.equal(unpack(again), weight)


def example():
    """docs/format.md, "Integers by example": 2x5, three bits, a scale a row."""
    scales = Scales(Grid(3, 0), torch.tensor([[0.5], [-2.0]]).bfloat16())
    return torch.tensor([[0.5, 0.0, -2.0, 1.5, -0.5], [0.0, 0.0, -6.0, 8.0, 2.0]]), scales


def test_bytes_by_hand():
    weight, scales = example()
    packed = pack(weight, "bitmask", scales)
    assert packed.mask_PJ4.tolist() == [[[0b11101, 0b11100, 0, 0]]]
    # row 0: 1 -4 3 -1, plus 4: 5 0 7 3 = 101 000 111 011 from the lowest bit on; row 1: 3 -4 -1, plus 4: 7 0 3
    assert packed.values.tolist() == [0b11000101, 0b0111, 0b11000111, 0b0] + [0] * 64
    assert packed.scale_PG4.tolist() == [[[0x3F00, 0xC000 - 0x10000, 0, 0]]]
    assert packed.zero_PG4 is None
    assert packed.starts.tolist() == [0, 4]
    assert packed.nbytes == 68 + 4 * 8 + 4 * 2
    dense = pack(weight, "dense", scales)
    # row 0: 5 4 0 7 3, then the code of zero, 4, up to 64 codes; row 1 and the two rows beyond the matrix alike
    assert dense.values[:3].tolist() == [0b00100101, 0b00111110, 0b10010010]
    assert dense.values.numel() == 4 * 24 + 64


def test_zeros_have_no_sign():
    weight, scales = on_grid((4, 64), "int4", 0.5)
    signed = torch.where(weight == 0, -weight, weight)
    assert signed.signbit().sum() > weight.signbit().sum()
    for format in FORMATS:
        assert torch.equal(bits(unpack(pack(signed, format, scales))), bits(weight))


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_off_the_grid_is_refused(format):
    weight, scales = on_grid((4, 64), "int4", 0.5)
    weight[2, 7] = 77.0
    with pytest.raises(PackError, match="1 of 256 weights are not on the grid int4/64; first at row 2, input 7: 77"):
        pack(weight, format, scales)
    with pytest.raises(PackError, match=r"up_proj: 1 of 256 weights are not on the grid.*quantize the layer again"):
        choose("up_proj", weight, None, scales)
    other = Scales(scales.grid, scales.scale_OG[:2])
    with pytest.raises(PackError, match="its scales have shape"):
        pack(weight, format, other)


def test_bytes_are_known_without_packing():
    for grid in ("int8", "int4/32", "int3/row/asymmetric"):
        for dtype in DTYPES:
            weight, scales = on_grid((70, 300), grid, 0.5, dtype)
            assert packed_nbytes((70, 300), None, dtype, scales.grid) == pack(weight, "dense", scales).nbytes
            exact = pack(weight, "bitmask", scales)
            guess = packed_nbytes((70, 300), exact.survivors, dtype, scales.grid)
            assert guess == pytest.approx(exact.nbytes, rel=0.01 if scales.grid.bits < 8 else 0)
    # by hand: 32 bytes of integers, 8 of scales, 8 of mask for each of 4 rows, 64 of padding
    assert packed_nbytes((4, 64), None, torch.bfloat16, parse("int4")) == 4 * 32 + 8 + 64
    assert packed_nbytes((4, 64), 256, torch.bfloat16, parse("int8")) == 256 + 8 + 32 + 64
    assert packed_nbytes((4, 64), None, torch.bfloat16) == 512
    assert packed_nbytes((4, 64), 100, torch.bfloat16) == 2 * 132 + 32


def test_the_reader_trusts_nothing():
    weight, scales = on_grid((6, 70), "int4/64/asymmetric")
    packed = pack(weight, "bitmask", scales)
    values, mask, scale, zero, _ = parts_of(packed)
    grid, shape = scales.grid, (6, 70)
    beyond = mask.clone()
    beyond[0, 1, 2] |= 1 << 6
    flipped = mask.clone()
    flipped[0, 0, 0] = 0
    infinite = scale.clone()
    infinite[0, 0, 0] = 0x7F80
    high = zero.clone()
    high[0, 0, 0] = 16
    symmetric = parse("int4")
    for got, words in (
        ((values, beyond, scale, zero, shape, grid), "keeps input 70 of row 2, of 70 inputs"),
        ((values, flipped, scale, zero, shape, grid), r"take \d+ bytes, but \d+ are stored"),
        ((values[:-1], mask, scale, zero, shape, grid), "are stored"),
        ((values[:-1], None, scale, zero, shape, grid), "integers of a 6x70 matrix on int4/64/asymmetric take 512 bytes"),
        ((values[:5], mask, scale, zero, shape, grid), "end with 64 zeros, found 5 bytes"),
        ((values.int(), mask, scale, zero, shape, grid), "a vector of uint8, found int32"),
        ((values, mask, scale[:1], zero, shape, grid), r"as int16, found int16 of shape \[1, 2, 4\]"),
        ((values, mask, scale.float(), zero, shape, grid), "as int16, found float32"),
        ((values, mask, infinite, zero, shape, grid), "a scale of int4/64/asymmetric is not finite"),
        ((values, mask, scale, None, shape, grid), "has its zeros, found them otherwise"),
        ((values, mask, scale, zero, shape, symmetric), "has no zeros"),
        ((values, mask, scale, high, shape, grid), "a zero of int4/64/asymmetric is 16, of 16 levels"),
        ((values, mask, scale, zero.int(), shape, grid), "of uint8, found int32"),
        ((values, mask.int(), scale, zero, shape, grid), "found int32"),
        ((values, mask, scale, zero, (0, 70), grid), "at least one output"),
        ((values.to("meta"), mask, scale, zero, shape, grid), "read on the CPU"),
        ((values, mask, scale.to("meta"), zero, shape, grid), "found int16"),
    ):  # fmt: skip
        with pytest.raises(PackError, match=words):
            read_integers(*got, torch.bfloat16)


def rounded(x_TI):
    """x as the kernels multiply it: blocks of 32 inputs in steps of absmax / 127, in double."""
    tokens, inputs = x_TI.shape
    blocks = nn.functional.pad(x_TI.float(), (0, -inputs % 32)).view(tokens, -1, 32)
    absmax = blocks.abs().amax(-1, keepdim=True)
    # a division of a number by a tensor would round twice
    whole = (blocks * torch.full_like(absmax, 127).div(absmax)).nan_to_num(0).round()
    return (whole.double() * (absmax / 127).double()).view(tokens, -1)[:, :inputs]


def check(y, x, weight, scales, bias=None):
    """|y - x W'| within the bound of fp32 sums of x's integers, plus one rounding to the dtype; NaN fails."""
    exact = scales.weights(scales.integers(weight)).double()
    want, scale = rounded(x) @ exact.T, rounded(x).abs() @ exact.abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    bound = scale * (weight.shape[1] + 4) * 2**-23 + want.abs() * ROUNDING[x.dtype] + 1e-7 + scale * 2**-20
    assert y.shape == want.shape
    assert y.dtype == x.dtype
    assert bool(((y.double() - want).abs() <= bound).all())


def test_all_bits_run_here():
    print("not run, this CPU lacks them:", [k.name for k in dispatch.kernels() if k.lacks])
    assert {k.dtype for k in RUNNABLE} == {f"int{b}" for b in BITS}


@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda k: k.name)
def test_every_kernel_multiplies_every_grid(kernel):
    for grid in (g for g in GRIDS if f"int{parse(g).bits}" == kernel.dtype):
        for tokens, dtype in ((1, torch.float32), (2, torch.bfloat16), (7, torch.float16), (33, torch.float32)):
            weight, scales = on_grid((37, 200), grid, 0.5)
            if kernel.strategy == "pairs":
                if scales.zero_OG is not None:
                    continue
                weight, scales = on_grid((37, 200), grid, 0.0)
                weight = two_of_four(weight)
            packed = pack(weight, kernel.format, scales)
            assert kernel.accepts(packed, tokens) is None
            x, bias = torch.randn(tokens, 200).to(dtype), torch.randn(37).to(dtype)
            check(Call([packed], [bias])(x, kernel.index).view(tokens, 37), x, weight, scales, bias)


def test_every_problem_has_a_kernel_that_takes_it():
    for grid in ("int8", "int3/32"):
        for format in FORMATS:
            weight, scales = on_grid((8, 640), grid)
            packed = pack(weight, format, scales)
            for tokens in (1, 4, 8, 16, 64, 256):
                row = select(packed, tokens)
                assert row.accepts(packed, tokens) is None
                assert row.dtype == packed.stored
    row = next(k for k in RUNNABLE if k.dtype == "int8" and k.format == "bitmask")
    weight, scales = on_grid((8, 64), "int4")
    assert "takes int8, these are int4" in row.accepts(pack(weight, "bitmask", scales), 1)
    assert "takes bitmask weights, these are dense" in row.accepts(pack(weight, "dense", scales), 1)


@pytest.mark.parametrize("grid", ["int8", "int4/32", "q4_0"])
def test_two_of_four_inputs_have_kernels_of_their_own(grid):
    dense, scales = on_grid((8, 640), grid, 0.0)
    weight = two_of_four(dense)
    packed = pack(weight, "bitmask", scales)
    assert packed.pairs
    row = select(packed, 1)
    assert row.strategy == "pairs"
    assert select(packed, dispatch.PAIRS_TOKENS[row.isa] + 1).strategy == "tile"
    x = torch.randn(3, 640)
    check(Call([packed], [None])(x).view(3, 8), x, weight, scales)
    # one row in which four keep three
    weight[5, 636:639] = dense[5, 636:639] = scales.scale_OG[5, -1].float()
    more = pack(weight, "bitmask", scales)
    assert not more.pairs
    assert select(more, 1).strategy == "stream"
    assert "at most two weights of every four inputs, here some keep more" in row.accepts(more, 1)
    # the smaller of two matrices decides where it must
    both = Call([packed, pack(weight[4:], "bitmask", Scales(scales.grid, scales.scale_OG[4:]))], [None, None])
    assert dispatch.kernels()[both.kernel(1)].strategy == "stream"


def test_pairs_are_for_symmetric_grids():
    row = next(k for k in RUNNABLE if k.strategy == "pairs" and k.dtype == "int4")
    weight, scales = on_grid((8, 64), "int4/64/asymmetric", 0.0)
    packed = pack(two_of_four(weight), "bitmask", scales)
    assert packed.pairs
    assert "takes symmetric grids, these are on int4/64/asymmetric" in row.accepts(packed, 1)
    assert select(packed, 1).strategy == "stream"


def test_the_operator_passes_opcheck():
    weight, scales = on_grid((30, 64), "int4/32/asymmetric")
    packed = pack(weight, "bitmask", scales)
    parts = [*parts_of(packed), *parts_of(packed, torch.zeros(30))]
    layouts = layout_of((30, 64), packed.grid) * 2
    opcheck(torch.ops.secateurs.linear.default, (torch.randn(3, 64), parts, layouts))
    opcheck(torch.ops.secateurs.linear_back.default, (torch.randn(3 * 60), parts, layouts))


def test_wrong_inputs_are_refused():
    weight, scales = on_grid((30, 64), "int4")
    packed = pack(weight, "bitmask", scales)
    with pytest.raises(DeviceError, match=r"64 torch.float32 inputs was given torch.float32 of shape \[1, 65\]"):
        linear(torch.randn(1, 65), packed)
    with pytest.raises(DeviceError, match="takes bf16, fp16, fp32, and was given torch.float64"):
        linear(torch.randn(1, 64).double(), packed)
    with pytest.raises(DeviceError, match="the bias of 30"):
        linear(torch.randn(1, 64), packed, torch.zeros(30).bfloat16())
    with pytest.raises(PackError, match="without their scales"):
        torch.ops.secateurs.linear(
            torch.randn(1, 64), [packed.values, None, None, None, None], layout_of((30, 64), packed.grid)
        )
    both = [*parts_of(packed), *parts_of(pack(weight, "dense", scales))]
    with pytest.raises(DeviceError, match="one format and one kind of numbers"):
        torch.ops.secateurs.linear(torch.randn(1, 64), both, layout_of((30, 64), packed.grid) * 2)


def test_scales_that_were_written_to_are_checked_again():
    weight, scales = on_grid((8, 64), "int4")
    packed = pack(weight, "bitmask", scales)
    x = torch.ones(1, 64)
    linear(x, packed)
    packed.scale_PG4[0, 0, 0] = 0x7F80
    with pytest.raises(PackError, match="not finite"):
        linear(x, packed)


def layers(format, grids=("int4", "int4/128", "int4/64/asymmetric")):
    made = []
    for outputs, grid in zip((32, 16, 12), grids, strict=True):
        weight, scales = on_grid((outputs, 64), grid)
        made.append(PackedLinear.of(pack(weight, format, scales)))
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_query_key_and_value_share_a_call(format, monkeypatch):
    parent = nn.Module()
    for name, layer in zip(("q_proj", "k_proj", "v_proj"), layers(format), strict=True):
        parent.add_module(name, layer)
    alone = copy.deepcopy(parent)
    group_shared_inputs(parent)
    x, calls, multiply = torch.randn(5, 64), [], PackedLinear._multiply
    want = [layer(x) for layer in alone.children()]
    monkeypatch.setattr(PackedLinear, "_multiply", staticmethod(lambda ls, x: calls.append(len(ls)) or multiply(ls, x)))
    got = [layer(x) for layer in parent.children()]
    assert calls == [3]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_only_layers_of_one_kind_share_a_call():
    parent = nn.Module()
    q, k, v = layers("bitmask", ("int4", "int8", "int4"))
    for name, layer in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        parent.add_module(name, layer)
    group_shared_inputs(parent)
    assert q.group.layers == [q, v]
    assert k.group is None
    x = torch.randn(3, 64)
    assert [layer(x).shape[-1] for layer in (q, k, v)] == [32, 16, 12]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grid", ["int4/64/asymmetric", "int8"])
def test_a_layer_is_loaded_copied_and_cast(format, grid):
    weight, scales = on_grid((20, 70), grid, dtype=torch.float16)
    packed = pack(weight, format, scales)
    layer = PackedLinear.of(packed, torch.randn(20).half())
    empty = PackedLinear.empty(
        (20, 70), packed.survivors, torch.float16, True, format=format, grid=scales.grid, length=packed.values.numel()
    )
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in layer.state_dict().items()
    }
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 70).half()
    for again in (empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
        assert torch.equal(again.dense().weight, weight)
    # what is stored stays as it is; x and bias say in what is computed
    y = layer(x).float()
    layer.to(torch.float32)
    assert torch.allclose(layer(x.float()), y, rtol=1e-2, atol=1e-2)
    dense = layer.dense()
    assert dense.weight.dtype == dense(x.float()).dtype == torch.float32
    assert torch.equal(dense.weight.half(), weight)
    assert torch.equal(layer.weight_scale, parts_of(packed)[2])
    assert f"format={format}, grid={scales.grid}" in repr(layer)


@pytest.mark.parametrize("format", FORMATS)
def test_compile_and_gradients_go_through(format):
    weight, scales = on_grid((64, 64), "int4/32", dtype=torch.float32)
    layer = PackedLinear.of(pack(weight, format, scales))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), layer(x))
    x.requires_grad_(True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64))


def isa():
    return RUNNABLE[0].isa


def test_what_is_smallest_and_not_slower_is_chosen(monkeypatch):
    half, scales = on_grid((64, 256), "int4", 0.5)
    monkeypatch.setattr(packed_linear, "BITMASK_FROM", {("int4", isa()): 0.4})
    choice = choose("layer", half, None, scales)
    assert (choice.format, choice.grid, choice.plain) == ("bitmask", scales.grid, False)
    assert choice.nbytes == pack(half, "bitmask", scales).nbytes
    assert choice.dense_nbytes == 2 * 64 * 256
    assert choice.survivors == int((half != 0).sum())
    # a bit per position costs more than it saves
    few, scales = on_grid((64, 256), "int4", 0.1)
    choice = choose("layer", few, None, scales)
    assert (choice.format, choice.nbytes) == ("dense", pack(few, "dense", scales).nbytes)
    assert "would take 1." in choice.reason
    monkeypatch.setattr(packed_linear, "BITMASK_FROM", {("int4", isa()): 0.9})
    some, scales = on_grid((64, 256), "int4", 0.5)
    assert f"slower than all integers below 90% with {isa()} kernels" in choose("layer", some, None, scales).reason
    monkeypatch.setattr(packed_linear, "BITMASK_FROM", {})
    choice = choose("layer", some, None, scales)
    assert choice.format == "dense"
    assert f"slower than all integers with {isa()} kernels" in choice.reason
    assert choice.but("it is read").plain
    # scales of a single input
    tall, scales = on_grid((64, 1), "int8", 0.0)
    assert choose("layer", tall, None, scales).plain


@pytest.mark.parametrize(
    ("isa", "text", "format"),
    [
        ("avx2", "int8", "bitmask"),
        ("avx2", "int4", "dense"),
        ("avx512", "int4", "bitmask"),
        ("avx512", "int3", "dense"),
    ],
)
def test_half_of_zeros_are_left_out_where_that_was_measured_to_be_no_slower(isa, text, format, monkeypatch):
    rows = [replace(k, isa=isa, lacks="") for k in RUNNABLE]
    monkeypatch.setattr(packed_linear, "kernels", lambda: rows)
    # rounding makes some more
    half, scales = on_grid((64, 256), text, 0.5)
    assert choose("layer", half, None, scales).format == format


def test_who_wants_bytes_gets_the_smallest_form_and_hears_that_it_is_slower(monkeypatch):
    monkeypatch.setattr(packed_linear, "BITMASK_FROM", {("int4", isa()): 0.9})
    some, scales = on_grid((64, 256), "int4", 0.5)
    fast, small = (choose("layer", some, None, scales, optimize=wanted) for wanted in ("speed", "size"))
    assert (fast.format, fast.slower, fast.least_nbytes) == ("dense", False, small.nbytes)
    assert (small.format, small.slower, small.least_nbytes) == ("bitmask", True, small.nbytes)
    assert small.nbytes == pack(some, "bitmask", scales).nbytes < fast.nbytes == pack(some, "dense", scales).nbytes
    assert small.reason.endswith(f"% zeros left out, slower than all integers below 90% with {isa()} kernels")
    # rows that are looked up have no other form
    table = choose("layer", some, None, scales, True, "size")
    assert (table.format, table.slower, table.nbytes, table.least_nbytes) == ("dense", False, fast.nbytes, fast.nbytes)
    # where a bit per position costs more than it saves there is nothing to ask for
    few, scales = on_grid((64, 256), "int4", 0.1)
    choice = choose("layer", few, None, scales, optimize="size")
    assert (choice.format, choice.slower, choice.least_nbytes) == ("dense", False, choice.nbytes)
    as_it_is = small.but("it is read")
    assert (as_it_is.nbytes, as_it_is.least_nbytes, as_it_is.slower) == (2 * 64 * 256, 2 * 64 * 256, False)


def test_two_of_four_are_left_out_wherever_a_kernel_takes_them(monkeypatch):
    monkeypatch.setattr(packed_linear, "BITMASK_FROM", {})
    weight, scales = on_grid((64, 256), "int8", 0.0)
    half = two_of_four(weight)
    # 255 inputs: the last four are three
    for some, of in ((half, scales), (half[:, :255].contiguous(), scales)):
        choice = choose("layer", some, None, of)
        assert choice.format == ("bitmask" if ("int8", isa()) in packed_linear.PAIRS else "dense")
        assert choice.format == "dense" or "at most two of four inputs kept" in choice.reason
    half[63, 252:255] = weight[63, 252:255] = scales.scale_OG[63, -1].float()
    assert choose("layer", half, None, scales).format == "dense"
    weight, scales = on_grid((64, 256), "int8/64/asymmetric", 0.0)
    assert choose("layer", two_of_four(weight), None, scales).format == "dense"


def test_a_profile_that_measured_integers_decides():
    weight, scales = on_grid((64, 256), "int4", 0.5)
    for speedup, format, words in ((0.8, "dense", "0.80x as fast as all integers on here"), (1.3, "bitmask", "1.30x")):
        rows = [{"dtype": "int4", "sparsity": 0.5, "tokens": 1, "kernel": "bitmask_int4_x", "speedup": speedup}]
        choice = choose("layer", weight, DeviceProfile("here", {}, 1.0, {}, rows, {}), scales)
        assert choice.format == format
        assert words in choice.reason
        small = choose("layer", weight, DeviceProfile("here", {}, 1.0, {}, rows, {}), scales, optimize="size")
        assert (small.format, small.slower) == ("bitmask", speedup < 1)
        assert f"left out, {words}" in small.reason
