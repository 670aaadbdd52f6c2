"""Process groups of the trainer: the only reader of Megatron's global parallel state."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from fipo_megatron.config.schema import ParallelConfig


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's groups. `data_context` spans data- and context-parallel ranks: the ranks that share gradients.

    Those of experts: `expert` shares them out, `expert_tensor` cuts each, `expert_data` shares their gradients.
    """

    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    expert_data: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank() == self.pipeline.size() - 1


def listening_socket(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on `address` alone; hold it until the store takes it, so nobody else can take the port.

    Raises:
        ValueError: the port is taken, or the address is not this machine's.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ValueError(
            f"cluster.master_port: {port} on {address} can't be used ({error.strerror}); use 0 for any free port"
        ) from error
    return sock


def make_store(
    address: str, port: int, num_clients: int, timeout_s: float, listener: socket.socket | None = None
) -> dist.TCPStore:
    """The key-value store of a rendezvous: its server where `listener` is given, else a client of it.

    Without a listener torch's server would accept connections on every interface, whatever address it is given.
    """
    return dist.TCPStore(
        address,
        port,
        num_clients,
        is_master=listener is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )


def initialize_groups(
    parallel: ParallelConfig, rank: int, store: dist.Store, backend: str, timeout_s: float
) -> ParallelGroups:
    """This rank's groups. Collective over all `parallel.world_size` ranks.

    A collective that a peer leaves waiting longer than `timeout_s` seconds raises.
    """
    from megatron.core import parallel_state

    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=parallel.world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # a timedelta's minutes
    )
    world = dist.group.WORLD
    assert world is not None
    return ParallelGroups(
        world=world,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
    )


@contextmanager
def simulated_groups(parallel: ParallelConfig, rank: int) -> Iterator[ParallelGroups]:
    """The groups that a rank of the layout would have, in a process by itself: sizes and ranks in them are right,
    collectives return without doing anything. Not beside real groups; leaving it leaves nothing behind."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, too

    try:
        yield initialize_groups(parallel, rank, FakeStore(), "fake", timeout_s=60)
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
