import os

# before transformers is imported: tests never reach for a hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# before triton is: its kernels are interpreted, on tensors of the CPU; tools/gpu_check.py runs them on a card
os.environ["TRITON_INTERPRET"] = "1"
# before torch is: workers that share the cores have one thread each, or every product would wait for a thread that waits for a core
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import process
import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers in every run, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_profile_of_this_machine(request, monkeypatch, tmp_path_factory):
    """`pack` must not choose by what somebody measured here; trained models are found in the real cache."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama folder; tests must not write into it."""
    return tiny.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A text file."""
    return tiny.text(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def elsewhere():
    """reload(folder) in a process without secateurs."""
    found = process.Elsewhere()
    yield found
    found.close()


@pytest.fixture
def layer():
    """weight_OI [24, 32], Stats of 256 correlated tokens whose channels differ in scale, and the tokens."""
    from secateurs import Stats

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator) * torch.randn(32, generator=generator).exp()
    x_TI = torch.randn(256, 32, generator=generator) @ mixing
    return torch.randn(24, 32, generator=generator), Stats.of(x_TI), x_TI
