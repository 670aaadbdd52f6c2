"""Bytes of hand-counted collectives, and the links that they take."""

import dataclasses
from typing import Any

import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.planner.communication import (
    bandwidth,
    pass_collectives,
    pass_traffic,
    replicas,
    seconds,
    stage_weights,
    update_traffic,
)
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.gpu import find_gpu
from tests.unit.planner.test_flops import make_shape

# Hidden 8, 4 query and 2 key-value heads of 4, MLP of 12, 4 layers, vocabulary of 64, not tied.
SHAPE = make_shape(num_layers=4, head_dim=4, vocab_size=64, qk_norm=False)
MOE = dataclasses.replace(SHAPE, num_experts=8, experts_per_token=2, moe_intermediate_size=6, norm_topk_prob=True)
TOKENS = 16 * 8 * 2  # bytes of 16 tokens' hidden states, in bfloat16


def make_config(**parallel: object) -> Config:
    return Config.model_validate({"parallel": parallel, "platform": "cpu"})


def test_a_rank_alone_sends_nothing() -> None:
    traffic = pass_traffic(make_config(), SHAPE, 0, 16, 5)
    assert not any(traffic.forward.values())
    assert not any(traffic.backward.values())
    assert update_traffic(make_config(), SHAPE, 0) == 0


def test_tensor_parallel_sums() -> None:
    traffic = pass_traffic(make_config(tensor=4), SHAPE, 0, 16, 5)
    # An all-reduce of 4 ranks: 2 * 3/4 of the bytes. Two a layer, one of the embedding.
    assert traffic.forward["tp"] == (4 * 2 + 1) * 1.5 * TOKENS
    # Two a layer of gradients, and of the head's input: 5 rows of 8 in float32.
    assert traffic.backward["tp"] == 4 * 2 * 1.5 * TOKENS + 1.5 * 5 * 8 * 4


def test_sequence_parallel_gathers_and_scatters() -> None:
    traffic = pass_traffic(make_config(tensor=4, sequence_parallel=True), SHAPE, 0, 16, 0)
    assert traffic.forward["tp"] == (4 * 4 + 1) * 0.75 * TOKENS  # the embedding's sum is a reduce-scatter
    assert traffic.backward["tp"] == 4 * 6 * 0.75 * TOKENS  # both inputs are gathered once more


def test_keys_and_values_are_gathered_over_the_context() -> None:
    config = make_config(context=4)
    # 4 tokens a rank, keys and values of 2 heads of 4, to 3 others, in 4 layers.
    assert pass_traffic(config, SHAPE, 0, 16, 0).forward["cp"] == 4 * 3 * (4 * 2 * 2 * 4 * 2)
    on_gpu = config.model_copy(update={"platform": "cuda"})
    traffic = pass_traffic(on_gpu, SHAPE, 0, 16, 0)
    assert traffic.backward["cp"] == 2 * traffic.forward["cp"]
    # A key-value head that tensor-parallel ranks can't share is on each.
    cut = pass_traffic(make_config(context=4, tensor=4), SHAPE, 0, 16, 0)
    assert cut.forward["cp"] == 4 * 3 * (4 * 2 * 1 * 4 * 2)


def test_stages_send_their_output_on_and_its_gradient_back() -> None:
    first, last = (pass_traffic(make_config(pipeline=2), SHAPE, stage, 16, 0) for stage in (0, 1))
    assert (first.forward["pp"], first.backward["pp"]) == (TOKENS, 0)
    assert (last.forward["pp"], last.backward["pp"]) == (0, TOKENS)
    interleaved = [pass_traffic(make_config(pipeline=2, virtual_pipeline=2), SHAPE, s, 16, 0) for s in (0, 1)]
    assert [t.forward["pp"] for t in interleaved] == [2 * TOKENS, TOKENS]  # three borders of four chunks
    cut = pass_traffic(make_config(pipeline=2, tensor=2, sequence_parallel=True), SHAPE, 0, 16, 0)
    assert cut.forward["pp"] == TOKENS / 2


def test_tokens_go_to_their_experts_and_back() -> None:
    traffic = pass_traffic(make_config(data=4, expert=4), MOE, 0, 16, 0)
    assert traffic.forward["ep"] == 4 * 2 * 0.75 * (2 * TOKENS)  # each to 2 experts
    assert traffic.backward["ep"] == traffic.forward["ep"]
    # Only attention is summed over tensor-parallel ranks.
    both = pass_traffic(make_config(tensor=4, expert=4, sequence_parallel=True), MOE, 0, 16, 0)
    assert both.forward["tp"] == (4 * 2 + 1) * 0.75 * TOKENS
    assert both.forward["ep"] == traffic.forward["ep"] / 4


