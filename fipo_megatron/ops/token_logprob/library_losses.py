"""Log-probs by the cross entropies of Transformer Engine and Megatron-Core, as alternatives to compare with.

Both know neither an entropy nor columns beyond the vocabulary. Both write into the logits that they are given: they get
a copy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def logprob_of_library(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    impl: str,
    temperature: float,
    true_vocab_size: int,
    tp_group: ProcessGroup | None,
    entropy: str,
) -> torch.Tensor:
    """log p(target) [N] float32 of `logits` [N, V / tp], with gradient; `impl` is "te" or "megatron".

    The library's own collectives over `tp_group`; every rank must call. Raises ValueError for what it can't do.
    """
    num_shards = 1 if tp_group is None else tp_group.size()
    if entropy != "none":
        raise ValueError(f"impl={impl!r} computes no entropy, asked for is entropy={entropy!r}: use impl='auto'")
    if true_vocab_size != logits.size(1) * num_shards:
        raise ValueError(
            f"impl={impl!r} would count all of {num_shards} x {logits.size(1)} columns, true_vocab_size is "
            f"{true_vocab_size}: use impl='auto', which leaves padding out"
        )
    if logits.dtype == torch.float64:
        raise ValueError(f"impl={impl!r} computes in float32, logits is float64: use impl='auto'")
    own_logits = logits.clone() if temperature == 1.0 else logits.float() / temperature
    loss = _te_loss if impl == "te" else _megatron_loss
    logprobs = -loss(own_logits[:, None], target_ids[:, None], tp_group).view(-1).float()
    # No log-prob is positive, whatever the rounding; a clamp would drop the gradient of those rows.
    return logprobs - logprobs.detach().clamp(min=0)


def _te_loss(logits: torch.Tensor, target_ids: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    try:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy
    except ImportError as error:
        raise ValueError(
            f"impl='te' needs Transformer Engine ({error}): install transformer-engine, or use impl='auto'"
        ) from error
    loss: torch.Tensor = parallel_cross_entropy(logits, target_ids, 0.0, False, tp_group)
    return loss


def _megatron_loss(logits: torch.Tensor, target_ids: torch.Tensor, tp_group: ProcessGroup | None) -> torch.Tensor:
    try:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    except ImportError as error:
        raise ValueError(
            f"impl='megatron' needs Megatron-Core ({error}): install megatron-core, or use impl='auto'"
        ) from error
    # It takes its group from Megatron's global state, not from its caller.
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "impl='megatron' needs Megatron's process groups: call initialize_model_parallel, or use impl='auto'"
        )
    megatron_ranks = dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    ranks = [dist.get_rank()] if tp_group is None else dist.get_process_group_ranks(tp_group)
    if ranks != megatron_ranks:
        raise ValueError(
            f"impl='megatron' would sum over Megatron's tensor-parallel ranks {megatron_ranks}, tp_group has {ranks}: "
            "pass Megatron's group, or use impl='auto'"
        )
    loss: torch.Tensor = vocab_parallel_cross_entropy(logits, target_ids)
    return loss
