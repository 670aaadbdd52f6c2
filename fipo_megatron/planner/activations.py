"""What one transformer layer keeps of a microbatch for its backward pass, and the most that it has beside that.

t tokens of one context-parallel rank, s = t / tp of them under sequence parallelism, else s = t; h hidden size; q and
kv a rank's widths of queries and of keys; i a rank's width of the MLP, or of an expert; d size of a head; b bytes of
the model's type; P tokens that a rank's experts compute. Bytes of the three kinds of layers:

norm of n numbers
    `local_cpu` (model/local_layers.py): x and x / rms, both float32, and the result: (8 + b) n.
    `local_cuda`, `transformer_engine`: x and the result: 2 b n.
norm of query and key heads
    `local_cpu`: x and x / rms of queries and of keys, 8 (q + kv) t; in float32 x of the keys is a view of the whole qkv
    product, 4 (q + 2 kv) t. Others: x of the queries; that of the keys is a view of the product, which attention keeps.
rotation
    Local: cos and sin, for queries and for keys: 4 d b t. Transformer Engine: one table for all layers.
attention
    `local_cpu`: copies of q, k and v, the result, and the result in order: (3 q + 2 kv) b t. Others: q, k, the result,
    and the qkv product, of which the values are a view: (3 q + 3 kv) b t. All: log-sums, 4 bytes a head and token. With
    context parallelism local layers gather keys: (2 cp + 1) / 2 as many, for both chunks of a sequence; on a CPU masks,
    too, (1 + b) bytes for each query and key of a chunk.
    `local_cuda` in float32 with fewer key-value heads than query heads: torch has no fused kernel and computes by its
    formula. The softmax of all scores waits, 4 bytes a head, query and key; in the forward pass there are the scores
    beside it, and truth values of a byte, in the backward pass two gradients.
gated MLP
    Local: product of both halves, silu, the other half, product: 5 i b t. Transformer Engine: 3 i b t.
experts
    Local: input, and per expert what an MLP keeps and the result before it is weighted: (h + 6 i) b P. Transformer
    Engine: (h + 3 i) b P. The router: logits and weights of all experts, 8 E s, and truth values.
dropout of probability 0 behind attention and MLP
    Transformer Engine's fused sum: a mask each, 2 s h. Local: nothing.

Residual sums and linear layers keep what is kept already: a linear layer's input is the result of a norm, of attention
or of an MLP. This is the count of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", section 4, for packed sequences, SwiGLU, grouped queries and fused attention. That keeps no scores, so that
selective recomputation, which is of attention alone, saves little or nothing. What local layers on a CPU keep is
measured (docs/planner.md); the other two are read from the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fipo_megatron.config.schema import Config, ParallelConfig
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.parameters import bytes_of_type

LayerKind = Literal["local_cpu", "local_cuda", "transformer_engine"]
Recompute = Literal["none", "selective", "full"]
FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a layer on one rank, in numbers, of a microbatch."""

    kind: LayerKind
    b: int
    t: float
    s: float
    h: int
    q: float
    kv: float
    i: float
    head_dim: int
    heads: float
    context: int
    is_sharded: bool  # s < t: what all ranks of a tensor-parallel group need is gathered
    longest: float  # positions of the longest sequence, over all context-parallel ranks
    has_qk_norm: bool
    num_experts: int
    own_experts: int  # of them on this rank
    routed: float  # P: tokens that this rank's experts compute, one for each expert of a token

    @property
    def is_cpu(self) -> bool:
        return self.kind == "local_cpu"

    @property
    def scores(self) -> float:
        """Bytes of attention's scores of a layer, where torch has no fused kernel, else 0. Of a context-parallel rank
        the larger of the two chunks of each sequence, which are computed apart."""
        if self.kind != "local_cuda" or self.b != FLOAT_BYTES or self.q == self.kv:
            return 0.0
        queries = self.t if self.context == 1 else self.t / 2
        return FLOAT_BYTES * self.heads * queries * self.longest

    @property
    def kept_scores(self) -> float:
        """Bytes of the softmax of all scores of a layer: the two chunks of a sequence see 2 cp + 1 chunks of keys."""
        return self.scores if self.context == 1 else self.scores * (2 * self.context + 1) / (2 * self.context)


def layer_kind(config: Config, has_transformer_engine: bool = True) -> LayerKind:
    """What a run's layers are computed by, on GPUs where `has_transformer_engine` is true. With float32 it has to be
    absent there (model/build.py)."""
    if config.platform == "cpu":
        return "local_cpu"
    return "transformer_engine" if has_transformer_engine and config.model.dtype != "float32" else "local_cuda"


