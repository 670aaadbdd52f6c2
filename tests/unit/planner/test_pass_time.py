"""Seconds of passes: by hand on a device of 1 FLOP/s, and in proportion where a layout changes."""

import dataclasses

import numpy as np
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.planner.efficiency import Efficiencies, efficiency_fields
from fipo_megatron.planner.flops import forward_flops
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.pass_time import PassModel, pack
from tests.unit.planner.test_flops import make_shape

SHAPE = make_shape(num_layers=4, head_dim=4, vocab_size=64, qk_norm=False)
PERFECT = Efficiencies().with_values(**{field.name: float(field.metadata["is_share"]) for field in efficiency_fields()})
NO_LINKS = Gpu("one", 1, 1.0, 1e30, 1e30, 1e30, 8, 0.0)  # computes 1 FLOP/s, all else takes no time
LENGTHS = Lengths(np.array([3, 4, 2, 3]), np.array([6, 5, 7, 6]))  # 9 tokens each, 8 positions


def make_config(budget: int = 8, recompute: str = "none", **parallel: object) -> Config:
    return Config.model_validate(
        {"parallel": parallel, "trainer": {"microbatch_tokens": budget, "recompute": recompute}, "platform": "cpu"}
    )


def passes(config: Config, efficiencies: Efficiencies = PERFECT) -> tuple[float, float]:
    """Seconds of a forward and of a training pass over all samples."""
    model = PassModel(config, SHAPE, NO_LINKS, efficiencies)
    held = pack(config, SHAPE, LENGTHS, range(4))
    return model.forward_pass(held).seconds, model.training_pass(held).seconds


def test_microbatches_hold_what_the_plan_says() -> None:
    held = pack(make_config(budget=16, data=2), SHAPE, LENGTHS, range(4))
    assert held.tokens.tolist() == [[16], [16]]
    assert held.pairs.tolist() == [[72], [72]]  # 8 * 9 / 2 each
    assert held.rows.sum() == 24
    padded = pack(make_config(budget=16, context=3), SHAPE, LENGTHS, range(1))
    assert padded.tokens.tolist() == [[12]]  # a multiple of 6


def test_a_pass_takes_its_operations() -> None:
    flops = forward_flops(SHAPE, np.full(4, 8), 24)
    head = forward_flops(SHAPE, np.array([]), 24)
    forward, training = passes(make_config())
    assert forward == pytest.approx(flops)
    assert training == pytest.approx(3 * flops + head)  # its logits are made again
    attention = 4 * 4 * 16 * 4 * 36.0  # 4 * layers * heads * head_dim * pairs
    assert passes(make_config(recompute="selective"))[1] == pytest.approx(3 * flops + head + attention)
    assert passes(make_config(recompute="full"))[1] == pytest.approx(4 * flops)


def test_float32_has_its_own_peak() -> None:
    narrow = make_config()
    wide = narrow.model_copy(update={"model": narrow.model.model_copy(update={"dtype": "float32"})})
    gpu, held = dataclasses.replace(NO_LINKS, float32_flops=0.1), pack(narrow, SHAPE, LENGTHS, range(4))
    slow, fast = (PassModel(config, SHAPE, gpu, PERFECT).forward_pass(held).seconds for config in (wide, narrow))
    assert slow == pytest.approx(10 * fast)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"data": 2}, {"context": 2}], ids=str)
def test_two_ranks_take_half(parallel) -> None:
    assert passes(make_config(**parallel)) == pytest.approx(np.array(passes(make_config())) / 2)


def test_each_efficiency_divides_its_own_part() -> None:
    cost = {
        "attention": 4 * 4 * 16 * 4 * 36.0,
        "head": 2 * 8 * 64 * 24.0,
        "matmul": 4 * 2 * (8 * 48 + 3 * 8 * 12) * 32.0,
    }
    whole = passes(make_config())[0]
    assert sum(cost.values()) == pytest.approx(whole)
    for name, flops in cost.items():
        half = PERFECT.with_values(**{name: 0.5})
        assert passes(make_config(), half)[0] == pytest.approx(whole + flops)
    fixed = PERFECT.with_values(microbatch_s=7.0)
    assert passes(make_config(), fixed) == pytest.approx((whole + 4 * 7, passes(make_config())[1] + 4 * 21))


def test_a_pipeline_waits_while_it_fills() -> None:
    """Without a head all stages take as long: 4 microbatches on 2 stages take 5 parts instead of 4."""
    no_head = make_shape(num_layers=4, head_dim=4, vocab_size=1, qk_norm=False)
    config = make_config(pipeline=2)
    model = PassModel(config, no_head, NO_LINKS, PERFECT)
    held = pack(config, no_head, LENGTHS, range(4))
    time = model.training_pass(held)
    assert time.seconds == pytest.approx(3 * forward_flops(no_head, np.full(4, 8), 0) / 2 * 5 / 4, rel=0.01)
    assert time.bubble == pytest.approx([0.2, 0.2], abs=0.01)
    interleaved = make_config(pipeline=2, virtual_pipeline=2)
    time = PassModel(interleaved, no_head, NO_LINKS, PERFECT).training_pass(
        pack(interleaved, no_head, LENGTHS, range(4))
    )
    assert time.bubble == pytest.approx([1 / 9, 1 / 9], abs=0.01)  # (p - 1) / (v m + p - 1)


