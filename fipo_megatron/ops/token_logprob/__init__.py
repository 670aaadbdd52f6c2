"""Log-probability of each target token, and entropy, from logits that may be sharded over the vocabulary."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from fipo_megatron.ops.token_logprob.checks import check_options, check_shard, check_targets
from fipo_megatron.ops.token_logprob.implementations import check_whole_rows, make_row_kernels, pick_implementation
from fipo_megatron.ops.token_logprob.library_losses import logprob_of_library
from fipo_megatron.ops.token_logprob.reference import logprob_reference
from fipo_megatron.ops.token_logprob.vocab_parallel import VocabParallelLogprob, VocabShard

__all__ = ["token_logprob"]

IMPLEMENTATIONS = ("auto", "torch", "triton", "te", "megatron", "reference")


def token_logprob(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    true_vocab_size: int,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    entropy: str = "none",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) [N] with gradient to `logits`, and the entropy [N], or None where `entropy` is "none".

    `logits` [N, V / tp] (float16, bfloat16, float32, float64) holds the columns `vocab_start`, `vocab_start + 1`, ...
    of the vocabulary; `target_ids` [N] int64 are global. Both results describe softmax(logits / temperature) over the
    first `true_vocab_size` columns: what Megatron pads beyond has no probability and no gradient. Arithmetic and
    results are float32, or float64 for float64 logits; no log-prob is positive. `entropy` is "none", "detached" (no
    gradient) or "differentiable". The logits are left alone; the backward pass writes one tensor of their shape and
    dtype.
    `impl`: "auto" picks "torch" or, on CUDA, "triton"; "te" and "megatron" are those libraries' losses, which have
    neither entropy nor padding; "reference" is autograd over whole rows.
    Collectives over `tp_group`: a maximum and a sum in the forward pass, none in the backward one, and once for each
    group and width a maximum that compares widths; every rank must call, also with N = 0. ValueError for arguments that
    don't fit, before any of it starts.
    """
    check_options(temperature, entropy, impl, IMPLEMENTATIONS)
    check_whole_rows(impl, tp_group)
    check_targets(logits, "logits", target_ids, true_vocab_size)
    check_shard(logits.size(1), vocab_start, tp_group, logits.device)
    tp_size = 1 if tp_group is None else tp_group.size()
    if not 0 < true_vocab_size <= logits.size(1) * tp_size:
        raise ValueError(
            f"true_vocab_size={true_vocab_size} does not fit {tp_size} shard(s) of {logits.size(1)} columns: "
            "pass the tokenizer's size before padding"
        )
    num_columns = min(max(true_vocab_size - vocab_start, 0), logits.size(1))
    impl = pick_implementation("token_logprob", impl, logits)
    if impl == "reference":
        return logprob_reference(logits, target_ids, temperature, num_columns, entropy)
    if impl in ("te", "megatron"):
        logprobs = logprob_of_library(
            logits,
            target_ids,
            impl=impl,
            temperature=temperature,
            true_vocab_size=true_vocab_size,
            tp_group=tp_group,
            entropy=entropy,
        )
        return logprobs, None
    shard = VocabShard(make_row_kernels(impl), temperature, vocab_start, num_columns, tp_group, entropy)
    logprobs, row_entropy = VocabParallelLogprob.apply(logits, target_ids, shard)
    return logprobs, row_entropy
