"""One rank of the policy: Megatron-Core model, optimizer, and the calls that the loop makes. Knows nothing of Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from fipo_megatron.algorithm.loss_metrics import (
    NUM_STATISTICS,
    LossStatistics,
    all_reduce_statistics,
    loss_metrics,
    reduce_statistics,
)
from fipo_megatron.checkpoint.hf_folder import write_hf_folder
from fipo_megatron.config.schema import Config, OptimizerConfig
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.model.platform import prepare_process, resolve_platform
from fipo_megatron.ops.future_kl_scan import choose_scan
from fipo_megatron.ops.token_logprob.implementations import pick_implementation
from fipo_megatron.parallel.groups import initialize_groups, listening_socket, make_store
from fipo_megatron.parallel.packed import PackedTokens, ResponseRows, make_packed_tokens
from fipo_megatron.parallel.plan import PackingPlan, PackingUnits, forward_cost, microbatch_tokens, plan_packing
from fipo_megatron.reshard.connect import WeightsOut, connect_sender
from fipo_megatron.reshard.session import WeightSession
from fipo_megatron.types import PolicyUpdate, TrainingBatch, TransferCost, UpdateCost

if TYPE_CHECKING:  # Megatron-Core must not be imported before `prepare_process`
    from fipo_megatron.checkpoint.policy_state import PolicySave, RankState

FLOAT32_MAX = torch.finfo(torch.float32).max
NORM_ELEMENTS = 1 << 24  # of a piece of the gradient whose norm is computed at once


class PolicyDivergedError(RuntimeError):
    """An update would have lost the policy; it was not made."""


class MegatronPolicy:
    """Rank `rank` of the policy. Methods marked collective must be called on every rank."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.rank = rank
        self.platform = resolve_platform(config.platform)
        prepare_process(self.platform, config.parallel)
        self.listener = listening_socket(config.cluster.address, config.cluster.master_port) if rank == 0 else None
        self.sender: WeightsOut | None = None
        self.pending_save: PolicySave | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address and port where the ranks meet; rank 0 holds the port open until `connect`."""
        assert self.listener is not None
        return self.config.cluster.address, int(self.listener.getsockname()[1])

    def close(self) -> None:
        """Say goodbye to the engines' workers, which would take this rank for dead, and leave the process groups."""
        if self.sender is not None:
            self.sender.close()
        dist.destroy_process_group()

    def connect(self, address: str, port: int) -> None:
        """Join the trainer's process groups, at rank 0's rendezvous. Collective."""
        config = self.config
        timeout_s = config.timeouts.startup_s
        store = make_store(address, port, config.parallel.world_size, timeout_s, self.listener)
        self.groups = initialize_groups(
            config.parallel, self.rank, store, self.platform.backend, config.timeouts.collective_s
        )

    def load(self, folder: Path, optimizer: OptimizerConfig, random_seed: int | None = None) -> None:
        """Build model and optimizer of the folder's shape, with its weights, or random ones of a seed. Collective."""
        from fipo_megatron.model.build import build_model, build_optimizer
        from fipo_megatron.model.host_offload import HostOffload
        from fipo_megatron.model.weights import PolicyWeights
        from fipo_megatron.trainer.step import PipelineStep

        self.folder = folder
        shape = read_model_shape(folder)
        self.chunks = build_model(self.config, shape, self.platform, self.groups, random_seed)
        self.weights = PolicyWeights(self.chunks, shape, self.groups)
        if random_seed is None:
            self.weights.load(folder)
        self.cost = forward_cost(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.moe_intermediate_size * shape.experts_per_token
            if shape.num_experts
            else shape.intermediate_size,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
        )
        parallel = self.config.parallel
        self.units = PackingUnits(parallel.context, parallel.tensor if parallel.sequence_parallel else 1)
        self.optimizer = build_optimizer(optimizer, self.config.parallel, self.chunks)
        self.optimizer_settings = optimizer
        self.num_updates = 0  # since the weights were loaded: all ranks have the same, or one is stale
        self.host_offload = HostOffload(self.chunks, self.optimizer)
        self.step = PipelineStep(self.chunks, self.groups, shape.vocab_size, self.config.kernels)
        self.reference = None
        if self.config.algorithm.reference_kl_coef > 0:
            self.reference = {name: p.detach().to("cpu", copy=True) for name, p in self.weights.parameters.items()}

    def describe_kernels(self) -> str:
        """What this rank computes log-probs and future-KL with, on one line."""
        kernels, device = self.config.kernels, self.platform.device
        example = torch.empty(0, dtype=getattr(torch, self.config.model.dtype), device=device)
        operation = "linear_logprob" if kernels.logprob_from == "hidden_states" else "token_logprob"
        logprob = pick_implementation(operation, kernels.logprob, example)
        line = f"log-probs from {kernels.logprob_from.replace('_', ' ')} by {logprob}"
        if self.config.algorithm.objective != "fipo":
            return line
        scan = choose_scan(device.type) if kernels.future_kl_scan == "auto" else kernels.future_kl_scan
        return f"{line}, future-KL by {scan}"

    # ---------------------------------------------------------------- log-probs

    def logprobs(self, batch: TrainingBatch) -> list[ResponseRows] | None:
        """Log-probs of this rank's response tokens, and where they stand in the batch's response arrays. Collective.

        Only ranks that speak for their tokens (see `reports`) return them; `merge_response_rows` joins all.
        """
        self.host_offload.reload("parameters")
        microbatches = self._microbatches(batch, self.plan(batch, range(batch.num_samples)))
        logprobs = self.step.logprobs(microbatches, self.config.rollout.temperature)
        if not self.reports:
            return None
        return [
            (packed.batch_rows.numpy(force=True), values.float().numpy(force=True))
            for packed, values in zip(microbatches, logprobs, strict=True)
        ]

    def ref_logprobs(self, batch: TrainingBatch) -> list[ResponseRows] | None:
        """The same, by the frozen initial policy. Collective."""
        assert self.reference is not None, "needs algorithm.reference_kl_coef > 0"
        self.host_offload.reload("parameters")
        current = {name: p.detach().to("cpu", copy=True) for name, p in self.weights.parameters.items()}
        self._set_parameters(self.reference)
        try:
            return self.logprobs(batch)
        finally:
            self._set_parameters(current)

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its tokens: last stage, first tensor-parallel rank."""
        return self.groups.is_last_stage and self.groups.tensor.rank() == 0

    # ---------------------------------------------------------------- updates

    def update(self, batch: TrainingBatch, samples: Sequence[int], lr: float) -> PolicyUpdate:
        """One optimizer step of FIPO's loss over a mini-batch. Collective; equal on every rank but for its memory.

        No step is made, and weights and optimizer stay as they were, where no token counts in the loss, or where the
        loss or the norm of the gradient is not finite.

        Raises:
            PolicyDivergedError: the mini-batch's KL is beyond `trainer.max_policy_kl`; the weights are left as they
                were.
        """
        config, plan = self.config, self.plan(batch, samples)
        vector = self.backward(batch, plan)
        statistics, metrics = vector.cpu().numpy(), loss_metrics(vector, config.algorithm)
        if not (math.isfinite(metrics["loss"]) and self._has_finite_gradient()):
            return PolicyUpdate(statistics, grad_norm=None, skipped="not_finite", cost=self._cost_of(plan))
        if abs(metrics["policy_kl"]) > config.trainer.max_policy_kl:
            raise PolicyDivergedError(
                f"a mini-batch's policy KL is {metrics['policy_kl']:.4g}, beyond trainer.max_policy_kl = "
                f"{config.trainer.max_policy_kl:g}; the update was not made: lower optimizer.lr ({lr:g}), raise "
                "optimizer.warmup_steps, or use larger mini-batches"
            )
        if LossStatistics(vector).sums["kept_tokens"] == 0:
            return PolicyUpdate(statistics, grad_norm=None, skipped="empty", cost=self._cost_of(plan))
        grad_norm = self._optimizer_step(lr)
        return PolicyUpdate(statistics, grad_norm, cost=self._cost_of(plan))

    def backward(self, batch: TrainingBatch, plan: PackingPlan) -> torch.Tensor:
        """Statistics of FIPO's loss over the mini-batch of a plan, float64, equal on every rank; its gradient is left
        in Megatron's buffers. Collective."""
        from fipo_megatron.trainer.step import policy_loss

        loss = partial(
            policy_loss,
            config=self.config.algorithm,
            groups=self.groups,
            sequence_norm=self.config.rollout.max_response_tokens,
            scan_impl=self.config.kernels.future_kl_scan,
        )
        entropy = "differentiable" if self.config.algorithm.entropy_coef > 0 else "detached"
        self.host_offload.reload("parameters", "gradients")
        microbatches = self._microbatches(batch, plan)
        statistics = self.step.gradients(
            microbatches,
            self.config.rollout.temperature,
            loss,
            entropy if self.config.kernels.has_entropy else "none",
        )
        return self._all_reduce(statistics, NUM_STATISTICS)

    def supervised_update(self, batch: TrainingBatch, samples: Sequence[int], lr: float) -> float:
        """Mean negative log-likelihood per response token of one supervised optimizer step. Collective."""
        from fipo_megatron.trainer.step import supervised_loss

        self.host_offload.reload("parameters", "gradients")
        microbatches = self._microbatches(batch, self.plan(batch, samples))
        statistics = self.step.gradients(microbatches, 1.0, supervised_loss)
        total = (
            torch.stack(statistics).sum(0)
            if statistics
            else torch.zeros(2, dtype=torch.float64, device=self.platform.device)
        )
        dist.all_reduce(total, group=self.groups.data_context)
        self._from_last_stage(total)
        if not self._has_finite_gradient():
            raise PolicyDivergedError(f"a supervised update's gradient is not finite; lower the learning rate ({lr:g})")
        self._optimizer_step(lr)
        return (total[0] / total[1]).item()

    def _has_finite_gradient(self) -> bool:
        """Whether the gradient in Megatron's buffers has a finite norm: Adam would keep a NaN. Collective."""
        buffers = [buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        # Piece by piece: each is converted to float64, which of a whole buffer is twice the gradients' memory again.
        pieces = [piece for buffer in buffers for piece in buffer.grad_data.split(NORM_ELEMENTS)]
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
        squares = torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=self.groups.world)
        return squares.item() < FLOAT32_MAX  # False for NaN; in float32 Megatron sums these squares to clip by them

    def _optimizer_step(self, lr: float) -> float:
        """The gradient's norm before clipping."""
        self.host_offload.reload("optimizer")
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.optimizer_settings.weight_decay * group["wd_mult"]
        succeeded, grad_norm, _ = self.optimizer.step()
        self.num_updates += 1
        if not succeeded or not math.isfinite(grad_norm):
            raise PolicyDivergedError(f"the gradient's norm is {grad_norm}; lower optimizer.lr ({lr:g})")
        return float(grad_norm)

    def _all_reduce(self, statistics: list[torch.Tensor], size: int) -> torch.Tensor:
        """Statistics over microbatches, data- and context-parallel ranks, known on every stage."""
        if self.groups.is_last_stage:
            vector = all_reduce_statistics(
                reduce_statistics(statistics).to(self.platform.device), self.groups.data_context
            )
        else:
            vector = torch.zeros(size, dtype=torch.float64, device=self.platform.device)
        self._from_last_stage(vector)
        return vector

    def _from_last_stage(self, vector: torch.Tensor) -> None:
        if self.groups.pipeline.size() > 1:
            dist.broadcast(vector, group=self.groups.pipeline, group_src=self.groups.pipeline.size() - 1)

    def plan(self, batch: TrainingBatch, samples: Sequence[int]) -> PackingPlan:
        """The microbatches of a mini-batch on all data-parallel ranks; every rank makes the same plan."""
        sample_lens = np.diff(batch.cu_seqlens)
        return plan_packing(
            samples,
            sample_lens,
            self.cost.of(sample_lens, sample_lens - batch.prompt_lens),
            self.units,
            data_size=self.groups.data.size(),
            microbatch_tokens=microbatch_tokens(self.config),
            microbatch_multiple=self.groups.pipeline.size() if len(self.chunks) > 1 else 1,
        )

    def _microbatches(self, batch: TrainingBatch, plan: PackingPlan) -> list[PackedTokens]:
        """This rank's part of a plan."""
        return [
            make_packed_tokens(batch, chosen, self.units, self.groups.context.rank()).to(self.platform.device)
            for chosen in plan.microbatches[self.groups.data.rank()]
        ]

    def _cost_of(self, plan: PackingPlan) -> UpdateCost:
        cost = UpdateCost(
            num_microbatches=plan.num_microbatches,
            packing_waste_frac=plan.waste,
            unused_frac=plan.unused,
            # Ranks that share out experts meet in every layer of every microbatch.
            imbalance_frac=plan.imbalance if self.config.parallel.expert == 1 else plan.synchronous_imbalance,
            peak_memory_bytes=self.platform.peak_memory_bytes(),
        )
        self.platform.reset_peak_memory()
        return cost

    def _set_parameters(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.weights.parameters.items():
                parameter.copy_(values[name])

    # ---------------------------------------------------------------- weights out

    def listen_for_engines(self) -> tuple[str, int]:
        """Address and port where rank 0 will meet the engines' workers."""
        self.listener = listening_socket(self.config.cluster.address)
        return self.rendezvous()

    def connect_engines(self, session: WeightSession) -> None:
        """Meet the engines' workers; every rank, while the engines connect.

        Raises:
            ConnectionError: an engine did not come.
        """
        if self.sender is not None:
            self.sender.close()
        self.sender = None
        self.host_offload.reload("parameters")
        self.sender = connect_sender(
            session, self.weights, self.rank, self.listener, self.platform.device, self._write_folder
        )

    def push_weights(self, version: int) -> TransferCost:
        """Send this rank's part of the weights to the engines' workers, as `version`; what it took. Every rank.

        Raises:
            ConnectionError: an engine is gone. Ranks that send nothing to it have finished, all can go on.
        """
        assert self.sender is not None, "connect_engines comes first"
        start = time.perf_counter()
        try:
            self.host_offload.reload("parameters")
            num_bytes = self.sender.send(version, self.num_updates)
        except BaseException:
            self.sender.close()  # so that no engine waits for what does not come
            raise
        return TransferCost(num_bytes, time.perf_counter() - start)

    def _write_folder(self, weights: Iterable[tuple[str, torch.Tensor]], target: Path) -> None:
        write_hf_folder(weights, self.folder, target)

    def export(self, source: Path, target: Path) -> None:
        """Write the policy as a Hugging Face folder, config and tokenizer from `source`. Collective."""
        self.host_offload.reload("parameters")
        weights = self.weights.gather()
        if self.rank == 0:
            write_hf_folder(weights, source, target)
        else:
            for _ in weights:
                pass

    # ---------------------------------------------------------------- state on disk

    def begin_save(self, folder: Path) -> None:
        """Copy weights, optimizer and random generators to host memory, and write them to an empty folder meanwhile.
        Collective; the next update may follow at once. `finish_save` ends it."""
        from fipo_megatron.checkpoint.policy_state import PolicySave

        if self.pending_save is not None:
            raise RuntimeError(f"{folder}: another save has begun; finish_save comes first")
        self.pending_save = PolicySave(self._rank_state(), folder)

    def is_save_written(self) -> bool:
        """Whether this rank has written its part of the save under way, or failed to."""
        return self.pending_save is None or self.pending_save.is_written()

    def finish_save(self) -> list[str]:
        """Wait until all ranks have written; the files of this rank, relative to the folder. Collective.

        Raises:
            RuntimeError: a rank could not write, or no save has begun.
        """
        if self.pending_save is None:
            raise RuntimeError("no save has begun: begin_save comes first")
        pending, self.pending_save = self.pending_save, None
        return pending.finish()

    def load_state(self, folder: Path) -> bool:
        """Go on from a saved state, of this or another layout, after `load` of the model's folder. Collective.

        The reference policy stays what `load` read. In another layout random generators start from the run's seed; the
        same on every rank, whether they do.

        Raises:
            ValueError: the folder has no such state, or one of another model.
        """
        from fipo_megatron.checkpoint.policy_state import load_policy_state

        loaded = load_policy_state(self._rank_state(), folder, self.config.seed)
        self.num_updates = loaded.num_updates
        return loaded.is_reseeded

    def random_states(self) -> dict[str, np.ndarray]:
        """This rank's random generators, a uint8 array each, for `set_random_states`."""
        from fipo_megatron.checkpoint.policy_state import random_states

        return {name: state.numpy() for name, state in random_states().items()}

    def set_random_states(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Put the generators into this rank's states, of those of all ranks."""
        from fipo_megatron.checkpoint.policy_state import set_random_states

        set_random_states({name: torch.tensor(state) for name, state in states[self.rank].items()})

    def _rank_state(self) -> RankState:
        from fipo_megatron.checkpoint.policy_state import RankState

        self.host_offload.reload("parameters", "optimizer")
        layout = self.config.parallel.model_dump(mode="json")
        return RankState(self.chunks, self.optimizer, self.num_updates, layout)

    def offload(self) -> None:
        """Move the policy to host memory; each call above brings back the parts that it needs."""
        self.host_offload.offload()
