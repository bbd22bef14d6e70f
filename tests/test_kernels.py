import os
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from secateurs import kernels
from secateurs.errors import DeviceError
from secateurs.formats import DTYPES, pack
from secateurs.kernels import Call, linear, select

NAMES = {name: dtype for dtype, name in DTYPES.items()}
RUNNABLE = [k for k in kernels.kernels() if not k.lacks]
# half the distance between neighbours, relative
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}


def problem(shape=(37, 200), dtype=torch.bfloat16, sparsity=0.5):
    weight = torch.randn(shape).to(dtype)
    return weight.masked_fill(torch.rand(shape) < sparsity, 0)


def check(y, x, weight, bias=None):
    """|y - x W'| within the bound of any order of fp32 sums, plus one rounding to the dtype; NaN fails."""
    want = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    bound = scale * (weight.shape[1] + 4) * 2**-23 + want.abs() * ROUNDING[weight.dtype] + 1e-7 + scale * 2**-20
    assert y.shape == want.shape
    assert bool(((y.double() - want).abs() <= bound).all())


def test_something_runs_here():
    print("not run, this CPU lacks them:", [k.name for k in kernels.kernels() if k.lacks])
    assert {k.dtype for k in RUNNABLE} == set(NAMES)


@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda k: k.name)
def test_every_kernel_multiplies(kernel):
    dtype = NAMES[kernel.dtype]
    for tokens in (1, 2, 5, 16, 17, 65, 130):
        weight, bias = problem(dtype=dtype), torch.randn(37).to(dtype)
        x = torch.randn(tokens, 200).to(dtype)
        y = Call([pack(weight, kernel.format)], [bias])(x, kernel.index)
        check(y.view(tokens, 37), x, weight, bias)


def test_rows_answer_why_not():
    dense, packed = pack(problem(), "dense"), pack(problem())
    row = next(k for k in RUNNABLE if k.format == "bitmask" and k.dtype == "bf16")
    assert row.accepts(packed, 1) is None
    assert "these are dense" in row.accepts(dense, 1)
    assert "these are fp32" in row.accepts(pack(problem(dtype=torch.float32)), 1)
    lacking = kernels.Kernel("x", "bitmask", "bf16", "neon", "stream", 0, "x needs NEON, which this CPU lacks")
    assert "NEON" in lacking.accepts(packed, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_every_problem_has_a_kernel_that_takes_it(dtype):
    for sparsity in (0.3, 0.6, 0.95):
        packed = pack(problem(dtype=dtype, sparsity=sparsity))
        for tokens in (1, 8, 9, 64, 500):
            assert select(packed, tokens).accepts(packed, tokens) is None


def test_few_tokens_stream_and_many_survivors_are_tiled():
    packed = pack(problem())
    assert select(packed, 1).strategy == "stream"
    assert select(packed, 500).strategy == "tile"


def test_a_row_can_be_forced():
    code = (
        "import torch, secateurs.kernels as k; from secateurs.formats import pack;"
        "p = pack(torch.eye(4, 64).bfloat16()); print(k.select(p, 1).name)"
    )

    def run(name, code=code):
        environment = {**os.environ, "SECATEURS_KERNEL": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("bitmask_bf16_scalar_tile").stdout.strip() == "bitmask_bf16_scalar_tile"
    unknown = run("bitmask_bf16_abacus")
    assert unknown.returncode
    assert "no kernel is named 'bitmask_bf16_abacus'; these run here: " in unknown.stderr
    assert "bitmask_bf16_scalar_stream" in unknown.stderr
    # a layer that stays dense is torch's then
    dense = "import torch; from secateurs.kernels import streams_dense as s; w = torch.ones(4, 64); print(s(w, w[:1]))"
    assert run("bitmask_fp32_scalar_tile", dense).stdout.strip() == "False"
    assert run("dense_fp32_scalar_stream", dense).stdout.strip() == "True"
    wrong = run("bitmask_fp32_scalar_tile")
    assert "SECATEURS_KERNEL=bitmask_fp32_scalar_tile: " in wrong.stderr
    assert "these are bf16" in wrong.stderr


def test_the_operator_passes_opcheck():
    weight = problem((30, 64))
    packed = pack(weight)
    x = torch.randn(3, 64).bfloat16()
    arguments = (x, [packed.values] * 2, [packed.mask_PJ4] * 2, [None, torch.zeros(30).bfloat16()], [30, 64] * 2)
    opcheck(torch.ops.secateurs.linear.default, arguments)


def test_leading_dimensions_are_kept():
    weight = problem((30, 64), torch.float32)
    x = torch.randn(2, 3, 64)
    y = linear(x, pack(weight))
    assert y.shape == (2, 3, 30)
    check(y.view(6, 30), x.view(6, 64), weight)
    # a view that is not contiguous
    z = linear(x.transpose(0, 1), pack(weight))
    assert torch.equal(z, y.transpose(0, 1))
    assert linear(x[:0], pack(weight)).shape == (0, 3, 30)


def test_wrong_inputs_are_refused():
    packed = pack(problem((30, 64)))
    with pytest.raises(DeviceError, match=r"64 torch.bfloat16 inputs was given torch.float32 of shape \[1, 64\]"):
        linear(torch.randn(1, 64), packed)
    with pytest.raises(DeviceError, match=r"shape \[1, 65\]"):
        linear(torch.randn(1, 65).bfloat16(), packed)
    with pytest.raises(DeviceError, match="the bias of 30"):
        linear(torch.randn(1, 64).bfloat16(), packed, torch.zeros(29).bfloat16())


def test_a_mask_that_was_written_to_is_checked_again():
    packed = pack(problem((8, 64), torch.float32))
    x = torch.ones(1, 64)
    linear(x, packed)
    packed.mask_PJ4[0, 0, 0] ^= 1
    with pytest.raises(Exception, match="are stored"):
        linear(x, packed)


def test_the_same_tensors_in_another_shape_are_checked_again():
    dense = torch.randn(6, 64)
    operator = torch.ops.secateurs.linear.default
    y = operator(torch.ones(1, 64), [dense], [None], [None], [6, 64])
    z = operator(torch.ones(1, 96), [dense], [None], [None], [4, 96])
    assert torch.allclose(y, dense.sum(1), atol=1e-5)
    assert torch.allclose(z, dense.view(4, 96).sum(1), atol=1e-5)


def test_threads_are_those_of_torch():
    from secateurs.library import threads_note

    assert threads_note() is None
    weight = problem((512, 1024), torch.float32)
    packed, x = pack(weight), torch.randn(3, 1024)
    here = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(x, packed)
        torch.set_num_threads(2)
        two = linear(x, packed)
    finally:
        torch.set_num_threads(here)
    # rows are split, sums are not
    assert torch.equal(one, two)
