"""The one place that decides between CPU and CUDA: device, backend, fusions, layer spec, and what torch must be told.

Megatron-Core assumes CUDA. On a CPU a few torch functions are replaced, in this process only, by ones that answer for
the CPU: each patch is listed with the layouts that need it, and nothing else is touched. On CUDA torch is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from packaging.version import Version

from fipo_megatron.config.schema import ParallelConfig
from fipo_megatron.model.hf_config import ModelShape

# Tested with the patches below; another version may need other ones, so it is refused rather than tried.
CPU_TESTED_VERSIONS = {"megatron-core": ("0.16.1", "0.20"), "torch": ("2.13", "2.14")}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Platform:
    """Where the policy's processes run."""

    name: Literal["cpu", "cuda"]

    @property
    def device(self) -> torch.device:
        return CPU if self.name == "cpu" else torch.device("cuda", torch.cuda.current_device())

    @property
    def backend(self) -> str:
        """The torch.distributed backend of all trainer groups."""
        return "gloo" if self.name == "cpu" else "nccl"

    @property
    def has_transformer_engine(self) -> bool:
        return self.name == "cuda" and importlib.util.find_spec("transformer_engine") is not None

    def reset_peak_memory(self) -> None:
        """Begin to measure `peak_memory_bytes` anew."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(PermissionError):  # in some containers: then it is the peak of the process's life
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory_bytes(self) -> int:
        """The most memory that this process has had: its tensors on a device, on a CPU all of it."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated()
        return peak_resident_bytes()

    def fusion_flags(self) -> dict[str, bool]:
        """Megatron's fusion settings: all off without Transformer Engine, whose or apex's kernels they call."""
        fused = self.has_transformer_engine
        return {
            "bias_activation_fusion": fused,
            "bias_dropout_fusion": fused,
            "masked_softmax_fusion": False,
            "persist_layer_norm": fused,
            "gradient_accumulation_fusion": False,
            "apply_rope_fusion": fused,
            "cross_entropy_loss_fusion": False,
        }

    def block_spec(self, num_layers: int, shape: ModelShape) -> Any:
        """Megatron's layer spec for one pipeline stage of `num_layers` layers."""
        from megatron.core.models.gpt import gpt_layer_specs
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

        kind = {"num_experts": shape.num_experts or None, "qk_layernorm": shape.qk_norm}
        if self.has_transformer_engine:
            from megatron.core.extensions.transformer_engine import TENorm

            spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
                moe_grouped_gemm=bool(shape.num_experts), **kind
            )
            return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=TENorm)
        from fipo_megatron.model.local_layers import LocalAttention, LocalRMSNorm

        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", **kind)
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = LocalAttention
        if shape.qk_norm:
            attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
        spec.submodules.input_layernorm = LocalRMSNorm
        spec.submodules.pre_mlp_layernorm = LocalRMSNorm
        return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=LocalRMSNorm)


def peak_resident_bytes(process: int | str = "self") -> int:
    """The most host memory that a process of this machine has had, since `reset_peak_memory` if it asked for that."""
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(kib) << 10


def resolve_platform(setting: Literal["auto", "cpu", "cuda"]) -> Platform:
    """The platform of this process.

    Raises:
        ValueError: `cuda` was asked for and torch sees no CUDA device.
    """
    if setting == "auto":
        return Platform("cuda" if torch.cuda.is_available() else "cpu")
    if setting == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "platform: 'cuda', but torch sees no CUDA device; use platform=cpu or install a CUDA build of torch"
        )
    return Platform(setting)


def prepare_process(platform: Platform, parallel: ParallelConfig) -> list[str]:
    """Names of the patches applied. Call once in a process, before Megatron-Core is imported; a no-op on CUDA.

    Raises:
        ValueError: a version the patches were not tested with.
    """
    if platform.name != "cpu":
        return []
    check_cpu_versions()
    torch.set_num_threads(1)
    needed = [patch for patch in CPU_PATCHES if patch.needed_by(parallel)]
    for patch in needed:
        patch.apply()
    return [patch.name for patch in needed]


def check_cpu_versions() -> None:
    """Raises ValueError if megatron-core or torch is not a version that the CPU patches were tested with."""
    for package, (low, high) in CPU_TESTED_VERSIONS.items():
        found = importlib.metadata.version(package)
        if not Version(low) <= Version(found) < Version(high):
            raise ValueError(
                f"platform: 'cpu' needs {package} >= {low}, < {high}, found {found}: the CPU patches are tested with "
                "those versions only; run `make install` for a tested environment"
            )


