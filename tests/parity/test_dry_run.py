"""What the dry run says of each rank, held against real ranks: parameters, and the bytes of buffers and optimizer."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.trainer.dry_run import check_ranks
from fipo_megatron.trainer.policy_processes import CONTEXT, run_policy
from fipo_megatron.trainer.tiny_models import write_model
from tests.parity.policy_config import make_config


def held(policy: Any) -> tuple[int, int, int, int]:
    """Parameters; bytes of weights, of gradient buffers, and of what the optimizer has and will have after a step."""
    parameters = policy.weights.parameters.values()
    buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    updated = [
        parameter
        for each in optimizers
        if not each.is_stub_optimizer
        for group in each.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert all(str(parameter.dtype) == "torch.float32" for parameter in updated)
    is_half = policy.config.model.dtype == "bfloat16"
    state = sum(parameter.numel() for parameter in updated) * (8 + 4 * is_half)
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
        state,
    )


@pytest.mark.parametrize(
    ("family", "parallel", "dtype"),
    [
        ("qwen2_tied", {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "bfloat16"),
        ("qwen2", {"context": 2, "data": 2}, "float32"),
        ("qwen3_moe", {"tensor": 2, "data": 2, "expert": 2, "sequence_parallel": True}, "bfloat16"),
        ("qwen3_moe", {"data": 2, "distributed_optimizer": False}, "bfloat16"),
    ],
)
def test_a_real_rank_holds_what_was_said(family: str, parallel: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    write_model(family, tmp_path)
    config = make_config(tmp_path, parallel=parallel, model={"dtype": dtype})
    _, ranks = run_policy(config, [("load", (tmp_path, OptimizerConfig())), (held, ())])
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        stages = pool.submit(check_ranks, config, read_model_shape(tmp_path)).result()
    for stage in stages:
        in_stage = [ranks[rank] for rank in stage.ranks]
        assert {number for number, *_ in in_stage} == {stage.num_parameters}
        assert {gradients for _, _, gradients, _ in in_stage} == {stage.gradient_bytes}
        mean = sum(state for *_, state in in_stage) / len(in_stage)  # the optimizer's shares differ a little
        assert mean == pytest.approx(stage.optimizer_bytes, rel=0.01)
