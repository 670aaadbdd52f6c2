"""How much memory each rank takes in each phase of a step, before any process exists. Pure arithmetic, no Megatron.

A phase is as large as its fullest moment, a moment the sum of its items. What is not a tensor of the policy's or the
engine's is a named input (`MemoryInputs`), and so is what only a run can tell: how evenly a router spreads its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.ops.linear_logprob.workspace import choose_blocking, count_bytes
from fipo_megatron.parallel.plan import PackingUnits, microbatch_tokens
from fipo_megatron.planner.activations import (
    FLOAT_BYTES,
    LayerKind,
    LayerSizes,
    kept_by_layer,
    kept_by_norm,
    layer_sizes,
    most_in_backward,
    most_in_forward,
)
from fipo_megatron.planner.parameters import (
    StageParameters,
    bytes_of_type,
    count_model,
    count_parameters,
    largest_parameter,
)
from fipo_megatron.reshard.layout import engine_layout

GIB, MIB = 1 << 30, 1 << 20
PHASES = ("rollout", "old_logprobs", "train", "sync")
# Of a packed microbatch (parallel/packed.py): token and number of each position; index, row in the batch, target, mask,
# advantage, old and reference log-prob of each response row.
POSITION_BYTES, ROW_BYTES = 16, 37
LOSS_ARRAYS = 24  # float32 of each response row, in the loss and its gradient (algorithm/fipo_loss.py)
CPU_SCRATCH_BYTES = 2 * (2 * MIB)  # two blocks of rows in ops/token_logprob/torch_impl.py, of one thread
DOUBLE_BYTES, NORM_ELEMENTS = 8, 1 << 24  # of the piece of the gradient whose norm is computed (trainer/policy.py)


def _input(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class MemoryInputs:
    """What no formula gives, on a GPU. On a CPU only `expert_load` counts."""

    context_gib: float = _input(1.0, "CUDA context, loaded kernels and workspaces of cuBLAS, of the trainer's process")
    communication_gib: float = _input(2.0, "buffers of NCCL, all groups of a rank together")
    fragmentation: float = _input(0.05, "what torch's allocator holds beyond tensors, as a share of them")
    engine_context_gib: float = _input(2.0, "what an engine keeps of a shared device while it sleeps: context, graphs")
    expert_load: float = _input(1.3, "tokens of the expert-parallel rank that gets most, over the mean")

    def with_values(self, **values: float) -> MemoryInputs:
        """Others in their place.

        Raises:
            ValueError: no such name, or a value that can't be.
        """
        known = {f.name for f in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"--memory {name}={value:g}: not known; choose one of {', '.join(sorted(known))}")
            if not (1 if name == "expert_load" else 0) <= value < math.inf:
                raise ValueError(f"--memory {name}={value:g}: must be {'1' if name == 'expert_load' else '0'} or more")
        return replace(self, **values)


@dataclass(frozen=True)
class Microbatches:
    """The microbatches of a mini-batch on one rank, at their largest."""

    number: int
    tokens: int  # of one, on one context-parallel rank
    rows: int  # response rows of one, on one context-parallel rank
    longest: int  # positions of the longest sequence, over all context-parallel ranks
    total_tokens: int  # of all of them
    num_updates: int = 2  # mini-batches of a step: with more than one, optimizer state is there in the backward pass


def largest_microbatches(config: Config) -> Microbatches:
    """Those of a run whose samples are all of the greatest length, with a prompt of nothing: no batch takes more."""
    rollout, trainer, parallel = config.rollout, config.trainer, config.parallel
    units = PackingUnits(parallel.context, parallel.tensor if parallel.sequence_parallel else 1)
    longest = int(units.sequence_lens(np.array([rollout.max_prompt_tokens + rollout.max_response_tokens]))[0])
    tokens = units.capacity(microbatch_tokens(config)) // parallel.context
    per_microbatch = max(tokens * parallel.context // longest, 1)
    samples = -(-trainer.mini_batch_prompts * rollout.samples_per_prompt // parallel.data)
    number = -(-samples // per_microbatch)
    if parallel.virtual_pipeline is not None:
        number = -(-number // parallel.pipeline) * parallel.pipeline
    return Microbatches(
        number=number,
        tokens=tokens,
        rows=tokens,
        longest=longest,
        total_tokens=number * tokens,
        num_updates=rollout.prompts_per_step // trainer.mini_batch_prompts,
    )


@dataclass(frozen=True)
class Moment:
    """A point of a phase, and what stands in memory then."""

    phase: str
    name: str
    items: dict[str, float]  # bytes

    @property
    def total(self) -> float:
        return sum(self.items.values())

    @property
    def largest(self) -> str:
        return max(self.items, key=self.items.__getitem__)


@dataclass(frozen=True)
class StageMemory:
    """What each rank of a stage takes."""

    parameters: StageParameters
    phases: dict[str, Moment]  # the fullest moment of each
    host_bytes: float  # of host memory that a rank takes beside its device

    @property
    def peak(self) -> Moment:
        """The fullest of all phases."""
        return max(self.phases.values(), key=lambda moment: moment.total)


def in_flight(config: Config, stage: int, num_microbatches: int) -> tuple[int, int]:
    """Microbatches that a stage has begun and not ended at most, and the layers' share that each of them keeps, as a
    divisor: model chunks of a stage under the interleaved schedule.

    Megatron's 1F1B (`get_pp_rank_microbatches`): warm-up and one more; Narayanan et al. 2021, sections 2.2 and 2.3.
    """
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    if chunks == 1:
        return min(pipeline - stage, num_microbatches), 1
    warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
    return min(warm_up + 1, num_microbatches * chunks), chunks


def predict_memory(
    config: Config,
    shape: ModelShape,
    kind: LayerKind,
    inputs: MemoryInputs,
    microbatches: Microbatches | None = None,
    device_bytes: int | None = None,
) -> list[StageMemory]:
    """What each rank of each pipeline stage takes, by phase; on a GPU with what `inputs` add.

    `microbatches`: the largest that the configuration allows unless others are given. `device_bytes`: of a device,
    of which a colocated engine takes its share. Raises ValueError for a layout that can't hold the model.
    """
    planner = _Planner(config, shape, kind, inputs, microbatches or largest_microbatches(config), device_bytes)
    return [planner.stage(parameters) for parameters in count_parameters(config.parallel, shape, config.model.dtype)]


class _Planner:
    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        kind: LayerKind,
        inputs: MemoryInputs,
        microbatches: Microbatches,
        device_bytes: int | None,
    ) -> None:
        self.config, self.shape, self.kind, self.inputs = config, shape, kind, inputs
        self.microbatches, self.device_bytes = microbatches, device_bytes
        self.sizes: LayerSizes = layer_sizes(
            kind,
            config.model.dtype,
            config.parallel,
            shape,
            microbatches.tokens,
            microbatches.longest,
            inputs.expert_load,
        )
        self.b = bytes_of_type(config.model.dtype)
        self.engine_weights = engine_weight_bytes(config, shape)

    def stage(self, held: StageParameters) -> StageMemory:
        """All phases of a stage's ranks."""
        moments = [
            Moment("rollout", "the engine at work", self._state(held) | self._engine("weights", "KV cache")),
            Moment("sync", "weights on their way", self._sending(held)),
            *self._logprobs(held),
            *self._train(held),
        ]
        phases = {}
        for phase in PHASES:
            fullest = max((m for m in moments if m.phase == phase), key=lambda moment: moment.total)
            phases[phase] = self._with_reserve(fullest)
        return StageMemory(held, phases, self._host_bytes(held))

    # ------------------------------------------------------------ what rests

    def _state(self, held: StageParameters, *parts: str) -> dict[str, float]:
        """Parts of the policy that are there: all, unless it rests in host memory and brings back what it needs."""
        sizes = {"weights": held.weight_bytes, "gradients": held.gradient_bytes, "optimizer": held.optimizer_bytes}
        if not self.config.trainer.offload:
            return dict(sizes)
        if self.kind == "local_cpu":  # the copies are in the same memory; only gradients are freed
            copies = {"copies of offloaded state": float(held.weight_bytes + held.optimizer_bytes)}
            return {name: size for name, size in sizes.items() if name in parts} | copies
        return {name: size for name, size in sizes.items() if name in parts}

    def _engine(self, *parts: str) -> dict[str, float]:
        """What a colocated engine has on the same device."""
        config = self.config
        if config.placement.mode != "colocated" or self.device_bytes is None or self.kind == "local_cpu":
            return {}
        weights = self.engine_weights
        found = {"engine weights": weights} if "weights" in parts else {}
        if "KV cache" in parts:
            found["engine KV cache"] = max(config.rollout.gpu_memory_utilization * self.device_bytes - weights, 0.0)
        return found

    def _sending(self, held: StageParameters) -> dict[str, float]:
        """Buckets; or on rank 0, which writes a folder or broadcasts, a parameter's shards and what they make up."""
        if self.config.sync.transport in ("disk", "disk_delta", "broadcast"):
            own = {"gathered weights": 2.0 * largest_parameter(self.shape) * self.b} if held.stage == 0 else {}
        else:
            own = {"sync bucket": float(self.config.sync.bucket_mib * MIB)}
        return self._state(held, "weights") | own | self._engine("weights")

    def _host_bytes(self, held: StageParameters) -> float:
        total = 0.0
        if self.config.trainer.offload and self.kind != "local_cpu":
            total += held.weight_bytes + held.optimizer_bytes
        if self.config.algorithm.reference_kl_coef > 0:
            # The reference, which on a CPU is among the items, and the policy's weights while it computes.
            total += (1 if self.kind == "local_cpu" else 2) * held.weight_bytes
        if self.config.checkpoint.every_steps and self.config.checkpoint.asynchronous:
            total += held.weight_bytes + held.optimizer_bytes
        return total

    # ------------------------------------------------------------ what is computed

    def _logprobs(self, held: StageParameters) -> list[Moment]:
        """One microbatch at a time, of which nothing is kept."""
        batch = self._batch(self.microbatches.num_updates)
        state = self._state(held, "weights") | batch | self._reference_on_cpu(held)
        moments = [Moment("old_logprobs", "a layer", state | {"one layer at work": most_in_forward(self.sizes)})]
        if held.stage == self.config.parallel.pipeline - 1:
            hidden = {"one layer at work": 2 * self.sizes.s * self.sizes.h * self.b}
            moments.append(Moment("old_logprobs", "the head", state | hidden | self._head(keeps=False)))
        return moments

    def _train(self, held: StageParameters) -> list[Moment]:
        x, config = self.sizes, self.config
        parts = ["weights", "gradients"] + (["optimizer"] if self.microbatches.num_updates > 1 else [])
        state = self._state(held, *parts) | self._batch() | self._reference_on_cpu(held) | self._gathered()
        kept = self._kept(held)
        moments = []
        if held.stage == config.parallel.pipeline - 1:
            head = self._head(keeps=True)
            moments.append(Moment("train", "the head", state | kept | head))
            moments.append(Moment("train", "the head's backward pass", state | kept | self._head_backward()))
        work = most_in_backward(x)
        if config.trainer.recompute == "full":
            work += kept_by_layer(x, "none")
        elif config.trainer.recompute == "selective":
            work += (3 * x.q + 2 * x.kv) * x.b * x.t if x.is_cpu else x.kept_scores
        after_head = self._kept_rows() if held.stage == config.parallel.pipeline - 1 else {}
        moments.append(
            Moment("train", "a layer's backward pass", state | kept | after_head | {"one layer at work": work})
        )
        everything = self._state(held, "weights", "gradients", "optimizer") | self._batch() | self._gathered()
        widest = min(max(buffer.num_elements for buffer in held.buffers), NORM_ELEMENTS) * DOUBLE_BYTES
        before = self._state(held, *parts) | self._batch() | self._gathered()
        moments.append(Moment("train", "the norm of the gradient", before | {"gradient in float64": float(widest)}))
        moments.append(Moment("train", "the optimizer's step", everything | self._step(held)))
        return moments

    def _kept(self, held: StageParameters) -> dict[str, float]:
        """Of all microbatches in flight, for their backward passes."""
        x, config = self.sizes, self.config
        number, chunks = in_flight(config, held.stage, self.microbatches.number)
        layers = len(held.layers) / chunks
        kept = number * layers * kept_by_layer(x, config.trainer.recompute)
        if chunks > 1:  # the interleaved schedule keeps what it has sent
            kept += number * x.s * x.h * x.b
        return {"activations": kept}

    def _kept_rows(self) -> dict[str, float]:
        """Of the final norm, whose result is cut to the response rows."""
        rows = self.microbatches.rows * self.sizes.h * self.b
        return {"final norm and rows": kept_by_norm(self.sizes, with_result=False) + rows}

    def _head(self, keeps: bool) -> dict[str, float]:
        """Log-probs of the response rows."""
        rows, x = self.microbatches.rows, self.sizes
        head = self._head_bytes(with_gradient=False)
        if not keeps:
            return {"final norm and rows": float(rows * x.h * self.b), "head": head + self._scratch()}
        loss = {"loss": float(rows * LOSS_ARRAYS * FLOAT_BYTES)}
        return self._kept_rows() | loss | {"head": head + 2 * self._scratch()}

    def _head_backward(self) -> dict[str, float]:
        rows, x = self.microbatches.rows, self.sizes
        gradient = rows * x.h * self.b
        if self.config.kernels.logprob_from == "hidden_states" and self.b != FLOAT_BYTES:
            gradient += rows * x.h * FLOAT_BYTES  # which is summed in float32
        loss = {"loss": float(rows * LOSS_ARRAYS * FLOAT_BYTES)}
        return (
            self._kept_rows() | loss | {"head": self._head_bytes(with_gradient=True) + gradient + 2 * self._scratch()}
        )

    def _head_bytes(self, with_gradient: bool) -> float:
        """The workspace of the blocks of logits, or all logits."""
        rows, kernels, parallel = self.microbatches.rows, self.config.kernels, self.config.parallel
        columns = -(-self.shape.vocab_size // parallel.tensor)
        if kernels.logprob_from == "logits":
            wide = FLOAT_BYTES if kernels.logprob in ("megatron", "reference") else 0
            return float(rows * columns * (self.b * (2 if with_gradient else 1) + wide))
        dtype = torch.bfloat16 if self.b == 2 else torch.float32
        device = torch.device("cpu" if self.sizes.is_cpu else "cuda")
        arguments = (rows, columns, self.shape.hidden_size, dtype, device)
        blocking = choose_blocking(*arguments, kernels.workspace_mib * MIB)
        blocks = -(-columns // blocking.columns)
        statistics = 4 * FLOAT_BYTES * blocks * rows  # four numbers of each row and block of columns
        workspace = count_bytes(blocking, rows, self.shape.hidden_size, dtype, device)
        if not with_gradient and self.b != FLOAT_BYTES and (self.sizes.is_cpu or blocking.rows < rows):
            workspace -= blocking.columns * self.shape.hidden_size * FLOAT_BYTES  # the gradient of a block's weights
        return float(workspace + statistics)

    def _scratch(self) -> float:
        """Of a head's kernels in torch; an update has that of the microbatch before, too, whose graph lives on."""
        uses_torch = self.sizes.is_cpu and self.config.kernels.logprob_from == "hidden_states"
        return float(CPU_SCRATCH_BYTES) if uses_torch else 0.0

    def _step(self, held: StageParameters) -> dict[str, float]:
        """Temporaries of AdamW: torch's goes tensor by tensor on a CPU, over all at once on a device; Transformer
        Engine's has none."""
        if self.kind == "transformer_engine":
            return {}
        if self.kind == "local_cpu":
            return {"AdamW at work": 2.0 * FLOAT_BYTES * max(buffer.largest_updated for buffer in held.buffers)}
        return {"AdamW at work": float(FLOAT_BYTES * max(buffer.num_updated for buffer in held.buffers))}

    def _batch(self, num_mini_batches: int = 1) -> dict[str, float]:
        """The packed tokens of all microbatches of a call: of one mini-batch in an update, of all for old log-probs."""
        m = self.microbatches
        per_token = POSITION_BYTES + ROW_BYTES * m.rows / m.tokens
        return {"batch": num_mini_batches * m.total_tokens * per_token}

    def _gathered(self) -> dict[str, float]:
        """Megatron's one buffer for the gathered input of linear layers, which stays."""
        x = self.sizes
        return {"gathered input": x.t * x.h * x.b} if x.is_sharded and x.kind != "transformer_engine" else {}

    def _reference_on_cpu(self, held: StageParameters) -> dict[str, float]:
        if not self.sizes.is_cpu or self.config.algorithm.reference_kl_coef == 0:
            return {}
        return {"reference policy": float(held.weight_bytes)}

    def _with_reserve(self, moment: Moment) -> Moment:
        """With what a GPU holds beside tensors."""
        if self.sizes.is_cpu:
            return moment
        inputs = self.inputs
        own = sum(size for name, size in moment.items.items() if not name.startswith("engine"))
        reserve = (inputs.context_gib + inputs.communication_gib) * GIB + inputs.fragmentation * own
        items = moment.items | {"reserve": reserve}
        if self.config.placement.mode == "colocated" and moment.phase != "rollout":
            items["engine's context"] = inputs.engine_context_gib * GIB
        return Moment(moment.phase, moment.name, items)


def predict_machine(config: Config, shape: ModelShape, stages: Sequence[StageMemory]) -> dict[str, Moment]:
    """What all ranks and engines take of the memory of one machine, by phase, on a CPU: engines there keep weights and
    cache while they sleep, and copies in host memory are in the same. All ranks are taken to be at their fullest at
    once."""
    rollout, num_workers = config.rollout, engine_layout(config.rollout).num_workers
    shared = {"engine weights": num_workers * engine_weight_bytes(config, shape)}
    if rollout.engine != "hf":
        shared["engine KV cache"] = float(num_workers * rollout.kv_cache_gib * GIB)
    shared["copies in host memory"] = sum(stage.host_bytes * len(stage.parameters.ranks) for stage in stages)
    found = {}
    for phase in PHASES:
        items = dict(shared)
        for stage in stages:
            for name, size in stage.phases[phase].items.items():
                items[name] = items.get(name, 0.0) + size * len(stage.parameters.ranks)
        found[phase] = Moment(phase, "their fullest", items)
    return found


def engine_weight_bytes(config: Config, shape: ModelShape) -> float:
    """Of each worker of an engine, about: all parameters over its workers."""
    workers = config.rollout.tensor * config.rollout.pipeline
    return count_model(shape) * bytes_of_type(config.model.dtype) / workers
