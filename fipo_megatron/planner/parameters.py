"""What each rank of a pipeline stage holds of the model: parameters, gradients, optimizer state. Pure counting."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from fipo_megatron.config.schema import ParallelConfig
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, hf_tensor_shape, padded_vocab_size
from fipo_megatron.model.weight_map.families import EMBEDDING, FINAL_NORM, HEAD, LAYERS, is_expert, layer_entry
from fipo_megatron.reshard.layout import TrainerLayout, trainer_layout

GRADIENT_BYTES = 4  # a parameter's, whatever its type: they are summed in float32
MOMENT_BYTES = 8  # both, in float32
MAIN_BYTES = 4  # the float32 copy of a bfloat16 parameter that the optimizer updates
# Megatron-Core's buffers under its distributed optimizer (distributed/param_and_grad_buffer.py): a parameter begins at
# a multiple of 64 elements, a bucket ends at one of 128 and of the ranks that share it.
PARAMETER_MULTIPLE, BUCKET_MULTIPLE = 64, 128


def bytes_of_type(dtype: str) -> int:
    """Of an element of `model.dtype`."""
    return 2 if dtype == "bfloat16" else 4


Bucket = tuple[tuple[int, int], ...]  # (elements of a parameter, how many such), in about the forward pass's order


@dataclass(frozen=True)
class ParameterBuffer:
    """Megatron's buffer of parameters that are reduced over the same ranks, on one rank."""

    buckets: tuple[Bucket, ...]
    replicas: int  # ranks that hold the same, and share out the optimizer's state where it is distributed
    is_distributed: bool

    @functools.cached_property
    def num_parameters(self) -> int:
        return sum(size * count for bucket in self.buckets for size, count in bucket)

    @functools.cached_property
    def num_elements(self) -> int:
        """With the padding between parameters, and at the end of a bucket."""
        if not self.is_distributed:
            return self.num_parameters
        multiple = math.lcm(BUCKET_MULTIPLE, self.replicas)
        total = 0
        for bucket in self.buckets:
            padded = sum(_ceil(size, PARAMETER_MULTIPLE) * count for size, count in bucket)
            first, _ = bucket[0]  # Megatron fills a bucket from its last parameter to its first
            total += _ceil(padded - _ceil(first, PARAMETER_MULTIPLE) + first, multiple)
        return total

    @property
    def num_updated(self) -> int:
        """Elements that this rank's optimizer updates: of the largest share, if they are shared out."""
        return -(-self.num_elements // self.replicas) if self.is_distributed else self.num_parameters

    @property
    def largest_updated(self) -> int:
        """Of the largest tensor that it updates."""
        return min(max((size for bucket in self.buckets for size, _ in bucket), default=0), self.num_updated)


@dataclass(frozen=True)
class StageParameters:
    """What each rank of a pipeline stage holds: all hold as much."""

    stage: int
    ranks: range
    layers: tuple[int, ...]
    dense: ParameterBuffer
    experts: ParameterBuffer
    dtype: str

    @property
    def buffers(self) -> tuple[ParameterBuffer, ParameterBuffer]:
        return self.dense, self.experts

    @property
    def num_parameters(self) -> int:
        return sum(buffer.num_parameters for buffer in self.buffers)

    @property
    def weight_bytes(self) -> int:
        return sum(buffer.num_elements for buffer in self.buffers) * bytes_of_type(self.dtype)

    @property
    def gradient_bytes(self) -> int:
        return sum(buffer.num_elements for buffer in self.buffers) * GRADIENT_BYTES

    @property
    def optimizer_bytes(self) -> int:
        """Moments, and main parameters where the model's are not float32."""
        state = MOMENT_BYTES + (MAIN_BYTES if self.dtype == "bfloat16" else 0)
        return sum(buffer.num_updated for buffer in self.buffers) * state

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def count_parameters(parallel: ParallelConfig, shape: ModelShape, dtype: str) -> list[StageParameters]:
    """What the ranks of each stage hold, by the weight map.

    Raises:
        ValueError: the layers can't be shared out evenly, or the ranks of a stage not among the experts' sizes.
    """
    layout = trainer_layout(parallel)
    dense, experts = _sizes_of_layer(parallel, shape)
    return [_count_stage(parallel, shape, dtype, layout, stage, dense, experts) for stage in range(parallel.pipeline)]


def count_model(shape: ModelShape) -> int:
    """Parameters of the whole model, without padding."""
    per_layer = sum(
        size * (shape.num_experts if of_experts else 1) for size, of_experts in _whole_sizes_of_layer(shape)
    )
    return per_layer * shape.num_layers + sum(_whole_sizes_of_ends(shape))


def count_experts(shape: ModelShape) -> int:
    """Parameters of all experts, without the routers."""
    of_one = sum(size for size, of_experts in _whole_sizes_of_layer(shape) if of_experts)
    return of_one * shape.num_experts * shape.num_layers


def largest_parameter(shape: ModelShape) -> int:
    """Elements of the largest of the model's parameters, as Megatron joins them."""
    return max(*_whole_sizes_of_ends(shape), *(size for size, _ in _whole_sizes_of_layer(shape)))


def _whole_sizes_of_layer(shape: ModelShape) -> list[tuple[int, bool]]:
    """Elements of each parameter of a layer, of experts of one, and whether it is one expert's."""
    rows = LAYERS[shape.architecture]
    return [(_whole_size(layer_entry(row, 0, 0 if is_expert(row) else None), shape), is_expert(row)) for row in rows]


def _whole_sizes_of_ends(shape: ModelShape) -> list[int]:
    ends = [EMBEDDING, FINAL_NORM] + ([] if shape.tie_word_embeddings else [HEAD])
    return [_whole_size(entry, shape) for entry in ends]


def _count_stage(
    parallel: ParallelConfig,
    shape: ModelShape,
    dtype: str,
    layout: TrainerLayout,
    stage: int,
    dense: list[int],
    experts: list[int],
) -> StageParameters:
    layers = layout.layers_of_stage(shape.num_layers, stage)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    size = functools.partial(_shard_size, shape=shape, parallel=parallel)
    start = ((size(EMBEDDING), 1),) if is_first else ()
    end = ((size(FINAL_NORM), 1),) if is_last else ()
    body = *((of_layer, len(layers)) for of_layer in dense), *end
    head = ((size(HEAD), 1),) if is_last and not (shape.tie_word_embeddings and is_first) else ()
    if shape.tie_word_embeddings and parallel.pipeline > 1:  # both ends of the pipeline hold it, in a bucket of its own
        buckets = tuple(bucket for bucket in (start, body, head) if bucket)
    else:
        buckets = (start + body + head,)
    per_layer = shape.num_experts // parallel.expert if experts else 0
    of_experts = tuple((of_expert, per_layer * len(layers)) for of_expert in experts)
    first = stage * layout.ranks_per_stage
    expert_replicas = layout.ranks_per_stage // (parallel.expert * parallel.expert_tensor)
    is_distributed = parallel.distributed_optimizer
    return StageParameters(
        stage=stage,
        ranks=range(first, first + layout.ranks_per_stage),
        layers=tuple(layers),
        dense=ParameterBuffer(buckets, parallel.data * parallel.context, is_distributed),
        experts=ParameterBuffer((of_experts,) if experts else (), expert_replicas, is_distributed),
        dtype=dtype,
    )


def _sizes_of_layer(parallel: ParallelConfig, shape: ModelShape) -> tuple[list[int], list[int]]:
    """Elements of each parameter of one layer on one rank: of all but experts, and of one expert."""
    dense, experts = [], []
    for row in LAYERS[shape.architecture]:
        if is_expert(row):
            experts.append(_shard_size(layer_entry(row, 0, 0), shape, parallel))
        else:
            dense.append(_shard_size(layer_entry(row, 0, None), shape, parallel))
    return dense, experts


def _shard_size(entry: WeightMapEntry, shape: ModelShape, parallel: ParallelConfig) -> int:
    if entry.rule == "vocab":
        return padded_vocab_size(shape.vocab_size, parallel.tensor) // parallel.tensor * shape.hidden_size
    size = _whole_size(entry, shape)
    if entry.rule == "replicated":
        return size
    return size // (parallel.tensor if entry.expert is None else parallel.expert_tensor)


def _whole_size(entry: WeightMapEntry, shape: ModelShape) -> int:
    return sum(math.prod(hf_tensor_shape(name, shape)) for name in entry.hf_names)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
