"""What a module is judged by: a user's loss or its outputs' distance, whatever they lie in."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from secateurs import shrink_module
from secateurs.base.errors import PlanError
from secateurs.shrink.consumers import Consumers
from secateurs.shrink.outputs import Objective, distance, tensors_of
from secateurs.shrink.trace import trace


@dataclass
class Found:
    boxes: Tensor
    levels: list[Tensor]
    names: str = "of a detector"


class Detector(nn.Module):
    """Two heads on one body; `kind` says what they lie in."""

    def __init__(self, kind=Found):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.body(x)
        boxes, scores = self.boxes(x), self.scores(x)
        if self.kind is Found:
            return Found(boxes, [scores])
        return {"boxes": boxes, "levels": [scores]} if self.kind is dict else [boxes, (scores,)]


@pytest.mark.filterwarnings("ignore:.* saw little")
@pytest.mark.parametrize("kind", [Found, dict, list])
def test_outputs_may_lie_in_anything(kind):
    model, x = Detector(kind).eval(), torch.randn(24, 3, 8, 8)
    small, report = shrink_module(model, [(x,)], "params=0.6x", multiple=1)
    assert report["parameters"]["left"] <= 0.6 * report["parameters"]["dense"]
    assert type(small(x)) is kind
    # the class's own forward is back
    assert "forward" not in small.__dict__
    with torch.no_grad():
        want, got = tensors_of(model(x)), tensors_of(small(x))
    assert [t.shape for t in got] == [(24, 4, 8, 8), (24, 3, 8, 8)] == [t.shape for t in want]
    assert all(float((a - b).norm() / b.norm()) < 0.7 for a, b in zip(got, want, strict=True))


def test_distance_by_hand():
    """KL of (1/2, 1/2) from (3/4, 1/4): ln 2 - ln 3 / 2 + ln 2 - ... = -(ln 3/4 + ln 1/4) / 2 - ln 2 = 0.14384; and 1 / 5 of images."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    wanted = torch.tensor([[1.0, 1.0]]).log()
    assert float(distance(logits, wanted)) == pytest.approx(0.143841, abs=1e-5)
    image, dense = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, 2.0]]])
    assert float(distance({"a": image, "b": logits}, {"a": dense, "b": wanted})) == pytest.approx(0.343841, abs=1e-5)
    # what is no float has no distance
    assert float(distance([image, torch.tensor([1])], [dense, torch.tensor([9])])) == pytest.approx(0.2)


class Two(nn.Module):
    """Four hidden units: two are read by the first output, two by the second, which weighs ten times as much."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(4))
            self.out.weight.copy_(torch.tensor([[1.0, 1.1, 0, 0], [0, 0, 10.0, 11.0], [0, 0, 0, 0]]))

    def forward(self, x):
        return self.out(self.hidden(x)).unsqueeze(1)


def first(model, batch):
    x, target = batch
    return (model(x)[:, 0, 0] - target).square().mean()


def test_a_user_s_loss_decides_what_goes():
    """By outputs' distance the small output loses its units, by a loss of the small output the large one does."""
    x = torch.randn(64, 4)
    batches = [(x[i : i + 16], torch.randn(16)) for i in range(0, 64, 16)]
    _, alone = shrink_module(Two().eval(), [b[:1] for b in batches], "params=0.6x", multiple=1)
    _, judged = shrink_module(Two().eval(), batches, "params=0.6x", multiple=1, loss=first, inputs=lambda b: b[:1])
    assert sorted(alone["groups"][0]["removed"]) == [0, 1]
    assert sorted(judged["groups"][0]["removed"]) == [2, 3]


def test_rows_weigh_by_the_mean_square_of_the_loss_s_gradients():
    """E[g^2] of each example's own loss: d/dy (y - t)^2 = 2 (y - t) of the first output, 0 of the others."""
    model, x, target = Two().eval(), torch.randn(12, 4), torch.randn(12)
    objective = Objective.of([(x[:5], target[:5]), (x[5:], target[5:])], lambda b: b[:1], first, torch.device("cpu"))
    consumers = Consumers(model, trace(model, (x[:2],)), objective, 0.01, 0, lambda *_: None)
    consumers.weigh()
    with torch.no_grad():
        wanted = (2 * (model(x)[:, 0, 0] - target)).square().mean().sqrt()
    torch.testing.assert_close(consumers.by_name["out.weight"].scale_O[0], torch.tensor([float(wanted), 0.0, 0.0]))


class Unheard(Detector):
    """Its scores are made from a layer of their own."""

    def __init__(self):
        super().__init__(dict)
        self.score = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())

    def forward(self, x):
        return {"boxes": self.boxes(self.body(x)), "levels": self.scores(self.score(x))}


def test_what_the_loss_does_not_reach_stays_whole():
    x = torch.randn(8, 3, 8, 8)
    with pytest.warns(UserWarning, match="saw little"):
        _, report = shrink_module(
            Unheard().eval(), [(x,)], "params=0.8x", multiple=1, loss=lambda m, b: m(*b)["boxes"].square().mean()
        )
    assert report["kept_whole"]["score.0"] == "the loss does not change with it"
    assert {r["group"] for r in report["groups"]} == {"body.0", "body.2"}


@pytest.mark.parametrize(("loss", "words"), [
    (lambda m, b: m(*b)["boxes"], r"gives \[4, 4, 8, 8\]; it must give a scalar"),
    (lambda m, b: 1.0, "gives a float; it must give a scalar"),
    (lambda m, b: m(*b)["boxes"].sum().detach(), "a number without a gradient"),
    (lambda m, b: m(*b)["boxes"].sum() * torch.nan, "gives nan for batch 0"),
])  # fmt: skip
def test_a_loss_that_is_none_is_refused_in_a_sentence(loss, words):
    with pytest.raises(PlanError, match=words):
        shrink_module(Detector(dict).eval(), [(torch.randn(4, 3, 8, 8),)], "params=0.8x", multiple=1, loss=loss)


def test_a_batch_with_targets_needs_to_be_told_apart():
    with pytest.raises(PlanError, match="one holds a list; say with inputs= what the module takes"):
        shrink_module(Detector().eval(), [(torch.randn(4, 3, 8, 8), [1, 2])], "params=0.8x")


def test_an_eighth_is_held_out_and_none_of_a_few():
    def sizes(objective):
        return None if objective is None else [len(b[0]) for b in objective.batches]

    x = torch.arange(40.0)
    used, held = Objective([(x[:16],), (x[16:37],), (x[37:],)], [None] * 3, None).parted()
    assert (sizes(used), sizes(held)) == ([16, 19], [3, 2])
    assert sorted(float(v) for o in (used, held) for b in o.batches for v in b[0]) == x.tolist()
    few = Objective([(x[:15],)], [None], None)
    assert few.parted() == (few, None)
    used, held = Objective([(x[:8],)] * 9, list(range(9)), lambda m, b: b).parted()
    assert (used.given, held.given) == (list(range(8)), [8])
