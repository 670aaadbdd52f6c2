"""What is refused before any kernel starts. The only values read from a device are the smallest and largest id."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIN_TEMPERATURE = 1e-6
ENTROPIES = ("none", "detached", "differentiable")

# (group, columns) whose ranks are known to hold equal shards
_equal_shards: set[tuple[str, int]] = set()


def check_options(temperature: float, entropy: str, impl: str, implementations: tuple[str, ...]) -> None:
    """ValueError for an option that means nothing."""
    if impl not in implementations:
        raise ValueError(f"impl={impl!r} is not known: use one of {', '.join(implementations)}")
    if entropy not in ENTROPIES:
        raise ValueError(f"entropy={entropy!r} is not known: use one of {', '.join(ENTROPIES)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} has no softmax: pass a number greater than 0")
    if temperature < MIN_TEMPERATURE:
        raise ValueError(f"temperature={temperature} would overflow: pass {MIN_TEMPERATURE:g} or more")


def check_targets(values: torch.Tensor, name: str, target_ids: torch.Tensor, true_vocab_size: int) -> None:
    """ValueError unless `values` is a floating-point matrix and `target_ids` has a valid id for each row of it."""
    if values.dim() != 2 or values.dtype not in DTYPES:
        raise ValueError(f"{name} is {values.dtype} {list(values.shape)}: pass a matrix of {_names(DTYPES)}")
    if target_ids.shape != values.shape[:1] or target_ids.dtype != torch.int64:
        raise ValueError(
            f"target_ids {list(target_ids.shape)} is {target_ids.dtype}, {name} {list(values.shape)}: "
            "pass one int64 id a row"
        )
    if target_ids.device != values.device:
        raise ValueError(f"target_ids is on {target_ids.device}, {name} on {values.device}: move one to the other's")
    if not target_ids.numel():
        return
    smallest, largest = (int(bound) for bound in torch.stack(target_ids.aminmax()).tolist())
    if not 0 <= smallest <= largest < true_vocab_size:
        raise ValueError(
            f"target_ids reach from {smallest} to {largest}, true_vocab_size is {true_vocab_size}: "
            "give masked positions a valid id too, e.g. 0"
        )


def check_shard(num_columns: int, vocab_start: int, tp_group: ProcessGroup | None, device: torch.device) -> None:
    """ValueError unless the ranks of `tp_group` hold equal shards, one behind the other.

    Collective the first time that a group comes with `num_columns`: a maximum of two numbers. Every rank must call.
    """
    size, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    if size > 1:
        _check_equal(num_columns, tp_group, device)
    if vocab_start != rank * num_columns:
        raise ValueError(
            f"vocab_start={vocab_start} is not shard {rank} of {size} with {num_columns} columns each: "
            f"pass rank * (V / tp), {rank * num_columns}"
        )


def _check_equal(num_columns: int, tp_group: ProcessGroup | None, device: torch.device) -> None:
    assert tp_group is not None
    key = (tp_group.group_name, num_columns)
    if key in _equal_shards:
        return
    bounds = torch.tensor([num_columns, -num_columns], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=tp_group)
    largest, smallest = int(bounds[0]), -int(bounds[1])
    if smallest != largest:
        raise ValueError(
            f"the vocabulary shards of {tp_group.size()} ranks have {smallest} to {largest} columns, here "
            f"{num_columns}: pad the vocabulary to a multiple of the ranks"
        )
    _equal_shards.add(key)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
