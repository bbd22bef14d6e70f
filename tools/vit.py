"""A small ViT trained here on Fashion-MNIST, as a Hugging Face folder with its image processor, and the images as PNG files.

    python tools/vit.py            # trains it (minutes), prints where it lies, its accuracy, and where the images are

Cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import os
import sys
import warnings
from pathlib import Path

import fashion_mnist
import torch
from torch import Tensor, nn

EPOCHS = 5
# images of each part that are written as files
FILES = 600


def root() -> Path:
    """Where the model and the images are, whether or not they are there yet."""
    cache = os.environ.get("SECATEURS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "secateurs") / "vit-fashion-mnist"


class Logits(nn.Module):
    """The model as a function from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def make(epochs: int = EPOCHS, images: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A trained ViTForImageClassification of 0.3 million parameters, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=28, patch_size=7,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    x, y = fashion_mnist.load("train")
    fashion_mnist.train(Logits(model), x[:images], y[:images], epochs)
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.286], image_std=[0.353])
    return model.eval(), processor


def save_images(folder: Path, part: str, count: int) -> Path:
    """The first images of a part as FOLDER/CLASS/NUMBER.png."""
    from PIL import Image

    x, y = fashion_mnist.load(part)
    for i in range(count):
        place = folder / str(int(y[i])) / f"{i:05d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = ((x[i, 0] * 0.353 + 0.286) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(place)
    return folder


def fetch() -> Path:
    """The folder with model/, train/ and test/, made on the first call."""
    done = root()
    if not (done / "model" / "config.json").is_file():
        print("training a ViT on Fashion-MNIST", file=sys.stderr)
        save_images(done / "train", "train", FILES)
        save_images(done / "test", "t10k", FILES)
        model, processor = make()
        processor.save_pretrained(done / "model")
        model.save_pretrained(done / "model")
    return done


def accuracy(folder: Path) -> float:
    """The share of the 10,000 test images that a model folder gets right."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder).eval()
    return fashion_mnist.accuracy(Logits(model), *fashion_mnist.load("t10k"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = fetch()
    print(place, f"accuracy {accuracy(place / 'model'):.4f}")
