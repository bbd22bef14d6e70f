"""Folders whose weights lie on grids, by rounding to nearest: what exports and packed folders are made of in tests."""

import json

import tiny
import torch
from transformers import AutoModelForCausalLM

from secateurs.matrix.grids import Scales, parse
from secateurs.model.scales import SCALES_FILE, write_scales


def save(place, model_type="llama", dtype=torch.float32, **changes):
    """A tiny model whose tokenizer has a merge, without which llama.cpp takes none."""
    architecture, config = tiny.TINY[model_type]
    tiny.random(architecture, model_type, {**config, **changes}).to(dtype).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    data = json.loads((place / "tokenizer.json").read_text())
    data["model"]["vocab"]["ab"] = 258
    data["model"]["merges"] = [["a", "b"]]
    (place / "tokenizer.json").write_text(json.dumps(data))
    return place


def nearest(weight_OI, grid):
    """Scales that put the extreme of each group near the grid's first integer, so about half of them are negative."""
    parts = grid.grouped(weight_OI.float())
    if grid.symmetric:
        extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))[..., 0]
        return Scales(grid, (-extreme / grid.middle * 1.003).to(grid.scale_dtype))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = ((high - low) / (grid.levels - 1)).to(grid.scale_dtype)
    zero = (-low / scale.float()).nan_to_num(0).round().clamp(0, grid.levels - 1)
    return Scales(grid, scale, zero.to(torch.uint8))


def on_grid(folder, text, others=None, skip="lm_head"):
    """Round a saved causal language model in place, with 40% zeros. others: {part of a layer's name: another grid}."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    scales = {}
    torch.manual_seed(1)
    for name, module in model.named_modules():
        conv1d = type(module).__name__ == "Conv1D"
        if (not conv1d and not isinstance(module, torch.nn.Linear)) or skip in name:
            continue
        grid = parse(next((other for part, other in (others or {}).items() if part in name), text))
        weight_OI = module.weight.data.T if conv1d else module.weight.data
        weight_OI = weight_OI.masked_fill(torch.rand(weight_OI.shape) < 0.4, 0)
        scales[name] = nearest(weight_OI, grid)
        rounded = scales[name].rounded(weight_OI).to(weight_OI.dtype)
        module.weight.data = rounded.T.contiguous() if conv1d else rounded
    for file in folder.glob("model*"):
        file.unlink()
    model.save_pretrained(folder)
    write_scales(folder / SCALES_FILE, scales)
    return folder
