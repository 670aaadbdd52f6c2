"""Bytes that ranks exchange: of a microbatch's passes, of an update. Counted as one rank sends them.

A ring collective over n ranks has each send (n - 1) / n of the whole in an all-gather or a reduce-scatter, twice that
in an all-reduce (Thakur et al. 2005). Which collectives there are is Megatron-Core's and this code's doing, and each
line names its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fipo_megatron.config.schema import Config, ParallelConfig
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.parameters import GRADIENT_BYTES, bytes_of_type

Kind = Literal["tp", "pp", "dp", "cp", "ep", "sync"]


@dataclass(frozen=True)
class StageWeights:
    """Weights of one rank of a pipeline stage, matrices alone: norms and biases are below a thousandth."""

    dense: float
    experts: float


def stage_weights(shape: ModelShape, parallel: ParallelConfig, stage: int) -> StageWeights:
    """What each rank of a stage holds; a head that is the embedding is on the last stage, too."""
    layers = shape.num_layers / parallel.pipeline
    query, key_value = (heads * shape.head_dim for heads in (shape.num_attention_heads, 2 * shape.num_key_value_heads))
    layer = shape.hidden_size * (2 * query + key_value)
    if not shape.num_experts:
        layer += 3 * shape.hidden_size * shape.intermediate_size
    table = shape.vocab_size * shape.hidden_size
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    tables = is_first + is_last if not (shape.tie_word_embeddings and is_first) else 1
    router = layers * shape.hidden_size * shape.num_experts
    expert = 3 * shape.hidden_size * shape.moe_intermediate_size
    held_experts = shape.num_experts / (parallel.expert * parallel.expert_tensor)
    return StageWeights((layers * layer + tables * table) / parallel.tensor + router, layers * held_experts * expert)


@dataclass(frozen=True)
class PassTraffic:
    """Bytes that one rank of a stage sends in a microbatch's forward and backward pass, by kind."""

    forward: Mapping[Kind, float]
    backward: Mapping[Kind, float]


