"""The model types that zoo.py tries: every type of transformers' own lists, its class, and what its default config lacks."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs.model.miniature import small_instance

# kind of model -> lists of transformers, the first that has a type names its class
KINDS = {
    "causal": ("CAUSAL_LM",),
    "encoder": ("MASKED_LM", "TEXT_ENCODING"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION", "DEPTH_ESTIMATION", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "VIDEO_CLASSIFICATION",
        "BACKBONE",
    ),
    "audio": ("CTC", "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION"),
    "vision-language": ("IMAGE_TEXT_TO_TEXT", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
}  # fmt: skip

_LLAMA_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# fields that a real config of the type states and its class's default does not; a dot leads into a part
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _LLAMA_ROPE)},
    "dbrx": {
        "attn_config.rope_theta": 5e5,
        "attn_config.clip_qkv": 8,
        "attn_config.kv_n_heads": 8,
        "num_key_value_heads": 8,
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 512},
    "hunyuan_vl": {"text_config.head_dim": 128},
    "glm_ocr": {"text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [8, 12, 12]}},
    "glm4v_moe": {
        "text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    },
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [16, 24, 24]}},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "qwen2_vl": {"text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [16, 24, 24]}},
    "qwen2_5_vl": {"text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [16, 24, 24]}},
    "paddleocr_vl": {"text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [16, 24, 24]}},
    "glm4v": {
        "text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    },
    "glm46v": {
        "text_config.rope_parameters": {**_LLAMA_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    },
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}


def rows(kinds: Any = KINDS) -> list[tuple[str, str]]:
    """(kind, type) for every type of the kinds; two types of one class and one config class are one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found, seen = [], set()
    for kind in kinds:
        for model_type, name in listed(kind).items():
            key = (name, CONFIG_MAPPING_NAMES.get(model_type))
            # a composite whose class takes its text part is that part's row
            text = f"{model_type}_text"
            if key in seen or (listed(kind).get(text) == name and text in CONFIG_MAPPING_NAMES):
                continue
            seen.add(key)
            found.append((kind, model_type))
    return found


def listed(kind: str) -> dict[str, str]:
    """Class names by type."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for name in KINDS[kind]:
        for model_type, cls in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            found.setdefault(model_type, cls if isinstance(cls, str) else cls[0])
    return found


def class_of(kind: str, model_type: str) -> Any:
    import transformers

    return getattr(transformers, listed(kind)[model_type])


def small(kind: str, model_type: str) -> nn.Module:
    """A small random model of a type. Raises ValueError where its class makes none."""
    from transformers import AutoConfig

    cls = class_of(kind, model_type)
    config = AutoConfig.for_model(model_type)
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        config = next((part for part in vars(config).values() if isinstance(part, wanted)), config)
    for name, value in HINTS.get(config.model_type, {}).items():
        *parts, field = name.split(".")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, field, value)
    model = small_instance(cls, config)
    # what is not saved is computed anew
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if name not in computed:
            _apart(parameter)
    for module in model.modules():
        # some types' classes set this row to zero whenever they load
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    return model


def _apart(parameter: torch.Tensor) -> None:
    """Make equal weights of a matrix differ a little, so that a value says which weight it is."""
    if parameter.dim() < 2 or not parameter.is_floating_point():
        return
    for _ in range(9):
        _, which, counts = parameter.unique(return_inverse=True, return_counts=True)
        twice = counts[which] > 1
        if not twice.any():
            return
        parameter[twice] *= 1 + 1e-4 * torch.rand(int(twice.sum()))


def save(model: Any, folder: Path, kind: str, tokenizer: Any) -> None:
    """The model as a Hugging Face folder with a tokenizer, and with a processor where it reads images or sound."""
    model.save_pretrained(folder)
    if kind not in ("vision", "audio"):
        tokenizer.save_pretrained(folder)
    elif kind == "audio":
        tokenizer.save_pretrained(folder)
        _extractor(model.config).save_pretrained(folder)
    else:
        _image_processor(model.config).save_pretrained(folder)


def _image_processor(config: Any) -> Any:
    from transformers import ViTImageProcessor

    side = getattr(config, "image_size", None) or 32
    high, wide = (side, side) if isinstance(side, int) else side
    return ViTImageProcessor(size={"height": high, "width": wide})


def _extractor(config: Any) -> Any:
    import transformers
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    bins = getattr(getattr(config, "encoder_config", config), "num_mel_bins", None)
    # two frames side by side
    bins = bins or getattr(config, "feature_projection_input_dim", 0) // 2
    if config.model_type == "whisper":
        # so many seconds that the frames of the encoder's window divide their samples
        frames = 2 * config.max_source_positions
        seconds = next(n for n in range(1, 31) if n * 16000 % frames == 0)
        return WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds, hop_length=seconds * 16000 // frames)
    # transformers lists another, which makes no features
    other = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor"}
    name = {**FEATURE_EXTRACTOR_MAPPING_NAMES, **other}.get(config.model_type, "")
    own = getattr(transformers, name, Wav2Vec2FeatureExtractor)
    taken = inspect.signature(own.__init__).parameters
    sizes = {"num_mel_bins": bins, "feature_size": bins, "max_length": getattr(config, "max_length", None)}
    if own is Wav2Vec2FeatureExtractor:
        return own()
    return own(**{name: value for name, value in sizes.items() if value and name in taken})


def images(folder: Path, count: int = 12) -> Path:
    """A folder of random pictures."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def sounds(folder: Path, count: int = 12) -> Path:
    """A folder of half seconds of noise, 16 kHz."""
    import wave

    folder.mkdir(parents=True)
    for i in range(count):
        samples = (torch.randn(8000, generator=torch.Generator().manual_seed(i)) * 3000).to(torch.int16)
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(samples.numpy().tobytes())
    return folder
