import torch
import transformers
from torch import nn

from secateurs.model.miniature import small_instance
from secateurs.model.reads import _reads, read_by_code


class Mixed(nn.Module):
    """Calls one layer, multiplies by another's weight, and asks a third one's for its dtype alone."""

    def __init__(self):
        super().__init__()
        self.called, self.multiplied, self.asked = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.called(x).to(self.asked.weight.dtype)
        return self.asked(x @ self.multiplied.weight.T)


def test_what_is_multiplied_without_its_module_is_read_and_what_is_asked_for_its_dtype_is_not():
    model = Mixed()
    with _reads(model) as found:
        model(torch.ones(2, 4))
    assert found == {"multiplied"}


def test_a_weight_is_read_too_where_its_module_runs_at_other_times():
    model = Mixed()
    with _reads(model) as found:
        model(torch.ones(2, 4))
        torch.stack([model.called.weight, model.multiplied.weight])
    assert found == {"multiplied", "called"}


def test_the_names_are_those_of_the_whole_model():
    config = transformers.MambaConfig(vocab_size=260, hidden_size=32, state_size=8, num_hidden_layers=9)
    model = transformers.MambaForCausalLM(config)
    assert read_by_code(model) == ({f"backbone.layers.{i}.mixer.dt_proj" for i in range(9)}, None)


def test_a_dtype_that_code_compares_is_no_reading():
    model = small_instance(transformers.T5ForConditionalGeneration, transformers.T5Config())
    assert read_by_code(model) == (set(), None)


def test_what_makes_no_small_instance_says_so(monkeypatch):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4))

    def refuse(_):
        raise ValueError("no small instance of GPT2LMHeadModel runs (it is too tired)")

    monkeypatch.setattr("secateurs.model.reads.miniature", refuse)
    assert read_by_code(model) == (set(), "no small instance of GPT2LMHeadModel runs (it is too tired)")
