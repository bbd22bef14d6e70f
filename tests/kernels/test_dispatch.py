import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.library import opcheck

from secateurs.base.errors import DeviceError
from secateurs.kernels import dispatch
from secateurs.kernels.dispatch import Call, layout_of, linear, parts_of, select
from secateurs.kernels.formats import DTYPES, Packed, pack

NAMES = {name: dtype for dtype, name in DTYPES.items()}
# integers have tests of their own (test_integers.py)
RUNNABLE = [k for k in dispatch.kernels() if not k.lacks and k.dtype in NAMES]
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
    print("not run, this CPU lacks them:", [k.name for k in dispatch.kernels() if k.lacks])
    assert {k.dtype for k in RUNNABLE} == set(NAMES)


@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda k: k.name)
def test_every_kernel_multiplies(kernel):
    dtype = NAMES[kernel.dtype]
    for tokens in (1, 2, 5, 16, 17, 65, 130):
        weight, bias = problem(dtype=dtype), torch.randn(37).to(dtype)
        x = torch.randn(tokens, 200).to(dtype)
        y = Call([pack(weight, kernel.format)], [bias])(x, kernel.index)
        check(y.view(tokens, 37), x, weight, bias)


@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda k: k.name)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "0.99"])
def test_every_kernel_multiplies_every_pattern(kernel, pattern):
    dtype = NAMES[kernel.dtype]
    # whole panels and words, with each byte of the mask alike; rows whose neighbours are far apart
    weight = torch.rand(40, 1024).add(0.5).to(dtype)
    inputs = torch.arange(1024) + torch.arange(40)[:, None]
    keep = torch.rand(40, 1024) > 0.99 if pattern == "0.99" else inputs % 4 < int(pattern[0])
    weight = weight.masked_fill(~keep, 0)
    packed = pack(weight, kernel.format)
    assert packed.most == {"2:4": 4, "1:4": 2}.get(pattern, packed.most) or kernel.format == "dense"
    for tokens in (1, 2, 3, 4, 7, 40):
        x = torch.randn(tokens, 1024).to(dtype)
        check(Call([packed], [None])(x, kernel.index).view(tokens, 40), x, weight)


