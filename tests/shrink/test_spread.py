"""How a Gram matrix of few images is shrunk, against covariances that are known."""

import pytest
import torch

from secateurs.shrink.spread import Spread


def shrunk(x_NPI, parts=1):
    spread = Spread()
    for part in x_NPI.chunk(parts):
        spread.add_(part)
    flat = torch.cat([x_NPI, torch.ones(*x_NPI.shape[:2], 1, dtype=x_NPI.dtype)], 2).flatten(0, 1)
    gram = flat.T @ flat
    seen = spread.shrink(gram, len(flat))
    return gram / len(flat), seen


def test_by_hand():
    """Two images of one place: (1, 1, 1), (3, 1, -1) + the mean; entries off the diagonal of both covariances and of their mean."""
    x = torch.tensor([[[2.0, 1.0, 4.0]], [[0.0, 1.0, 0.0]]], dtype=torch.double)
    # about the mean (1, 1, 2) the images are (1, 0, 2) and (-1, 0, -2): both have x1 x3 = 2, so nothing varies
    gram, seen = shrunk(x)
    assert (seen.images, seen.places, seen.numbers, seen.share) == (2, 2, 3, 0)
    assert gram[0, 2] == 4
    x = torch.tensor([[[1.0, 1.0]], [[-1.0, -1.0]], [[3.0, -1.0]], [[-3.0, 1.0]]], dtype=torch.double)
    # products 1, 1, -3, -3: mean -1, variance of the mean ((1 + 1 + 9 + 9) / 4 - 1) / 3 = 4 / 3, above 1: nothing is known
    gram, seen = shrunk(x)
    assert seen.share == 1
    # a quarter of the noise is taken away
    assert gram[0, 1] == pytest.approx(-0.75)
    assert gram[0, 0] == 5
    x = torch.tensor([[[1.0, 1.0]], [[-1.0, -1.0]], [[3.0, 1.0]], [[-3.0, -1.0]]], dtype=torch.double)
    # products 1, 1, 3, 3: mean 2, variance of the mean (5 - 4) / 3, a twelfth of 4
    gram, seen = shrunk(x)
    assert seen.share == pytest.approx(1 / 12)
    assert gram[0, 1] == pytest.approx(2 * (1 - 1 / 48))


def test_places_that_are_alike_count_once():
    """64 places of the same numbers are worth one, and shrink as one does; 64 that differ are worth 64."""
    torch.manual_seed(0)
    root = torch.randn(20, 20, dtype=torch.double) / 20**0.5
    images = torch.randn(8, 1, 20, dtype=torch.double) @ root
    one, alike = shrunk(images), shrunk(images.expand(-1, 64, -1))
    assert alike[1].share == pytest.approx(one[1].share)
    assert alike[1].worth == pytest.approx(one[1].worth)
    torch.testing.assert_close(one[0], alike[0])
    _, differ = shrunk(torch.randn(8, 64, 20, dtype=torch.double) @ root)
    assert alike[1].worth < 12
    assert 250 < differ.worth <= 512


def test_it_is_nearer_to_the_truth_and_keeps_means():
    torch.manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.double) / 30**0.5
    truth, mean = root.T @ root, torch.randn(30, dtype=torch.double)
    for images in (4, 8, 32):
        x = torch.randn(images, 2, 30, dtype=torch.double) @ root + mean
        gram, seen = shrunk(x, parts=2)
        seen_mean = x.mean((0, 1))
        torch.testing.assert_close(gram[-1, :-1], seen_mean)
        covariance = gram[:-1, :-1] - torch.outer(seen_mean, seen_mean)
        plain = torch.cov(x.flatten(0, 1).T, correction=0)
        assert (covariance - truth).norm() < 0.99 * (plain - truth).norm()
        torch.testing.assert_close(covariance.diagonal(), plain.diagonal())
        assert 0 < seen.share < 1


def test_one_image_knows_no_correlations_and_many_are_used_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(1, 50, 4, dtype=torch.double)
    gram, seen = shrunk(x)
    assert seen.share == 1
    many = torch.randn(400, 1, 4, dtype=torch.double)
    gram, seen = shrunk(many)
    assert seen.share == 0
    flat = torch.cat([many, torch.ones(400, 1, 1, dtype=torch.double)], 2).flatten(0, 1)
    torch.testing.assert_close(gram, flat.T @ flat / 400)
