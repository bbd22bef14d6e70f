"""Tiny random models of every family's real classes, and a byte tokenizer: what tests prune in place of trained ones."""

from pathlib import Path

import torch

from secateurs.model.blocks import inside
from secateurs.model.couplings import couplings_of
from secateurs.model.discover import layout_of
from secateurs.model.layers import layers_of

VOCABULARY = 260
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 257,
}

# model_type, and a word if there are two of it -> (architecture, config arguments); every type has at least one
TINY = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8, "sliding_window": 16}),
    # its kinds of blocks have rotations of their own
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            **_LLAMA, "head_dim": 8, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", _LLAMA),
    "opt": (
        "OPTForCausalLM",
        {
            **_COMMON, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "word_embed_proj_dim": 16, "pad_token_id": 257,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {**_COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**_COMMON, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    # the bare encoder, as sentence embedders are stored
    "bert base": (
        "BertModel",
        {**_COMMON, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "bert": (
        "BertForMaskedLM",
        {**_COMMON, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
}  # fmt: skip


def make(model_type: str, dtype: torch.dtype = torch.float32):
    """A model with weights large enough that layers matter."""
    architecture, arguments = TINY[model_type]
    return random(architecture, model_type.split()[0], arguments).to(dtype).eval()


def random(architecture: str, model_type: str, arguments: dict):
    """A model of that class with large random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **arguments)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def pruned(model, sparsity=0.5):
    """The model with random weights of its linear layers at zero."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.weight.data.masked_fill_(torch.rand(module.weight.shape) < sparsity, 0)
    return model.eval()


def tokens():
    """Windows for a tiny model, [2, 10]."""
    return torch.arange(20).view(2, 10) % 200


def couplings(model):
    """The couplings of all blocks."""
    layout, found = layout_of(model), couplings_of(model)
    blocks = ((name, model.get_submodule(name)) for name in inside(model, layout))
    each = (found.of(name, block, layers_of(block, name, layout.experts), model.config) for name, block in blocks)
    return [coupling for couplings in each for coupling in couplings]


def tokenizer():
    """One token a byte, no merges, nothing added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {"<bos>": 256, "<eos>": 257}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")


def save(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    """The model and tokenizer as a Hugging Face folder, in several shards."""
    make(model_type, dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def text(folder: Path, words: int = 6000, seed: int = 0) -> Path:
    """A text file of random words that no other seed shares."""
    from random import Random

    random = Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"text-{seed}.txt"
    letters = "abcdefghijklmnopqrstuvwxyz"
    file.write_text(" ".join("".join(random.choices(letters, k=random.randint(2, 9))) for _ in range(words)))
    return file
