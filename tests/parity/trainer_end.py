"""A trainer of one rank whose policy is a model of transformers: what engines are sent their weights by, in tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.checkpoint.hf_folder import write_hf_folder
from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.model.weight_map.entry import read_shard
from fipo_megatron.model.weight_map.families import make_entries
from fipo_megatron.parallel.groups import listening_socket
from fipo_megatron.reshard.connect import connect_sender
from fipo_megatron.reshard.layout import TrainerLayout, engine_layout
from fipo_megatron.reshard.session import TransportName, WeightSession
from fipo_megatron.rollout.hf import folder_weights


class Weights:
    """What of `PolicyWeights` a session uses."""

    def __init__(self, folder: Path, policy: torch.nn.Module) -> None:
        self.shape = read_model_shape(folder)
        self.take(policy)

    def take(self, policy: torch.nn.Module) -> None:
        """Hold this model's weights, in the memory of those before."""
        whole = {name: tensor.detach() for name, tensor in folder_weights(policy).items()}
        self.whole = whole
        cut = {
            entry.megatron_name: read_shard(entry, whole.__getitem__, self.shape, 0, 1)
            for entry in make_entries(self.shape)
        }
        if not hasattr(self, "parameters"):
            self.parameters = {name: tensor.clone() for name, tensor in cut.items()}
        for name, tensor in cut.items():
            self.parameters[name].copy_(tensor)

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `PolicyWeights.gather` on rank 0."""
        for entry in make_entries(self.shape):
            for name in entry.hf_names:
                yield name, self.whole[name]


class TrainerEnd:
    """Connects to an engine and pushes to it, in a thread while the engine takes its part."""

    def __init__(
        self, folder: Path, policy: torch.nn.Module, config: Config, transport: TransportName, sockets: Path
    ) -> None:
        self.weights, self._folder = Weights(folder, policy), folder
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._listener = listening_socket("127.0.0.1")
        self.session = WeightSession(
            shape=self.weights.shape,
            trainer=TrainerLayout(),
            engine=engine_layout(config.rollout),
            transport=transport,
            address="127.0.0.1",
            port=self._listener.getsockname()[1],
            folder=str(sockets),
            timeout_s=60.0,
            bucket_bytes=1 << 20,
            verify=True,
        )
        self.num_updates = 0

    def connect(self, engine: Any, replica: int = 0) -> None:
        """Both ends meet."""

        def meet() -> None:
            self.out = connect_sender(
                self.session,
                self.weights,  # type: ignore[arg-type]
                0,
                self._listener,
                torch.device("cpu"),
                lambda tensors, target: write_hf_folder(tensors, self._folder, target),
            )

        self._beside(meet, lambda: engine.call("connect_weights", self.session.to_info(replica)))

    def push(self, engine: Any, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Send a model's weights; what the engine says it took."""
        self.weights.take(policy)
        self.num_updates += 1
        return self._beside(
            lambda: self.out.send(version, self.num_updates),
            lambda: engine.call("update_weights", {"version": version}),
        )

    def _beside(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                ours()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            result = theirs()
        except BaseException as error:
            error.add_note(f"the trainer's end: {failures or 'still waits, or is done'}")
            raise  # the cause, most likely
        thread.join(60)
        if failures:
            raise failures[0]
        return result
