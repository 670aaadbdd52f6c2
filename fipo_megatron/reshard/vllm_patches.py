"""What of vLLM (0.32.0) is mended in a worker's process before its model is built. Most is its CPU build's."""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import suppress
from typing import Any

import torch
import vllm._custom_ops as custom_ops
from vllm.model_executor.layers import utils as layer_utils
from vllm.platforms import current_platform
from vllm.v1.worker import gpu_worker

# In the environment:
RENDEZVOUS_FOLDER = "FIPO_RENDEZVOUS_FOLDER"  # of one engine, that nobody else can enter
ENGINE_PROCESS = "FIPO_ENGINE_PROCESS"  # the number of the process that has started the engine


def patch_vllm() -> None:
    """All that this process needs; more than once does no harm."""
    if current_platform.is_cpu():
        use_weights_as_loaded()
        skip_experts_of_others()
        give_stages_their_input()
    if RENDEZVOUS_FOLDER in os.environ:
        meet_in_a_file(os.environ[RENDEZVOUS_FOLDER])
    if ENGINE_PROCESS in os.environ:
        end_with_engine(int(os.environ[ENGINE_PROCESS]))


def end_with_engine(engine: int) -> None:
    """Have this worker end with the process that has started the engine, and the core between them.

    The core does not notice when that process is killed, and workers end with the core alone.
    """
    if engine == os.getpid():
        return
    parent = os.getppid()
    core = parent if parent not in (1, engine) else None  # else this process is the core, or there is none

    def watch() -> None:
        with suppress(ProcessLookupError):  # gone already
            select.select([os.pidfd_open(engine)], [], [])
        if core is not None and os.getppid() == core:
            os.kill(core, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def use_weights_as_loaded() -> None:
    """Have vLLM's CPU build multiply by the weights themselves; effective for models that are loaded after it."""
    custom_ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


def skip_experts_of_others() -> None:
    """Under expert parallelism the CPU kernel takes experts' global numbers for local ones, and reads beyond its own.

    The experts of other workers become the first one here, with weight 0.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    if hasattr(original, "unpatched"):
        return

    def apply(self: Any, output: torch.Tensor, *arguments: Any, **named: Any) -> None:
        assert not arguments, "vLLM names them"
        expert_map = named["expert_map"]
        if expert_map is not None:
            local = expert_map[named["topk_ids"].long()]
            is_here = local >= 0
            named["topk_ids"] = local.where(is_here, 0).to(named["topk_ids"].dtype)
            named["topk_weights"] = named["topk_weights"] * is_here
        original(self, output, **named)

    apply.unpatched = original  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = apply


def give_stages_their_input() -> None:
    """Later pipeline stages receive into a tensor that vLLM makes in a warm-up, left out where nothing is compiled."""
    from vllm.distributed import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.initialize_kv_cache
    if hasattr(original, "unpatched"):
        return

    def initialize_kv_cache(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if not get_pp_group().is_first_rank and self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    initialize_kv_cache.unpatched = original  # type: ignore[attr-defined]
    CPUModelRunner.initialize_kv_cache = initialize_kv_cache


def meet_in_a_file(folder: str) -> None:
    """Have the workers of an engine find each other through a file: torch's server for it listens on every interface,
    and asks nobody for a token. For the workers of one machine."""
    original = gpu_worker.init_distributed_environment
    original = getattr(original, "unpatched", original)

    def init_distributed_environment(
        world_size: int, rank: int, distributed_init_method: str, *arguments: Any, **options: Any
    ) -> None:
        name = distributed_init_method.rsplit(":", 1)[-1].replace("/", "-")  # the port, of which no two have the same
        original(world_size, rank, f"file://{folder}/workers-{name}", *arguments, **options)

    init_distributed_environment.unpatched = original  # type: ignore[attr-defined]
    gpu_worker.init_distributed_environment = init_distributed_environment
