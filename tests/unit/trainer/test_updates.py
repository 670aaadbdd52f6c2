"""Which samples the updates of a step take, and at which learning rate."""

from __future__ import annotations

import numpy as np
import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.updates import cost_metrics, learning_rate, mini_batches
from fipo_megatron.types import PolicyUpdate, UpdateCost


def test_mini_batches_take_whole_groups_once_in_a_seeded_order() -> None:
    config = Config.model_validate(
        {"rollout": {"prompts_per_step": 6, "samples_per_prompt": 3}, "trainer": {"mini_batch_prompts": 2}, "seed": 4}
    )
    batches = mini_batches(config, 1)
    assert [len(batch) for batch in batches] == [6, 6, 6]
    assert sorted(sample for batch in batches for sample in batch) == list(range(18))
    for batch in batches:
        assert [batch[i : i + 3] for i in (0, 3)] == [list(range(first, first + 3)) for first in batch[::3]]
    assert mini_batches(config, 1) == batches
    assert mini_batches(config, 2) != batches
    assert mini_batches(config.model_copy(update={"seed": 5}), 1) != batches


@pytest.mark.parametrize(("warmup", "rates"), [(4, [0.05, 0.1, 0.15, 0.2, 0.2]), (0, [0.2] * 5)])
def test_the_learning_rate_rises_linearly_and_stays(warmup: int, rates: list[float]) -> None:
    config = Config.model_validate({"optimizer": {"lr": 0.2, "warmup_steps": warmup}})
    assert [learning_rate(config, step) for step in range(1, 6)] == pytest.approx(rates)


def test_costs_are_added_averaged_and_at_their_worst() -> None:
    costs = [UpdateCost(2, 0.01, 0.2, 0.05, 3 << 30), UpdateCost(3, 0.03, 0.4, 0.15, 2 << 30)]
    updates = [PolicyUpdate(np.zeros(0), grad_norm=1.0, cost=cost) for cost in (*costs, None)]
    expected = {"microbatches": 5, "packing_waste_frac": 0.02, "packing_unused_frac": 0.3, "imbalance_frac": 0.1}
    assert cost_metrics(updates) == pytest.approx(
        {f"cost/{name}": value for name, value in (expected | {"peak_memory_gib": 3.0}).items()}
    )
    assert cost_metrics(updates[2:]) == {}
