"""A policy that rests in host memory between its calls makes the very same updates."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.parallel.packed import merge_response_rows
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


@pytest.mark.multiproc
def test_offload_changes_no_bit_of_the_other_calls(tmp_path: Path) -> None:
    """Those of a warm start, of a run with a reference policy, and of an engine that is to receive the weights."""
    folder = tmp_path / "model"
    write_model("llama3", folder, MAX_PROMPT_TOKENS + max(RESPONSE_LENS))
    config = make_config(
        folder,
        model={"dtype": "bfloat16"},
        parallel={"pipeline": 2, "distributed_optimizer": False},
        rollout={"max_prompt_tokens": MAX_PROMPT_TOKENS, "max_response_tokens": max(RESPONSE_LENS)},
        trainer={"microbatch_tokens": 130},
        algorithm={"reference_kl_coef": 0.2},
    )
    batch = make_check_batch(transformers_logprobs(folder), RESPONSE_LENS, config.algorithm)
    batch = replace(batch, ref_logprobs=batch.old_logprobs)
    samples = range(batch.num_samples)
    calls: list[Call] = [
        ("logprobs", (batch,)),
        ("supervised_update", (batch, samples, OPTIMIZER.lr)),
        ("logprobs", (batch,)),
        ("describe_kernels", ()),
        ("ref_logprobs", (batch,)),
        ("logprobs", (batch,)),
        ("update", (batch, samples, OPTIMIZER.lr)),
        ("supervised_update", (batch, samples, OPTIMIZER.lr)),
    ]
    load: Call = ("load", (folder, OPTIMIZER))
    stayed = [load, *calls, ("export", (folder, tmp_path / "stayed"))]
    moved = [load, *chain.from_iterable((("offload", ()), call) for call in calls)]
    moved += [("offload", ()), ("export", (folder, tmp_path / "moved"))]
    replies = run_policy(config, stayed + moved)
    found, expected = replies[len(stayed) :][2:-1:2], replies[1 : 1 + len(calls)]

    for i in (0, 2, 4, 5):  # the last stage's log-probs
        found[i], expected[i] = (merge_response_rows(reply[-1]) for reply in (found[i], expected[i]))
        np.testing.assert_array_equal(found[i], expected[i])
    initial, trained, reference, still_trained = (found[i] for i in (0, 2, 4, 5))
    assert (trained != initial).any()
    np.testing.assert_array_equal(reference, initial)
    np.testing.assert_array_equal(still_trained, trained)
    assert found[1] == expected[1]
    assert found[7] == expected[7]
    assert found[7][0] < found[1][0]
    assert (found[6][0].statistics == expected[6][0].statistics).all()
    assert found[6][0].grad_norm == expected[6][0].grad_norm > 0

    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("stayed", "moved")}
    assert found[3] == expected[3]
    assert all(torch.equal(weights["moved"][name], tensor) for name, tensor in weights["stayed"].items())
