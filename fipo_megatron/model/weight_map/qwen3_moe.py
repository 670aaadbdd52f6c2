"""Qwen3-MoE: which Hugging Face tensors of a layer make up which Megatron parameter. Plain data."""

from __future__ import annotations

from fipo_megatron.model.weight_map.entry import LayerRow

LAYER: tuple[LayerRow, ...] = (
    ("input_layernorm.weight", ("input_layernorm.weight",), "replicated"),
    (
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "replicated"),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "replicated"),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "row"),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "replicated"),
    ("mlp.router.weight", ("mlp.gate.weight",), "replicated"),
    (
        "mlp.experts.{expert}.linear_fc1.weight",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        "gated",
    ),
    ("mlp.experts.{expert}.linear_fc2.weight", ("mlp.experts.{expert}.down_proj.weight",), "row"),
)
