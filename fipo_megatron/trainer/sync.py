"""The policy's weights on their way to the engines: connect, push, verify, and begin anew when an engine fails."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.reshard.engine_views import ViewsRefusedError
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError
from fipo_megatron.reshard.layout import engine_layout, trainer_layout
from fipo_megatron.reshard.session import ON_DISK, TransportName, WeightSession
from fipo_megatron.rollout.client import EngineUpdateError
from fipo_megatron.trainer.actor import EngineClient, PolicyClient
from fipo_megatron.types import TransferCost

logger = logging.getLogger(__name__)

WRONG_WEIGHTS = (WeightMismatchError, StaleWeightsError)  # no other engine would have them any better


class WeightSync:
    """Between the policy's ranks and the engines. `restart` replaces the engine of a replica by a new one."""

    def __init__(
        self,
        config: Config,
        session: WeightSession,
        policy: PolicyClient,
        engines: list[EngineClient],
        restart: Callable[[int], EngineClient],
    ) -> None:
        self.config, self.session = config, session
        self._policy, self._engines, self._restart = policy, engines, restart
        self._is_connected = False

    async def sync(self, version: int) -> dict[str, float]:
        """Push the policy's weights to all engines, as `version`; what it took. Engines that failed are rebuilt, once.

        Raises:
            EngineUpdateError: a rebuilt engine failed, too; a WorkerError if it did not start.
            WeightMismatchError, StaleWeightsError: an engine does not hold what the policy is.
            WorkerError: a rank of the policy died or stalled.
        """
        try:
            return await self._sync(version)
        except EngineUpdateError as error:
            logger.warning("weight update %d failed (%s); the engine is rebuilt", version, error)
            for replica in error.replicas:
                self._engines[replica] = self._restart(replica)
            self._is_connected = False
            return await self._sync(version) | {"sync/rebuilt_engines": len(error.replicas)}

    async def _sync(self, version: int) -> dict[str, float]:
        if not self._is_connected:
            await self._connect()
        updates = [engine.update_weights({"version": version}) for engine in self._engines]
        costs, took = await self._both(self._policy.push_weights(version), updates)
        return self._metrics(costs, took)

    async def _connect(self) -> None:
        await asyncio.gather(*(engine.ready() for engine in self._engines))
        try:
            await asyncio.gather(
                *(engine.check_session(self.session.to_info(replica)) for replica, engine in enumerate(self._engines))
            )
        except ViewsRefusedError as error:
            if self.config.placement.mode == "colocated" and self.session.transport == "cuda_ipc":
                error.add_note("NCCL, for whole tensors, takes one process a device: set placement.mode=disaggregated")
                raise
            if self.config.sync.transport != "auto":
                raise
            logger.warning("an engine takes no shards (%s); it is sent whole tensors: sync.transport=broadcast", error)
            self.session = replace(self.session, transport="broadcast")
        address, port = await self._policy.listen_for_engines()
        self.session = replace(self.session, address=address, port=port)
        connecting = [
            engine.connect_weights(self.session.to_info(replica)) for replica, engine in enumerate(self._engines)
        ]
        await self._both(self._policy.connect_engines(self.session), connecting, concurrently=True)
        self._is_connected = True

    async def _both(
        self,
        policy_side: Awaitable[Any],
        engine_sides: Sequence[Coroutine[Any, Any, Any]],
        concurrently: bool | None = None,
    ) -> tuple[Any, list[Any]]:
        """What both ends return. Both are run to their end, well or not: neither may be left in the middle of it. Where
        weights are on disk, the engines begin when the policy has written them.

        Raises:
            EngineUpdateError: an engine failed, or is gone.
            Exception: what a rank of the policy raised, or the engine's refusal of wrong weights.
        """
        if concurrently is None:
            concurrently = self.session.transport not in ON_DISK
        sent: Any
        if concurrently:
            sent, *received = await asyncio.gather(policy_side, *engine_sides, return_exceptions=True)
        else:
            try:
                sent = await policy_side
            except BaseException:
                for side in engine_sides:  # not begun: what they would read is not there
                    side.close()
                raise
            received = await asyncio.gather(*engine_sides, return_exceptions=True)
        failures = {i: result for i, result in enumerate(received) if isinstance(result, BaseException)}
        for failure in failures.values():
            if isinstance(failure, WRONG_WEIGHTS):
                raise failure
        if isinstance(sent, BaseException) and not isinstance(sent, ConnectionError):
            raise sent
        if isinstance(sent, ConnectionError) and not failures:
            failures = dict.fromkeys(range(len(received)), sent)  # it can't be told whose end broke
        if failures:
            first = next(iter(failures.values()))
            raise EngineUpdateError(f"{type(first).__name__}: {first}", list(failures)) from first
        return sent, list(received)

    def _metrics(self, costs: Sequence[TransferCost], took: Sequence[dict[str, float]]) -> dict[str, float]:
        """Under `sync/`: gibibytes that were sent, by the least that any plan could send, and the slowest engine's
        seconds of receiving and verifying."""
        sent = sum(cost.sent_bytes for cost in costs)
        itemsize = torch.empty(0, dtype=getattr(torch, self.config.model.dtype)).element_size()
        least = self.session.make_plan().minimum_elements * itemsize
        metrics = {"sent_gib": sent / 2**30, "sent_over_minimum": sent / least}
        for key in {key for cost in took for key in cost}:
            metrics[key] = max(cost.get(key, 0.0) for cost in took)
        return {f"sync/{name}": value for name, value in metrics.items()}


def make_session(
    config: Config, model_folder: Path, on_cpu: bool, socket_folder: Path, run_folder: Path
) -> WeightSession:
    """The session that a configuration asks for; its address and port are known when the policy listens."""
    transport = pick_transport(config, on_cpu)
    folder = socket_folder
    if transport in ON_DISK:
        # Its own, also where runs share `sync.folder`: what is in it is the run's to remove.
        parent = Path(config.sync.folder) if config.sync.folder else run_folder
        folder = parent / f"weights-{run_folder.name}-{secrets.token_hex(4)}"
    return WeightSession(
        shape=read_model_shape(model_folder),
        trainer=trainer_layout(config.parallel),
        engine=engine_layout(config.rollout),
        transport=transport,
        address=config.cluster.address,
        port=0,
        folder=str(folder.absolute()),
        timeout_s=config.timeouts.collective_s,
        bucket_bytes=config.sync.bucket_mib << 20,
        verify=config.sync.verify,
    )


def pick_transport(config: Config, on_cpu: bool) -> TransportName:
    """The transport that `sync.transport` stands for."""
    if config.sync.transport != "auto":
        return config.sync.transport
    if config.cluster.ray_address is None and config.cluster.address.startswith("127."):
        if on_cpu:
            return "shared_memory"
        if config.placement.mode == "colocated":
            return "cuda_ipc"
    return "collective"
