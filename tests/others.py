"""Tiny random models that are no causal language models, with the files that their processors read: images and recordings."""

from pathlib import Path

import numpy as np
import tiny
import torch

_BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TEXT = {**_BASE, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128}
_PAIR = {
    "vocab_size": tiny.VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 257, "bos_token_id": 256,
    "eos_token_id": 257, "decoder_start_token_id": 256,
}  # fmt: skip
_VISION = {**_BASE, "image_size": 16, "patch_size": 4}

# name -> (architecture, config arguments, what it reads)
OTHERS = {
    "vit": ("ViTForImageClassification", {**_VISION, "num_labels": 7}, "images"),
    "vit base": ("ViTModel", _VISION, "images"),
    "dpt": (
        "DPTForDepthEstimation",
        {
            **_VISION, "num_hidden_layers": 4, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8,
            "backbone_out_indices": [0, 1, 2, 3],
        },
        "images",
    ),
    # its blocks are convolutions
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "num_labels": 5, "image_size": 16},
        "images",
    ),
    "bert": ("BertForSequenceClassification", {**_TEXT, "num_labels": 3}, "text"),
    "bart": ("BartForConditionalGeneration", {**_PAIR, "max_position_embeddings": 128}, "text"),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **_PAIR, "max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 16, "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        "audio",
    ),
}  # fmt: skip


def make(name: str, **changes):
    """A model with weights large enough that layers matter."""
    architecture, arguments, _ = OTHERS[name]
    return tiny.random(architecture, name.split()[0], {**arguments, **changes}).eval()


def save(folder: Path, name: str, **changes) -> Path:
    """The model with its tokenizer, image processor or feature extractor."""
    from transformers import WhisperFeatureExtractor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    make(name, **changes).save_pretrained(folder)
    reads = OTHERS[name][2]
    if reads != "images":
        tiny.tokenizer().save_pretrained(folder)
    if reads == "images":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    if reads == "audio":
        WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    return folder


def images(folder: Path, count: int = 12) -> Path:
    """Random images in two folders."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(count):
        place = folder / "ab"[i % 2] / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(place)
    return folder


def recordings(folder: Path, count: int = 9, rate: int = 16000) -> Path:
    """Noise of half a second."""
    from scipy.io import wavfile

    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        wavfile.write(folder / f"{i}.wav", rate, (random.normal(size=rate // 2) * 8000).astype(np.int16))
    return folder


def image_processor(size=16):
    """CLIP's, without torchvision, for square images."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def save_contrastive(folder: Path) -> Path:
    """A CLIP, which compares images and text."""
    import transformers

    text = {**_TEXT, "vocab_size": tiny.VOCABULARY + 1, "bos_token_id": 256, "eos_token_id": 257}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPProcessor(image_processor(), _with_places()).save_pretrained(folder)
    return folder


def save_vision_language(folder: Path) -> Path:
    """A LLaVA, whose language part reads text, or images among text; token 258 is an image's place."""
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**{**_TEXT, "vocab_size": tiny.VOCABULARY + 2, "num_key_value_heads": 2}),
        image_token_id=258,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor(), _with_places(), patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _with_places():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<eos>"})
    return tokenizer
