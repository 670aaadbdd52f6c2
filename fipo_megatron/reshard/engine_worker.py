"""The receiving end of a weight update, loaded inside vLLM's workers through `worker_extension_cls`.

Importing this module registers `fipo_collective` as a backend of vLLM's weight-transfer API.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from fipo_megatron.reshard.transport.broadcast import BroadcastGroup, TensorMeta

BACKEND = "fipo_collective"


@dataclass
class CollectiveInitInfo(WeightTransferInitInfo):
    """How a worker finds the trainer."""

    address: str
    port: int
    first_rank: int  # of this engine's workers in the group
    size: int
    timeout_s: float


@dataclass
class CollectiveUpdateInfo(WeightTransferUpdateInfo):
    """The tensors that follow, `(name, shape, dtype)` each."""

    tensors: list[Any]


class CollectiveWeightTransferEngine(WeightTransferEngine[CollectiveInitInfo, CollectiveUpdateInfo]):
    """Full tensors, broadcast by the trainer, through the model's own loader, layer by layer."""

    init_info_cls = CollectiveInitInfo
    update_info_cls = CollectiveUpdateInfo
    group: BroadcastGroup | None = None

    def init_transfer_engine(self, init_info: CollectiveInitInfo) -> None:
        rank = init_info.first_rank + self.parallel_config.rank
        self.group = BroadcastGroup(init_info.address, init_info.port, rank, init_info.size, init_info.timeout_s)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator, which a CPU build of torch lacks.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: CollectiveUpdateInfo) -> None:
        assert self.group is not None, "init_transfer_engine comes first"
        metas = [TensorMeta(name, tuple(shape), dtype) for name, shape, dtype in update_info.tensors]
        self.model.load_weights(self.group.receive(metas))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        self.group = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """Rebuild the prepacked copy that vLLM's CPU build (0.32.0) keeps of a tied output head.

    Its layerwise reload does not, so logits would silently stay those of the old weights.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Mixed into vLLM's worker. Empty: importing this module has registered the backend."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, CollectiveWeightTransferEngine)
