"""The model of an engine: a step by hand, and batches beside a scheduler that goes step by step."""

import dataclasses
from collections import deque

import numpy as np
import pytest

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.engine_model import EngineModel
from fipo_megatron.planner.gpu import Gpu

# 2 layers of (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16) = 576 weights, and a head of 32 * 8 = 256
DENSE = ModelShape(
    architecture="Qwen3ForCausalLM",
    vocab_size=32,
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    max_positions=1 << 20,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
)
WEIGHTS = 2 * 576 + 256
EXPERTS = dataclasses.replace(DENSE, num_experts=6, experts_per_token=2, moe_intermediate_size=4)
PERFECT = Efficiencies(nvlink=1, network=1, prefill=1, decode=1, decode_matmul=1, decode_step_s=0, collective_s=0)
GPU = Gpu("toy", 10_000, bf16_flops=1e6, memory_bandwidth=1e4, nvlink_bandwidth=1e3, network_bandwidth=1e2,
          gpus_per_node=4, price_per_hour=1)  # fmt: skip


def model(shape=DENSE, efficiencies=PERFECT, gpu=GPU, **layout):
    return EngineModel(shape, gpu, efficiencies, **layout)


KV = 2 * 2 * 2 * 2 * 2  # keys and values, layers, heads, sizes, bytes: 32 a token


@pytest.mark.parametrize(
    ("layout", "kv_bytes", "weight_bytes"),
    [
        ({}, KV, 2 * WEIGHTS),
        ({"tensor": 2}, KV / 2, WEIGHTS),
        ({"tensor": 4}, KV / 2, WEIGHTS / 2),  # two heads: each is on two workers
        ({"pipeline": 2}, KV / 2, WEIGHTS),
        ({"bytes_per_weight": 1}, KV / 2, WEIGHTS),
    ],
)
def test_bytes_of_a_worker(layout, kv_bytes, weight_bytes):
    assert model(**layout).kv_bytes_per_token == kv_bytes
    assert model(**layout).weight_bytes == weight_bytes


def test_float32_is_computed_at_its_own_peak():
    gpu = dataclasses.replace(GPU, float32_flops=1e5)
    narrow, wide = (model(gpu=gpu, bytes_per_weight=width) for width in (2, 4))
    assert wide.prefill_s(np.array([5])) == pytest.approx(10 * narrow.prefill_s(np.array([5])))
    assert wide.decode_step_s(1000, 0) == pytest.approx(10 * narrow.decode_step_s(1000, 0))


def test_an_embedding_of_its_own_is_held_but_not_read():
    untied = dataclasses.replace(DENSE, tie_word_embeddings=False)
    assert model(untied).weight_bytes == 2 * (WEIGHTS + 256)
    assert model(untied).decode_step_s(1, 0) == model().decode_step_s(1, 0)


@pytest.mark.parametrize(
    ("layout", "num_sequences", "context", "seconds"),
    [
        ({}, 1, 0, 2 * WEIGHTS / 1e4),
        ({}, 1, 100, (2 * WEIGHTS + 100 * KV) / 1e4),
        ({}, 1000, 0, 1000 * 2 * WEIGHTS / 1e6),  # bound by operations
        ({"tensor": 2}, 1, 100, (WEIGHTS + 100 * KV / 2) / 1e4 + 2 * 2 * 16 * 2 / 2 / 1e3),
        ({"tensor": 8}, 1, 0, 2 * WEIGHTS / 8 / 1e4 + 2 * 2 * 16 * 2 * 7 / 8 / 1e2),  # over nodes
        ({"pipeline": 2}, 1, 100, (2 * WEIGHTS + 100 * KV) / 1e4),  # a sequence passes all stages
    ],
)
def test_a_step_by_hand(layout, num_sequences, context, seconds):
    assert model(**layout).decode_step_s(num_sequences, context) == pytest.approx(seconds)


def test_efficiencies_and_the_fixed_time_count():
    slow = dataclasses.replace(PERFECT, decode=0.5, decode_step_s=3.0)
    assert model(efficiencies=slow).decode_step_s(1, 0) == pytest.approx(2 * 2 * WEIGHTS / 1e4 + 3)
    assert model(efficiencies=slow, pipeline=2).decode_step_s(1, 0) == pytest.approx(2 * 2 * WEIGHTS / 1e4 + 6)
    late = dataclasses.replace(PERFECT, collective_s=0.1)  # two a layer, where there are any
    assert model(efficiencies=late).decode_step_s(1, 0) == model().decode_step_s(1, 0)
    assert model(efficiencies=late, tensor=2).decode_step_s(1, 0) == pytest.approx(
        model(tensor=2).decode_step_s(1, 0) + 0.4
    )
    half = dataclasses.replace(PERFECT, decode_matmul=0.5, prefill=0.25)
    assert model(efficiencies=half).decode_step_s(1000, 0) == pytest.approx(2 * 1000 * 2 * WEIGHTS / 1e6)
    assert model(efficiencies=half).prefill_s(np.array([5])) == pytest.approx(4 * model().prefill_s(np.array([5])))


def test_experts_that_are_hit():
    engine = model(EXPERTS)
    assert engine.experts_hit(1) == pytest.approx(2)
    assert engine.experts_hit(2) == pytest.approx(6 * (1 - (4 / 6) ** 2))
    assert engine.experts_hit(1000) == pytest.approx(6)
    dense = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 6 * 8) + 256  # attention, router, head
    expert = 3 * 8 * 4
    assert engine.weight_bytes == 2 * (dense + 2 * 6 * expert)
    assert engine.decode_step_s(1, 0) == pytest.approx(2 * (dense + 2 * 2 * expert) / 1e4)


