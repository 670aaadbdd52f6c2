"""Which samples the updates of a step take, and at which learning rate."""

from __future__ import annotations

import pytest

from fipo_megatron.config.schema import Config
from fipo_megatron.trainer.updates import learning_rate, mini_batches


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
