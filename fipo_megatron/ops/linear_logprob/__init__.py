"""Log-probability of each target token, and entropy, from hidden states and the head's weights: without the logits."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from fipo_megatron.ops.linear_logprob.chunked import ChunkedLinearLogprob, Head
from fipo_megatron.ops.linear_logprob.reference import linear_logprob_reference
from fipo_megatron.ops.linear_logprob.workspace import choose_blocking
from fipo_megatron.ops.token_logprob.checks import check_options, check_shard, check_targets
from fipo_megatron.ops.token_logprob.implementations import check_whole_rows, make_row_kernels, pick_implementation
from fipo_megatron.ops.token_logprob.vocab_parallel import VocabShard

__all__ = ["linear_logprob"]

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    true_vocab_size: int,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    entropy: str = "none",
    impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) [N] and the entropy [N] (None where "none") of softmax(hidden @ weight.T / temperature).

    `hidden` [N, H] is whole on every rank of `tp_group`; `weight` [V / tp, H], of the same dtype (float16, bfloat16,
    float32, float64), holds the rows `vocab_start`, ... of the head and may be the embedding's too; `target_ids` [N]
    int64 are global. Only the first `true_vocab_size` columns count. Sums and results are float32, or float64 for
    float64 inputs; no log-prob is positive. `entropy` is "none", "detached" (no gradient) or "differentiable".
    Beside the workspace the backward pass holds the gradient of `hidden` in float32.
    Logits exist a block at a time in `workspace_bytes` and are computed again in the backward pass; the torch kernels
    take up to 4 MiB a thread (16 MiB twice on CUDA) beside it. In the backward pass `hidden` gets
    the gradient of all shards, and `weight` that of its own rows: added to `weight.main_grad` where there is one
    (Megatron's buffer; autograd then gets None), else in its dtype.
    `impl`: "auto" picks the kernels "torch" or, on CUDA, "triton"; "reference" is autograd over all logits.
    Collectives over `tp_group`: a maximum and a sum in the forward pass, a sum of [N, H] in the backward one, and once
    for each group and width a maximum that compares widths; every rank must call, also with N = 0. ValueError for
    arguments that don't fit, before any of it starts.
    """
    check_options(temperature, entropy, impl, IMPLEMENTATIONS)
    check_whole_rows(impl, tp_group)
    check_targets(hidden, "hidden", target_ids, true_vocab_size)
    tp_size = 1 if tp_group is None else tp_group.size()
    check_shard(len(weight), vocab_start, tp_group, hidden.device)
    _check_weight(hidden, weight, true_vocab_size, tp_size)
    num_columns = min(max(true_vocab_size - vocab_start, 0), len(weight))
    # Of whole shards, so that a workspace is too small on all ranks or on none.
    blocking = choose_blocking(len(hidden), len(weight), hidden.size(1), hidden.dtype, hidden.device, workspace_bytes)
    impl = pick_implementation("linear_logprob", impl, hidden)
    if impl == "reference":
        return linear_logprob_reference(hidden, weight, target_ids, temperature, num_columns, entropy)
    shard = VocabShard(make_row_kernels(impl), temperature, vocab_start, num_columns, tp_group, entropy)
    logprobs, row_entropy = ChunkedLinearLogprob.apply(hidden, weight, target_ids, Head(shard, blocking))
    return logprobs, row_entropy


def _check_weight(hidden: torch.Tensor, weight: torch.Tensor, true_vocab_size: int, tp_size: int) -> None:
    if weight.dim() != 2 or weight.size(1) != hidden.size(1):
        raise ValueError(f"weight is {list(weight.shape)}, hidden {list(hidden.shape)}: pass [V / tp, H] and [N, H]")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"weight is {weight.dtype} on {weight.device}, hidden {hidden.dtype} on {hidden.device}: "
            "convert one to the other's"
        )
    if not 0 < true_vocab_size <= len(weight) * tp_size:
        raise ValueError(
            f"weight has {tp_size} x {len(weight)} rows, true_vocab_size={true_vocab_size}: a head smaller than the "
            "tokenizer's vocabulary; load the model that belongs to the tokenizer, or pass the size before padding"
        )
