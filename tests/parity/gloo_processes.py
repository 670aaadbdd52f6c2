"""Runs a function in several gloo processes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fipo_megatron.trainer.policy_processes import CONTEXT

TIMEOUT = timedelta(seconds=60)
RankFunction = Callable[[int, int, dist.ProcessGroup], Any]


def start_processes(function: RankFunction, size: int, folder: Path) -> list:
    """What `function(rank, size, group)` returns on each of `size` gloo ranks."""
    method = CONTEXT.get_start_method()
    mp.start_processes(run_rank, args=(function, size, folder), nprocs=size, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def run_rank(rank: int, function: RankFunction, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    assert dist.group.WORLD is not None
    torch.save(function(rank, size, dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()
