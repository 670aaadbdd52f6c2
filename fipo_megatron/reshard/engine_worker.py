"""The receiving end of a weight update, loaded inside vLLM's workers through `worker_extension_cls`.

Importing this module registers `fipo` as a backend of vLLM's weight-transfer API, and, on a CPU, has vLLM multiply by
its weights as they are: without packed copies an update in place is an update, and what is verified is what is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from fipo_megatron.reshard.connect import WeightsIn, connect_receiver
from fipo_megatron.reshard.engine_views import ViewsRefusedError, engine_views
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.reshard.vllm_patches import patch_vllm
from fipo_megatron.reshard.whole_tensors import WholeTensorsIn, connect_broadcast

BACKEND = "fipo"
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of logits, relative to the largest
# Whose kernels read expert weights as the checkpoint has them. Others shuffle them when the model is loaded.
PLAIN_EXPERT_BACKENDS = ("TRITON", "BATCHED_TRITON")


@dataclass
class SessionInfo(WeightTransferInitInfo):
    """A `WeightSession` as a dictionary, with the replica's number."""

    session: dict[str, Any]
    connect: bool  # False: find out whether the engine takes part, while nobody waits for it


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What comes: a version of the weights."""

    version: int


class FipoWeightTransferEngine(WeightTransferEngine[SessionInfo, UpdateInfo]):
    """Shards into the live parameters, by the session's plan, or whole tensors through the model's own loader."""

    init_info_cls = SessionInfo
    update_info_cls = UpdateInfo
    session: WeightSession
    weights: WeightsIn | None = None
    whole: WholeTensorsIn | None = None
    packed_experts: list[PackedExperts]
    report: dict[str, Any]  # of the last call: seconds, and why it was refused

    def init_transfer_engine(self, init_info: SessionInfo) -> None:
        self.report = {}
        with self._refusing():
            self._connect(init_info)

    def _connect(self, init_info: SessionInfo) -> None:
        self.session, replica = WeightSession.from_info(init_info.session)
        self.weights = self.whole = None
        self.packed_experts = []
        destination = replica * self.session.engine.workers_per_replica + self.parallel_config.rank
        if self.session.transport == "broadcast":
            if not init_info.connect:
                return
            group = connect_broadcast(self.session, 1 + destination)
            self.whole = WholeTensorsIn(self.session, group, self.model_config.dtype)
            return
        plan = self.session.make_plan()
        parameters = dict(self.model.named_parameters())
        self.packed_experts = find_packed_experts(self.model)
        for experts in self.packed_experts:
            parameters |= experts.unpacked
        views = engine_views(parameters, plan.stored(destination), self.model_config.dtype)
        if init_info.connect:
            self.weights = connect_receiver(self.session, plan, destination, views)

    def start_weight_update(self) -> None:
        if self.whole is not None:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator, which a CPU build of torch lacks.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.report = {}
        with self._refusing():
            self._receive(update_info)

    def _receive(self, update_info: UpdateInfo) -> None:
        start = time.perf_counter()
        if self.whole is not None:
            self.model.load_weights(self.whole.tensors(update_info.version))
        else:
            assert self.weights is not None, "init_transfer_engine comes first"
            self.weights.receive(update_info.version)
        self.report["receive_s"] = time.perf_counter() - start

    def finish_weight_update(self) -> None:
        if "refusal" not in self.report:
            with self._refusing():
                self._finish()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Reports a refusal instead of raising it: vLLM carries an exception's text to its caller, not its type."""
        try:
            yield
        except (ViewsRefusedError, WeightMismatchError, StaleWeightsError) as error:
            self.report["refusal"] = [type(error).__name__, str(error)]

    def _finish(self) -> None:
        if self.whole is not None:
            finalize_layerwise_reload(self.model, self.model_config)
            for experts in find_packed_experts(self.model):  # loaded, but not packed
                experts.take_loaded()
                experts.pack()
        start = time.perf_counter()
        receiver = self.weights or self.whole
        assert receiver is not None, "init_transfer_engine comes first"
        if self.session.verify:
            receiver.verify()
        for experts in self.packed_experts:
            experts.pack()
        if self.session.verify:
            check_head(self.model)
        self.report["verify_s"] = time.perf_counter() - start

    def shutdown(self) -> None:
        self.weights = self.whole = None


class PackedExperts:
    """The experts of a layer on a CPU: vLLM multiplies by a packed copy alone, so an unpacked one is kept beside it."""

    def __init__(self, name: str, layer: Any) -> None:
        self.layer = layer
        moe = layer.quant_method.moe
        num_experts, hidden = len(layer.w13_weight), moe.hidden_dim
        width = layer.intermediate_size_per_partition
        shapes = {"w13_weight": (num_experts, 2 * width, hidden), "w2_weight": (num_experts, hidden, width)}
        self.unpacked = {
            f"{name}.{kind}": torch.zeros(shape, dtype=moe.in_dtype, device=layer.w13_weight.device)
            for kind, shape in shapes.items()
        }

    def take_loaded(self) -> None:
        """Copy what the model's loader has put in the place of the packed weights."""
        for name, tensor in self.unpacked.items():
            tensor.copy_(getattr(self.layer, name.rsplit(".", 1)[-1]))

    def pack(self) -> None:
        """Make the packed copy anew; vLLM (0.32.0) does so when the model is loaded first, and never again."""
        for name, tensor in self.unpacked.items():
            kind = name.rsplit(".", 1)[-1]
            setattr(self.layer, kind, torch.nn.Parameter(tensor.clone(), requires_grad=False))
        self.layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(self.layer)


def find_packed_experts(model: torch.nn.Module) -> list[PackedExperts]:
    """Of every layer whose experts vLLM has packed, on a CPU.

    Raises:
        ViewsRefusedError: another kernel's layout, which can't be written in place.
    """
    packed = []
    for name, layer in model.named_modules():
        if not hasattr(layer, "w13_weight"):
            continue
        method: Any = layer.quant_method
        backend = getattr(getattr(method, "unquantized_backend", None), "name", "a quantised one")
        if backend == "CPU":
            packed.append(PackedExperts(name, layer))
        elif backend not in PLAIN_EXPERT_BACKENDS:
            raise ViewsRefusedError(f"{name}: its kernel ({backend}) stores experts in a layout of its own")
    return packed


@torch.no_grad()
def check_head(model: Any) -> None:
    """WeightMismatchError if the head's logits of a fixed vector are not those of the weights that it should have.

    A head with a packed or separate copy of its weights computes from what it was before the update.
    """
    tied = getattr(model.config, "tie_word_embeddings", False)
    for head in (module for module in model.modules() if isinstance(module, ParallelLMHead)):
        weight = model.model.embed_tokens.weight if tied else head.weight
        probe = torch.linspace(-1.0, 1.0, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
        logits = head.quant_method.apply(head, probe, bias=None).float()
        expected = torch.nn.functional.linear(probe, weight).float()
        difference = ((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
        if not difference <= HEAD_TOLERANCE[weight.dtype]:
            raise WeightMismatchError(
                f"the output head {'is not the embedding' if tied else 'uses other weights'}: its logits differ by "
                f"{difference:.2g} of the largest from those of the weights that were sent"
            )


class WorkerExtension:
    """Mixed into vLLM's worker."""

    def weight_update_report(self) -> dict[str, Any]:
        """Of the last call: seconds, `receive_s` and `verify_s`, and as `refusal` an exception's type and text."""
        return self.weight_transfer_engine.report  # type: ignore[attr-defined]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FipoWeightTransferEngine)
patch_vllm()
