"""The ranks of a policy in plain processes, without Ray, driven by a list of calls: for checks and tests."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fipo_megatron.config.schema import Config

CONTEXT = mp.get_context("forkserver")
# To look for devices by CUDA itself, as torch does at import, would forbid processes forked afterwards to use them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# What Megatron imports of torch, but not Megatron itself: it has to come after the patches of model/platform.py.
PRELOADED = ("fipo_megatron.trainer.policy", "torch.distributed.tensor", "torch._dynamo")
CONTEXT.set_forkserver_preload(list(PRELOADED))

# A method of MegatronPolicy by name, or a function of the policy; and the arguments.
Call = tuple[str | Callable[..., Any], tuple[Any, ...]]


def run_policy(config: Config, calls: Sequence[Call], timeout_s: float = 120) -> list[list[Any]]:
    """Results `[call][rank]` of calls made on every rank of a policy.

    Raises:
        RuntimeError: a rank failed, the message holds its traceback; or died; or none answered for `timeout_s`.
    """
    ports = CONTEXT.Queue()
    ranks: list[Any] = []
    replies: dict[Connection, int] = {}  # where each rank's will come from
    try:
        for rank in range(config.parallel.world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            arguments = (config, rank, list(calls), ports, sender, timeout_s)
            ranks.append(CONTEXT.Process(target=_run_rank, args=arguments, daemon=True))
            ranks[-1].start()
            sender.close()  # so that the rank's end is the only one: it closes when the rank dies
            replies[receiver] = rank
        values = _gather(replies, ranks, timeout_s)
        for process in ranks:
            process.join(timeout_s)
        return [[of_rank[i] for of_rank in values] for i in range(len(calls))]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _gather(replies: dict[Connection, int], ranks: list[Any], timeout_s: float) -> list[list[Any]]:
    """The values of every rank; a RuntimeError as soon as one has failed or died."""
    values: list[list[Any]] = [[] for _ in ranks]
    pending = dict(replies)
    while pending:
        ready = wait(list(pending), timeout_s)
        if not ready:
            raise RuntimeError(f"{len(pending)} ranks did not answer within {timeout_s:g} s")
        for receiver in [receiver for receiver in pending if receiver in ready]:
            rank = pending.pop(receiver)
            try:
                values[rank], error = receiver.recv()
            except EOFError:
                ranks[rank].join(timeout_s)
                code = ranks[rank].exitcode
                how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
                raise RuntimeError(f"rank {rank} died {how}") from None
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
    return values


def _run_rank(config: Config, rank: int, calls: list[Call], ports: Any, results: Connection, timeout_s: float) -> None:
    import torch

    from fipo_megatron.trainer.policy import MegatronPolicy

    try:
        if config.platform == "cuda":
            torch.cuda.set_device(rank)
        policy = MegatronPolicy(config, rank)
        if rank == 0:
            for _ in range(config.parallel.world_size):
                ports.put(policy.rendezvous())
        policy.connect(*ports.get(timeout=timeout_s))
        values = [_make_call(policy, method, arguments) for method, arguments in calls]
        policy.close()
        results.send((values, None))
    except BaseException:
        results.send((None, traceback.format_exc()))


def _make_call(policy: Any, method: str | Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return getattr(policy, method)(*arguments) if isinstance(method, str) else method(policy, *arguments)
