"""Ranks and layers against Megatron-Core's own numbering."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator

from fipo_megatron.config.schema import Config
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout, engine_layout, trainer_layout

ORDER = "tp-cp-ep-dp-pp"  # of initialize_model_parallel


@pytest.mark.parametrize(
    "layout",
    [
        TrainerLayout(),
        TrainerLayout(tensor=2, pipeline=2, context=2, data=3),
        TrainerLayout(tensor=4, pipeline=2, data=4, expert=4, expert_tensor=2),
        TrainerLayout(tensor=2, context=2, data=4, expert=8),
    ],
    ids=str,
)
def test_holders_are_megatrons(layout: TrainerLayout) -> None:
    dense = RankGenerator(
        tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order=ORDER, rank_offset=0
    )
    groups = {tuple(group) for group in dense.get_ranks("dp-cp")}
    ours = {
        tuple(layout.dense_holders(stage, shard)) for stage in range(layout.pipeline) for shard in range(layout.tensor)
    }
    assert ours == groups
    for group in dense.get_ranks("tp"):  # in shard order
        stage = group[0] // layout.ranks_per_stage
        assert all(rank in layout.dense_holders(stage, shard) for shard, rank in enumerate(group))
    assert {tuple(layout.dense_holders(stage, None)) for stage in range(layout.pipeline)} == {
        tuple(group) for group in dense.get_ranks("tp-cp-dp")
    }

    replicas = layout.ranks_per_stage // (layout.expert * layout.expert_tensor)
    experts = RankGenerator(
        tp=layout.expert_tensor, ep=layout.expert, dp=replicas, pp=layout.pipeline, cp=1, order=ORDER, rank_offset=0
    )
    ours = {
        tuple(layout.expert_holders(stage, expert, shard))
        for stage in range(layout.pipeline)
        for expert in range(layout.expert)
        for shard in range(layout.expert_tensor)
    }
    assert ours == {tuple(group) for group in experts.get_ranks("dp")}
    for group in experts.get_ranks("ep"):
        stage, shard = group[0] // layout.ranks_per_stage, group[0] % layout.expert_tensor
        assert all(rank in layout.expert_holders(stage, expert, shard) for expert, rank in enumerate(group))


def test_layers_of_the_trainers_stages() -> None:
    assert TrainerLayout(pipeline=2).layers_of_stage(8, 1) == [4, 5, 6, 7]
    assert TrainerLayout(pipeline=2, virtual_pipeline=2).layers_of_stage(8, 0) == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="num_layers = 7: must be a multiple of the 2 pipeline chunks"):
        TrainerLayout(pipeline=2).layers_of_stage(7, 0)


def test_experts_must_fit_a_stage() -> None:
    with pytest.raises(ValueError, match=r"parallel.expert \* parallel.expert_tensor = 4: must divide .* = 2"):
        TrainerLayout(data=2, expert=4)


@pytest.mark.parametrize(
    ("stages", "layers", "expected"),
    [
        (1, 5, [range(5)]),
        (2, 5, [range(3), range(3, 5)]),
        (3, 8, [range(3), range(3, 6), range(6, 8)]),
        (4, 9, [range(2), range(2, 4), range(4, 7), range(7, 9)]),
    ],
)
def test_layers_of_the_engines_stages(stages: int, layers: int, expected: list[range]) -> None:
    layout = EngineLayout(pipeline=stages)
    assert [layout.layers_of_stage(layers, stage) for stage in range(stages)] == expected


def test_experts_of_the_engines_workers() -> None:
    assert EngineLayout(tensor=4).experts_of_worker(6, 3) == range(6)
    shared = EngineLayout(tensor=4, expert_parallel=True)
    assert [shared.experts_of_worker(6, rank) for rank in range(4)] == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    assert EngineLayout(tensor=2, pipeline=3, replicas=4).num_workers == 24


def test_layouts_of_a_configuration() -> None:
    config = Config.model_validate(
        {
            "parallel": {"tensor": 2, "pipeline": 2, "context": 2, "data": 3, "expert": 4},
            "rollout": {"tensor": 4, "pipeline": 2, "replicas": 3, "expert_parallel": True},
        }
    )
    layout = trainer_layout(config.parallel)
    assert layout == TrainerLayout(tensor=2, pipeline=2, context=2, data=3, expert=4)
    assert layout.world_size == config.parallel.world_size
    assert engine_layout(config.rollout) == EngineLayout(4, 2, True, 3)