@dataclass(frozen=True)
class Patch:
    """One replacement of torch or Megatron functions on a CPU, and the layouts that need it."""

    name: str
    needed_by: Callable[[ParallelConfig], bool]
    apply: Callable[[], None]


def _every_layout(_: ParallelConfig) -> bool:
    return True


def _newer_than_0_16(_: ParallelConfig) -> bool:
    return Version(importlib.metadata.version("megatron-core")) >= Version("0.17")


def _patch_current_device() -> None:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


# Those that Megatron's optimizer, schedules and buffers call with a literal "cuda" or pinned memory.
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")


def _patch_factories() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return wrapped

    # `torch.device` as a context looks calls up among the factories that it finds when it is first used.
    with torch.device("meta"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_random_state() -> None:
    """Megatron's RNG tracker keeps CUDA generator states: it gets the CPU generator's."""

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.default_generator.set_state(new_state)

    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _patch_tensor_type() -> None:
    """Megatron's optimizers compare `param.type()` with the names of CUDA tensors."""
    original = torch.Tensor.type

    def type_for_megatron(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron.core"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_for_megatron  # type: ignore[method-assign, assignment]


def _patch_synchronize() -> None:
    torch.cuda.synchronize = lambda *_: None


def _patch_cuda_moves() -> None:
    def stay(self: Any, *_: Any, **__: Any) -> Any:
        return self

    torch.Tensor.cuda = torch.nn.Module.cuda = stay  # type: ignore[method-assign]


class _NoStream:
    """Stands for a CUDA stream, and its events, where work is done when a call returns: nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing."""

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None:
        """Nothing."""


def _patch_current_stream() -> None:
    torch.cuda.current_stream = lambda *_: _NoStream()  # type: ignore[assignment]


CPU_PATCHES = (
    Patch("current_device", _every_layout, _patch_current_device),
    Patch("factories", _every_layout, _patch_factories),
    Patch("random_state", _every_layout, _patch_random_state),
    Patch("tensor_type", _every_layout, _patch_tensor_type),
    Patch("current_stream", _newer_than_0_16, _patch_current_stream),  # asked for before gradients are reduced
    # Pipelines, and saves of the policy's state.
    Patch("synchronize", _every_layout, _patch_synchronize),
    # Rotary embeddings under context parallelism, tied embeddings in a pipeline, saves of the optimizer's state.
    Patch("cuda_moves", _every_layout, _patch_cuda_moves),
)


def prepare_for_experts(platform: Platform) -> None:
    """Patch what models with experts need in every layout; after `prepare_process`, before such a model is built."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 reads it without Transformer Engine, too, to find it None
        moe_utils.te_general_gemm = None
    if platform.name != "cpu":
        return
    _patch_current_stream()
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    # The splits of the all-to-all: Megatron makes numpy arrays only of those that come from a device.
    move = moe_utils.maybe_move_tensor_to_cpu

    def move_to_numpy(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else move(tensor)

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_numpy
    _patch_uneven_splits()


def _patch_uneven_splits() -> None:
    """Ranks that share an expert bring different numbers of tokens: gloo can exchange those only all-to-all."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(local: torch.Tensor, group: dist.ProcessGroup, splits: Any = None, *rest: Any) -> torch.Tensor:
        if splits is None:
            return gather(local, group, splits, *rest)
        size = group.size()
        whole = local.new_empty((sum(splits), *local.shape[1:]))
        dist.all_to_all_single(whole, torch.cat([local] * size), list(splits), [len(local)] * size, group=group)
        return whole

    def reduce_scatter_uneven(
        whole: torch.Tensor, group: dist.ProcessGroup, splits: Any = None, *rest: Any
    ) -> torch.Tensor:
        if splits is None:
            return reduce_scatter(whole, group, splits, *rest)
        size, own = group.size(), splits[group.rank()]
        parts = whole.new_empty((size * own, *whole.shape[1:]))
        dist.all_to_all_single(parts, whole.contiguous(), [own] * size, list(splits), group=group)
        return parts.unflatten(0, (size, own)).sum(0)

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven
