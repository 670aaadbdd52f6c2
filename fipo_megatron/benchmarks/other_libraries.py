"""Log-probs by other libraries, to be measured beside ours. Each is imported when it is made, and may be missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.benchmarks.logprob_passes import Forward, LogprobInputs, Outputs, eager_logprob
from fipo_megatron.benchmarks.operation import UnavailableError


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile for its exact shapes; UnavailableError where that would do nothing or fail."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise UnavailableError("TORCHDYNAMO_DISABLE is set")
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UnavailableError("no C++ compiler")
    # In this process: its workers would outlive the short processes that measure memory.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def require_cuda(inputs: LogprobInputs) -> None:
    """For kernels in Triton or CUDA."""
    if not inputs.target_ids.is_cuda:
        raise UnavailableError("needs CUDA")


@cache
def single_rank_group(device_type: str) -> dist.ProcessGroup:
    """Megatron's tensor-parallel group of one rank: its losses ask for one. Nothing listens beyond loopback."""
    from megatron.core import parallel_state

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def make_megatron(inputs: LogprobInputs, is_fused: bool) -> Forward:
    """Its vocab-parallel cross entropies, plain and fused. They change float32 logits.

    The fused one gives its gradient in bfloat16.
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = single_rank_group(inputs.target_ids.device.type)
    loss = partial(fused_vocab_parallel_cross_entropy, tp_group=group) if is_fused else vocab_parallel_cross_entropy
    return _overwriting(inputs, lambda logits, targets: -loss(logits, targets[:, None]).view(-1), 1)


def make_transformer_engine(inputs: LogprobInputs) -> Forward:
    """Its parallel cross entropy, which writes the gradient over the logits."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    require_cuda(inputs)
    return _overwriting(
        inputs,
        lambda logits, targets: -parallel_cross_entropy(logits, targets[:, None], 0.0, False, None).view(-1),
        1,
    )


def make_liger_vocab_parallel(inputs: LogprobInputs) -> Forward:
    """Its cross entropy for shards of the vocabulary, which may write over the logits."""
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    require_cuda(inputs)
    loss = LigerVocabParallelCrossEntropy()
    return _overwriting(inputs, lambda logits, targets: -loss(logits, targets[:, None]).view(-1), 1)


def make_liger(inputs: LogprobInputs) -> Forward:
    """Its cross entropy, which writes the gradient over the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    require_cuda(inputs)
    return _overwriting(inputs, lambda logits, targets: -liger_cross_entropy(logits, targets, reduction="none"))


def make_compiled(inputs: LogprobInputs, with_entropy: bool) -> Forward:
    """The eager form from logits, fused by torch.compile."""
    run = compile_function(partial(eager_logprob, with_entropy=with_entropy))
    return Forward(lambda: run(inputs.leaves["logits"], inputs.target_ids))


def make_compiled_head(inputs: LogprobInputs, with_entropy: bool) -> Forward:
    """The eager form from hidden states, fused by torch.compile."""

    def run_head(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> Outputs:
        return eager_logprob(hidden @ weight.t(), target_ids, with_entropy)

    run = compile_function(run_head)
    return Forward(lambda: run(*_head(inputs), inputs.target_ids))


def make_verl_chunks(inputs: LogprobInputs) -> Forward:
    """verl's chunks of tokens in torch, whose backward pass always has an entropy."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head = FusedLinearForPPO(impl_backend="torch")
    return Forward(lambda: head(*_head(inputs), inputs.target_ids))


def make_verl_triton(inputs: LogprobInputs) -> Forward:
    """verl's kernel."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    require_cuda(inputs)
    return Forward(lambda: linear_cross_entropy(*_head(inputs), inputs.target_ids, 1.0, "none"))


def make_liger_scaled(inputs: LogprobInputs, with_entropy: bool) -> Forward:
    """Liger's fused linear cross entropy for reinforcement learning; on a CPU its fallback in torch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def run() -> Outputs:
        found = Function.apply(*_head(inputs), inputs.target_ids, 1.0, -100, 1, with_entropy)
        losses, entropy = found if isinstance(found, tuple) else (found, None)
        return -losses, entropy

    return Forward(run)


def make_cut_cross_entropy(inputs: LogprobInputs, impl: str) -> Forward:
    """cut-cross-entropy: "cce", its kernel with all gradients, or "torch_compile"."""
    from cut_cross_entropy import linear_cross_entropy

    if impl == "cce":
        require_cuda(inputs)
        # What it leaves out by default are gradients that bfloat16 would round away.
        return Forward(
            lambda: (
                -linear_cross_entropy(*_head(inputs), inputs.target_ids, reduction="none", impl=impl, filter_eps=None),
                None,
            )
        )
    compile_function(linear_cross_entropy)
    return Forward(
        lambda: (-linear_cross_entropy(*_head(inputs), inputs.target_ids, reduction="none", impl=impl), None)
    )


def _head(inputs: LogprobInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.leaves["hidden"], inputs.leaves["weight"]


def _overwriting(
    inputs: LogprobInputs, logprob: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_batch_axes: int = 0
) -> Forward:
    """Of a function that may write into its logits, [N, V] or [N, 1, V]; these are put back, untimed."""
    original = inputs.leaves["logits"].detach()
    original = original[:, None] if num_batch_axes else original
    logits = original.clone().requires_grad_()

    def restore() -> None:
        with torch.no_grad():
            logits.copy_(original)

    return Forward(lambda: (logprob(logits, inputs.target_ids), None), {"logits": logits}, restore)


Makers = Mapping[str, Callable[[LogprobInputs], Forward]]

FROM_LOGITS: Makers = {
    "megatron": partial(make_megatron, is_fused=False),
    "megatron fused": partial(make_megatron, is_fused=True),
    "transformer engine": make_transformer_engine,
    "liger": make_liger,
    "liger vocab-parallel": make_liger_vocab_parallel,
    "torch.compile": partial(make_compiled, with_entropy=False),
    "torch.compile+entropy": partial(make_compiled, with_entropy=True),
}
FROM_HIDDEN: Makers = {
    "verl chunks+entropy": make_verl_chunks,
    "verl triton+entropy": make_verl_triton,
    "liger scaled": partial(make_liger_scaled, with_entropy=False),
    "liger scaled+entropy": partial(make_liger_scaled, with_entropy=True),
    "cut-cross-entropy": partial(make_cut_cross_entropy, impl="cce"),
    "cut-cross-entropy, torch_compile": partial(make_cut_cross_entropy, impl="torch_compile"),
    "torch.compile": partial(make_compiled_head, with_entropy=False),
    "torch.compile+entropy": partial(make_compiled_head, with_entropy=True),
}