def pass_traffic(config: Config, shape: ModelShape, stage: int, num_tokens: float, num_rows: float) -> PassTraffic:
    """Of a microbatch of `num_tokens` positions and `num_rows` rows of the head, both over all context-parallel ranks.

    Recomputation is not in it: it repeats `forward`, but for `pp`.
    """
    parallel = config.parallel
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    layers, width = shape.num_layers / pipeline, bytes_of_type(config.model.dtype)
    hidden = num_tokens / context * shape.hidden_size * width  # of all tokens that a tensor-parallel group has
    forward: dict[Kind, float] = {}
    backward: dict[Kind, float] = {}

    # The attention's output and the dense MLP's are summed, and so are the gradients of their inputs. With sequence
    # parallelism each sum is a reduce-scatter and an all-gather, and the backward pass gathers inputs once more.
    ring = (tensor - 1) / tensor * hidden
    cut_blocks = 1 if shape.num_experts else 2
    forward["tp"] = 2 * layers * cut_blocks * ring
    backward["tp"] = (3 if parallel.sequence_parallel else 2) * layers * cut_blocks * ring
    if stage == 0:
        forward["tp"] += (1 if parallel.sequence_parallel else 2) * ring  # the embedding's sum
    if stage == pipeline - 1:  # the gradient of the head's input, in float32 (ops/linear_logprob)
        backward["tp"] += 2 * (tensor - 1) / tensor * num_rows / context * shape.hidden_size * 4

    # Keys and values: gathered, and their gradients scattered (model/local_layers.py). Transformer Engine passes them
    # around a ring, and in the backward pass both again.
    heads = -(-shape.num_key_value_heads // tensor)
    keys_values = num_tokens / context * 2 * heads * shape.head_dim * width
    forward["cp"] = layers * (context - 1) * keys_values
    backward["cp"] = (1 if config.platform == "cpu" else 2) * forward["cp"]

    # Hidden states to the next stage, their gradients to the one before; interleaved, of each model chunk.
    sent = hidden / (tensor if parallel.sequence_parallel else 1)
    chunks = parallel.virtual_pipeline or 1
    if pipeline > 1:
        forward["pp"] = (chunks - (stage == pipeline - 1)) * sent
        backward["pp"] = (chunks - (stage == 0)) * sent

    if shape.num_experts:
        expert = _expert_traffic(parallel, shape, hidden) * layers
        forward["ep"] = backward["ep"] = expert
    return PassTraffic(forward, backward)


def pass_collectives(config: Config, shape: ModelShape, stage: int) -> tuple[float, float]:
    """How many collectives and messages a rank of a stage waits for in a microbatch: forward and backward pass.

    The head's reductions of its statistics are a number a row, and not in it.
    """
    parallel = config.parallel
    layers, chunks = shape.num_layers / parallel.pipeline, parallel.virtual_pipeline or 1
    forward = backward = 0.0
    if parallel.tensor > 1:
        cut_blocks = 1 if shape.num_experts else 2
        forward += (2 if parallel.sequence_parallel else 1) * layers * cut_blocks + (stage == 0)
        backward += (3 if parallel.sequence_parallel else 1) * layers * cut_blocks
        backward += stage == parallel.pipeline - 1
    if parallel.context > 1:
        forward += 2 * layers  # keys, values
        backward += 2 * layers
    if parallel.pipeline > 1:
        forward += chunks - (stage == parallel.pipeline - 1)
        backward += chunks - (stage == 0)
    exchanges = 2 * layers * ((parallel.expert > 1) + (parallel.expert_tensor > 1))
    return forward + exchanges, backward + exchanges


def _expert_traffic(parallel: ParallelConfig, shape: ModelShape, hidden: float) -> float:
    """Of one layer and pass: each token goes to the ranks of its experts and comes back, all-to-all; where an expert is
    cut, its ranks gather all their tokens and scatter the sums."""
    own = hidden / (parallel.tensor if parallel.sequence_parallel else 1) * shape.experts_per_token
    to_experts = 2 * (parallel.expert - 1) / parallel.expert * own
    within_expert = 2 * (parallel.expert_tensor - 1) * own
    return to_experts + within_expert


def update_traffic(config: Config, shape: ModelShape, stage: int) -> float:
    """Bytes that one rank of a stage sends for gradients and weights in an update: gradients are reduce-scattered in
    float32 and weights all-gathered; without the distributed optimizer gradients are all-reduced."""
    parallel, held = config.parallel, stage_weights(shape, config.parallel, stage)
    gathered = bytes_of_type(config.model.dtype) if parallel.distributed_optimizer else GRADIENT_BYTES
    per_weight = GRADIENT_BYTES + gathered
    dense, experts = replicas(parallel)
    return per_weight * ((dense - 1) / dense * held.dense + (experts - 1) / experts * held.experts)


def replicas(parallel: ParallelConfig) -> tuple[int, int]:
    """Ranks that hold the same dense weights, and the same experts."""
    per_stage = parallel.tensor * parallel.context * parallel.data
    return parallel.context * parallel.data, max(1, per_stage // (parallel.expert * parallel.expert_tensor))


def seconds(config: Config, gpu: Gpu, efficiencies: Efficiencies, traffic: Mapping[Kind, float]) -> float:
    """Seconds of a rank's traffic within the trainer, one kind after the other, none behind computing: model/build.py
    leaves Megatron's overlaps off but that of messages between stages of several model chunks, which is left out."""
    return sum(amount / bandwidth(config, gpu, efficiencies, kind) for kind, amount in traffic.items() if amount)


def bandwidth(config: Config, gpu: Gpu, efficiencies: Efficiencies, kind: Kind) -> float:
    """Bytes per second that a rank reaches in a group of a kind. Ranks are numbered tensor, context, data, pipeline
    (reshard/layout.py); a group is as fast as its slowest link."""
    parallel = config.parallel
    per_stage = parallel.tensor * parallel.context * parallel.data
    span = {
        "tp": parallel.tensor,
        "cp": parallel.tensor * parallel.context,
        "dp": per_stage,
        "ep": parallel.expert * parallel.expert_tensor,
        "pp": parallel.world_size,  # to the same place of the next stage
        "sync": 1 if config.placement.mode == "colocated" else gpu.gpus_per_node + 1,
    }[kind]
    if span <= gpu.gpus_per_node:
        return gpu.nvlink_bandwidth * efficiencies.nvlink
    return gpu.network_bandwidth * efficiencies.network
