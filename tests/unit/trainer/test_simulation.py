"""Simulated steps: closed forms, conservation, staleness, determinism, and what is refused."""

import numpy as np
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.planner.engine_model import EngineModel
from fipo_megatron.planner.flops import elementwise_accesses
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.trainer.simulation import SimulationInputs, parse_inputs, simulate_steps
from tests.unit.planner.test_engine_model import DENSE, PERFECT

GPU = Gpu("toy", 10**6, 1e9, 1e7, 1e6, 1e5, 8, 1)
BASE = {
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "replicas": 2, "max_prompt_tokens": 50,
                "max_response_tokens": 200},
    "dynamic_sampling": {"generation_prompts": 16},
    "trainer": {"mini_batch_prompts": 4, "microbatch_tokens": 250},
    "parallel": {"data": 2, "pipeline": 2},
}  # fmt: skip


def config(**sections):
    return Config.model_validate({name: BASE.get(name, {}) | sections.get(name, {}) for name in {*BASE, *sections}})


def simulate(of=None, lengths=None, num_steps=1, efficiencies=PERFECT, **inputs):
    of, inputs = of or config(), SimulationInputs(**inputs)
    return list(simulate_steps(of, DENSE, lengths or inputs.lengths(of), GPU, efficiencies, inputs, num_steps))


def measure(of=None, **arguments):
    return [step.metrics(of or config()) for step in simulate(of, **arguments)]


def equal(response, prompt=10):
    return Lengths(np.array([prompt]), np.array([response]))


def test_equal_responses_leave_nobody_waiting():
    (metrics,) = measure(config(parallel={"pipeline": 1}), lengths=equal(100), acceptance_rate=1)
    for name in ("engines/tail", "cost/imbalance_frac", "idle/data_ranks", "bubble/stage_0"):
        assert metrics[name] == pytest.approx(0, abs=1e-12), name


def test_phases_by_hand():
    """16 prompts of 4 responses on two engines; 32 samples in 2 updates on two ranks."""
    exact = PERFECT.with_values(matmul=1, attention=1, head=1, elementwise=1, call_s=2)
    of = config(parallel={"pipeline": 1})
    (step,) = simulate(of, lengths=equal(100), efficiencies=exact, acceptance_rate=1, reward_s=5.0)
    engine = EngineModel(DENSE, GPU, PERFECT)
    own = engine.generate(
        np.full(32, 10), np.full(32, 100), max_concurrent=256, kv_capacity=10**6, samples_per_prompt=4
    )
    assert step.phases["rollout"] == pytest.approx(own.seconds + 5)
    # 109 positions of 1152 weights, 5995 pairs of 64 operations, 100 rows of 256 weights; 16 samples a rank
    sample = (109 * 2 * 1152 + 5995 * 64 + 100 * 2 * 256) / 1e9
    sample += 109 * DENSE.num_layers * 2 * sum(elementwise_accesses(DENSE)) / 1e7  # of memory, in bfloat16
    head = 100 * 2 * 256 / 1e9  # once more in the backward pass
    assert step.phases["old_logprobs"] == pytest.approx(16 * sample + 2)
    assert [update.seconds for update in step.updates] == pytest.approx([8 * (3 * sample + head)] * 2)
    updates = 2 * (8 * (3 * sample + head) + step.update_end_s + 2)
    assert step.phases["train"] == pytest.approx(updates + 16 * sample + 2)


def test_a_reference_policy_takes_a_pass_more():
    (without,) = simulate()
    (with_one,) = simulate(config(algorithm={"reference_kl_coef": 0.1}))
    assert with_one.phases["old_logprobs"] == pytest.approx(2 * without.phases["old_logprobs"])


def test_a_long_response_makes_the_other_engine_wait():
    """Two prompts on two engines: where one has the long ones, the other waits for the difference."""
    lengths = Lengths(np.array([10, 10]), np.array([50, 150]))
    of = config(rollout={"prompts_per_step": 2}, dynamic_sampling={"enabled": False}, trainer={"mini_batch_prompts": 2})
    tails = []
    for seed in range(8):
        seeded = of.model_copy(update={"seed": seed})
        (step,) = simulate(seeded, lengths, group_correlation=1)
        short, long = sorted(trace.seconds for trace in step.rollout.batches[0])
        tails.append(step.metrics(of)["engines/tail"])
        assert tails[-1] == pytest.approx(1 - (short + long) / 2 / long)
    assert max(tails) > 0.3
    assert min(tails) == 0  # both engines have long or short ones


def test_no_token_is_lost():
    of = config()
    for step in simulate(of, num_steps=4):
        metrics = step.metrics(of)
        traces = [trace for batch in step.rollout.batches for trace in batch]
        assert sum(len(trace.finish_s) for trace in traces) == metrics["rollout/generated_groups"] * 4
        assert len(step.rollout.groups) == 8
        trained = [sample for group in step.rollout.groups for sample in group.samples]
        positions = sum(len(s.prompt.token_ids) + len(s.response_ids) - 1 for s in trained)
        assert step.logprobs.plan.num_tokens == positions
        assert sum(update.plan.num_tokens for update in step.updates) == positions
        assert metrics["rollout/trained_tokens"] == sum(len(sample.response_ids) for sample in trained)
        assert metrics["time/step_s"] == pytest.approx(sum(step.phases.values()))


def test_groups_that_are_kept_are_a_version_old():
    """Each generation batch has twice the groups that a step needs, and all pass."""
    of = config()
    steps = measure(of, num_steps=4, acceptance_rate=1)
    assert [metrics["rollout/generated_groups"] for metrics in steps] == [16, 0, 16, 0]
    assert [metrics["rollout/stale_samples"] for metrics in steps] == [0, 32, 0, 32]
    assert [metrics["rollout/age_mean"] for metrics in steps] == [0, 1, 0, 1]
    assert [metrics["rollout/surplus_kept"] for metrics in steps] == [8, 0, 8, 0]
    assert steps[1]["time/rollout_s"] == 0
    assert "engines/tail" not in steps[1]


def test_groups_that_are_dropped_are_generated_for_nothing():
    dropping = config(dynamic_sampling={"surplus": "drop"})
    steps = measure(dropping, num_steps=2, acceptance_rate=1)
    assert [metrics["rollout/stale_samples"] for metrics in steps] == [0, 0]
    assert [metrics["rollout/surplus_dropped"] for metrics in steps] == [8, 16]


def test_the_acceptance_rate_is_that_of_generated_groups():
    (metrics,) = measure(
        config(rollout={"prompts_per_step": 200}, dynamic_sampling={"generation_prompts": 1000}), acceptance_rate=0.3
    )
    assert metrics["rollout/generated_groups_with_spread"] == pytest.approx(300, abs=40)


def test_too_few_groups_end_it_as_a_run():
    with pytest.raises(RuntimeError, match="max_generation_batches: 2 generation batches"):
        simulate(config(dynamic_sampling={"max_generation_batches": 2}), acceptance_rate=0.05)


def without_clock(steps):
    return [{k: v for k, v in metrics.items() if not k.startswith("planning/")} for metrics in steps]


def test_a_seed_gives_the_same_steps_and_another_others():
    first, again, other = (
        without_clock(measure(config().model_copy(update={"seed": seed}), num_steps=3)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_idle_shares_by_placement():
    """Engines and ranks of their own: what one side works, the other does not. Shared: the devices have both."""
    apart, shared = (measure(config(placement={"mode": mode}))[0] for mode in ("disaggregated", "colocated"))
    for metrics in (apart, shared):
        assert all(0 <= metrics[f"idle/{who}"] < 1 for who in ("trainer", "engines", "devices"))
    ranks, workers = 4, 2
    both = ranks * (1 - apart["idle/trainer"]) + workers * (1 - apart["idle/engines"])
    assert apart["idle/devices"] == pytest.approx(1 - both / (ranks + workers))
    assert shared["idle/devices"] < 1


def test_offloading_takes_time():
    of = config(trainer={"offload": True}, placement={"mode": "colocated"})
    (with_offload,), (without,) = simulate(of), simulate(config(placement={"mode": "colocated"}))
    assert all(with_offload.phases[phase] > without.phases[phase] for phase in without.phases)


def test_lengths_beyond_the_limits_are_refused():
    with pytest.raises(ValueError, match=r"rollout.max_response_tokens = 200: the lengths have one of 201"):
        simulate(lengths=equal(201))
    with pytest.raises(ValueError, match=r"rollout.max_prompt_tokens = 50: the lengths have one of 51"):
        simulate(lengths=equal(20, prompt=51))


def test_inputs_are_parsed():
    assert parse_inputs(["sigma=0.2", "reward_s=3"]) == SimulationInputs(sigma=0.2, reward_s=3)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("sigmas=1", "--input sigmas=1: not known; choose one of mean_response, sigma"),
        ("sigma", "--input sigma: must be NAME=VALUE, such as sigma=0.5"),
        ("sigma=wide", "--input sigma=wide: must be"),
        ("acceptance_rate=0", "acceptance_rate = 0: must be above 0"),
        ("acceptance_rate=nan", "acceptance_rate = nan"),
        ("group_correlation=-0.1", "group_correlation = -0.1"),
        ("reward_s=-1", "reward_s = -1"),
        ("reward_s=inf", "reward_s = inf"),
    ],
)
def test_wrong_inputs_are_named(setting, match):
    with pytest.raises(ValueError, match=match):
        parse_inputs([setting])
