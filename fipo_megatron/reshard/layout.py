"""Which rank holds what: the trainer's ranks as Megatron-Core numbers them, and the engines' workers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fipo_megatron.config.schema import ParallelConfig, RolloutConfig


@dataclass(frozen=True)
class TrainerLayout:
    """The trainer's ranks, numbered in Megatron-Core's order: tensor, context, data, pipeline (the last is slowest).

    Experts share the tensor * context * data ranks of a stage out anew, in the order expert-tensor, expert, replica.

    Raises:
        ValueError: the ranks of a stage can't be shared out among the experts' sizes.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        if self.ranks_per_stage % (self.expert * self.expert_tensor):
            raise ValueError(
                f"parallel.expert * parallel.expert_tensor = {self.expert * self.expert_tensor}: must divide "
                f"parallel.tensor * parallel.context * parallel.data = {self.ranks_per_stage}"
            )

    @property
    def ranks_per_stage(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        return self.ranks_per_stage * self.pipeline

    def dense_holders(self, stage: int, shard: int | None) -> list[int]:
        """The ranks of a pipeline stage that hold a tensor-parallel shard, or, `None`, a parameter that is not cut."""
        first = stage * self.ranks_per_stage
        if shard is None:
            return list(range(first, first + self.ranks_per_stage))
        return list(range(first + shard, first + self.ranks_per_stage, self.tensor))

    def expert_holders(self, stage: int, expert_rank: int, shard: int) -> list[int]:
        """The ranks of a stage that hold shard `shard` of the experts of expert-parallel rank `expert_rank`."""
        first = stage * self.ranks_per_stage
        own = first + shard + self.expert_tensor * expert_rank
        return list(range(own, first + self.ranks_per_stage, self.expert_tensor * self.expert))

    def layers_of_stage(self, num_layers: int, stage: int) -> list[int]:
        """Global numbers of the layers of a pipeline stage: one run of them, or one a model chunk when interleaved.

        Raises:
            ValueError: the layers can't be shared out evenly.
        """
        num_chunks = self.pipeline * (self.virtual_pipeline or 1)
        if num_layers % num_chunks:
            raise ValueError(f"num_layers = {num_layers}: must be a multiple of the {num_chunks} pipeline chunks")
        size = num_layers // num_chunks
        return [
            layer
            for chunk in range(stage, num_chunks, self.pipeline)
            for layer in range(chunk * size, (chunk + 1) * size)
        ]


@dataclass(frozen=True)
class EngineLayout:
    """The engines' workers: replicas of pipeline * tensor workers, tensor fastest, as vLLM and SGLang number them.

    With `expert_parallel` the workers of a pipeline stage hold whole experts, else each holds a slice of all.
    """

    tensor: int = 1
    pipeline: int = 1
    expert_parallel: bool = False
    replicas: int = 1

    @property
    def workers_per_replica(self) -> int:
        return self.tensor * self.pipeline

    @property
    def num_workers(self) -> int:
        return self.workers_per_replica * self.replicas

    def layers_of_stage(self, num_layers: int, stage: int) -> range:
        """The layers of an engine's pipeline stage: what is left of an even share goes to the last stages but one."""
        sizes = [num_layers // self.pipeline] * self.pipeline
        for i in range(num_layers % self.pipeline):
            sizes[-2 - i] += 1
        first = sum(sizes[:stage])
        return range(first, first + sizes[stage])

    def experts_of_worker(self, num_experts: int, tensor_rank: int) -> range:
        """The experts that a worker holds, of which the first workers have one more where they can't be even."""
        if not self.expert_parallel:
            return range(num_experts)
        size, rest = divmod(num_experts, self.tensor)
        first = tensor_rank * size + min(tensor_rank, rest)
        return range(first, first + size + (tensor_rank < rest))


def trainer_layout(parallel: ParallelConfig) -> TrainerLayout:
    """The layout of the policy's ranks."""
    return TrainerLayout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=parallel.data,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
    )


def engine_layout(rollout: RolloutConfig) -> EngineLayout:
    """The layout of the engines' workers."""
    return EngineLayout(rollout.tensor, rollout.pipeline, rollout.expert_parallel, rollout.replicas)
