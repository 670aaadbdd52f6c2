"""Phases of a step, against sums made by hand and properties that must hold."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fipo_megatron.planner.activations import kept_by_layer, layer_sizes
from fipo_megatron.planner.memory import (
    GIB,
    MemoryInputs,
    Microbatches,
    StageMemory,
    engine_weight_bytes,
    in_flight,
    largest_microbatches,
    predict_machine,
    predict_memory,
)
from fipo_megatron.planner.parameters import count_model, count_parameters
from tests.unit.planner.shapes import QWEN2_32B, make_config, make_shape

NOTHING = MemoryInputs(0, 0, 0, 0, 1)
ROLLOUT = {"max_prompt_tokens": 512, "max_response_tokens": 3584}


def stages(parallel: dict[str, Any], inputs: MemoryInputs = NOTHING, **sections: Any) -> list[StageMemory]:
    config = make_config(parallel, rollout=ROLLOUT | sections.pop("rollout", {}), **sections)
    return predict_memory(config, make_shape(**QWEN2_32B), "transformer_engine", inputs, device_bytes=80 * GIB)


@pytest.mark.parametrize(
    ("pipeline", "chunks", "microbatches", "expected"),
    [
        (1, None, 8, [(1, 1)]),
        (4, None, 8, [(4, 1), (3, 1), (2, 1), (1, 1)]),
        (4, None, 2, [(2, 1), (2, 1), (2, 1), (1, 1)]),
        # 2 (pp - stage - 1) + (vpp - 1) pp in warm-up, and one more; each of half a stage's layers
        (4, 2, 8, [(11, 2), (9, 2), (7, 2), (5, 2)]),
        (2, 2, 2, [(4, 2), (3, 2)]),
    ],
)
def test_microbatches_in_flight(
    pipeline: int, chunks: int | None, microbatches: int, expected: list[tuple[int, int]]
) -> None:
    config = make_config({"pipeline": pipeline, "virtual_pipeline": chunks})
    assert [in_flight(config, stage, microbatches) for stage in range(pipeline)] == expected


def test_activations_of_a_stage() -> None:
    parallel = {"tensor": 8, "pipeline": 2, "sequence_parallel": True}
    first, last = stages(parallel)
    sizes = layer_sizes(
        "transformer_engine", "bfloat16", make_config(parallel).parallel, make_shape(**QWEN2_32B), 4096, 4096, 1
    )
    kept = 32 * kept_by_layer(sizes, "none")
    assert first.phases["train"].items["activations"] == 2 * kept
    assert last.phases["train"].items["activations"] == kept
    # In units of s b h / t: norms, masks, attention, log-sums of 40 heads, MLP
    by_hand = 8 + 2 + 2 * (3 + 3 / 5) + 4 * 40 / 5120 + 6 * 27648 / 5120
    assert kept / (32 * 4096 * 5120 / 8) == pytest.approx(by_hand)


def test_state_of_32b() -> None:
    """16 bytes a parameter but for the optimizer's 12, shared out over 8: what a trainer of bfloat16 has."""
    train = stages({"tensor": 8, "pipeline": 2, "data": 8, "sequence_parallel": True})[0].phases["train"].items
    parameters = count_parameters(
        make_config({"tensor": 8, "pipeline": 2}).parallel, make_shape(**QWEN2_32B), "bfloat16"
    )
    number = parameters[0].num_parameters
    assert number == pytest.approx(32.76e9 / 16, rel=0.01)
    assert train["weights"] == pytest.approx(2 * number, rel=1e-4)
    assert train["gradients"] == pytest.approx(4 * number, rel=1e-4)
    assert train["optimizer"] == pytest.approx(12 * number / 8, rel=1e-4)


def test_full_recomputation_keeps_inputs_and_one_layer() -> None:
    parallel = {"tensor": 8, "pipeline": 2, "sequence_parallel": True}
    none, full = (stages(parallel, trainer={"recompute": kind})[0].phases["train"] for kind in ("none", "full"))
    assert full.items["activations"] == 2 * 32 * 4096 / 8 * 5120 * 2
    assert full.total < none.total
    assert full.items["one layer at work"] - none.items["one layer at work"] == none.items["activations"] / (2 * 32)


def test_recomputed_scores_are_at_work_once_more() -> None:
    """Of 8 query and 2 key-value heads in each of four layers; the last of 4096 tokens is a target alone."""
    shape, matrix = make_shape(num_attention_heads=8, num_key_value_heads=2), 8 * 4095**2 * 4
    work = {}
    for recompute in ("none", "selective"):
        config = make_config(dtype="float32", rollout=ROLLOUT, trainer={"recompute": recompute})
        (stage,) = predict_memory(config, shape, "local_cuda", NOTHING)
        work[recompute] = stage.phases["train"].items
    assert work["none"]["activations"] - work["selective"]["activations"] == 4 * (matrix + 4 * 8 * 4095)
    assert work["selective"]["one layer at work"] - work["none"]["one layer at work"] == matrix


def test_offload_brings_back_what_a_phase_needs() -> None:
    parallel = {"tensor": 8, "sequence_parallel": True}
    (away,) = stages(parallel, trainer={"offload": True})
    (here,) = stages(parallel)
    assert {"weights", "gradients", "optimizer"} <= here.phases["old_logprobs"].items.keys()
    assert "gradients" not in away.phases["old_logprobs"].items
    assert "weights" not in away.phases["rollout"].items
    assert {"weights", "gradients", "optimizer"} <= away.phases["train"].items.keys()
    one_update = {"mini_batch_prompts": 512}  # no optimizer's state before its step
    (single,) = stages(parallel, trainer={"offload": True, **one_update})
    assert single.phases["train"].total <= away.phases["train"].total
    assert away.host_bytes > here.host_bytes


