"""Trainer ranks and engine workers in processes of their own, that hold whole random models cut without the plan."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.parallel.groups import listening_socket
from fipo_megatron.reshard.execute import WeightReceiver, WeightSender
from fipo_megatron.reshard.layout import EngineLayout, TrainerLayout
from fipo_megatron.reshard.plan import ReshardPlan, make_plan
from fipo_megatron.reshard.transport.base import Transport, bucket_size
from fipo_megatron.reshard.transport.collective import CollectiveTransport
from fipo_megatron.reshard.transport.cuda_ipc import CudaIpcReceiver, CudaIpcSender
from fipo_megatron.reshard.transport.shared_memory import SharedMemoryReceiver, SharedMemorySender
from fipo_megatron.trainer.policy_processes import CONTEXT
from tests.unit.reshard.test_plan import cut_for_engine, cut_for_trainer

ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Case:
    """One set of processes: the trainer's ranks, then the engines' workers."""

    shape: ModelShape
    trainer: TrainerLayout
    engine: EngineLayout
    transport: str  # "shared_memory", "collective", or on one GPU "cuda_ipc"
    folder: Path
    dtype: torch.dtype = torch.bfloat16
    bucket_bytes: int = 1 << 12  # of a process
    min_direct_bytes: int | None = 1 << 8  # of the collective transport: low enough that small models have both ways
    verify: bool = True
    timeout_s: float = 30.0

    @property
    def num_processes(self) -> int:
        return self.trainer.world_size + self.engine.num_workers

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.transport == "cuda_ipc" else "cpu")

    def make_plan(self) -> ReshardPlan:
        return make_plan(self.shape, self.trainer, self.engine)


# What a process does: of the case, its number among the trainer's ranks or the workers, and what makes its transport.
Role = Callable[[Case, int, Callable[[], Transport]], Any]


def random_model(shape: ModelShape, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A whole model under its Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(hf_tensor_shape(name, shape), generator=generator).to(dtype)
        for entry in make_entries(shape)
        for name in entry.hf_names
    }


def make_sender(case: Case, source: int, transport: Transport, seed: int) -> tuple[WeightSender, dict[str, Any]]:
    """A sender of the rank's part of the model `seed`, and that part."""
    whole = random_model(case.shape, seed, case.dtype)
    parameters = cut_for_trainer(whole, case.shape, case.trainer)[source]
    parameters = {name: tensor.contiguous().clone().to(case.device) for name, tensor in parameters.items()}
    return WeightSender(case.make_plan(), source, parameters, transport, case.verify), parameters


def set_parameters(case: Case, source: int, parameters: dict[str, torch.Tensor], seed: int) -> None:
    """Change the parameters in place into those of the model `seed`."""
    new = cut_for_trainer(random_model(case.shape, seed, case.dtype), case.shape, case.trainer)[source]
    for name, tensor in parameters.items():
        tensor.copy_(new[name])


def make_views(case: Case, destination: int, plan: ReshardPlan) -> dict[str, torch.Tensor]:
    """What an engine's worker stores, filled with a number that no model has; rows of every second tensor strided."""
    views = {}
    for i, (name, box) in enumerate(plan.stored(destination).items()):
        dims = hf_tensor_shape(name, case.shape)
        if len(dims) == 1:
            views[name] = torch.full((box.rows,), 777.0, dtype=case.dtype, device=case.device)
        else:
            wide = torch.full((box.rows, box.columns + i % 2), 777.0, dtype=case.dtype, device=case.device)
            views[name] = wide[:, : box.columns]
    return views


def expected_views(case: Case, destination: int, seed: int) -> dict[str, torch.Tensor]:
    """What the worker has to store of the model `seed`, cut by torch.chunk."""
    whole = random_model(case.shape, seed, case.dtype)
    stored = case.make_plan().stored(destination)
    rank = destination % case.engine.workers_per_replica % case.engine.tensor
    return {name: cut_for_engine(whole[name], name, case.shape, case.engine, rank) for name in stored} | {
        name: whole[name][box.row : box.row + box.rows]
        for name, box in stored.items()
        if ".experts." in name and case.engine.expert_parallel
    }