def layer_sizes(
    kind: LayerKind,
    dtype: str,
    parallel: ParallelConfig,
    shape: ModelShape,
    tokens: int,
    longest: int,
    expert_load: float,
) -> LayerSizes:
    """Of a microbatch of `tokens` on each context-parallel rank. `expert_load`: tokens of the rank whose experts get
    most, over the mean."""
    tensor, is_sharded = parallel.tensor, parallel.sequence_parallel
    own = tokens / tensor if is_sharded else tokens
    has_experts = shape.num_experts > 0
    routed = 0.0
    if has_experts:  # every rank brings own * k; those of the experts' group meet, cut over expert_tensor ranks
        routed = own * shape.experts_per_token * parallel.expert_tensor
        routed = min(routed * (expert_load if parallel.expert > 1 else 1.0), routed * parallel.expert)
    return LayerSizes(
        kind=kind,
        b=bytes_of_type(dtype),
        t=tokens,
        s=own,
        h=shape.hidden_size,
        q=shape.num_attention_heads * shape.head_dim / tensor,
        kv=shape.num_key_value_heads * shape.head_dim / tensor,
        i=shape.moe_intermediate_size / parallel.expert_tensor if has_experts else shape.intermediate_size / tensor,
        head_dim=shape.head_dim,
        heads=shape.num_attention_heads / tensor,
        context=parallel.context,
        is_sharded=is_sharded,
        longest=longest,
        has_qk_norm=shape.qk_norm,
        num_experts=shape.num_experts,
        own_experts=shape.num_experts // parallel.expert,
        routed=routed,
    )


def kept_by_layer(x: LayerSizes, recompute: Recompute) -> float:
    """Bytes that wait for the backward pass of one layer."""
    if recompute == "full":
        return x.b * x.s * x.h
    mlp = _kept_by_experts(x) if x.num_experts else (3 if x.kind == "transformer_engine" else 5) * x.i * x.b * x.t
    masks = 2 * x.s * x.h if x.kind == "transformer_engine" else 0
    return 2 * kept_by_norm(x) + _kept_by_attention(x, recompute) + mlp + masks


def kept_by_norm(x: LayerSizes, with_result: bool = True) -> float:
    """Of the norm of all tokens' hidden states, and its result where what follows keeps it."""
    result = x.b * x.s * x.h if with_result else 0
    return result + (2 * FLOAT_BYTES if x.is_cpu else x.b) * x.s * x.h


def _kept_by_attention(x: LayerSizes, recompute: Recompute) -> float:
    product = (x.q + 2 * x.kv) * x.b * x.t
    is_float = x.b == FLOAT_BYTES
    kept = 0.0
    if x.kind != "transformer_engine":
        kept += 4 * x.head_dim * x.b * x.t  # cos and sin
    keeps_product = not x.is_cpu
    if x.has_qk_norm:
        if x.is_cpu:
            kept += FLOAT_BYTES * x.t * (2 * x.q + x.kv + (0 if is_float else x.kv))
            keeps_product = is_float
        else:
            kept += x.q * x.b * x.t
    if recompute == "selective":  # inputs of attention, and its result for the layer behind it
        return kept + product + (2 * x.q + x.kv) * x.b * x.t
    kept += FLOAT_BYTES * x.heads * x.t + x.kept_scores  # log-sums
    keys = x.t if x.context == 1 else x.t * (2 * x.context + 1) / 2  # of both chunks of every sequence
    if x.is_cpu:
        kept += (3 * x.q * x.t + 2 * x.kv * keys) * x.b
        if x.context > 1:  # masks, as truth values and as numbers, of runs that see more keys than they have queries
            chunk = x.longest / (2 * x.context)
            sequences = x.t * x.context / x.longest
            kept += sequences * chunk**2 * (2 * x.context + 1) * (1 + x.b)
    elif x.kind == "local_cuda" and x.context > 1:
        kept += (2 * x.q * x.t + 2 * x.kv * keys) * x.b
        keeps_product = False
    else:
        kept += (2 * x.q + x.kv) * x.b * x.t
    return kept + (product if keeps_product else 0)


def _kept_by_experts(x: LayerSizes) -> float:
    """Tokens that experts compute, and the router's: of each token and expert a logit, a weight and truth values."""
    widths = x.h + (3 if x.kind == "transformer_engine" else 6) * x.i
    return x.routed * (widths * x.b + 3 * FLOAT_BYTES) + x.s * x.num_experts * (2 * FLOAT_BYTES + 2)


def most_in_forward(x: LayerSizes) -> float:
    """Bytes of a layer at its fullest where nothing is kept: its input, and what the MLP has when it multiplies, or
    attention with its scores."""
    gathered = x.h * x.b * x.t if x.is_sharded else 0
    factor = 3 if x.kind == "transformer_engine" else 5
    mlp = 3 * x.routed * x.h * x.b if x.num_experts else factor * x.i * x.b * x.t
    attention = 2.25 * x.scores  # scores, softmax, truth values
    return 2 * x.s * x.h * x.b + gathered + max(mlp, attention)


def most_in_backward(x: LayerSizes) -> float:
    """Bytes beside all that is kept when a layer's backward pass begins: the gradient of its result, and in the MLP
    those of its halves, or of a matrix, or those of attention's scores. Transformer Engine has those of all experts at
    once."""
    own = x.s * x.h * x.b
    gathered = x.h * x.b * x.t if x.is_sharded else 0
    if x.num_experts:
        matrices = (x.own_experts if x.kind == "transformer_engine" else 1) * 2 * x.h * x.i * x.b
        mlp = 2 * x.routed * x.h * x.b + matrices
    else:
        inner = x.i * x.b * x.t
        mlp = max(inner + x.h * x.i * x.b, 2 * inner)
    return own + gathered + max(mlp, 2 * x.scores)
