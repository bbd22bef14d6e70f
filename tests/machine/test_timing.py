"""What is said of samples."""

from secateurs.machine.timing import Timing


def test_percentiles_by_hand():
    samples = [*range(31)][::-1]
    assert Timing.of(samples) == Timing(15, 3, 27, 31)
    assert Timing.of([2.0, 9.0]) == Timing(5.5, 2.0, 9.0, 2)
