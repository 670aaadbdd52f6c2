"""Qwen2 and Qwen2.5: which Hugging Face tensors of a layer make up which Megatron parameter. Plain data."""

from __future__ import annotations

from fipo_megatron.model.weight_map.entry import LayerRow

LAYER: tuple[LayerRow, ...] = (
    ("input_layernorm.weight", ("input_layernorm.weight",), "replicated"),
    (
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    (
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
    ),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "row"),
    ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "replicated"),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gated"),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "row"),
)
