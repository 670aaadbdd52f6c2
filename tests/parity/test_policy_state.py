"""A policy that was saved goes on as if it had not been: in its own layout bit for bit, in another within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fipo_megatron.algorithm.loss_metrics import loss_metrics
from fipo_megatron.config.schema import OptimizerConfig
from fipo_megatron.trainer.policy_processes import Call, run_policy
from fipo_megatron.trainer.tiny_models import VOCAB, write_model
from fipo_megatron.types import TrainingBatch
from tests.parity.policy_config import make_config

LR = 0.01
OPTIMIZER = OptimizerConfig(lr=LR, weight_decay=0.1, adam_eps=1e-3)
FIRST, SECOND = range(0, 4), range(4, 8)


def make_batch() -> TrainingBatch:
    rng = np.random.default_rng(0)
    prompt_lens, response_lens = rng.integers(1, 9, 8), np.array([1, 30, 17, 5, 22, 9, 13, 28])
    lens = prompt_lens + response_lens
    return TrainingBatch(
        token_ids=rng.integers(2, VOCAB, lens.sum()),
        cu_seqlens=np.concatenate([[0], np.cumsum(lens)]),
        prompt_lens=prompt_lens,
        advantages=rng.normal(size=8).astype(np.float32),
        old_logprobs=np.full(response_lens.sum(), -4.0, np.float32),
    )


BATCH = make_batch()


# ---------------------------------------------------------------- functions of a rank


def optimizer_tensors(policy: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Moments and main parameters under the names of the weight map, each of the parameter's local shape.

    Read from the optimizer itself, and summed over those that share a parameter out.
    """
    names = {parameter: name for name, parameter in policy.weights.parameters.items()}
    found: dict[str, dict[str, torch.Tensor]] = {"main": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for each in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        if each.is_stub_optimizer:
            continue
        for buffer in each.buffers:
            for parameter in buffer.param_index_map:
                held = parameter in each.model_param_gbuf_map
                if held:
                    group, place = each.model_param_group_index_map[parameter]
                    main = each.optimizer.param_groups[group]["params"][place]
                    tensors = {"main": main, **each.optimizer.state[main]}
                    part = each._get_model_param_range_map(parameter)["param"]
                for kind, of_kind in found.items():
                    whole = torch.zeros(parameter.numel())
                    if held:
                        whole[part.start : part.end] = tensors[kind].detach()
                    dist.all_reduce(whole.view(torch.int32), group=each.data_parallel_group)
                    of_kind[names[parameter]] = whole.view(parameter.shape)
    return found


def whole_optimizer(policy: Any) -> dict[str, dict[str, np.ndarray]]:
    """The same of the whole model, under Hugging Face's names: they travel as float32 weights would."""
    weights = {name: p.detach().clone() for name, p in policy.weights.parameters.items()}
    whole = {}
    for kind, tensors in optimizer_tensors(policy).items():
        policy._set_parameters(tensors)
        whole[kind] = {name: tensor.numpy().copy() for name, tensor in policy.weights.gather()}
    policy._set_parameters(weights)
    return whole


def step_tensors(policy: Any) -> tuple[list[float], int]:
    """Each parameter's count of steps, and how many tensors they are."""
    steps = [
        state["step"]
        for each in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
        if not each.is_stub_optimizer
        for state in each.optimizer.state.values()
    ]
    return [float(step) for step in steps], len({step.data_ptr() for step in steps})


def draw(policy: Any) -> list[float]:
    """Random numbers of torch's generator and of the one that Megatron keeps for tensor-parallel ranks."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        forked = torch.rand(3).tolist()
    return [*forked, *torch.rand(3).tolist()]


# ---------------------------------------------------------------- same layout


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_model(request.param, path)
    return path


def update(samples: range) -> Call:
    return ("update", (BATCH, samples, LR))


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("folder", "parallel", "dtype"),
    [
        ("qwen2_tied", {}, "float32"),
        ("llama3", {"tensor": 2}, "bfloat16"),
        ("qwen2", {"data": 2, "distributed_optimizer": False}, "bfloat16"),
        ("qwen2_tied", {"distributed_optimizer": False}, "float32"),
    ],
    indirect=["folder"],
)
def test_same_layout_goes_on_bit_for_bit(folder: Path, parallel: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    config = make_config(folder, parallel=parallel, model={"dtype": dtype})
    saved = tmp_path / "saved"
    saved.mkdir()
    calls: list[Call] = [
        ("load", (folder, OPTIMIZER)),
        update(FIRST),
        update(SECOND),
        ("offload", ()),
        ("begin_save", (saved,)),
        (draw, ()),
        update(FIRST),  # while files are written
        ("finish_save", ()),
        update(SECOND),
        ("export", (folder, tmp_path / "undisturbed")),
        ("load", (folder, OPTIMIZER)),
        ("offload", ()),
        ("load_state", (saved,)),
        (draw, ()),
        (step_tensors, ()),
        update(FIRST),
        update(SECOND),
        (step_tensors, ()),
        ("export", (folder, tmp_path / "resumed")),
    ]
    replies = run_policy(config, calls)
    names = sorted(name for of_rank in replies[7] for name in of_rank)
    assert names == sorted(path.name for path in saved.iterdir())
    for before, after in ((6, 15), (8, 16)):
        np.testing.assert_array_equal(replies[before][0].statistics, replies[after][0].statistics)
        assert replies[before][0].grad_norm == replies[after][0].grad_norm > 0
    for steps, num_tensors in replies[14]:
        assert set(steps) == {2.0}
        assert num_tensors == len(steps) > 1
    assert all(set(steps) == {4.0} for steps, _ in replies[17])
    assert replies[5] == replies[13]
    assert not any(replies[12])  # random generators went on
    undisturbed, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


# ---------------------------------------------------------------- another layout


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("folder", "before", "after"),
    [
        ("qwen2_tied", {"tensor": 2}, {"pipeline": 2}),
        ("qwen2", {"tensor": 2, "context": 2, "sequence_parallel": True}, {"data": 2}),
        ("llama3", {"data": 2}, {}),
        ("qwen3_moe", {"data": 2, "expert": 2}, {}),
        ("qwen3_moe", {}, {"data": 2, "expert": 2}),
    ],
    indirect=["folder"],
)
def test_another_layout_goes_on(folder: Path, before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    """Moments and main parameters bit for bit, the next loss within rounding."""
    saved = tmp_path / "saved"
    saved.mkdir()
    save: list[Call] = [
        ("load", (folder, OPTIMIZER)),
        update(FIRST),
        update(SECOND),
        ("begin_save", (saved,)),
        ("finish_save", ()),
        (whole_optimizer, ()),
        update(FIRST),
    ]
    *_, whole, next_update = run_policy(make_config(folder, parallel=before), save)
    resume: list[Call] = [
        ("load", (folder, OPTIMIZER)),
        ("load_state", (saved,)),
        (step_tensors, ()),
        (whole_optimizer, ()),
        update(FIRST),
        (step_tensors, ()),
    ]
    config = make_config(folder, parallel=after)
    _, reseeded, steps, loaded, resumed, later = run_policy(config, resume)
    assert all(reseeded)
    assert all(set(each) == {2.0} and count == len(each) for each, count in steps)
    assert all(set(each) == {3.0} for each, _ in later)
    for kind, tensors in whole[0].items():
        assert sorted(tensors) == sorted(loaded[0][kind])
        assert all(np.array_equal(loaded[0][kind][name], tensor) for name, tensor in tensors.items()), kind
        assert all(np.abs(tensor).max() > 0 for tensor in tensors.values())
    expected, found = (
        loss_metrics(torch.from_numpy(each[0].statistics), config.algorithm)["loss"] for each in (next_update, resumed)
    )
    assert found == pytest.approx(expected, rel=0, abs=1e-6)
    assert resumed[0].grad_norm == pytest.approx(next_update[0].grad_norm, rel=1e-5)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([("load_state", "empty")], "empty: no policy state, metadata.json is missing"),
        ([("finish_save",)], "no save has begun"),
        ([("begin_save", "state"), ("begin_save", "empty")], "another save has begun"),
        (
            [("begin_save", "state"), ("finish_save",), ("load", "other"), ("load_state", "state")],
            "is it of another one",
        ),
    ],
    ids=["no-state", "no-save", "two-saves", "another-model"],
)
def test_refusals(calls: list[tuple[str, ...]], message: str, tmp_path: Path) -> None:
    for name, family in (("model", "qwen2"), ("other", "llama3")):
        (tmp_path / name).mkdir()
        write_model(family, tmp_path / name)
    for name in ("empty", "state"):
        (tmp_path / name).mkdir()
    arguments = [("load", (tmp_path / "model", OPTIMIZER))] + [
        (method, tuple([tmp_path / folder for folder in folders] + [OPTIMIZER] * (method == "load")))
        for method, *folders in calls
    ]
    with pytest.raises(RuntimeError, match=message):
        run_policy(make_config(tmp_path / "model"), arguments)
