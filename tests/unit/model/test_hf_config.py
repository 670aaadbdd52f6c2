from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.model.hf_config import make_model_shape, read_model_shape

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
QWEN3 = {
    **QWEN,
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 64,
}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    **QWEN,
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "pretraining_tp": 1,
}
FAMILIES = {"qwen2": QWEN, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "llama": LLAMA}


def test_reads_the_files_of_both_rope_spellings() -> None:
    shape = make_model_shape(QWEN, "here")
    assert (shape.head_dim, shape.rope_theta, shape.num_layers) == (128, 1e6, 64)
    newer = {**QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del newer["rope_theta"]
    assert make_model_shape(newer, "here").rope_theta == 5e5


def test_families_differ_in_what_their_config_does_not_say() -> None:
    shapes = {name: make_model_shape(config, "here") for name, config in FAMILIES.items()}
    assert {name: (shape.qkv_bias, shape.qk_norm) for name, shape in shapes.items()} == {
        "qwen2": (True, False),
        "qwen3": (False, True),
        "qwen3_moe": (False, True),
        "llama": (False, False),
    }
    assert (shapes["qwen3"].head_dim, shapes["qwen3"].tie_word_embeddings) == (128, True)
    assert [shape.num_experts for shape in shapes.values()] == [0, 0, 128, 0]


def test_experts_are_read_under_both_spellings() -> None:
    shape = make_model_shape(QWEN3_MOE, "here")
    sizes = (shape.num_experts, shape.experts_per_token, shape.moe_intermediate_size, shape.norm_topk_prob)
    assert sizes == (128, 8, 768, True)
    newer = {**QWEN3_MOE, "num_local_experts": 128}
    del newer["num_experts"]
    assert make_model_shape(newer, "here") == shape


def test_reads_the_rope_of_llama_3_in_both_spellings() -> None:
    shape = make_model_shape(LLAMA, "here")
    assert (shape.rope_theta, shape.rope_factor) == (5e5, 32.0)
    newer = {**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}, "rope_scaling": None}
    assert make_model_shape(newer, "here") == shape
    assert make_model_shape({**LLAMA, "rope_scaling": None}, "here").rope_factor is None


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("qwen2", "rms_norm_eps"),
        ("qwen2", "vocab_size"),
        ("qwen3", "head_dim"),  # its default is not the width over the heads
        ("qwen3_moe", "num_experts"),
        ("qwen3_moe", "moe_intermediate_size"),
    ],
)
def test_a_missing_key_is_named(family: str, key: str) -> None:
    broken = {name: value for name, value in FAMILIES[family].items() if name != key}
    with pytest.raises(ValueError, match=rf"config\.json of here lacks {key}"):
        make_model_shape(broken, "here")


@pytest.mark.parametrize(
    ("family", "change", "line"),
    [
        (
            "qwen2",
            {"architectures": ["MixtralForCausalLM"]},
            "here is of architecture 'MixtralForCausalLM'; supported:",
        ),
        ("qwen2", {"architectures": None}, "here is of architecture 'none'; supported: Qwen2ForCausalLM, Qwen3"),
        ("qwen2", {"vocab_size": "152064"}, "vocab_size = '152064' in config.json of here; must be a positive whole"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True in config.json of here: sliding-window "),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn' in config.json of here is not "),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' in config.json of here: another activation is not "),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types in config.json of here holds ",
        ),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} in config.json of here: "),
        ("qwen3", {"attention_bias": True}, "attention_bias = True in config.json of here: a bias in the attention "),
        ("qwen3", {"head_dim": 0}, "head_dim = 0 in config.json of here; must be a positive whole number"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 in config.json of here: a dense layer "),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0] in config.json of here: a dense layer "),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 in config.json "),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok = 129 in config.json of here exceeds "),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "norm_topk_prob = True in config.json of here: with num_experts_per"),
        ("llama", {"attention_bias": True}, "attention_bias = True in config.json of here: a bias in the attention "),
        ("llama", {"mlp_bias": True}, "mlp_bias = True in config.json of here: a bias in the MLP is not "),
        ("llama", {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "low_freq_factor = 2.0 of the rotary "),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "config.json of here lacks the factor of rope type "),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' in config.json of "),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 of the rotary embedding in config"),
    ],
)
def test_refuses_what_the_weight_map_does_not_cover(family: str, change: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match="model.path: ") as error:
        make_model_shape({**FAMILIES[family], **change}, "here")
    assert str(error.value).startswith(f"model.path: {line}")
    assert "; " in str(error.value)  # the remedy


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no config.json; give a model's"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is not a JSON object; copy it"):
        read_model_shape(tmp_path)
