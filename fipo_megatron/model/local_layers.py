"""Norm and attention for Megatron's local layer spec, where Transformer Engine is not installed.

Megatron's own local norm refuses sequence parallelism, its local attention context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from fipo_megatron.parallel.context import zigzag_positions


class LocalRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron to all-reduce its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LocalAttention(MegatronModule):
    """Causal grouped-query attention on torch's fused kernel.

    Query `[s, b, heads, dim]`, key and value `[s, b, groups, dim]`, `s` local tokens a sequence. Under context
    parallelism key and value are all-gathered over `context_group`, and zig-zag positions make the mask.
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
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Context `[s, b, heads * dim]`."""
        assert packed_seq_params is None, "the local attention takes padded rows"
        mask = None
        if self.context_group.size() > 1:
            mask = _zigzag_causal_mask(query.size(0), self.context_group).to(query.device)
            key, value = (_AllGatherSequence.apply(t, self.context_group) for t in (key, value))
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, dim]
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _zigzag_causal_mask(local_len: int, group: dist.ProcessGroup) -> torch.Tensor:
    """bool `[local_len, cp * local_len]`: which gathered keys (rank by rank) each local query may see."""
    size = group.size()
    positions = [zigzag_positions([local_len * size], rank, size) for rank in range(size)]
    return positions[group.rank()][:, None] >= torch.cat(positions)[None]


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
