import os
import subprocess
import sys

import pytest
import tiny
import torch
from plans import asked
from torch import nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.base import precision

SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(params=SIXTEEN, ids=lambda d: str(d).removeprefix("torch."))
def slow(request, monkeypatch):
    """A 16-bit dtype for which this CPU is said to have no instructions."""
    monkeypatch.setattr(precision, "_has", lambda stored: False)
    return request.param


# name: what is called, with tensors of these shapes
CALLS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (3, 30, 40), (50, 40), (50,)),
    "linear without bias": (lambda x, w: F.linear(x, w), (90, 40), (50, 40)),
    "linear by name": (lambda x, w, b: F.linear(x, weight=w, bias=b), (90, 40), (50, 40), (50,)),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), (50,), (90, 40), (40, 50)),
    "addmm of a matrix": (lambda b, x, w: torch.addmm(b, x, w), (90, 50), (90, 40), (40, 50)),
    "matmul": (torch.matmul, (2, 30, 40), (2, 40, 20)),
    "@": (lambda a, b: a @ b, (30, 40), (40, 20)),
    "bmm": (torch.bmm, (2, 30, 40), (2, 40, 20)),
    "baddbmm": (torch.baddbmm, (2, 30, 20), (2, 30, 40), (2, 40, 20)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (2, 30, 40), (2, 40, 20)),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *[(1, 2, 20, 16)] * 3),
    "conv2d": (lambda x, w: F.conv2d(x, w), (2, 3, 8, 8), (5, 3, 3, 3)),
}


def near(got, want):
    """One rounding to the dtype, which a sum in another order may turn over."""
    assert got.dtype in SIXTEEN
    want = want.double()
    assert bool(((got.double() - want).abs() <= torch.finfo(got.dtype).eps * want.abs() + 1e-5).all())


def given(name, dtype):
    call, *shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    return call, [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", CALLS)
def test_a_product_is_formed_in_fp32_and_rounded_once(name, slow):
    call, tensors = given(name, slow)
    with precision.widened():
        got = call(*tensors)
    copies = [t.detach().float().requires_grad_() for t in tensors]
    want = call(*copies)
    assert got.dtype == slow
    near(got, want)
    # and the way back
    direction = torch.randn(want.shape).to(slow)
    got.backward(direction)
    want.backward(direction.float())
    for t, copy in zip(tensors, copies, strict=True):
        assert t.grad.dtype == slow
        near(t.grad, copy.grad)


def test_a_matrix_is_widened_in_pieces_and_no_copy_is_kept(slow, monkeypatch):
    call, tensors = given("linear", slow)
    with precision.widened():
        whole = call(*tensors)
    widths = []
    monkeypatch.setattr(precision, "_WEIGHTS", 40 * 7)
    monkeypatch.setattr(F, "linear", lambda x, w, b, f=F.linear: widths.append(len(w)) or f(x, w, b))
    kept = []
    with precision.widened(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pieces = precision._product(*tensors)
    assert widths == [7] * 7 + [1]
    near(pieces, whole)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors[:2]}
    torch.autograd.grad(pieces.float().square().sum(), tensors)


def test_what_is_no_slow_product_stays_as_it_is(slow):
    call, tensors = given("linear", torch.float32)
    with precision.widened():
        assert torch.equal(call(*tensors), F.linear(*tensors))
        few = [t.detach().to(slow) for t in tensors]
        few[0] = few[0].reshape(-1, 40)[: precision._FEW - 1]
        assert torch.equal(F.linear(*few), precision._product(*few))
        with pytest.raises(RuntimeError):
            # dtypes that torch refuses to multiply are still refused
            F.linear(tensors[0], few[1])


def test_nothing_is_entered_where_the_cpu_has_instructions(monkeypatch):
    monkeypatch.setattr(precision, "_has", lambda stored: True)
    assert precision.compute_dtype(torch.bfloat16) == torch.bfloat16
    assert not isinstance(precision.widened(), torch.overrides.TorchFunctionMode)
    monkeypatch.setattr(precision, "_has", lambda stored: False)
    assert precision.compute_dtype(torch.bfloat16) == torch.float32
    assert precision.compute_dtype(torch.float64) == torch.float64
    assert precision.compute_dtype(torch.bfloat16, "cuda") == torch.bfloat16


@pytest.fixture
def fresh():
    precision._has.cache_clear()
    yield
    precision._has.cache_clear()


@pytest.mark.parametrize(
    ("flags", "capability", "limit", "bf16", "fp16"),
    [
        ({"avx2"}, "AVX2", None, False, False),
        ({"avx2", "avx512f"}, "AVX512", None, False, False),
        ({"avx512_bf16"}, "AVX512", None, True, False),
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, "AVX512", None, True, True),
        ({"avx512_bf16", "avx512_fp16"}, "AVX512", "AVX512_CORE_BF16", True, False),
        ({"avx512_bf16"}, "AVX512", "AVX2", False, False),
        ({"avx512_bf16"}, "AVX2", None, False, False),
    ],
)
def test_16_bit_products_need_instructions(monkeypatch, fresh, flags, capability, limit, bf16, fp16):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert (precision.compute_dtype(torch.bfloat16) == torch.bfloat16) is bf16
    assert (precision.compute_dtype(torch.float16) == torch.float16) is fp16
    assert precision.compute_dtype(torch.float32) == torch.float32


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE_VNNI"])
def test_onednns_limit_is_obeyed(limit):
    code = "import torch; from secateurs.base.precision import compute_dtype as c; print(c(torch.bfloat16), c(torch.float16))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "torch.float32 torch.float32", found.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_run_sees_the_same_layers_and_tokens(family, slow, monkeypatch):
    """Hooks that watch products find them; what is written has its dtype."""
    windows = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))
    plan = asked(sc.Plan, sparsity=0.5, method="sparsegpt", sensitivity=128, reconstruct=2)

    def pruned(dtype):
        model = tiny.make(family, slow).to(dtype)
        return model, sc.prune(model, plan, calibration=windows)

    calls = []
    monkeypatch.setattr(precision, "_product", lambda *a, f=precision._product: calls.append(1) or f(*a))
    model, report = pruned(slow)
    assert calls
    exact, want = pruned(torch.float32)
    assert {p.dtype for p in model.parameters()} == {slow}
    assert [(r.name, r.kept) for r in report.layers] == [(r.name, r.kept) for r in want.layers]
    # routing may send a token elsewhere after a rounding
    if family != "mixtral":
        assert [r.tokens for r in report.layers] == [r.tokens for r in want.layers]
    same = [
        ((p == 0) == (q == 0)).float().mean() for p, q in zip(model.parameters(), exact.parameters(), strict=True)
        if p.dim() > 1
    ]  # fmt: skip
    assert float(torch.stack(same).mean()) > 0.9


def test_modules_of_one_linear_are_widened_too(slow):
    model = nn.Sequential(nn.Linear(16, 8)).to(slow)
    report = sc.prune(
        model, asked(sc.Plan, sparsity=0.5, method="wanda"), calibration=[{"input": torch.randn(99, 16).to(slow)}]
    )
    assert report.layers[0].tokens == 99
