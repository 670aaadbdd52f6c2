"""Shapes of models and configurations that the planner's tests compute by hand."""

from __future__ import annotations

from typing import Any

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape, make_model_shape

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN2_32B = SIZES | {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}


def make_shape(architecture: str = "Qwen2ForCausalLM", **changes: Any) -> ModelShape:
    """A small model, or with `changes` another."""
    return make_model_shape({"architectures": [architecture], **SIZES, **changes}, "here")


def make_config(parallel: dict[str, Any] | None = None, dtype: str = "bfloat16", **sections: Any) -> Config:
    """A run on GPUs."""
    values = {
        "platform": "cuda",
        "parallel": parallel or {},
        "model": {"dtype": dtype, "path": "models/Tiny"},
        **sections,
    }
    return Config.model_validate(values)