def test_ranks_that_share_devices_take_turns() -> None:
    """Two devices: of four data-parallel ranks two compute at once; of two stages with one microbatch one does."""
    gpu, shared = NO_LINKS, dataclasses.replace(NO_LINKS, num_shared=2)

    def ratio(config: Config) -> float:
        held = pack(config, SHAPE, LENGTHS, range(4))
        own, turns = (PassModel(config, SHAPE, device, PERFECT).training_pass(held).seconds for device in (gpu, shared))
        return turns / own

    assert ratio(make_config(data=4)) == pytest.approx(2, rel=0.03)  # the slowest rank has a little more than the mean
    assert ratio(make_config(tensor=4)) == pytest.approx(2)
    assert ratio(make_config(tensor=2)) == pytest.approx(1)
    assert ratio(make_config(budget=32, pipeline=2)) == 1
    assert 1 < ratio(make_config(budget=32, pipeline=2, tensor=4)) <= 2


def test_memory_adds_its_seconds() -> None:
    slow = dataclasses.replace(NO_LINKS, memory_bandwidth=2.0)
    half = PERFECT.with_values(elementwise=0.5)
    for parallel, elements in (
        ({}, 10 * 8 + 2 * 6 * 4 + 3 * 12),
        ({"tensor": 2}, 10 * 8 + (2 * 6 * 4 + 3 * 12) / 2),
        ({"tensor": 2, "sequence_parallel": True}, (10 * 8 + 2 * 6 * 4 + 3 * 12) / 2),
        ({"context": 2}, (10 * 8 + 2 * 6 * 4 + 3 * 12) / 2),
    ):
        config = make_config(**parallel)
        held = pack(config, SHAPE, LENGTHS, range(4))
        found = PassModel(config, SHAPE, slow, half).forward_pass(held).seconds
        assert found == pytest.approx(passes(config)[0] + 4 * 32 * elements * 2 / (2.0 * 0.5))


def test_links_add_their_seconds() -> None:
    config = make_config(tensor=2)
    slow = Gpu("slow", 1, 1.0, 1e30, 0.25, 0.25, 8, 0.0)
    held = pack(config, SHAPE, LENGTHS, range(4))
    hidden = 32 * 8 * 2  # bytes of all tokens
    forward = PassModel(config, SHAPE, slow, PERFECT).forward_pass(held).seconds
    assert forward == pytest.approx(passes(config)[0] + (4 * 2 + 1) * hidden / 0.25)


def test_ranks_wait_for_each_collective() -> None:
    config, late = make_config(tensor=2), PERFECT.with_values(collective_s=1000.0)
    held = pack(config, SHAPE, LENGTHS, range(4))
    num_microbatches = held.tokens.shape[1]
    model, free = (PassModel(config, SHAPE, NO_LINKS, at) for at in (late, PERFECT))
    waited = model.forward_pass(held).seconds - free.forward_pass(held).seconds
    assert waited == pytest.approx(num_microbatches * 1000 * (2 * 4 + 1))
    waited = model.training_pass(held).seconds - free.training_pass(held).seconds
    assert waited == pytest.approx(num_microbatches * 1000 * 2 * (2 * 4 + 1))


def test_an_update_moves_gradients_and_state() -> None:
    config = make_config(data=2)
    gpu = Gpu("slow", 1, 1.0, 10.0, 2.0, 2.0, 8, 0.0)
    weights = 4 * (8 * 48 + 3 * 8 * 12) + 2 * 64 * 8
    communication, optimizer = PassModel(config, SHAPE, gpu, PERFECT).update_s()
    assert communication == pytest.approx(0.5 * 6 * weights / 2.0)
    assert optimizer == pytest.approx((12 * weights + 28 * weights / 2) / 10.0)


def test_ranks_that_share_experts_meet_in_each_microbatch() -> None:
    shape = make_shape(num_experts=8, experts_per_token=2, moe_intermediate_size=6, norm_topk_prob=True, vocab_size=64)
    lengths = Lengths(np.array([1, 1, 1, 1]), np.array([8, 4, 8, 4]))
    alone, together = (
        PassModel(config, shape, NO_LINKS, PERFECT).forward_pass(pack(config, shape, lengths, range(4))).seconds
        for config in (make_config(data=2), make_config(data=2, expert=2))
    )
    assert together >= alone
