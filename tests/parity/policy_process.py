"""A policy rank in a process of its own, driven by a script of calls: what the parity tests start."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fipo_megatron.config.schema import Config
from tests.parity.forkserver import CONTEXT

TIMEOUT_S = 120


def run_policy(config: Config, calls: Sequence[tuple[str, tuple[Any, ...]]], **_: Any) -> list[list[Any]]:
    """Results `[call][rank]` of the calls `(method, arguments)`, made on every rank of a real policy over gloo.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback.
    """
    world_size = config.parallel.world_size
    ports, results = CONTEXT.Queue(), CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(target=_run_rank, args=(config, rank, list(calls), ports, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        replies: dict[int, Any] = {}
        while len(replies) < world_size:
            rank, values, error = results.get(timeout=TIMEOUT_S)
            if error:
                raise RuntimeError(f"rank {rank}: {error}")
            replies[rank] = values
        for process in ranks:
            process.join(TIMEOUT_S)
        return [[replies[rank][i] for rank in range(world_size)] for i in range(len(calls))]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _run_rank(config: Config, rank: int, calls: list[tuple[str, tuple[Any, ...]]], ports: Any, results: Any) -> None:
    import torch.distributed as dist

    from fipo_megatron.trainer.policy import MegatronPolicy

    try:
        policy = MegatronPolicy(config, rank)
        if rank == 0:
            for _ in range(config.parallel.world_size):
                ports.put(policy.port())
        policy.connect(ports.get(timeout=TIMEOUT_S))
        values = [getattr(policy, method)(*arguments) for method, arguments in calls]
        dist.destroy_process_group()
        results.put((rank, values, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def make_config(folder: Path | None = None, **sections: dict[str, Any]) -> Config:
    """A small float32 CPU config; `sections` override single settings."""
    base: dict[str, Any] = {
        "platform": "cpu",
        "model": {"path": str(folder) if folder else None, "dtype": "float32"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_prompt_tokens": 16, "max_response_tokens": 48},
        "trainer": {"mini_batch_prompts": 4, "microbatch_samples": 3, "max_policy_kl": 10.0},
        "timeouts": {"startup_s": 100, "call_s": 60, "collective_s": 60},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)
