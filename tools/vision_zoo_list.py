"""The networks of tools/vision_zoo.py: {name: (builder, shape of one input)}, from vision_nets.py and from packages.

Widths and depths are small, so that each network takes seconds. torchvision's operators in C++ do not load beside every torch; its
networks do not need them, so their names are registered without code before it is imported, and nothing here calls them.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vision_nets
from torch import Tensor, nn

Networks = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]
_IMAGE, _SMALL = (3, 64, 64), (3, 32, 32)
_held: list[Any] = []

# {model_type: (what its config is given, the shape of an input)}: for images
_TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TRANSFORMERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "vit": ({**_TINY, "image_size": 32, "patch_size": 8}, _SMALL),
    "deit": ({**_TINY, "image_size": 32, "patch_size": 8}, _SMALL),
    "beit": ({**_TINY, "image_size": 32, "patch_size": 8}, _SMALL),
    "dinov2": ({**_TINY, "image_size": 32, "patch_size": 8, "mlp_ratio": 2}, _SMALL),
    "resnet": ({"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "layer_type": "basic"}, _IMAGE),
    "regnet": ({"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "groups_width": 8}, _IMAGE),
    "convnext": ({"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}, _IMAGE),
    "convnextv2": ({"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}, _IMAGE),
    "mobilenet_v1": ({"depth_multiplier": 0.125, "min_depth": 8}, _IMAGE),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, _IMAGE),
    "mobilevit": ({"hidden_sizes": [32, 48, 48], "neck_hidden_sizes": [8, 16, 16, 24, 32, 32, 64], "image_size": 64}, _IMAGE),
    "swin": ({"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}, _SMALL),
    "swinv2": ({"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32,
        "patch_size": 2}, _SMALL),
    "segformer": ({"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4],
        "decoder_hidden_size": 32}, _IMAGE),
    "poolformer": ({"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}, _IMAGE),
    "levit": ({"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "image_size": 64,
               "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2]}, _IMAGE),
    "cvt": ({"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, _IMAGE),
    "focalnet": ({"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64}, _IMAGE),
    "pvt": ({"hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        "image_size": 64}, _IMAGE),
    "efficientnet": ({"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}, _IMAGE),
    "hgnet_v2": ({"embedding_size": 16, "stem_channels": [3, 8, 16], "stage_in_channels": [16, 32, 48, 64],
        "stage_mid_channels": [8, 12, 16, 16],
                  "stage_out_channels": [32, 48, 64, 64], "hidden_sizes": [32, 48, 64, 64], "depths": [1, 1, 1, 1]}, _IMAGE),
}  # fmt: skip

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
TIMM: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "resnet18": ({"channels": (16, 24, 32, 48), "stem_width": 16}, _IMAGE),
    "resnet26d": ({"channels": (8, 12, 16, 24), "stem_width": 8}, _IMAGE),
    "seresnet18": ({"channels": (16, 24, 32, 48)}, _IMAGE),
    "ecaresnet26t": ({"channels": (8, 12, 16, 24), "stem_width": 16}, _IMAGE),
    "test_resnet": ({}, _IMAGE),
    "test_byobnet": ({}, _IMAGE),
    "test_efficientnet": ({}, _IMAGE),
    "test_efficientnet_gn": ({}, _IMAGE),
    "test_convnext": ({}, _IMAGE),
    "test_mambaout": ({}, _IMAGE),
    "test_nfnet": ({}, _IMAGE),
    "lcnet_035": ({}, _IMAGE),
    "repghostnet_050": ({}, _IMAGE),
    "ghostnet_050": ({}, _IMAGE),
    "mobilenetv3_small_050": ({}, _IMAGE),
    "mobilenetv4_conv_small_035": ({}, _IMAGE),
    "vit_tiny_patch16_224": (_VIT, _SMALL),
    "deit_tiny_patch16_224": (_VIT, _SMALL),
    "convnext_atto": ({"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}, _IMAGE),
    "dla46_c": ({}, _IMAGE),
}  # fmt: skip
# classes of timm whose registered networks do not take sizes
TIMM_CLASSES: dict[str, Callable[[Any], nn.Module]] = {
    "mixer": lambda m: m.mlp_mixer.MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=32),
    "resmlp": lambda m: m.mlp_mixer.MlpMixer(
        10, 32, patch_size=8, num_blocks=2, embed_dim=32, mlp_ratio=4, block_layer=m.mlp_mixer.ResBlock,
        norm_layer=m.mlp_mixer.Affine,
    ),
    "gmlp": lambda m: m.mlp_mixer.MlpMixer(
        10, 32, patch_size=8, num_blocks=2, embed_dim=32, mlp_ratio=6, block_layer=m.mlp_mixer.SpatialGatingBlock,
        mlp_layer=m.mlp_mixer.GatedMlp,
    ),
}  # fmt: skip
TORCHVISION: dict[str, Callable[[Any], nn.Module]] = {
    "mobilenet_v2": lambda m: m.MobileNetV2(num_classes=10, width_mult=0.25),
    "mnasnet": lambda m: m.MNASNet(0.25, num_classes=10),
    "shufflenet_v2": lambda m: m.ShuffleNetV2([2, 3, 2], [16, 24, 48, 64, 96], num_classes=10),
    "densenet": lambda m: m.DenseNet(8, (3, 3, 3, 3), 16, num_classes=10),
    "regnet": lambda m: m.RegNet(
        m.regnet.BlockParams.from_init_params(6, 24, 12.0, 2.0, 8, se_ratio=0.25), num_classes=10
    ),
    "swin": lambda m: m.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10),
    "vit": lambda m: m.VisionTransformer(64, 16, 2, 4, 48, 96, num_classes=10),
}


class _Auxiliary(nn.Module):
    """GoogLeNet with a second classifier half way, which only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(vision_nets.conv(3, 24, 3, 2), vision_nets.Inception(24)),
            nn.Sequential(nn.MaxPool2d(2), vision_nets.Inception(48)),
        )
        self.aux = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            vision_nets.conv(48, 8),
            nn.Flatten(),
            nn.Linear(128, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        out = self.head(self.second(x).mean((2, 3)))
        return (out, self.aux(x)) if self.training else out


def _of_transformers(model_type: str, given: dict[str, Any]) -> nn.Module:
    # transformers imports torchvision if it is there
    _register()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    # of some types the list has several classes, the plain classifier first
    found: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    cls = getattr(transformers, found if isinstance(found, str) else found[0])
    return cls(transformers.AutoConfig.for_model(model_type, num_labels=10, **given))


def _of_timm(name: str, given: dict[str, Any]) -> nn.Module:
    _register()
    import timm

    if name in TIMM_CLASSES:
        return TIMM_CLASSES[name](timm.models)
    return timm.create_model(name, num_classes=10, **given)


def _of_torchvision(name: str) -> nn.Module:
    _register()
    import torchvision

    return TORCHVISION[name](torchvision.models)


def missing() -> list[str]:
    """The packages whose networks are left out."""
    needed = {"timm": ("timm", "torchvision"), "torchvision": ("torchvision",)}
    return [p for p, names in needed.items() if any(importlib.util.find_spec(n) is None for n in names)]


def networks() -> Networks:
    """All networks whose package is installed."""
    found: Networks = {**vision_nets.NETWORKS, "GoogLeNet, auxiliary head": (_Auxiliary, _SMALL)}
    out = missing()
    for model_type, (given, shape) in TRANSFORMERS.items():
        found[f"transformers {model_type}"] = (functools.partial(_of_transformers, model_type, given), shape)
    if "timm" not in out:
        for name, (given, shape) in TIMM.items():
            found[f"timm {name}"] = (functools.partial(_of_timm, name, given), shape)
        for name in TIMM_CLASSES:
            found[f"timm {name}"] = (functools.partial(_of_timm, name, {}), _SMALL)
    if "torchvision" not in out:
        for name in TORCHVISION:
            found[f"torchvision {name}"] = (functools.partial(_of_torchvision, name), _IMAGE)
    return found


def drawn(count: int, shape: tuple[int, ...]) -> Tensor:
    """Inputs that vary slowly over places, as images do, and noise."""
    coarse = torch.randn(count, *shape[:-1], max(2, shape[-1] // 8))
    smooth = (
        nn.functional.interpolate(coarse.flatten(0, -3), size=shape[-1], mode="linear") if coarse.dim() > 3 else None
    )
    x = torch.randn(count, *shape)
    return x if smooth is None else 0.5 * x + smooth.reshape(count, *shape)


def _register() -> None:
    spec = importlib.util.find_spec("torchvision")
    if _held or spec is None or not spec.submodule_search_locations:
        return
    names = set()
    for file in Path(spec.submodule_search_locations[0]).rglob("*.py"):
        names |= set(re.findall(r"torchvision::(\w+)|register_meta\(\"(\w+)\"", file.read_text()))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted({a or b for a, b in names}):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    _held.append(library)
