"""The shape of a model, read from a Hugging Face config.json: plain data, no transformers, no Megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class Family:
    """What an architecture has without saying so in its config.json."""

    qkv_bias: bool = False
    qk_norm: bool = False  # of each query and key head
    sizes: tuple[str, ...] = ()  # that its config.json must name beside SIZES


FAMILIES = {
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, sizes=("head_dim",)),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, sizes=("head_dim", *EXPERT_SIZES)),
    "LlamaForCausalLM": Family(),
}

# Keys of which one value alone is covered, absent or null included, and what another one would stand for.
COVERED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "another activation"),
    "use_sliding_window": (False, "sliding-window attention"),
    "attention_bias": (False, "a bias in the attention"),
    "mlp_bias": (False, "a bias in the MLP"),
    "decoder_sparse_step": (1, "a dense layer between those with experts"),
    "mlp_only_layers": ([], "a dense layer between those with experts"),
    "shared_expert_intermediate_size": (0, "a shared expert"),
    "quantization_config": (None, "a quantized model"),
}
# Megatron's constants of rope type llama3; its factor alone can be chosen.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class ModelShape:
    """Sizes and constants of a decoder-only transformer with rotary embedding, RMS norms and gated MLPs."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense MLPs
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_factor: float | None = None  # of rope type llama3; None: the frequencies are not scaled
    num_experts: int = 0  # 0: dense; else every layer has as many instead of its MLP
    experts_per_token: int = 0
    moe_intermediate_size: int = 0  # of one expert
    norm_topk_prob: bool = False  # whether the weights of a token's experts sum to 1


def read_model_shape(folder: Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder.

    Raises:
        ValueError: it has no config.json, or one that can't be read or is of no such model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a model's Hugging Face folder")
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        hf_config = None
    if not isinstance(hf_config, dict):
        raise ValueError(f"{path} is not a JSON object; copy it from the model again")
    return make_model_shape(hf_config, str(folder))


def make_model_shape(hf_config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a config.json describes; `source` names it in errors.

    Raises:
        ValueError: something that the weight maps don't cover, or a value that is missing or no size.
    """
    architecture = (hf_config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"model.path: {source} is of architecture {architecture!r}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[architecture]
    if "num_local_experts" in hf_config:  # transformers 5 writes num_experts under this name
        hf_config = {"num_experts": hf_config["num_local_experts"], **hf_config}
    _check_covered(hf_config, source)
    _check_sizes(hf_config, (*SIZES, *family.sizes), source)
    rope_theta, rope_factor = _read_rope(hf_config, source)
    experts: dict[str, Any] = {}
    if "num_experts" in family.sizes:
        experts = {
            "num_experts": hf_config["num_experts"],
            "experts_per_token": hf_config["num_experts_per_tok"],
            "moe_intermediate_size": hf_config["moe_intermediate_size"],
            "norm_topk_prob": hf_config.get("norm_topk_prob", False),
        }
        _check_experts(source, **experts)
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
        rope_theta=rope_theta,
        tie_word_embeddings=hf_config.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_factor=rope_factor,
        **experts,
    )


def _check_covered(hf_config: Mapping[str, Any], source: str) -> None:
    for key, (covered, meaning) in COVERED.items():
        if hf_config.get(key) not in (None, covered):
            raise ValueError(
                f"model.path: {key} = {hf_config[key]!r} in config.json of {source}: {meaning} is not supported; "
                f"use a model with {key} = {covered!r}"
            )
    others = set(hf_config.get("layer_types") or []) - {"full_attention"}
    if others:
        raise ValueError(
            f"model.path: layer_types in config.json of {source} holds {min(others)!r}, which is not supported; "
            "use a model all of whose layers are 'full_attention'"
        )


def _check_sizes(hf_config: Mapping[str, Any], sizes: tuple[str, ...], source: str) -> None:
    missing = [key for key in (*sizes, "rms_norm_eps") if key not in hf_config]
    if missing:
        raise ValueError(
            f"model.path: config.json of {source} lacks {', '.join(missing)}; copy it from the model again"
        )
    for key in sizes:
        if not isinstance(hf_config[key], int) or hf_config[key] <= 0:
            raise ValueError(
                f"model.path: {key} = {hf_config[key]!r} in config.json of {source}; must be a positive whole number"
            )


def _check_experts(source: str, *, num_experts: int, experts_per_token: int, norm_topk_prob: bool, **_: int) -> None:
    if experts_per_token > num_experts:
        raise ValueError(
            f"model.path: num_experts_per_tok = {experts_per_token} in config.json of {source} exceeds num_experts = "
            f"{num_experts}; copy it from the model again"
        )
    if experts_per_token == 1 and norm_topk_prob:
        raise ValueError(
            f"model.path: norm_topk_prob = True in config.json of {source}: with num_experts_per_tok = 1 every weight "
            "is 1 and the router can't learn; set it to false, or use a model with more experts per token"
        )


def _read_rope(hf_config: Mapping[str, Any], source: str) -> tuple[float, float | None]:
    """The base of the rotary embedding's frequencies, and the factor by which type llama3 stretches them."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"model.path: rope type {rope_type!r} in config.json of {source} is not supported, 'default' and 'llama3' "
            "are; use another model (YaRN can be removed: the model then has its original positions)"
        )
    theta = float(rope.get("rope_theta", hf_config.get("rope_theta", 10000.0)))
    for key, covered in {"partial_rotary_factor": 1.0, **(LLAMA3_ROPE if rope_type == "llama3" else {})}.items():
        found = rope.get(key, hf_config.get(key, covered))
        if found != covered:
            raise ValueError(
                f"model.path: {key} = {found!r} of the rotary embedding in config.json of {source} is not supported; "
                f"use a model with {key} = {covered}"
            )
    if rope_type == "default":
        return theta, None
    if "factor" not in rope:
        raise ValueError(
            f"model.path: config.json of {source} lacks the factor of rope type 'llama3'; copy it from the model again"
        )
    return theta, float(rope["factor"])
