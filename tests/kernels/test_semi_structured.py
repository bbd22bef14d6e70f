"""What was measured of 2:4, on machines that cannot measure it."""

import pytest

from secateurs.kernels.semi_structured import Measured


def test_a_speedup_is_over_the_dense_product():
    found = Measured(seconds={"dense": 3.0, "cusparselt": 2.0}, why_not={"cutlass": "no such build"})
    assert found.speedup("cusparselt") == pytest.approx(1.5)
    assert found.speedup("cutlass") is None
    assert Measured(seconds={"cutlass": 1.0}).speedup("cutlass") is None
