"""What a model reads and what it predicts, by its class. It decides how the model is calibrated and how its quality is measured.

A way of predicting is one row of NUMBERS; outputs.py has the functions behind it.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from secateurs.model.checkpoint import Checkpoint

# the numbers that a comparison with the dense model gives, by what a model predicts; gates ask for them by these names
NUMBERS: dict[str, tuple[str, ...]] = {
    "next token": ("ppl", "kl", "agree"),
    "classes": ("kl", "agree"),
    "embeddings": ("cosine", "neighbours"),
    "outputs": ("error",),
}

# the ends of names of classes whose logits are distributions: over classes or words, for an input, a token or a pixel
_CLASSES = (
    "ForSequenceClassification", "ForImageClassification", "ForImageClassificationWithTeacher", "ForAudioClassification",
    "ForVideoClassification", "ForNextSentencePrediction", "ForMaskedLM", "ForTokenClassification",
    "ForAudioFrameClassification", "ForCTC", "ForQuestionAnswering", "ForSemanticSegmentation",
)  # fmt: skip
_EMBEDDINGS = ("Model", "ModelWithProjection", "TextEncoder", "VisionEncoder")
_AUDIO = ("input_features", "input_values")


@dataclass(frozen=True)
class Kind:
    """name: of the class. reads: what inputs can be made of for it: 'text', 'images' or 'audio'. predicts: a row of NUMBERS.

    pairs: it has a decoder that reads tokens, beside an encoder. prompted: images go with text. accepts: what its forward takes.
    """

    name: str
    reads: tuple[str, ...] = ("text",)
    predicts: str = "next token"
    pairs: bool = False
    prompted: bool = False
    accepts: frozenset[str] = frozenset({"input_ids", "attention_mask"})

    @property
    def causal(self) -> bool:
        """True for a language model that can be trained on plain text."""
        return self.predicts == "next token" and not self.pairs and "text" in self.reads


def kind_of(source: Checkpoint) -> Kind:
    """The kind of a folder's model. Raises CheckpointError if its class is not there."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = (source.raw_config.get("architectures") or [""])[0]
    own = str((source.raw_config.get("auto_map") or {}).get("AutoModelForCausalLM"))
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or own.rpartition(".")[2] == name:
        return Kind(name)
    return kind_of_class(*source.described())


def kind_of_class(cls: Any, config: Any) -> Kind:
    """The kind of a model class with this config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = cls.__name__
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return Kind(name)
    accepts = frozenset(inspect.signature(cls.forward).parameters)
    predicts = _predicts(name, config)
    main = getattr(cls, "main_input_name", "input_ids")
    pairs = "decoder_input_ids" in accepts and predicts in ("next token", "embeddings")
    if main in _AUDIO:
        return Kind(name, ("audio",), predicts, pairs, False, accepts)
    reads: tuple[str, ...] = ("text",)
    prompted = "pixel_values" in accepts and "input_ids" in accepts
    if main == "input_ids" and accepts.intersection(_AUDIO) and predicts != "next token":
        # it compares recordings and text, and needs both
        reads = ()
    elif main == "pixel_values":
        reads = ("images",)
    elif prompted:
        # a model that compares images and text needs both
        reads = ("text", "images") if predicts == "next token" else ("images",)
    return Kind(name, reads, predicts, pairs, prompted, accepts)


def _predicts(name: str, config: Any) -> str:
    from transformers.models.auto import modeling_auto as auto

    writing = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    if any(name in names.values() for names in writing):
        return "next token"
    if name.endswith(_CLASSES):
        # one label is a number, and several at once are no distribution
        number = name.endswith("ForSequenceClassification") and getattr(config, "num_labels", 2) == 1
        kind = getattr(config, "problem_type", None)
        return "outputs" if number or kind in ("regression", "multi_label_classification") else "classes"
    return "embeddings" if name.endswith(_EMBEDDINGS) else "outputs"
