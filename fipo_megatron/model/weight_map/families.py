"""The weight map of a whole model: the rows of its family for every layer and expert. Plain data."""

from __future__ import annotations

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map import llama, qwen2, qwen3, qwen3_moe
from fipo_megatron.model.weight_map.entry import WeightMapEntry

# Of one layer, by architecture: names below `decoder.layers.N.` (Megatron) and `model.layers.N.` (Hugging Face).
LAYERS = {
    "Qwen2ForCausalLM": qwen2.LAYER,
    "Qwen3ForCausalLM": qwen3.LAYER,
    "Qwen3MoeForCausalLM": qwen3_moe.LAYER,
    "LlamaForCausalLM": llama.LAYER,
}


def make_entries(shape: ModelShape) -> list[WeightMapEntry]:
    """One entry a Megatron parameter, in the order of the forward pass."""
    entries = [WeightMapEntry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")]
    for layer in range(shape.num_layers):
        for megatron_name, hf_names, rule in LAYERS[shape.architecture]:
            for expert in range(shape.num_experts) if "{expert}" in megatron_name else (None,):
                entries.append(
                    WeightMapEntry(
                        f"decoder.layers.{layer}.{megatron_name.format(expert=expert)}",
                        tuple(f"model.layers.{layer}.{name.format(expert=expert)}" for name in hf_names),
                        rule,
                        expert,
                    )
                )
    entries.append(WeightMapEntry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"))
    if not shape.tie_word_embeddings:
        entries.append(WeightMapEntry("output_layer.weight", ("lm_head.weight",), "vocab"))
    return entries