def make_receiver(case: Case, destination: int, transport: Transport) -> tuple[WeightReceiver, dict[str, torch.Tensor]]:
    plan = case.make_plan()
    views = make_views(case, destination, plan)
    return WeightReceiver(plan, destination, views, transport, case.verify), views


def make_transport(case: Case, sends: bool, number: int, port: int, listener: socket.socket | None) -> Transport:
    plan = case.make_plan()
    peers = sorted(plan.sends(number) if sends else plan.receives(number))
    size = bucket_size(case.bucket_bytes, plan.max_peers)
    if case.transport == "shared_memory":
        kind = SharedMemorySender if sends else SharedMemoryReceiver
        return kind(case.folder, number, peers, size, case.timeout_s)
    if case.transport == "cuda_ipc":
        on_device = CudaIpcSender if sends else CudaIpcReceiver
        return on_device(case.folder, number, peers, size, case.timeout_s, case.device)
    transport = CollectiveTransport(
        ADDRESS,
        port,
        number=number,
        sends=sends,
        peers=peers,
        num_sources=case.trainer.world_size,
        num_destinations=case.engine.num_workers,
        bucket_bytes=size,
        timeout_s=case.timeout_s,
        device=torch.device("cpu"),
        listener=listener,
    )
    transport.min_direct_bytes = case.min_direct_bytes
    return transport


class WeightProcesses:
    """The processes of a case; `results` waits for what each role returned, or for what it raised."""

    def __init__(self, case: Case, trainer_role: Role, engine_role: Role) -> None:
        self.case = case
        self._replies, self._ports = CONTEXT.Queue(), CONTEXT.Queue()
        self.processes = [
            CONTEXT.Process(
                target=_run, args=(case, number, trainer_role, engine_role, self._ports, self._replies), daemon=True
            )
            for number in range(case.num_processes)
        ]
        for process in self.processes:
            process.start()

    def results(self, timeout_s: float = 60.0, without: Sequence[int] = ()) -> dict[int, Any]:
        """By process; those in `without` are not waited for. Ends all processes."""
        awaited, replies = set(range(self.case.num_processes)) - set(without), {}
        deadline = time.monotonic() + timeout_s
        try:
            while awaited - replies.keys():
                number, value = self._replies.get(timeout=max(0.1, deadline - time.monotonic()))
                replies[number] = value
        except queue.Empty:
            raise TimeoutError(f"processes {sorted(awaited - replies.keys())} did not answer") from None
        finally:
            for number, process in enumerate(self.processes):
                process.join(5 if number in replies else 0)
                if process.is_alive():
                    process.kill()
                process.join()
        return replies


def run_case(case: Case, trainer_role: Role, engine_role: Role) -> list[Any]:
    """What the roles return: trainer's ranks first. RuntimeError with the traceback of one that raised."""
    replies = WeightProcesses(case, trainer_role, engine_role).results()
    failures = [(number, value) for number, value in replies.items() if isinstance(value, Failure)]
    for number, value in sorted(failures, key=lambda item: item[1].kind == "ConnectionError"):  # mostly what follows
        raise RuntimeError(f"process {number}: {value.text}")
    return [replies[number] for number in range(case.num_processes)]


@dataclass(frozen=True)
class Failure:
    """What a role raised."""

    kind: str
    message: str
    text: str
    seconds: float  # on the clock of time.monotonic


def _run(case: Case, number: int, trainer_role: Role, engine_role: Role, ports: Any, replies: mp.Queue[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    num_sources = case.trainer.world_size
    sends = number < num_sources
    listener, port = None, 0
    if case.transport == "collective":
        if number == 0:
            listener = listening_socket(ADDRESS)
            for _ in range(case.num_processes - 1):
                ports.put(listener.getsockname()[1])
            port = listener.getsockname()[1]
        else:
            port = ports.get()
    own = number if sends else number - num_sources

    def connect() -> Transport:
        return make_transport(case, sends, own, port, listener)

    try:
        value = (trainer_role if sends else engine_role)(case, own, connect)
    except BaseException as error:
        value = Failure(type(error).__name__, str(error), traceback.format_exc(), time.monotonic())
    replies.put((number, value))