def test_an_engine_on_the_same_device() -> None:
    sections: dict[str, Any] = {
        "placement": {"mode": "colocated"},
        "trainer": {"offload": True},
        "rollout": {"tensor": 4, "replicas": 2, "gpu_memory_utilization": 0.8},
    }
    (stage,) = stages({"tensor": 8, "sequence_parallel": True}, **sections)
    config = make_config({"tensor": 8}, **sections)
    weights = engine_weight_bytes(config, make_shape(**QWEN2_32B))
    assert weights == pytest.approx(2 * 32.76e9 / 4, rel=1e-3)
    assert stage.phases["rollout"].total == pytest.approx(0.8 * 80 * GIB)
    assert stage.phases["sync"].items["engine weights"] == weights
    assert "engine weights" not in stage.phases["train"].items


def test_inputs_are_added() -> None:
    parallel = {"tensor": 8, "sequence_parallel": True}
    (bare,) = stages(parallel)
    (held,) = stages(parallel, MemoryInputs(1, 2, 0.1, 5, 1))
    needed = bare.phases["train"].total
    assert held.phases["train"].total == pytest.approx(1.1 * needed + 3 * GIB)
    with pytest.raises(ValueError, match="--memory reserve=1: not known; choose one of communication_gib, context_gib"):
        MemoryInputs().with_values(reserve=1)
    with pytest.raises(ValueError, match="expert_load=0.5: must be 1 or more"):
        MemoryInputs().with_values(expert_load=0.5)
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="must be 0 or more"):
            MemoryInputs().with_values(context_gib=value)


def test_the_page_has_the_inputs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "planner.md").read_text()
    for each in fields(MemoryInputs):
        assert f"| `{each.name}` | {each.default:g} | " in page


def test_the_largest_microbatches() -> None:
    config = make_config({"data": 4, "context": 2, "tensor": 2, "sequence_parallel": True}, rollout=ROLLOUT)
    found = largest_microbatches(config)
    # 64 prompts x 16 samples of 4096 tokens over 4 ranks, one a microbatch; half of each on a context-parallel rank
    assert found == Microbatches(256, 2048, 2048, 4096, 256 * 2048, 8)
    more = make_config({"data": 4}, rollout=ROLLOUT, trainer={"microbatch_tokens": 10000})
    assert largest_microbatches(more).number == 128


def test_more_ranks_never_need_more() -> None:
    def most(**parallel: Any) -> float:
        return max(
            stage.peak.total for stage in stages({"sequence_parallel": parallel.get("tensor", 1) > 1, **parallel})
        )

    assert most(tensor=8) < most(tensor=4) < most(tensor=2) < most()
    assert most(pipeline=4) < most(pipeline=2) < most()
    assert most(data=8) < most()
    assert most(context=4, data=2) < most(data=2)


def test_logits_take_what_the_vocabulary_does() -> None:
    blocks, whole = (
        stages({"tensor": 8, "sequence_parallel": True}, kernels={"logprob_from": kind})[0].phases["train"]
        for kind in ("hidden_states", "logits")
    )
    assert whole.name.startswith("the head")
    gradient = 4096 * 5120 * 2
    assert whole.items["head"] == 4096 * 152064 / 8 * (2 + 2) + gradient
    workspace = blocks.items["head"] - 4096 * 5120 * 4 - gradient
    assert 200 < workspace / (1 << 20) < 260  # kernels.workspace_mib, and what is known of each row and block


def test_a_given_batch() -> None:
    config = make_config({"tensor": 8, "sequence_parallel": True}, rollout=ROLLOUT)
    few = Microbatches(number=1, tokens=1024, rows=512, longest=1024, total_tokens=1024)
    arguments = (config, make_shape(**QWEN2_32B), "transformer_engine", NOTHING)
    (small,) = predict_memory(*arguments, few)
    (more,) = predict_memory(*arguments, replace(few, number=9, total_tokens=9 * 1024))
    batch = more.phases["train"].items["batch"]
    assert batch == 9 * small.phases["train"].items["batch"] == 9 * (1024 * 16 + 512 * 37)
    assert more.phases["old_logprobs"].items["batch"] == 2 * batch  # of both mini-batches of the step


def test_one_machine_holds_all_ranks_and_engines() -> None:
    """Two stages of two ranks, and three engines of one worker: weights of the model and 2 GiB of cache each."""
    config = make_config(
        {"pipeline": 2, "data": 2},
        "float32",
        platform="cpu",
        rollout=ROLLOUT | {"replicas": 3, "kv_cache_gib": 2},
        checkpoint={"every_steps": 5},
    )
    shape = make_shape()
    held = predict_memory(config, shape, "local_cpu", NOTHING)
    machine = predict_machine(config, shape, held)
    engines = 3 * (4 * count_model(shape) + 2 * GIB)
    for phase in ("rollout", "train"):
        ranks = sum(2 * (stage.phases[phase].total + stage.host_bytes) for stage in held)
        assert machine[phase].total == pytest.approx(ranks + engines)
    assert held[0].host_bytes > 0
    weights = sum(2 * stage.phases["train"].items["weights"] for stage in held)
    assert machine["train"].items["weights"] == weights
    slow = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "hf"})})
    assert predict_machine(slow, shape, held)["train"].total == pytest.approx(machine["train"].total - 6 * GIB)
