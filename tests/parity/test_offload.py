"""A policy that rests in host memory between its calls makes the very same updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.trainer.layout_check import MAX_PROMPT_TOKENS, RESPONSE_LENS, make_check_batch, transformers_logprobs
from fipo_megatron.trainer.policy_processes import Call, run_policy
from fipo_megatron.trainer.tiny_models import write_model
from tests.parity.policy_config import make_config

OPTIMIZER = OptimizerConfig(lr=0.01)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("family", "dtype", "parallel"),
    [
        ("qwen2_tied", "float32", {"data": 2, "distributed_optimizer": False}),
        ("llama3", "bfloat16", {"pipeline": 2, "distributed_optimizer": False}),
        ("qwen3_moe", "bfloat16", {"data": 2, "expert": 2}),
    ],
)
def test_offload_changes_no_bit(family: str, dtype: str, parallel: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(family, folder, MAX_PROMPT_TOKENS + max(RESPONSE_LENS))
    config = make_config(
        folder,
        model={"dtype": dtype},
        parallel=parallel,
        rollout={"max_prompt_tokens": MAX_PROMPT_TOKENS, "max_response_tokens": max(RESPONSE_LENS)},
        trainer={"microbatch_tokens": 130},
    )
    batch = make_check_batch(transformers_logprobs(folder), RESPONSE_LENS, config.algorithm)
    samples = range(batch.num_samples)
    update: Call = ("update", (batch, samples, OPTIMIZER.lr))

    def steps(name: str, *rest: Call) -> list[Call]:
        return [
            ("load", (folder, OPTIMIZER)), *rest, ("logprobs", (batch,)), *rest, update, *rest, ("logprobs", (batch,)),
            update, *rest, ("export", (folder, tmp_path / name)),
        ]  # fmt: skip

    replies = run_policy(config, steps("stayed") + steps("moved", ("offload", ())))
    stayed, moved = (load_file(tmp_path / name / "model.safetensors") for name in ("stayed", "moved"))
    first_update, second_update = replies[2][0], replies[4][0]
    assert (replies[10][0].statistics == first_update.statistics).all()
    assert (replies[13][0].statistics == second_update.statistics).all()
    assert first_update.grad_norm > 0
    assert any(not torch.equal(moved[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())
    assert all(torch.equal(moved[name], tensor) for name, tensor in stayed.items())
