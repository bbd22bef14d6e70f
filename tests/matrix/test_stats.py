import pytest
import torch

from secateurs import Stats


@pytest.mark.parametrize("width", [1, 7, 96, 97, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_the_sum_of_outer_products(width, dtype):
    x_TI = torch.randn(300, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    stats = Stats.of(x_TI)
    want = x_TI.double().T @ x_TI.double()
    # any order of n fp32 additions: |error| <= n * eps * sum |terms| (Higham 2002, sec. 4.2)
    bound = 300 * torch.finfo(torch.float32).eps * (x_TI.double().abs().T @ x_TI.double().abs())
    assert bool(((stats.gram_II - want).abs() <= bound).all())
    assert torch.equal(stats.gram_II, stats.gram_II.T)
    assert torch.equal(stats.sqnorm_I, stats.gram_II.diagonal())
    norms = Stats.of(x_TI, gram=False)
    assert bool(((norms.sqnorm_I - want.diagonal()).abs() <= bound.diagonal()).all())
    assert norms.gram_II is None


def test_sixteen_bit_sums_do_not_saturate():
    # 1 + 1 + ... stops at 256 in bf16
    stats = Stats.of(torch.ones(5000, 3, dtype=torch.bfloat16))
    assert stats.gram_II.unique().tolist() == [5000.0]


def test_shards_merge_exactly_and_in_any_order():
    x_TI = torch.randint(-8, 8, (64, 5)).float()
    whole = Stats.of(x_TI)
    first, second = Stats.of(x_TI[:20]), Stats.of(x_TI[20:])
    for merged in (first + second, second + first):
        assert merged.tokens == 64
        assert torch.equal(merged.gram_II, whole.gram_II)
        assert torch.equal(merged.sqnorm_I, whole.sqnorm_I)
    with pytest.raises(ValueError, match="collect both the same way"):
        first + Stats.of(x_TI, gram=False)


def test_the_order_of_batches_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    # some inputs are a thousand times as large, as in real models
    batches = torch.randn(24, 64, 200, generator=generator) * torch.logspace(-2, 2, 200)
    gram, norms = (Stats.zeros(200, gram) for gram in (True, False))
    other_gram, other_norms = (Stats.zeros(200, gram) for gram in (True, False))
    for i in range(24):
        for stats in (gram, norms):
            stats.add_(batches[i])
        for stats in (other_gram, other_norms):
            stats.add_(batches[(7 * i + 3) % 24])
    assert torch.equal(gram.finish().gram_II, other_gram.finish().gram_II)
    assert torch.equal(norms.finish().sqnorm_I, other_norms.finish().sqnorm_I)
    again = gram.gram_II.clone()
    # finished sums may grow on
    gram.add_(batches[0])
    assert torch.equal(gram.finish().gram_II - again, torch.zeros(200, 200)) is False
    torch.testing.assert_close(gram.gram_II, again + batches[0].T @ batches[0])


def test_inverse_factor_rows_come_from_trailing_inverses(layer):
    _, stats, _ = layer
    upper = stats.inverse_factor(0.01).double()
    hessian = stats.damped(0.01).double()
    for j in (0, 5, 31):
        trailing = torch.linalg.inv(hessian[j:, j:])[0]
        torch.testing.assert_close(upper[j, j:], trailing / trailing[0].sqrt(), rtol=1e-3, atol=1e-6)


def test_dead_inputs_cost_next_to_nothing_and_are_named():
    stats = Stats.of(torch.tensor([[1.0, 0.0, 3.0], [1.0, 0.0, 0.0]]))
    assert stats.dead_I.tolist() == [False, True, False]
    # the mean of 2, 0 and 9 is 11 / 3
    want = torch.tensor([[2 + 0.11 / 3, 0, 3], [0, 11e-12 / 3, 0], [3, 0, 9 + 0.11 / 3]])
    torch.testing.assert_close(stats.damped(0.01), want)
    torch.testing.assert_close(Stats.of(torch.zeros(5, 2)).damped(0.01), 1e-12 * torch.eye(2))


def test_the_damping_is_no_less_than_fp32_needs():
    stats = Stats.of(torch.eye(4) * 2)
    # 4 inputs: 4 * 2^-23 of the mean, 4
    assert stats.damped(1e-9)[0, 0] == 4 + 16 * 2.0**-23
    low_rank = Stats.of(torch.ones(512, 256))
    assert torch.isfinite(low_rank.inverse_factor(1e-9)).all()


def test_singular_and_empty_grams_raise_with_numbers():
    with pytest.raises(ValueError, match="0 tokens is empty or not finite"):
        Stats.zeros(3, True).inverse_factor(0.01)
    bad = Stats(10, torch.ones(2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(ValueError, match=r"10 tokens is singular at damping 0.01.*2x2"):
        bad.inverse_factor(0.01)
    with pytest.raises(ValueError, match="only norms"):
        Stats.of(torch.ones(2, 2), gram=False).damped(0.01)


def test_bf16_products_leave_the_global_setting_alone():
    before = torch.backends.mkldnn.matmul.fp32_precision
    Stats.of(torch.ones(4, 4, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_drift_is_the_sum_of_differences_and_inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    # sums that fp16 cannot hold
    x_TI = (40 * torch.randn(3000, 12, generator=generator)).to(dtype)
    dense_TI = (1.5 * x_TI.float() + torch.randn(3000, 12, generator=generator)).to(dtype)
    stats = Stats.zeros(12, gram=True)
    stats.add_(x_TI[:1000], dense_TI[:1000])
    stats.add_(x_TI[1000:], dense_TI[1000:])
    stats.finish()
    want = (dense_TI - x_TI).double().T @ x_TI.double()
    assert want.abs().max() > 1e6
    torch.testing.assert_close(stats.drift_II.double(), want, rtol=1e-5, atol=float(want.abs().max()) * 1e-6)


def test_a_factor_is_kept_for_its_damping_alone():
    stats = Stats(1, torch.tensor([3.0, 1.0]), torch.diag(torch.tensor([3.0, 1.0])))
    # the mean of the diagonal is 2: 0.5 and 1.5 add 1 and 3, and U' U is the inverse
    for damping, diagonal in ((0.5, (4.0, 2.0)), (1.5, (6.0, 4.0)), (0.5, (4.0, 2.0))):
        want = torch.diag(torch.tensor(diagonal).rsqrt())
        torch.testing.assert_close(stats.inverse_factor(damping), want)
    # layers that share inputs share the work
    assert stats.inverse_factor(0.5) is stats.inverse_factor(0.5)
