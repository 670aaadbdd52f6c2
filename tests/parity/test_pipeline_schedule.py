"""The order in which the planner's pipeline works is that of Megatron-Core."""

from types import SimpleNamespace

import pytest

from fipo_megatron.planner.pipeline import stage_order


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (2, 1, 5), (4, 1, 9), (2, 2, 4), (4, 2, 8), (4, 3, 4), (8, 2, 16)], ids=str
)
def test_warm_up_and_order_of_chunks_are_those_of_megatron(shape):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    stages, chunks, microbatches = shape
    for stage in range(stages):
        order = stage_order(stage, shape, with_backward=True)
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        communicator = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
        )
        total, _, num_warmup, _ = get_pp_rank_microbatches(microbatches, chunks, stages, p2p_communicator=communicator)
        forward = [(work.microbatch, work.chunk) for work in order if work.kind == "forward"]
        backward = [(work.microbatch, work.chunk) for work in order if work.kind == "backward"]
        table = get_schedule_table(microbatches, chunks, stages if chunks > 1 else microbatches)
        assert len(forward) == total
        assert forward == table
        assert backward == [(microbatch, chunks - 1 - chunk) for microbatch, chunk in table]
        first_backward = next(i for i, work in enumerate(order) if work.kind == "backward")
        # in the steady phase a forward pass goes before each backward pass
        assert first_backward == min(num_warmup + 1, total)