@pytest.mark.parametrize(
    ("parallel", "stage", "expected"),
    [
        ({}, 0, (0, 0)),
        ({"tensor": 2}, 0, (2 * 4 + 1, 2 * 4 + 1)),  # two sums a layer; the embedding's, the head's
        ({"tensor": 2, "sequence_parallel": True}, 0, (4 * 4 + 1, 6 * 4 + 1)),
        ({"context": 2}, 0, (2 * 4, 2 * 4)),  # keys, values
        ({"pipeline": 2}, 0, (1, 0)),
        ({"pipeline": 2}, 1, (0, 1)),
        ({"pipeline": 2, "virtual_pipeline": 2}, 0, (2, 1)),
    ],
)
def test_collectives_of_a_microbatch(parallel: dict[str, Any], stage: int, expected: tuple[int, int]) -> None:
    assert SHAPE.num_layers == 4
    assert pass_collectives(make_config(**parallel), SHAPE, stage) == expected


def test_experts_are_sent_for_in_each_layer() -> None:
    assert MOE.num_layers == 4
    assert pass_collectives(make_config(data=4, expert=4), MOE, 0) == (8, 8)
    both = make_config(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True)
    assert pass_collectives(both, MOE, 0) == (4 * (2 + 4) + 1, 4 * (3 + 4) + 1)  # attention alone is cut by tensor


def test_weights_of_a_stage() -> None:
    layer = 8 * (16 + 8 + 8 + 16) + 3 * 8 * 12
    table = 64 * 8
    assert stage_weights(SHAPE, make_config().parallel, 0).dense == 4 * layer + 2 * table
    halves = make_config(tensor=2, pipeline=2).parallel
    assert [stage_weights(SHAPE, halves, s).dense for s in (0, 1)] == [(2 * layer + table) / 2] * 2
    tied = dataclasses.replace(SHAPE, tie_word_embeddings=True)
    assert stage_weights(tied, make_config().parallel, 0).dense == 4 * layer + table
    assert stage_weights(tied, halves, 1) == stage_weights(SHAPE, halves, 1)
    experts = stage_weights(MOE, make_config(data=4, expert=2, expert_tensor=2).parallel, 0)
    assert experts.experts == 4 * 8 * (3 * 8 * 6) / 4
    assert experts.dense == 4 * (8 * 48 + 8 * 8) + 2 * table


def test_an_update_reduces_gradients_and_gathers_weights() -> None:
    config, held = make_config(data=2, context=2), stage_weights(SHAPE, make_config().parallel, 0).dense
    assert update_traffic(config, SHAPE, 0) == 0.75 * held * (4 + 2)  # float32 gradients, bfloat16 weights
    plain = make_config(data=2, context=2, distributed_optimizer=False)
    assert update_traffic(plain, SHAPE, 0) == 0.75 * held * 8
    experts = make_config(data=4, expert=2)
    assert replicas(experts.parallel) == (4, 2)
    of_experts = stage_weights(MOE, experts.parallel, 0)
    assert update_traffic(experts, MOE, 0) == 6 * (0.75 * of_experts.dense + 0.5 * of_experts.experts)


@pytest.mark.parametrize(
    ("parallel", "kind", "on_node"),
    [
        ({"tensor": 8}, "tp", True),
        ({"tensor": 4, "context": 2}, "cp", True),
        ({"tensor": 8, "context": 2}, "cp", False),
        ({"tensor": 8, "data": 2}, "dp", False),
        ({"pipeline": 8}, "pp", True),
        ({"tensor": 4, "pipeline": 4}, "pp", False),
        ({"data": 16, "expert": 8}, "ep", True),
        ({"data": 16, "expert": 16}, "ep", False),
    ],
)
def test_a_group_is_as_fast_as_its_slowest_link(parallel, kind, on_node) -> None:
    gpu = find_gpu("h100-80gb")
    found = bandwidth(make_config(**parallel), gpu, Efficiencies().with_values(nvlink=0.5, network=0.4), kind)
    assert found == (450e9 * 0.5 if on_node else 50e9 * 0.4)


def test_seconds_add_up_over_kinds() -> None:
    config, gpu = make_config(tensor=8, data=2), find_gpu("h100-80gb")
    efficiencies = Efficiencies().with_values(nvlink=0.5, network=0.4)
    assert seconds(config, gpu, efficiencies, {"tp": 225e9, "dp": 20e9, "ep": 0.0}) == pytest.approx(2.0)
