"""The model of one vLLM worker of any layout, filled by vLLM's own loader, in one process without its peers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.reshard.engine_views import engine_views
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import make_plan


def wrong_views(folder: Path, layout: EngineLayout) -> dict[int, list[str]]:
    """By worker, the tensors of which its model does not hold what the plan says, where its views say.

    And the parameters of which vLLM fills and uses something that no view covers.
    """
    shape = read_model_shape(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(hf_tensor_shape(name, shape), generator=generator) + 1.0  # never zero
        for entry in make_entries(shape)
        for name in entry.hf_names
    }
    plan = make_plan(shape, TrainerLayout(), layout)
    wrong = {}
    for worker in range(layout.workers_per_replica):
        model = load_worker_model(folder, layout, worker, tensors)
        parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        stored = plan.stored(worker)
        views = engine_views(parameters, stored, torch.float32)
        wrong[worker] = [
            name for name, box in stored.items() if not torch.equal(_matrix(views[name]), box.of(tensors[name]))
        ]
        for view in views.values():
            view.zero_()
        unused = unused_parameters(worker // layout.tensor, layout.pipeline)
        wrong[worker] += [name for name, tensor in parameters.items() if name not in unused and tensor.count_nonzero()]
    return wrong


def unused_parameters(stage: int, num_stages: int) -> set[str]:
    """What vLLM's Qwen3-MoE loads on stages that do not use it."""
    names = set() if stage == 0 else {"model.embed_tokens.weight"}
    return names if stage == num_stages - 1 else names | {"model.norm.weight", "lm_head.weight"}


def load_worker_model(folder: Path, layout: EngineLayout, worker: int, tensors: dict[str, torch.Tensor]) -> Any:
    """vLLM's model of worker `worker` with its part of the Hugging Face tensors; the rest of its memory is zero."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=str(folder), dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()
    parallel = config.parallel_config
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size = layout.tensor, layout.pipeline
    parallel.enable_expert_parallel = layout.expert_parallel
    stage, rank = divmod(worker, layout.tensor)
    groups = {"_TP": (rank, layout.tensor), "_PP": (stage, layout.pipeline), "_EP": (rank, layout.tensor)}
    for name in ("_TP", "_PP", "_EP", "_DP", "_DCP", "_PCP"):
        setattr(parallel_state, name, _group(*groups.get(name, (0, 1))))
    with set_current_vllm_config(config), torch.no_grad():
        model = initialize_model(config)
        for parameter in model.parameters():
            parameter.zero_()
        model.load_weights(tensors.items())
    return model


def _group(rank: int, size: int) -> Any:
    """What a model asks of a process group while it is built and loaded."""
    return SimpleNamespace(
        rank_in_group=rank,
        world_size=size,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
        device_group=SimpleNamespace(rank=lambda: rank, size=lambda: size),
        cpu_group=None,
    )


def _matrix(view: torch.Tensor) -> torch.Tensor:
    return view if view.dim() == 2 else view[:, None]
