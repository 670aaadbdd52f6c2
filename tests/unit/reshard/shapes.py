"""Shapes of published models, and of small ones, for the plans."""

from __future__ import annotations

from typing import Any

from fipo_megatron.model.hf_config import FAMILIES, ModelShape, make_model_shape

QWEN2_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = QWEN2_32B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}


def shape_of(config: dict[str, Any]) -> ModelShape:
    return make_model_shape(config, "a test")


def small_shape(architecture: str, tied: bool = False, **sizes: int) -> ModelShape:
    """A model of few elements whose sizes differ from each other."""
    config = {
        "architectures": [architecture],
        "vocab_size": 70,
        "hidden_size": 6,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": tied,
        "head_dim": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
    }
    assert architecture in FAMILIES
    return shape_of(config | sizes)
