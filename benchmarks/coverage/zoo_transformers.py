"""Small models of Hugging Face transformers architectures, with random weights and keyword inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, SIDE, MEL_FRAMES = 120, 12, 32, 32

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# configurations use different names for the same sizes
BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128} | TOKENS
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False} | TOKENS
LLAMA = BERT | {"max_position_embeddings": 64, "use_cache": False}
GQA = LLAMA | {"num_key_value_heads": 2}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "use_cache": False,
    "decoder_start_token_id": 1,
} | TOKENS  # fmt: skip
IMAGE = {"image_size": SIDE, "patch_size": 8, "num_labels": 10}
VIT = {k: v for k, v in BERT.items() if k not in TOKENS} | IMAGE
CLIP = {
    "text_config": BERT | {"max_position_embeddings": 32},
    "vision_config": {k: v for k, v in VIT.items() if k != "num_labels"},
    "projection_dim": 32,
}

# class -> (fields of its configuration, key of INPUTS)
ARCHITECTURES: Mapping[str, tuple[dict[str, Any], str]] = {
    "BertForSequenceClassification": (BERT, "text"),
    "DistilBertForSequenceClassification": (
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128} | TOKENS,
        "text",
    ),
    "RobertaForSequenceClassification": (BERT, "text"),
    "AlbertForSequenceClassification": (BERT | {"embedding_size": 32}, "text"),
    "ElectraForSequenceClassification": (BERT | {"embedding_size": 32}, "text"),
    "DebertaV2ForSequenceClassification": (BERT, "text"),
    "MPNetForSequenceClassification": (BERT, "text"),
    "GPT2LMHeadModel": (GPT, "text"),
    "GPTNeoForCausalLM": (
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "max_position_embeddings": 64, "intermediate_size": 128, "use_cache": False} | TOKENS,
        "text",
    ),
    "GPTNeoXForCausalLM": (LLAMA, "text"),
    "GPTJForCausalLM": (GPT | {"rotary_dim": 8}, "text"),
    "OPTForCausalLM": (LLAMA | {"ffn_dim": 128, "word_embed_proj_dim": 64}, "text"),
    "BloomForCausalLM": ({"hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False} | TOKENS, "text"),
    "LlamaForCausalLM": (GQA, "text"),
    "MistralForCausalLM": (GQA, "text"),
    "Qwen2ForCausalLM": (GQA, "text"),
    "GemmaForCausalLM": (GQA | {"head_dim": 16}, "text"),
    "PhiForCausalLM": (LLAMA, "text"),
    "MambaForCausalLM": (
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False} | TOKENS,
        "tokens",
    ),
    "T5ForConditionalGeneration": (
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "use_cache": False,
         "decoder_start_token_id": 0} | TOKENS,
        "text to text",
    ),
    "BartForConditionalGeneration": (SEQ2SEQ | {"max_position_embeddings": 64}, "text to text"),
    "ViTForImageClassification": (VIT, "image"),
    "DeiTForImageClassification": (VIT, "image"),
    "SwinForImageClassification": (
        {"image_size": SIDE, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 10},
        "image",
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "patch_size": 4, "num_labels": 10},
        "image",
    ),
    "SegformerForSemanticSegmentation": (
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
         "decoder_hidden_size": 64, "num_labels": 10},
        "image",
    ),
    "CLIPModel": (CLIP, "text and image"),
    "WhisperForConditionalGeneration": (
        SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": MEL_FRAMES // 2, "max_target_positions": 64},
        "sound to text",
    ),
    "Wav2Vec2ForCTC": (
        BERT | {"conv_dim": [32] * 3, "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
                "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        "wave",
    ),
}  # fmt: skip


def tokens() -> Tensor:
    """Random tokens without special tokens."""
    return torch.randint(3, VOCABULARY, (1, LENGTH))


def image() -> Tensor:
    """One small image."""
    return torch.randn(1, 3, SIDE, SIDE)


INPUTS: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "tokens": lambda: {"input_ids": tokens()},
    "text": lambda: {"input_ids": tokens(), "attention_mask": torch.ones(1, LENGTH, dtype=torch.long)},
    "text to text": lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()},
    "image": lambda: {"pixel_values": image()},
    "text and image": lambda: {"input_ids": tokens(), "pixel_values": image()},
    "sound to text": lambda: {"input_features": torch.randn(1, 16, MEL_FRAMES), "decoder_input_ids": tokens()},
    "wave": lambda: {"input_values": torch.randn(1, 800)},
}


def names() -> list[str]:
    """The models in the table. Raises ImportError if transformers is not installed."""
    import transformers  # noqa: F401

    return list(ARCHITECTURES)


def model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small transformer with random weights, and its keyword inputs."""
    import transformers

    fields, kind = ARCHITECTURES[name]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**fields)), INPUTS[kind]()
