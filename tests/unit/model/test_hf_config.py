from __future__ import annotations

from typing import Any

import pytest

from fipo_megatron.model.hf_config import make_model_shape

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


def test_reads_the_files_of_both_rope_spellings() -> None:
    shape = make_model_shape(QWEN, "here")
    assert (shape.head_dim, shape.rope_theta, shape.num_layers) == (128, 1e6, 64)
    newer = {**QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del newer["rope_theta"]
    assert make_model_shape(newer, "here").rope_theta == 5e5


def test_a_missing_key_is_named() -> None:
    broken = {key: value for key, value in QWEN.items() if key != "rms_norm_eps"}
    with pytest.raises(ValueError, match=r"config\.json of here lacks rms_norm_eps"):
        make_model_shape(broken, "here")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "'none'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"vocab_size": "152064"}, "vocab_size = '152064' in config.json of here; must be a positive whole number"),
    ],
)
def test_refuses_what_the_weight_map_does_not_cover(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=f"model.path.*{cause}"):
        make_model_shape({**QWEN, **change}, "here")
