"""Parameters of each stage, against numbers made by hand and Megatron's rules of padding."""

from __future__ import annotations

from typing import Any

import pytest

from fipo_megatron.planner.parameters import ParameterBuffer, count_model, count_parameters, largest_parameter
from tests.unit.planner.shapes import EXPERTS, QWEN2_32B, make_config, make_shape

# Of one layer: norms 2 x 64; q, k, v of 64 + 32 + 32 rows, with a bias; o 64 x 64; three matrices 64 x 96.
LAYER = 128 + 128 * 64 + 128 + 64 * 64 + 3 * 64 * 96
TABLE = 100 * 64


def test_a_whole_model() -> None:
    assert count_model(make_shape()) == 4 * LAYER + 2 * TABLE + 64
    assert count_model(make_shape(tie_word_embeddings=True)) == 4 * LAYER + TABLE + 64
    assert count_model(make_shape(**QWEN2_32B)) == 32_763_876_352  # as Qwen2.5-32B's safetensors index says
    assert largest_parameter(make_shape(**QWEN2_32B)) == 152064 * 5120
    assert largest_parameter(make_shape()) == 2 * 64 * 96  # gate and up, joined
    # router 64 x 4, norms of heads 2 x 16, four experts of three matrices 64 x 32, no bias
    layer = 128 + 128 * 64 + 32 + 64 * 64 + 64 * 4 + 4 * 3 * 64 * 32
    assert count_model(make_shape("Qwen3MoeForCausalLM", **EXPERTS)) == 4 * layer + 2 * TABLE + 64


@pytest.mark.parametrize(
    ("parallel", "changes", "expected"),
    [
        ({}, {}, [4 * LAYER + 2 * TABLE + 64]),
        ({"pipeline": 2}, {}, [2 * LAYER + TABLE, 2 * LAYER + TABLE + 64]),
        ({"pipeline": 2}, {"tie_word_embeddings": True}, [2 * LAYER + TABLE, 2 * LAYER + TABLE + 64]),
        ({"pipeline": 4}, {}, [LAYER + TABLE, LAYER, LAYER, LAYER + TABLE + 64]),
        # norms stay whole; an odd vocabulary gets a row more
        ({"tensor": 2}, {"vocab_size": 99}, [4 * ((LAYER - 128) // 2 + 128) + TABLE + 64]),
        ({"data": 4, "context": 2}, {}, [4 * LAYER + 2 * TABLE + 64]),
    ],
)
def test_each_stage(parallel: dict[str, Any], changes: dict[str, Any], expected: list[int]) -> None:
    stages = count_parameters(make_config(parallel).parallel, make_shape(**changes), "bfloat16")
    assert [stage.num_parameters for stage in stages] == expected


def test_experts_are_shared_out_and_cut() -> None:
    shape = make_shape("Qwen3MoeForCausalLM", **EXPERTS)
    expert = 3 * 64 * 32

    def held(**parallel: int) -> tuple[int, int]:
        (stage,) = count_parameters(make_config({"sequence_parallel": True, **parallel}).parallel, shape, "bfloat16")
        return stage.experts.num_parameters, stage.experts.replicas

    assert held(tensor=2, data=4, expert_tensor=2) == (4 * 4 * expert // 2, 4)
    assert held(tensor=2, data=4, expert=4) == (4 * expert, 2)
    assert held(tensor=2, data=4, expert=2, expert_tensor=2) == (4 * 2 * expert // 2, 2)


def test_padding_of_a_buffer() -> None:
    # 3 parameters of 70 take 128, 128 and 70; 326 is padded to a multiple of 128 and of 3 ranks, 384.
    assert ParameterBuffer((((70, 3),),), 3, True).num_elements == 384
    assert ParameterBuffer((((70, 3),),), 3, True).num_updated == 128
    assert ParameterBuffer((((70, 3),),), 3, False).num_elements == 210
    assert ParameterBuffer((((70, 3),),), 3, False).num_updated == 210
    assert ParameterBuffer((((64, 1),), ((70, 1),)), 1, True).num_elements == 256
    assert ParameterBuffer((), 1, True).num_elements == 0


def test_bytes() -> None:
    def sizes(dtype: str, **parallel: Any) -> tuple[int, int, int, int]:
        (stage,) = count_parameters(make_config(parallel).parallel, make_shape(vocab_size=101), dtype)
        return stage.num_parameters, stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes

    number = 4 * LAYER + 2 * 101 * 64 + 64
    assert number % 128 == 64
    padded = number + 64
    assert sizes("bfloat16") == (number, 2 * padded, 4 * padded, 12 * padded)
    assert sizes("float32") == (number, 4 * padded, 4 * padded, 8 * padded)
    assert sizes("bfloat16", distributed_optimizer=False, data=4) == (number, 2 * number, 4 * number, 12 * number)
    assert sizes("bfloat16", data=4, context=2) == (number, 2 * padded, 4 * padded, 12 * padded // 8)


def test_layers_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="num_layers = 4: must be a multiple of the 3"):
        count_parameters(make_config({"pipeline": 3}).parallel, make_shape(), "bfloat16")