def test_rows_answer_why_not():
    dense, packed = pack(problem(), "dense"), pack(problem())
    row = next(k for k in RUNNABLE if k.format == "bitmask" and k.dtype == "bf16")
    assert row.accepts(packed, 1) is None
    assert "these are dense" in row.accepts(dense, 1)
    assert "these are fp32" in row.accepts(pack(problem(dtype=torch.float32)), 1)
    lacking = dispatch.Kernel("x", "bitmask", "bf16", "neon", "stream", 0, "x needs NEON, which this CPU lacks")
    assert "NEON" in lacking.accepts(packed, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_every_problem_has_a_kernel_that_takes_it(dtype):
    for sparsity in (0.3, 0.6, 0.95):
        packed = pack(problem(dtype=dtype, sparsity=sparsity))
        for tokens in (1, 8, 9, 64, 500):
            assert select(packed, tokens).accepts(packed, tokens) is None


def test_few_tokens_stream_and_many_survivors_are_tiled():
    # whatever the instruction set: at 50% some list positions
    packed = pack(problem(sparsity=0.3))
    assert select(packed, 1).strategy == "stream"
    assert select(packed, 500).strategy == "tile"


def test_a_row_can_be_forced():
    code = (
        "import torch, secateurs.kernels.dispatch as k; from secateurs.kernels.formats import pack;"
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
    dense = "import torch; from secateurs.kernels.dispatch import ours_is_faster as s; w = torch.ones(4, 64); print(s(w, w[:1]))"
    assert run("bitmask_fp32_scalar_tile", dense).stdout.strip() == "False"
    assert run("dense_fp32_scalar_stream", dense).stdout.strip() == "True"
    wrong = run("bitmask_fp32_scalar_tile")
    assert "SECATEURS_KERNEL=bitmask_fp32_scalar_tile: " in wrong.stderr
    assert "these are bf16" in wrong.stderr


def limited(limit, code):
    environment = {**os.environ, "SECATEURS_MAX_ISA": limit}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_limit_leaves_out_richer_rows():
    code = (
        "import secateurs.kernels.dispatch as k; rows = k.kernels();"
        "print({r.isa for r in rows if not r.lacks}); print(next(r.lacks for r in rows if r.isa not in ('scalar', 'cuda')))"
    )
    runs, lacks = limited("scalar", code).stdout.strip().splitlines()
    assert runs == "{'scalar'}"
    assert "SECATEURS_MAX_ISA=scalar leaves that out" in lacks or "this CPU lacks" in lacks
    assert "'avx512'" not in limited("avx2", code).stdout
    unknown = limited("avx1024", code)
    assert unknown.returncode
    assert "SECATEURS_MAX_ISA=avx1024 is no instruction set; known: scalar, neon, avx2, avx512" in unknown.stderr


def test_strategies_by_hand():
    choice = dispatch.Choice(5, 0.6, gather=(8, 0.85), many=(48, 0.45))
    assert [choice.strategy(t, 0.5) for t in (1, 5, 6, 47, 48)] == ["stream", "stream", "tile", "tile", "skip"]
    assert [choice.strategy(t, 0.9) for t in (1, 8, 9)] == ["gather", "gather", "skip"]
    assert [choice.strategy(t, 0.7) for t in (1, 9)] == ["stream", "skip"]


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_choice_has_a_kernel(isa):
    code = (
        "import torch, secateurs.kernels.dispatch as k; from secateurs.kernels.formats import pack, DTYPES\n"
        "for d in DTYPES:\n"
        "  for s in (0, .5, .95):\n"
        "    for f in ('bitmask', 'dense'):\n"
        "      p = pack(torch.ones(8, 640).masked_fill(torch.rand(8, 640) < s, 0).to(d), f)\n"
        "      for t in (1, 4, 8, 16, 64, 256):\n"
        "        row = k.select(p, t); assert row.accepts(p, t) is None; k.linear(torch.ones(t, 640).to(d), p)\n"
        "from secateurs.matrix.grids import Scales, parse\n"
        "for bits in (8, 6, 5, 4, 3, 2):\n"
        "  scales = Scales(parse(f'int{bits}/row'), torch.ones(8, 1).bfloat16())\n"
        "  for f in ('bitmask', 'dense'):\n"
        "    p = pack(torch.ones(8, 640).masked_fill(torch.rand(8, 640) < .5, 0), f, scales)\n"
        "    for t in (1, 16):\n"
        "      row = k.select(p, t); assert row.accepts(p, t) is None; k.linear(torch.ones(t, 640), p)\n"
        "print('done')"
    )
    found = limited(isa, code)
    assert found.stdout.strip() == "done", found.stderr


def test_wide_matrices_have_no_positions():
    gather = [k for k in RUNNABLE if k.strategy == "gather"]
    packed = pack(torch.eye(1, (1 << 16) + 64).bfloat16())
    for k in gather:
        if k.dtype == "bf16":
            assert "at most 65536 inputs, these are 65600" in k.accepts(packed, 1)
    y = linear(torch.ones(1, (1 << 16) + 64).bfloat16(), packed)
    assert y.tolist() == [[1.0]]


def test_changed_survivors_are_listed_again(monkeypatch):
    gather = next((k for k in RUNNABLE if k.strategy == "gather" and k.dtype == "fp32"), None)
    if gather is None:
        pytest.skip("no gather kernel runs here")
    monkeypatch.setattr(dispatch, "select", lambda packed, tokens: gather)
    packed = pack(problem((8, 64), torch.float32, 0.9))
    x = torch.randn(1, 64)
    y = linear(x, packed).clone()
    packed.values.mul_(2)
    assert torch.allclose(linear(x, packed), 2 * y, rtol=1e-5)


def test_our_dense_kernel_stands_in_for_an_emulated_one(monkeypatch):
    weight, x = torch.ones(4, 64).bfloat16(), torch.ones(300, 64).bfloat16()
    dispatch._dense_tokens.cache_clear()
    monkeypatch.setattr(dispatch, "compute_dtype", lambda dtype: torch.float32)
    if dispatch._best("dense", "bf16")["stream"].isa in ("avx2", "avx512"):
        assert dispatch.ours_is_faster(weight, x)
    dispatch._dense_tokens.cache_clear()
    monkeypatch.setattr(dispatch, "compute_dtype", lambda dtype: dtype)
    assert not dispatch.ours_is_faster(weight, x)
    dispatch._dense_tokens.cache_clear()
    # what needs a gradient is torch's
    weight.requires_grad_()
    assert not dispatch.ours_is_faster(weight, x[:1])
    with torch.no_grad():
        assert not dispatch.ours_is_faster(weight, x[:1].float())


def test_the_operator_passes_opcheck():
    weight = problem((30, 64))
    packed = pack(weight)
    x = torch.randn(3, 64).bfloat16()
    parts = [*parts_of(packed), *parts_of(packed, torch.zeros(30).bfloat16())]
    layouts = layout_of((30, 64), None) * 2
    opcheck(torch.ops.secateurs.linear.default, (x, parts, layouts))
    by_y = torch.randn(3 * 60).bfloat16()
    opcheck(torch.ops.secateurs.linear_back.default, (by_y, parts, layouts))


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
    parts = parts_of(Packed("dense", (6, 64), dense, torch.float32, 6 * 64))
    y = operator(torch.ones(1, 64), parts, layout_of((6, 64), None))
    z = operator(torch.ones(1, 96), parts, layout_of((4, 96), None))
    assert torch.allclose(y, dense.sum(1), atol=1e-5)
    assert torch.allclose(z, dense.view(4, 96).sum(1), atol=1e-5)


def test_threads_are_those_of_torch():
    from secateurs.kernels.library import threads_note

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


def test_positions_are_listed_once_for_all_threads(monkeypatch):
    gather = next((k for k in RUNNABLE if k.strategy == "gather" and k.dtype == "fp32"), None)
    if gather is None:
        pytest.skip("no gather kernel runs here")
    weights = [problem((37, 200), torch.float32, 0.9) for _ in range(2)]
    call = Call([pack(w) for w in weights], [None, None])
    listed, make, together = [], Call._list, threading.Barrier(4)

    def slow(self, strategy):
        listed.append(strategy)
        time.sleep(0.05)
        make(self, strategy)

    monkeypatch.setattr(Call, "_list", slow)
    x, found = torch.randn(1, 200), []

    def work():
        together.wait()
        found.append(call(x, gather.index))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert listed == ["gather"]
    assert len(found) == 4
    for y in found:
        check(y[:37].view(1, 37), x, weights[0])
        check(y[37:].view(1, 37), x, weights[1])
