"""A step's phases: what they consist of, what they are in proportion to, and what a run of them costs."""

import numpy as np
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.flops import training_flops
from fipo_megatron.planner.gpu import find_gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.step_time import Estimate, StepTime, predict_step
from fipo_megatron.planner.sync_time import sync_traffic
from tests.unit.planner.test_flops import make_shape

SHAPE = make_shape(
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=32768,
    max_positions=4096,
)
H100 = find_gpu("h100-80gb")


def make_config(**changes: object) -> Config:
    values: dict[str, object] = {
        "parallel": {"tensor": 2, "pipeline": 2, "data": 2},
        "rollout": {
            "prompts_per_step": 32,
            "samples_per_prompt": 4,
            "max_prompt_tokens": 64,
            "max_response_tokens": 1024,
        },
        "dynamic_sampling": {"generation_prompts": 32, "surplus": "keep"},
        "trainer": {"mini_batch_prompts": 8, "steps": 100},
    }
    return Config.model_validate(values | changes)


def predict(config: Config, **inputs: float) -> StepTime:
    return predict_step(config, SHAPE, Lengths.of_config(config), H100, **inputs)  # type: ignore[arg-type]


def test_the_step_is_the_sum_of_its_phases() -> None:
    step = predict(make_config())
    assert list(step.phases) == ["rollout", "old_logprobs", "train", "sync"]
    assert step.step_s.expected == pytest.approx(sum(phase.expected for phase in step.phases.values()))
    assert step.phases["train"].expected == pytest.approx(sum(part.expected for part in step.parts.values()))
    for phase in step.phases.values():
        assert 0 < phase.low < phase.expected < phase.high
    assert step.one_step_off_s.expected == max(
        step.phases["rollout"].expected, step.step_s.expected - step.phases["rollout"].expected
    )


def test_given_efficiencies_leave_no_range() -> None:
    from fipo_megatron.planner.efficiency import efficiency_fields

    fixed = Efficiencies().with_values(**{f.name: f.default for f in efficiency_fields()})
    config = make_config()
    step = predict_step(config, SHAPE, Lengths.of_config(config), H100, fixed)
    assert step.step_s.low == step.step_s.expected == step.step_s.high


def test_generated_samples_are_counted_apart_from_trained_ones() -> None:
    step = predict(make_config(), acceptance_rate=0.25)
    assert (step.num_trained, step.num_generated) == (128, 512)
    other = predict(make_config(), acceptance_rate=0.5)
    assert step.phases["rollout"].expected == pytest.approx(2 * other.phases["rollout"].expected)
    assert step.phases["train"] == other.phases["train"]
    rewarded = predict(make_config(), acceptance_rate=0.5, reward_s=3.0)
    assert rewarded.phases["rollout"].expected == pytest.approx(other.phases["rollout"].expected + 3)


def test_what_the_run_takes() -> None:
    step = predict(make_config(rollout=dict(make_config().rollout.model_dump(), tensor=2, replicas=3)))
    assert step.num_gpus == 8 + 6
    hours = 100 * (step.step_s.expected + step.eval_s.expected) / 3600
    assert step.gpu_hours.expected == pytest.approx(14 * hours)
    assert step.cost.expected == pytest.approx(14 * hours * H100.price_per_hour)
    assert step.tokens_per_gpu_s.expected == pytest.approx(step.trained_tokens / step.step_s.expected / 14)
    assert step.tokens_per_gpu_s.low < step.tokens_per_gpu_s.high
    shared = make_config(placement={"mode": "colocated"}, trainer={"mini_batch_prompts": 8, "offload": True})
    assert predict(shared).num_gpus == 8


def test_utilisation_counts_nothing_twice() -> None:
    config = make_config()
    step = predict(config)
    drawn = Lengths.of_config(config).draw(128, 0)
    assert step.model_flops == training_flops(SHAPE, drawn.sequence - 1, int(drawn.response.sum()))
    updates = sum(step.parts[name].expected for name in ("passes", "gradients", "optimizer"))
    assert step.mfu.expected == pytest.approx(step.model_flops / updates / (8 * 989e12))
    again = make_config(trainer={"mini_batch_prompts": 8, "recompute": "full"})
    assert predict(again).model_flops == step.model_flops
    assert predict(again).mfu.expected < step.mfu.expected


def test_bytes_of_a_step() -> None:
    step = predict(make_config())
    assert step.communication["sync"] == sync_traffic(make_config(), SHAPE, Efficiencies()).total
    assert all(step.communication[kind] > 0 for kind in ("tp", "pp", "dp", "sync"))
    assert step.communication["cp"] == step.communication["ep"] == 0
    assert len(step.bubble) == 2


def test_offloading_takes_time_in_each_phase() -> None:
    trainer = {"mini_batch_prompts": 8}
    plain, away = (predict(make_config(trainer=trainer | {"offload": offload})) for offload in (False, True))
    for name in plain.phases:
        assert away.phases[name].expected > plain.phases[name].expected


def test_a_reference_policy_is_one_more_pass() -> None:
    plain, with_reference = predict(make_config()), predict(make_config(algorithm={"reference_kl_coef": 0.1}))
    assert with_reference.phases["old_logprobs"].expected == pytest.approx(2 * plain.phases["old_logprobs"].expected)


def test_long_sequences_count_by_their_squares() -> None:
    """Samples of equal mean take longer the more they differ: attention is by pairs, not by tokens."""
    config = make_config(parallel={}, rollout={**make_config().rollout.model_dump(), "max_response_tokens": 4000})
    equal = Lengths(np.full(2, 10), np.full(2, 2000))
    unequal = Lengths(np.full(2, 10), np.array([100, 3900]))
    assert unequal.sequence.mean() == equal.sequence.mean()
    slow, fast = (predict_step(config, SHAPE, lengths, H100).parts["passes"] for lengths in (unequal, equal))
    assert slow.expected > fast.expected


def test_an_acceptance_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"acceptance_rate = 0: must be above 0"):
        predict(make_config(), acceptance_rate=0)


def test_a_falling_function_turns_the_ends() -> None:
    assert Estimate(1.0, 2.0, 4.0).map(lambda s: 8 / s) == Estimate(2.0, 4.0, 8.0)
