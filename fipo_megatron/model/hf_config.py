"""The shape of a model, read from a Hugging Face config.json: plain data, no transformers, no Megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM",)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes and constants of a decoder-only transformer of the Qwen2 family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool


def read_model_shape(folder: Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder."""
    return make_model_shape(json.loads((folder / "config.json").read_text()), str(folder))


def make_model_shape(hf_config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a config.json describes; `source` names it in errors.

    Raises:
        ValueError: an architecture, rope variant or attention window that the weight maps don't cover, or a value that
            is missing or no size.
    """
    architecture = (hf_config.get("architectures") or ["none"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"model.path: {source} is of architecture {architecture!r}; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"model.path: {source} uses rope type {rope_type!r}; supported: 'default'")
    if hf_config.get("use_sliding_window"):
        raise ValueError(f"model.path: {source} uses sliding-window attention, which is not supported")
    missing = [key for key in (*SIZES, "rms_norm_eps") if key not in hf_config]
    if missing:
        raise ValueError(
            f"model.path: config.json of {source} lacks {', '.join(missing)}; copy it from the model again"
        )
    for key in SIZES:
        if not isinstance(hf_config[key], int) or hf_config[key] <= 0:
            raise ValueError(
                f"model.path: {key} = {hf_config[key]!r} in config.json of {source}; must be a positive whole number"
            )
    return ModelShape(
        architecture=architecture,
        vocab_size=hf_config["vocab_size"],
        hidden_size=hf_config["hidden_size"],
        intermediate_size=hf_config["intermediate_size"],
        num_layers=hf_config["num_hidden_layers"],
        num_attention_heads=hf_config["num_attention_heads"],
        num_key_value_heads=hf_config["num_key_value_heads"],
        head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"],
        max_positions=hf_config["max_position_embeddings"],
        rms_norm_eps=hf_config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))),
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
    )
