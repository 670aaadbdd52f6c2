"""The weight map of a whole model: the rows of its family for every layer and expert. Plain data."""

from __future__ import annotations

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map import llama, qwen2, qwen3, qwen3_moe
from fipo_megatron.model.weight_map.entry import LayerRow, WeightMapEntry

# Of one layer, by architecture: names below `decoder.layers.N.` (Megatron) and `model.layers.N.` (Hugging Face).
LAYERS = {
    "Qwen2ForCausalLM": qwen2.LAYER,
    "Qwen3ForCausalLM": qwen3.LAYER,
    "Qwen3MoeForCausalLM": qwen3_moe.LAYER,
    "LlamaForCausalLM": llama.LAYER,
}


EMBEDDING = WeightMapEntry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
FINAL_NORM = WeightMapEntry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated")
HEAD = WeightMapEntry("output_layer.weight", ("lm_head.weight",), "vocab")


def layer_entry(row: LayerRow, layer: int, expert: int | None) -> WeightMapEntry:
    """The entry of one parameter: a row of a family's table in a layer, and of an expert if it is an expert's."""
    megatron_name, hf_names, rule = row
    return WeightMapEntry(
        f"decoder.layers.{layer}.{megatron_name.format(expert=expert)}",
        tuple(f"model.layers.{layer}.{name.format(expert=expert)}" for name in hf_names),
        rule,
        expert,
    )


def is_expert(row: LayerRow) -> bool:
    """Whether a row stands for one parameter an expert."""
    return "{expert}" in row[0]


def make_entries(shape: ModelShape) -> list[WeightMapEntry]:
    """One entry a Megatron parameter, in the order of the forward pass."""
    entries = [EMBEDDING]
    for layer in range(shape.num_layers):
        for row in LAYERS[shape.architecture]:
            entries += [
                layer_entry(row, layer, expert) for expert in (range(shape.num_experts) if is_expert(row) else (None,))
            ]
    entries.append(FINAL_NORM)
    if not shape.tie_word_embeddings:
        entries.append(HEAD)
    return entries
