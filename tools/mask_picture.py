"""A picture of masks: which weights of a layer stay under each pattern. Makes docs/masks.svg.

    python tools/mask_picture.py [--model FOLDER] [--layer NAME] [--out FILE.svg]

Every panel shows the same corner of one matrix at 50% zeros, chosen by magnitude: a square is a weight that stays, what is empty is
a zero. Below it is the share of the whole layer's squared weights that stays: the freer the pattern, the more. Without --model the
matrix is of the guides' toy (tools/guide_models.py). Nothing but text is written, so it can be compared line by line.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import secateurs as sc
from secateurs.base.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = {"unstructured": "unstructured", "2:4": "2:4: 2 kept of 4 in a row", "4x4": "4x4: whole blocks"}
CORNER, CELL, GAP, TOP, BELOW = 48, 4, 24, 24, 22


def kept_squares(weight_OI: Tensor, mask_OI: Tensor) -> float:
    """sum of w^2 over the weights that stay / over all."""
    squares = weight_OI.double().square()
    return float(squares[mask_OI].sum() / squares.sum())


def path_of(mask_OI: Tensor) -> str:
    """The weights that stay as one path: a rectangle for every run of them in a row."""
    parts = []
    for row, line in enumerate(mask_OI.tolist()):
        column = 0
        while column < len(line):
            end = column
            while end < len(line) and line[end]:
                end += 1
            if end > column:
                parts.append(f"M{column} {row}h{end - column}v1h{column - end}z")
            column = end + 1
    return "".join(parts)


def picture(weight_OI: Tensor) -> str:
    """The SVG: a panel for each pattern, side by side."""
    side = CORNER * CELL
    width, height = len(PATTERNS) * (side + GAP) + GAP, TOP + side + BELOW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (name, title) in enumerate(PATTERNS.items()):
        mask_OI = sc.patterns.parse(name).keep(weight_OI.abs(), 0.5)
        left = GAP + number * (side + GAP)
        lines += [
            f'<text x="{left}" y="{TOP - 8}" fill="#222">{title}</text>',
            f'<g transform="translate({left} {TOP}) scale({CELL})" shape-rendering="crispEdges">'
            f'<rect width="{CORNER}" height="{CORNER}" fill="#e8eaf0"/>'
            f'<path fill="#3949ab" d="{path_of(mask_OI[:CORNER, :CORNER])}"/></g>',
            f'<text x="{left}" y="{TOP + side + 15}" fill="#222">{kept_squares(weight_OI, mask_OI):.0%} of the squares stay</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def weight_of(folder: Path, layer: str) -> Tensor:
    """One matrix of a model folder, in fp32, [O, I]."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).get_submodule(layer).weight.detach().float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; default: the toy of the guides")
    parser.add_argument("--layer", default="model.layers.1.mlp.gate_proj", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "masks.svg", help="default: %(default)s")
    asked = parser.parse_args()
    if asked.model is None:
        import guide_models

        asked.model = guide_models.fetch("lm")
    write_text(asked.out, picture(weight_of(asked.model, asked.layer)))
