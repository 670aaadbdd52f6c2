"""Floating-point operations of packed causal sequences. One multiplication with its addition counts as two."""

from __future__ import annotations

import numpy as np

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.parallel.plan import ForwardCost, forward_cost

TRAINING_PASSES = 3  # forward, and the gradients of inputs and of weights, which take as much each


def model_cost(shape: ModelShape) -> ForwardCost:
    """Operations of a token, of a token and one that it attends to, and of a row of the head.

    Counted: the matrices of attention, of the MLP or of the experts that one token is sent to, the router, and the
    head; attention is causal. Left out, as is usual: norms, rotary embedding, activations, softmax and the embedding's
    look-up, below 1% of the whole.
    """
    active_width = shape.moe_intermediate_size * shape.experts_per_token if shape.num_experts else None
    cost = forward_cost(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=active_width or shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
    )
    router = 2.0 * shape.num_layers * shape.hidden_size * shape.num_experts
    return ForwardCost(cost.per_token + router, cost.per_response_token, cost.per_pair)


def num_pairs(lengths: np.ndarray) -> float:
    """Pairs of a token and one that it attends to, itself included: sum of s (s + 1) / 2 over sequences."""
    s = np.asarray(lengths, np.float64)
    return float((s * (s + 1) / 2).sum())


def forward_flops(shape: ModelShape, lengths: np.ndarray, num_head_rows: int) -> float:
    """Operations of one forward pass over sequences of `lengths` tokens `[N]`, whose head computes `num_head_rows`
    rows in all (in RL those of the responses alone)."""
    cost = model_cost(shape)
    num_tokens = float(np.sum(lengths, dtype=np.float64))
    return cost.per_token * num_tokens + cost.per_pair * num_pairs(lengths) + cost.per_response_token * num_head_rows


def training_flops(shape: ModelShape, lengths: np.ndarray, num_head_rows: int) -> float:
    """Operations of a forward and a backward pass. What is computed again to save memory is not in it: model FLOPs
    utilisation, this over time x peak, would otherwise praise waste (PaLM, appendix B)."""
    return TRAINING_PASSES * forward_flops(shape, lengths, num_head_rows)


def elementwise_accesses(shape: ModelShape) -> tuple[float, float]:
    """Elements that one token's forward pass reads or writes in a layer outside the matrix products, kernels fused:
    those of the hidden states, and those that tensor-parallel ranks have a share of each.

    Hidden states: two norms (in, out) and two residual sums (two in, one out); with experts also the copies that go to
    them and come back. Shared: rotary embedding of queries and keys (in, out), the gated activation (two in, one out).
    The backward pass has twice as many.
    """
    heads = shape.num_attention_heads + shape.num_key_value_heads
    hidden, shared = 10.0 * shape.hidden_size, 2.0 * heads * shape.head_dim
    if not shape.num_experts:
        return hidden, shared + 3.0 * shape.intermediate_size
    copies = shape.experts_per_token
    return hidden + 2.0 * (copies + 1) * shape.hidden_size, shared + 3.0 * copies * shape.moe_intermediate_size
