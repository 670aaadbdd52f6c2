"""Random models of every family, small and odd enough that a wrong slice can't pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 67  # odd: Megatron pads it under tensor parallelism, and the phantom column must not count
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# (model_type of transformers, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, **EXPERTS}),
    "qwen3_moe_unnormalized": ("qwen3_moe", {"head_dim": 32, **EXPERTS, "norm_topk_prob": False}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3_tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
}


def write_model(name: str, folder: Path, max_positions: int = SIZES["max_position_embeddings"]) -> None:
    """A Hugging Face folder with config and float32 weights, norms around 1 and not equal to it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = MODELS[name]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**SIZES, **settings, "max_position_embeddings": max_positions})
    )
    for parameter_name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0, std=0.15)
    model.save_pretrained(folder)
