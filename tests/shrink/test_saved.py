"""A smaller module comes back from its file as it was."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_architectures import Head, Norms, ViT
from torch import nn

from secateurs import load_shrunk, save_shrunk, shrink_module
from secateurs.base.errors import CheckpointError, PlanError

MODELS = {
    "norms": (lambda: Head(Norms()), torch.randn(16, 3, 16, 16), "params=0.7x"),
    "vit": (lambda: ViT("sdpa"), torch.randn(16, 3, 8, 8), "params=0.8x"),
    # an intercept comes where there was no bias
    "intercept": (lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3, bias=False)), torch.randn(64, 4), "params=0.8x"),
    # and its own channels were cut
    "no biases": (
        lambda: nn.Sequential(nn.Linear(4, 12, bias=False), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 3)),
        torch.randn(64, 4), "params=0.5x",
    ),
}  # fmt: skip


@pytest.fixture
def made(request):
    factory, x, budget = MODELS[getattr(request, "param", "intercept")]
    torch.manual_seed(0)
    dense = factory().eval()
    small, report = shrink_module(dense, [(x,)], budget, multiple=1)
    return factory, dense, small, report, x


@pytest.mark.filterwarnings("ignore:.* saw little")
@pytest.mark.parametrize("made", MODELS, indirect=True)
def test_it_comes_back_and_trains(made, tmp_path):
    factory, _, small, report, x = made
    # the report goes through JSON, and the module may have been trained since
    report = json.loads(json.dumps(report))
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.1)
    file = save_shrunk(small, report, tmp_path / "a" / "small.safetensors")
    again = load_shrunk(file, factory)
    assert type(again) is type(small)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert [str(m) for m in again.modules()] == [str(m) for m in small.modules()]
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    again(x).sum().backward()
    small(x).sum().backward()
    assert [n for n, p in again.named_parameters() if p.grad is None] == [
        n for n, p in small.named_parameters() if p.grad is None
    ]


def test_a_second_cut_is_loaded_after_the_first(made, tmp_path):
    factory, _, small, report, x = made
    first = save_shrunk(small, report, tmp_path / "first.safetensors")
    less, second = shrink_module(small, [(x,)], "params=0.7x", multiple=1)
    file = save_shrunk(less, second, tmp_path / "second.safetensors")
    again = load_shrunk(file, lambda: load_shrunk(first, factory))
    with torch.no_grad():
        assert torch.equal(again(x), less(x))


def test_what_cannot_be_loaded_is_refused_in_a_sentence(made, tmp_path):
    factory, dense, small, report, _ = made
    file = save_shrunk(small, report, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match="the factory builds a Head"):
        load_shrunk(file, lambda: Head(Norms()))
    with pytest.raises(CheckpointError, match=r"has no 0.weight of the size"):
        load_shrunk(file, lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)))
    with pytest.raises(CheckpointError, match=r"holds 2.bias of \[3\], and the factory's module has \[5\]"):
        load_shrunk(file, lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 5)))
    with pytest.raises(CheckpointError, match=r"holds no 3.bias"):
        load_shrunk(file, lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3), nn.Linear(3, 3)))
    with pytest.raises(CheckpointError, match=r"holds 2.bias of \[3\], and the factory's module has none"):
        load_shrunk(file, lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Embedding(3, 12)))
    save_file(dict(dense.state_dict()), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="was not written by save_shrunk"):
        load_shrunk(tmp_path / "plain.safetensors", factory)
    (tmp_path / "pickled").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="cannot read"):
        load_shrunk(tmp_path / "pickled", factory)
    with pytest.raises(PlanError, match="give the one that came with it"):
        save_shrunk(dense, report, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="give the one that came with it"):
        save_shrunk(small, {}, tmp_path / "other.safetensors")


class Versioned(nn.Sequential):
    """It asks which version of it wrote a file, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_class_that_asks_for_its_version_is_told(tmp_path):
    def factory():
        return Versioned(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))

    x = torch.randn(64, 4)
    small, report = shrink_module(factory().eval(), [(x,)], "params=0.8x", multiple=1)
    again = load_shrunk(save_shrunk(small, report, tmp_path / "small.safetensors"), factory)
    assert torch.equal(again(x), small(x))
