"""The picture of masks shows the weights that each pattern keeps, and no others."""

import re
import sys
from pathlib import Path

import pytest
import torch

import secateurs as sc

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import mask_picture  # noqa: E402


def drawn(path):
    """The mask that a path shows."""
    mask = torch.zeros(mask_picture.CORNER, mask_picture.CORNER, dtype=torch.bool)
    for column, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
        mask[int(row), int(column) : int(column) + int(length)] = True
    return mask


def paths(svg):
    return re.findall(r' d="([^"]*)"', svg)


def test_a_run_of_weights_is_one_rectangle():
    mask = torch.tensor([[True, True, False, True], [False, False, False, False], [False, False, True, True]])
    assert mask_picture.path_of(mask) == "M0 0h2v1h-2zM3 0h1v1h-1zM2 2h2v1h-2z"


def test_panels_show_the_corner_of_what_each_pattern_keeps():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    shown = paths(mask_picture.picture(weight))
    size = mask_picture.CORNER
    for name, path in zip(mask_picture.PATTERNS, shown, strict=True):
        assert drawn(path).equal(sc.patterns.parse(name).keep(weight.abs(), 0.5)[:size, :size]), name


def test_the_share_below_a_panel_is_of_squares_over_the_whole_layer():
    weight = torch.tensor([[3.0, 1.0, 0.0, 2.0]])
    assert mask_picture.kept_squares(weight, torch.tensor([[True, False, False, True]])) == pytest.approx(13 / 14)


def test_the_picture_of_the_guide_is_one_of_these():
    svg = (ROOT / "docs" / "masks.svg").read_text()
    masks = [drawn(path) for path in paths(svg)]
    assert [f">{title}<" in svg for title in mask_picture.PATTERNS.values()] == [True] * 3
    two_of_four, blocks = masks[1].view(-1, 4), masks[2].view(12, 4, 12, 4).int()
    assert (two_of_four.sum(1) == 2).all()
    assert blocks.amin((1, 3)).equal(blocks.amax((1, 3)))
    assert all(0.3 < mask.float().mean() < 0.7 for mask in masks)
    # the freer pattern keeps more
    shares = [int(share) for share in re.findall(r">(\d+)% of the squares stay<", svg)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 3