def test_whole_experts_are_dealt_to_workers_unevenly():
    dense = 2 * (2 * 8 * 8 + 2 * 8 * 4 + 6 * 8) + 256
    sliced, whole = (model(EXPERTS, tensor=4, expert_parallel=which) for which in (False, True))
    assert sliced.weight_bytes == 2 * (dense / 4 + 2 * 6 * 96 / 4)
    assert whole.weight_bytes == 2 * (dense / 4 + 2 * 2 * 96)  # 2 of 6 on the fullest of 4


def test_prefill_by_hand():
    # 5 tokens of 1152 weights, 15 pairs of 4 * 2 * 8 operations, one row of the head
    assert model().prefill_s(np.array([5])) == pytest.approx((5 * 2 * 1152 + 15 * 64 + 2 * 256) / 1e6)
    assert model(pipeline=2).prefill_s(np.array([5])) == pytest.approx(model().prefill_s(np.array([5])) / 2)
    both = model().prefill_s(np.array([5, 9]))
    assert both == pytest.approx(model().prefill_s(np.array([5])) + model().prefill_s(np.array([9])))


def test_room_for_keys_and_values():
    assert model().kv_capacity_tokens(0.5) == (5000 - 2 * WEIGHTS) // KV
    with pytest.raises(ValueError, match=r"gpu_memory_utilization = 0\.28.*raise rollout.tensor"):
        model().kv_capacity_tokens(0.28)


def generate(prompts, responses, engine=None, **settings):
    settings = {"max_concurrent": 100, "kv_capacity": 10**6} | settings
    return (engine or model()).generate(np.array(prompts), np.array(responses), **settings)


def test_one_long_response():
    trace = generate([5], [1001])
    steps = sum(2 * WEIGHTS + (6 + i) * KV for i in range(1000)) / 1e4
    assert trace.seconds == pytest.approx(model().prefill_s(np.array([5])) + steps)
    assert (trace.num_steps, trace.num_preemptions, trace.running.tolist()) == (1000, 0, [1, 0, 0])


def test_equal_responses_end_at_once():
    trace = generate([5] * 8, [101] * 8, samples_per_prompt=4)
    steps = sum(2 * WEIGHTS + 8 * (6 + i) * KV for i in range(100)) / 1e4
    assert trace.finish_s.tolist() == pytest.approx([2 * model().prefill_s(np.array([5])) + steps] * 8)
    assert trace.mean_running == pytest.approx(8, rel=0.01)


def test_places_are_filled_in_order():
    trace = generate([5] * 3, [11, 21, 11], max_concurrent=2)
    assert np.argsort(trace.finish_s, kind="stable").tolist() == [0, 1, 2]
    assert trace.num_steps == 20  # the third begins when the first has ended
    assert trace.finish_s[1] == trace.finish_s[2]


def step_by_step(engine, prompts, responses, max_concurrent, kv_capacity):
    """Finishing times and preemptions by a scheduler that decides anew for every token."""
    now, step_s, finish, preemptions = 0.0, engine.decode_step_s, {}, 0
    done = [0] * len(prompts)
    waiting, running = deque(range(len(prompts))), []

    def used():
        return sum(prompts[i] + done[i] for i in running)

    def retire():
        for i in [i for i in running if done[i] == responses[i]]:
            running.remove(i)
            finish[i] = now

    while waiting or running:
        started = []
        while (
            waiting
            and len(running) < max_concurrent
            and used() + prompts[waiting[0]] + done[waiting[0]] + 1 <= kv_capacity
        ):
            started.append(prompts[waiting[0]] + done[waiting[0]])
            running.append(waiting.popleft())
            done[running[-1]] += 1
        if started:
            now += engine.prefill_s(np.array(started))
        retire()
        while used() + len(running) > kv_capacity:
            waiting.appendleft(running.pop())
            preemptions += 1
        if running:
            now += step_s(len(running), used())
            for i in running:
                done[i] += 1
            retire()
    return [finish[i] for i in range(len(prompts))], preemptions


@pytest.mark.parametrize("seed", range(20))
def test_jumping_from_change_to_change_is_going_step_by_step(seed):
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, 20, 40)
    responses = rng.integers(1, 60, 40)
    limits = {"max_concurrent": int(rng.integers(1, 12)), "kv_capacity": int(rng.integers(80, 400))}
    trace = generate(prompts, responses, **limits)
    finish, preemptions = step_by_step(model(), prompts.tolist(), responses.tolist(), **limits)
    assert trace.num_preemptions == preemptions
    # memory-bound and compute-bound steps mix here: between two changes the mean step is exact for each kind alone
    assert trace.finish_s.tolist() == pytest.approx(finish, rel=2e-3)


def test_the_comparison_has_preemptions():
    counts = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompts, responses = rng.integers(1, 20, 40), rng.integers(1, 60, 40)
        limits = {"max_concurrent": int(rng.integers(1, 12)), "kv_capacity": int(rng.integers(80, 400))}
        counts.append(generate(prompts, responses, **limits).num_preemptions)
    assert sum(count > 0 for count in counts) >= 5
    assert max(counts) > 20


def test_a_sequence_beyond_the_cache_is_refused():
    with pytest.raises(ValueError, match="values of 20 tokens, the longest sequence has 21"):
        generate([5, 11], [5, 10], kv_capacity=20)


def test_no_requests_take_no_time():
    trace = generate([], [])
    assert (trace.seconds, trace.mean_running, trace.num_steps) == (0, 0, 0)
