import torch

from secateurs.matrix.grids import Grid, Scales


def test_all_integers_of_eight_bits_come_back_from_bf16():
    """162 steps of 0.0030975 are 0.50180, in bf16 0.5: that is 161.42 steps. Where two integers give one bf16, either will do."""
    for zero in (0, 93, 255):
        scale = torch.tensor([[0.0030975], [-0.0071], [1.0]], dtype=torch.bfloat16)
        scales = Scales(Grid(8, 0, symmetric=False), scale, torch.full((3, 1), zero, dtype=torch.uint8))
        integer = torch.arange(-zero, 256 - zero).repeat(3, 1)
        weight = scales.weights(integer).bfloat16()
        assert scales.off(weight) is None
        assert (scales.integers(weight) - integer).abs().max() <= 1


def test_zeros_of_a_negative_scale_are_positive():
    scales = Scales(Grid(4, 0), torch.tensor([[-0.5]], dtype=torch.bfloat16))
    assert not scales.weights(torch.tensor([[0, 0]])).signbit().any()
