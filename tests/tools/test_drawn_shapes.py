"""tools/drawn_shapes.py: what is drawn is what its labels say, and what is scored is mAP."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import drawn_shapes as shapes


def test_boxes_lie_on_what_is_drawn():
    """Inside a square's box the picture is bright, and no two boxes overlap."""
    images, boxes, classes = shapes.draw(20, 0)
    assert int((classes >= 0).sum()) > 20
    for image, own, kinds in zip(images, boxes, classes, strict=True):
        for box, kind in zip(own.int().tolist(), kinds.tolist(), strict=True):
            if kind == 1:
                left, top, right, bottom = box
                inside = image[:, top + 1 : bottom, left + 1 : right].mean((1, 2))
                around = image.mean((1, 2))
                assert bool((inside > around).any())
        there = own[kinds >= 0]
        overlaps = shapes.overlap(there[:, None], there[None])
        assert torch.equal(overlaps > 0, torch.eye(len(there), dtype=torch.bool))


def test_overlap_by_hand():
    """Of 4 x 4 and 4 x 2 that share 2 x 2: 4 of 20."""
    one, other = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 2, 6, 4])
    assert float(shapes.overlap(one, other)) == pytest.approx(4 / 20)


class Says(nn.Module):
    """Finds the same in each image: boxes as given, in the cells that are given."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, images):
        scores, sides = torch.full((len(images), 3, 320), -9.0), torch.ones(len(images), 4, 320)
        at = shapes.centres()
        for cell, kind, logit, (left, top, right, bottom) in self.found:
            scores[:, kind, cell] = logit
            x, y = at[cell]
            sides[:, :, cell] = torch.tensor([x - left, y - top, right - x, bottom - y])
        return {"scores": scores, "sides": sides}


def test_precision_by_hand():
    """Two discs in an image: the first guess hits one, the second nothing, the third the other: (1 + 2/3) / 2. Others are not there."""
    image = torch.zeros(1, 3, 64, 64)
    boxes = torch.tensor([[[0.0, 0, 16, 16], [32, 32, 48, 48], [0, 0, 0, 0]]])
    batch = image, boxes, torch.tensor([[0, 0, -1]])
    found = [(0, 0, 3.0, (0, 0, 16, 16)), (100, 0, 2.0, (50, 0, 60, 9)), (200, 0, 1.0, (32, 32, 48, 46))]
    assert shapes.precision(Says(found), batch) == pytest.approx((1 + 2 / 3) / 2 / 3)
    # a second guess of a disc that was hit counts as wrong, unless it is left out for its overlap
    twice = [*found[:1], (1, 0, 2.5, (0, 0, 16, 15))]
    assert [len(x) for x in shapes.detect(Says(twice), image)] == [1]


def test_what_is_right_has_no_loss_of_boxes_and_trains():
    batch = shapes.draw(4, 3)
    torch.manual_seed(0)
    model = shapes.Detector(8)
    out = model(batch[0])
    assert [out[k].shape for k in ("scores", "sides")] == [(4, 3, 320), (4, 4, 320)]
    before = float(shapes.loss(model, batch).detach())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        shapes.loss(model, batch).backward()
        optimizer.step()
    assert float(shapes.loss(model, batch).detach()) < 0.5 * before
