"""Log-probability of each target token, and entropy, from logits that may be sharded over the vocabulary."""

from __future__ import annotations

import math

import torch
from torch.distributed import ProcessGroup

from fipo_megatron.ops.token_logprob.reference import logprob_reference
from fipo_megatron.ops.token_logprob.vocab_parallel import VocabParallelLogprob

__all__ = ["token_logprob"]

IMPLEMENTATIONS = ("auto", "vocab_parallel", "reference")


def token_logprob(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    true_vocab_size: int,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    with_entropy: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) [N] with gradient to `logits`, and the entropy [N] without gradient (None unless asked for).

    `logits` [N, V / tp] holds the columns `vocab_start`, `vocab_start + 1`, ... of the vocabulary; `target_ids` [N] are
    global. Both results describe softmax(logits / temperature) over the first `true_vocab_size` columns: what Megatron
    pads beyond has no probability and no gradient. Arithmetic and results are float32, or float64 for float64 logits.
    Collectives over `tp_group`: a maximum and a sum in the forward pass, none in the backward one; every rank must
    call.
    """
    _check(logits, target_ids, temperature, true_vocab_size, vocab_start, tp_group, impl)
    num_columns = min(max(true_vocab_size - vocab_start, 0), logits.size(1))
    if impl == "reference":
        return logprob_reference(logits, target_ids, temperature, num_columns, with_entropy)
    logprobs, entropy = VocabParallelLogprob.apply(
        logits, target_ids, temperature, vocab_start, num_columns, tp_group, with_entropy
    )
    return logprobs, entropy


def _check(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: float,
    true_vocab_size: int,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    impl: str,
) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not known: use one of {', '.join(IMPLEMENTATIONS)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} has no softmax: pass a number greater than 0")
    if logits.dim() != 2 or target_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"logits is {list(logits.shape)} and target_ids {list(target_ids.shape)}: pass [N, V / tp] and [N]"
        )
    tp_size = 1 if tp_group is None else tp_group.size()
    if tp_size > 1 and impl == "reference":
        raise ValueError(f"impl='reference' reads whole rows, not {tp_size} shards: use impl='vocab_parallel'")
    if not 0 < true_vocab_size <= logits.size(1) * tp_size:
        raise ValueError(
            f"true_vocab_size={true_vocab_size} does not fit {tp_size} shard(s) of {logits.size(1)} columns: "
            "pass the tokenizer's size before padding"
        )
    if not 0 <= vocab_start <= logits.size(1) * (tp_size - 1):
        raise ValueError(
            f"vocab_start={vocab_start} is no shard of {tp_size} with {logits.size(1)} columns: pass rank * (V / tp)"
        )
    if target_ids.numel() and not 0 <= int(target_ids.min()) <= int(target_ids.max()) < true_vocab_size:
        raise ValueError(
            f"target_ids reach from {int(target_ids.min())} to {int(target_ids.max())}, true_vocab_size is "
            f"{true_vocab_size}: give masked positions a valid id too, e.g. 0"
        )
