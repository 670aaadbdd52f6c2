"""The search proposes what the checks allow, what fits, and nothing slower before something faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fipo_megatron.config.checks import check_config, is_allowed
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.gpu import find_gpu
from fipo_megatron.planner.lengths import Lengths
from fipo_megatron.planner.memory import MemoryInputs
from fipo_megatron.planner.report import describe_settings, make_plan
from fipo_megatron.planner.search import Inputs, SearchResult, search
from fipo_megatron.planner.step_time import predict_step
from tests.unit.planner.shapes import EXPERTS, QWEN2_32B, make_config, make_shape


def inputs(architecture: str = "Qwen2ForCausalLM", **changes: Any) -> Inputs:
    config = make_config(
        rollout={
            "max_prompt_tokens": 512,
            "max_response_tokens": 3584,
            "prompts_per_step": 64,
            "samples_per_prompt": 8,
        },
        dynamic_sampling={"generation_prompts": 64},
        trainer={"mini_batch_prompts": 32},
    )
    shape = make_shape(architecture, **changes)
    lengths = Lengths.of_config(config)
    gpu = find_gpu("h100-80gb")
    return Inputs(
        config, shape, "here", gpu, "transformer_engine", MemoryInputs(), lengths, Efficiencies(), is_allowed, 0.5
    )


def found(given: Inputs, num_gpus: int) -> tuple[SearchResult, list[str]]:
    notes: list[str] = []
    return search(given, num_gpus, 3, notes.append), notes


def test_proposals_of_32b_on_two_nodes() -> None:
    given = inputs(**QWEN2_32B)
    result, notes = found(given, 16)
    assert result.num_allowed > result.num_fitting > 0
    assert len(result.proposals) == 3
    assert result.nearest is None
    assert notes[0].startswith("16 GPUs shared: ")
    times = [proposal.plan.time.step_s.expected for proposal in result.proposals if proposal.plan.time]
    assert times == sorted(times)
    for proposal in result.proposals:
        config = proposal.plan.config
        check_config(config)
        assert not proposal.plan.misfits
        own = 0 if config.placement.mode == "colocated" else config.rollout.replicas * config.rollout.tensor
        assert config.parallel.world_size + own == 16
        assert config.parallel.tensor <= 8
        assert "parallel." in describe_settings(proposal.settings)
    best = result.proposals[0].plan
    again = make_plan(best.config, given.shape, "here", given.gpu, given.kind, given.memory)
    assert again.stages == best.stages
    step = predict_step(best.config, given.shape, given.lengths, given.gpu)
    assert best.time is not None
    assert best.time.step_s == step.step_s


def test_none_fits() -> None:
    result, _ = found(inputs(**QWEN2_32B), 2)
    assert not result.proposals
    assert result.num_fitting == 0
    assert result.nearest is not None
    assert result.nearest.misfits


def test_experts_are_laid_out() -> None:
    result, _ = found(inputs("Qwen3MoeForCausalLM", **EXPERTS), 8)
    assert len(result.proposals) == 3
    for proposal in result.proposals:
        parallel = proposal.plan.config.parallel
        assert parallel.expert > 1 or parallel.expert_tensor == parallel.tensor


def test_no_engine_has_room() -> None:
    given = inputs(**QWEN2_32B)
    rollout = given.config.rollout.model_copy(update={"gpu_memory_utilization": 0.3})
    with pytest.raises(ValueError, match="--gpus 2: no engine has room for the model"):
        found(replace(given, config=given.config.model_copy(update={"rollout": rollout})), 2)


def test_what_is_proposed_leaves_headroom() -> None:
    given = replace(inputs(**QWEN2_32B), headroom=0.2)
    result, _ = found(given, 16)
    assert result.proposals
    for proposal in result.proposals:
        for stage in proposal.plan.stages:
            for phase in ("old_logprobs", "train", "sync"):
                assert stage.phases[phase].total <= 0.8 * given.gpu.memory_bytes
    assert found(replace(given, headroom=0.0), 16)[0].num_fitting > result.num_fitting


def test_no_layout_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"--gpus 2: no layout of the policy on 2, 1 of them divides"):
        found(replace(inputs(), is_allowed=lambda *_: False), 2)
