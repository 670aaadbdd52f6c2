"""Norm and attention for Megatron's local layer spec, where Transformer Engine is not installed.

Megatron's own local norm refuses sequence parallelism, its local attention context parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from fipo_megatron.parallel.context import zigzag_positions


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron to all-reduce its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, and what LocalAttention makes of it once for all layers.

    Attention goes over runs of queries, each with a run of keys that ends where it ends: whole sequences, or under
    context parallelism this rank's two chunks of each sequence with all keys up to the chunk's end.
    """

    query_lens: tuple[int, ...] = ()
    key_lens: tuple[int, ...] = ()
    cu_query_lens: torch.Tensor = field(default_factory=torch.Tensor)  # int32 [runs + 1]
    cu_key_lens: torch.Tensor = field(default_factory=torch.Tensor)
    key_index: torch.Tensor | None = None  # int64 [sum(key_lens)], into the keys gathered rank by rank; None: all
    # Runs of equal lengths together: indices of their queries [n, q] and keys [n, k], and what undoes the order.
    equal_runs: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    restore: torch.Tensor = field(default_factory=torch.Tensor)  # int64 [t]


def pack_sequences(cu_seqlens: torch.Tensor, group: dist.ProcessGroup) -> PackedSequences:
    """The packed sequences of a microbatch, of which this rank of the context-parallel group holds its zig-zag part.

    `cu_seqlens`: int32 [sequences + 1], over all ranks; each sequence is a multiple of 2 * cp tokens where cp > 1.
    """
    size, rank, device = group.size(), group.rank(), cu_seqlens.device
    padded_lens = cu_seqlens.diff().tolist()
    gathered = torch.cat([zigzag_positions(padded_lens, other, size) for other in range(size)]).argsort()
    query_lens, keys, start = [], [], 0
    for length in padded_lens:
        chunk_len = length if size == 1 else length // (2 * size)
        for chunk in (0,) if size == 1 else (rank, 2 * size - 1 - rank):
            query_lens.append(chunk_len)
            keys.append(gathered[start : start + (chunk + 1) * chunk_len])
        start += length
    key_lens = [len(index) for index in keys]
    equal_runs, restore = _group_equal_runs(query_lens, keys)
    longest = max(padded_lens)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        query_lens=tuple(query_lens),
        key_lens=tuple(key_lens),
        cu_query_lens=_boundaries(query_lens).to(device),
        cu_key_lens=_boundaries(key_lens).to(device),
        key_index=torch.cat(keys).to(device) if size > 1 else None,
        equal_runs=tuple((q.to(device), k.to(device)) for q, k in equal_runs),
        restore=restore.to(device),
    )


def _group_equal_runs(
    query_lens: Sequence[int], keys: Sequence[torch.Tensor]
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    queries = torch.arange(sum(query_lens)).split(list(query_lens))
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
        groups.setdefault((len(query), len(key)), []).append(i)
    equal_runs = [
        (torch.stack([queries[i] for i in group]), torch.stack([keys[i] for i in group])) for group in groups.values()
    ]
    return equal_runs, torch.cat([index.flatten() for index, _ in equal_runs]).argsort()


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


class LocalAttention(MegatronModule):
    """Causal grouped-query attention on torch's fused kernels.

    Query `[t, heads, dim]`, key and value `[t, groups, dim]`, `t` local tokens of packed sequences. Under context
    parallelism key and value are all-gathered over `context_group`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "Megatron-Core >= 0.16 passes its process groups"
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """Context `[t, heads * dim]`."""
        assert packed_seq_params is not None, "the local attention takes packed sequences"
        if self.context_group.size() > 1:
            key, value = (_AllGatherSequence.apply(t, self.context_group) for t in (key, value))
        return self._attend_packed(query, key, value, packed_seq_params)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences
    ) -> torch.Tensor:
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn

            if packed.key_index is not None:
                key, value = key[packed.key_index], value[packed.key_index]
            context = varlen_attn(
                query,
                key,
                value,
                packed.cu_query_lens,
                packed.cu_key_lens,
                max(packed.query_lens),
                max(packed.key_lens),
                scale=self.softmax_scale,
                window_size=(-1, 0),
                enable_gqa=query.size(1) != key.size(1),
            )
            assert isinstance(context, torch.Tensor)
            return context.flatten(1)
        # The slow twin: torch's variable-length kernel takes half precision on CUDA alone.
        contexts = []
        for query_index, key_index in packed.equal_runs:
            (n, num_queries), num_keys = query_index.shape, key_index.size(1)
            mask = None
            if num_keys > num_queries:
                mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
                mask = mask.tril(num_keys - num_queries)
            queries, keys, values = (
                t.index_select(0, index.flatten()).unflatten(0, (n, -1)).transpose(1, 2)  # [n, heads, tokens, dim]
                for t, index in ((query, query_index), (key, key_index), (value, key_index))
            )
            contexts.append(self._attend(queries, keys, values, mask).transpose(1, 2).flatten(0, 1))
        return torch.cat(contexts).index_select(0, packed.restore).flatten(1)


class _AllGatherSequence(torch.autograd.Function):
    """Concatenation over the ranks along dim 0; the gradient is reduce-scattered back."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        full = local.new_empty((group.size() * local.size(0), *local.shape[1:]))
        dist.all_gather_into_tensor(full, local.contiguous(), group=group)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        local = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None
