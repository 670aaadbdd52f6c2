"""The updates of a step: which samples each takes, at which learning rate, and what they all did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from fipo_megatron.algorithm.loss_metrics import loss_metrics, reduce_statistics
from fipo_megatron.config.schema import AlgorithmConfig, Config
from fipo_megatron.types import PolicyUpdate

MINI_BATCH_STREAM = 2  # keeps the random numbers apart from those of other purposes with the same seed


def mini_batches(config: Config, step: int) -> list[list[int]]:
    """Sample indices of each update of a step: whole groups, in a seeded order."""
    order = np.random.default_rng([MINI_BATCH_STREAM, config.seed, step]).permutation(config.rollout.prompts_per_step)
    size = config.rollout.samples_per_prompt
    return [
        [
            int(group) * size + i
            for group in order[start : start + config.trainer.mini_batch_prompts]
            for i in range(size)
        ]
        for start in range(0, len(order), config.trainer.mini_batch_prompts)
    ]


def learning_rate(config: Config, step: int) -> float:
    """Constant after a linear warm-up over rollout steps."""
    return config.optimizer.lr * min(1.0, step / max(config.optimizer.warmup_steps, 1))


def update_metrics(updates: Sequence[PolicyUpdate], lr: float, config: AlgorithmConfig) -> dict[str, float]:
    """Metrics of the loss over all mini-batches of a step but those that are not finite, from their summed statistics,
    the mean gradient norm, and how many made no update; under `train/`."""
    metrics: dict[str, float] = {"lr": lr}
    finite = [torch.tensor(update.statistics) for update in updates if update.skipped != "not_finite"]
    if finite:
        metrics |= loss_metrics(reduce_statistics(finite), config)
    norms = [update.grad_norm for update in updates if update.grad_norm is not None]
    if norms:
        metrics["grad_norm"] = float(np.mean(norms))
    skipped = Counter(update.skipped for update in updates)
    metrics |= {
        "updates": skipped[None],
        "skipped_empty": skipped["empty"],
        "skipped_not_finite": skipped["not_finite"],
    }
    return {f"train/{name}": value for name, value in metrics.items()}


def cost_metrics(updates: Sequence[PolicyUpdate]) -> dict[str, float]:
    """What the updates of a step took in this layout, under `cost/`: microbatches of a rank in all, means of the shares
    over updates, and the most memory that a rank had in any."""
    costs = [update.cost for update in updates if update.cost is not None]
    if not costs:
        return {}
    return {
        "cost/microbatches": sum(cost.num_microbatches for cost in costs),
        "cost/packing_waste_frac": float(np.mean([cost.packing_waste_frac for cost in costs])),
        "cost/packing_unused_frac": float(np.mean([cost.unused_frac for cost in costs])),
        "cost/imbalance_frac": float(np.mean([cost.imbalance_frac for cost in costs])),
        "cost/peak_memory_gib": max(cost.peak_memory_bytes for cost in costs) / 2**30,
    }


class SkipGuard:
    """Ends a run whose mini-batches make no update any more."""

    def __init__(self, max_skipped: int) -> None:
        self._max_skipped = max_skipped
        self.num_skipped = 0  # in a row

    def observe(self, update: PolicyUpdate) -> None:
        """Counts mini-batches in a row that made no update; at the limit a RuntimeError."""
        self.num_skipped = 0 if update.skipped is None else self.num_skipped + 1
        if self.num_skipped < self._max_skipped:
            return
        remedy = {
            "empty": "no token of it counts in the loss: raise rollout.max_response_tokens if reward.mask_truncated "
            "leaves out what is cut there, or lower optimizer.lr if all sequences are dropped",
            "not_finite": "its loss or gradient is not finite: lower optimizer.lr, raise optimizer.warmup_steps, or "
            "set model.dtype=float32",
        }
        assert update.skipped is not None
        raise RuntimeError(
            f"trainer.max_skipped_updates: {self.num_skipped} mini-batches in a row made no update; of the last "
            + remedy[update.skipped]
        )
