import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from secateurs.model import attention


@pytest.mark.parametrize("positions", [1, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_tiles_equal_the_whole(positions, heads, groups):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, positions, 16, generator=generator, dtype=torch.float32).bfloat16()
    key, value = (torch.randn(2, groups, positions, 16, generator=generator).bfloat16() for _ in range(2))
    want = sdpa(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True, scale=0.3)
    got = attention.tiled(query, key, value, 0.3).transpose(1, 2).double()
    # chances and outputs are rounded to bf16 once each
    bound = (
        2 * torch.finfo(torch.bfloat16).eps * value.double().abs().amax((2, 3)).repeat_interleave(heads // groups, 1)
    )
    assert bool(((got - want).abs() <= bound[..., None, None]).all())


def test_it_is_used_for_plain_causal_bf16_and_nothing_else(monkeypatch):
    used = []
    compute = {torch.bfloat16: torch.bfloat16}
    monkeypatch.setattr(attention, "compute_dtype", lambda stored: compute[stored])
    monkeypatch.setattr(attention, "tiled", lambda *a, f=attention.tiled: used.append(1) or f(*a))
    import transformers

    ids = torch.arange(20)[None]
    for dtype, mask, want in ((torch.bfloat16, None, 3), (torch.float32, None, 0), (torch.bfloat16, "padded", 0)):
        model = tiny.make("llama", dtype)
        plain = model(ids).logits
        model = transformers.LlamaForCausalLM._from_config(model.config, attn_implementation=attention.register())
        model.load_state_dict(tiny.make("llama", dtype).state_dict())
        used.clear()
        padding = None if mask is None else torch.tensor([[0] * 3 + [1] * 17])
        logits = model.to(dtype).eval()(ids, attention_mask=padding, use_cache=False).logits
        assert len(used) == want
        if mask is None:
            assert float((logits - plain).float().norm() / plain.float().norm()) < 0.02
        if want:
            # its products would be emulated
            compute[torch.bfloat16] = torch.float32
            used.clear()
            model(ids, use_cache=False)
            assert not used
            compute[torch.bfloat16] = torch.bfloat16
