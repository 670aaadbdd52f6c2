"""Qwen2 and Qwen2.5: which Hugging Face tensors make up which Megatron parameter. Plain data."""

from __future__ import annotations

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry


def make_entries(shape: ModelShape) -> list[WeightMapEntry]:
    """One entry a Megatron parameter, in the order of the forward pass."""
    entries = [WeightMapEntry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")]
    for layer in range(shape.num_layers):
        hf, megatron = f"model.layers.{layer}", f"decoder.layers.{layer}"
        qkv = [f"{hf}.self_attn.{name}_proj" for name in "qkv"]
        entries += [
            WeightMapEntry(f"{megatron}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), "replicated"),
            WeightMapEntry(f"{megatron}.self_attention.linear_qkv.weight", tuple(f"{n}.weight" for n in qkv), "qkv"),
            WeightMapEntry(f"{megatron}.self_attention.linear_qkv.bias", tuple(f"{n}.bias" for n in qkv), "qkv"),
            WeightMapEntry(f"{megatron}.self_attention.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), "row"),
            WeightMapEntry(
                f"{megatron}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), "replicated"
            ),
            WeightMapEntry(
                f"{megatron}.mlp.linear_fc1.weight", (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"), "gated"
            ),
            WeightMapEntry(f"{megatron}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), "row"),
        ]
    entries.append(WeightMapEntry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"))
    if not shape.tie_word_embeddings:
        entries.append(WeightMapEntry("output_layer.weight", ("lm_head.weight",), "vocab"))
    return entries
