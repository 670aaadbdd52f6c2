"""The ranks of a policy in plain processes, without Ray, driven by a list of calls: for checks and tests."""

from __future__ import annotations

import multiprocessing as mp
import queue
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from fipo_megatron.config.schema import Config

CONTEXT = mp.get_context("forkserver")
# What Megatron imports of torch, but not Megatron itself: it has to come after the patches of model/platform.py.
PRELOADED = ("fipo_megatron.trainer.policy", "torch.distributed.tensor", "torch._dynamo")
CONTEXT.set_forkserver_preload(list(PRELOADED))

# A method of MegatronPolicy by name, or a function of the policy; and the arguments.
Call = tuple[str | Callable[..., Any], tuple[Any, ...]]


def run_policy(config: Config, calls: Sequence[Call], timeout_s: float = 120) -> list[list[Any]]:
    """Results `[call][rank]` of calls made on every rank of a policy.

    Raises:
        RuntimeError: a rank failed, the message holds its traceback; or they were not done within `timeout_s`.
    """
    world_size = config.parallel.world_size
    ports, results = CONTEXT.Queue(), CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(target=_run_rank, args=(config, rank, list(calls), ports, results, timeout_s), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        replies: dict[int, Any] = {}
        while len(replies) < world_size:
            try:
                rank, values, error = results.get(timeout=timeout_s)
            except queue.Empty:
                raise RuntimeError(f"{world_size - len(replies)} ranks did not answer within {timeout_s:g} s") from None
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
            replies[rank] = values
        for process in ranks:
            process.join(timeout_s)
        return [[replies[rank][i] for rank in range(world_size)] for i in range(len(calls))]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _run_rank(config: Config, rank: int, calls: list[Call], ports: Any, results: Any, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    from fipo_megatron.trainer.policy import MegatronPolicy

    try:
        if config.platform == "cuda":
            torch.cuda.set_device(rank)
        policy = MegatronPolicy(config, rank)
        if rank == 0:
            for _ in range(config.parallel.world_size):
                ports.put(policy.port())
        policy.connect(ports.get(timeout=timeout_s))
        values = [_make_call(policy, method, arguments) for method, arguments in calls]
        dist.destroy_process_group()
        results.put((rank, values, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _make_call(policy: Any, method: str | Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return getattr(policy, method)(*arguments) if isinstance(method, str) else method(policy, *arguments)
