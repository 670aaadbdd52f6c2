"""Agreement of the loss with cases from the authors' released losses; a case is an index entry and its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from fipo_megatron.algorithm.fipo_loss import fipo_loss
from fipo_megatron.algorithm.future_kl import future_kl, log_ratio
from fipo_megatron.algorithm.loss_metrics import loss_metrics
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.types import LossOutput, SegmentTable

# Our names for those of the authors' script and of the expected values.
CONFIG_NAMES = {
    "clip_ratio_low": "clip_ratio_low",
    "clip_ratio_high": "clip_ratio_high",
    "clip_ratio_c": "dual_clip_ratio",
    "decay_rate": "half_life_tokens",
    "future_kl_clip_ratio": "influence_clip",
    "future_kl_clip_high_only": "influence_clip_high_only",
    "safety_thresh": "safety_threshold",
}
INPUTS = ("log_prob", "old_log_prob", "advantages", "response_mask")
COUNT_EPSILON = 1e-8  # added to the count of tokens by the authors' masked mean
UNDEFINED_ERROR = 1e300  # stands for an error that is not a number


@dataclass(frozen=True)
class CaseErrors:
    """Relative errors of one case; that of gradient and future KL is the norm of the difference over the norm."""

    loss: float
    grad: float
    future_kl: float  # 0 where the objective has none
    metrics: float  # the worst metric

    def within(self, dtype: torch.dtype) -> bool:
        """Whether the case agrees, for inputs of `dtype`."""
        exact, rounded = (1e-9, 1e-6) if dtype == torch.float64 else (1e-4, 1e-4)
        return max(self.loss, self.grad, self.future_kl) <= exact and self.metrics <= rounded


def worst_errors(errors: Iterable[CaseErrors]) -> CaseErrors:
    """The largest error of each kind."""
    columns = zip(*((e.loss, e.grad, e.future_kl, e.metrics) for e in errors), strict=True)
    return CaseErrors(*(max(column) for column in columns))


def case_config(case: Mapping[str, Any]) -> AlgorithmConfig:
    """The settings of an entry with `objective`, `config` (the authors' names) and `loss_agg_mode`."""
    values = {"objective": case["objective"], "loss_aggregation": case["loss_agg_mode"]}
    for name, value in case["config"].items():
        if name not in CONFIG_NAMES:
            raise ValueError(f"config name {name!r} is not known: use one of {', '.join(CONFIG_NAMES)}")
        values[CONFIG_NAMES[name]] = value
    try:
        return AlgorithmConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{location}={first['input']!r} is not possible: {first['msg']}") from error


def case_errors(
    case: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> CaseErrors:
    """How far `fipo_loss` on inputs of `dtype` is from what the case expects."""
    config = case_config(case)
    expected = dict(case["expected"])
    wanted = {*INPUTS, "grad_log_prob", *(["future_kl"] if config.objective == "fipo" else [])}
    if missing := sorted(wanted - tensors.keys()) + sorted({"pg_loss"} - expected.keys()):
        raise ValueError(f"the case lacks {', '.join(missing)}: a case needs them")
    logprobs, old_logprobs, advantages = (tensors[name].to(dtype) for name in INPUTS[:3])
    mask = tensors["response_mask"].bool()
    num_rows, num_columns = logprobs.shape

    logprobs.requires_grad_()
    output = fipo_loss(logprobs, old_logprobs, advantages, mask, config, sequence_norm=num_columns)
    metrics = loss_metrics(output.statistics, config)
    loss = _released_reduction(output, metrics["dropped_sequences"], config)
    (grad,) = torch.autograd.grad(loss, logprobs)

    log_ratios = log_ratio(logprobs.detach(), old_logprobs, mask)
    future_kl_error = 0.0
    if config.objective == "fipo":
        segments = SegmentTable(torch.arange(num_rows + 1) * num_columns)
        found = future_kl(log_ratios.reshape(-1), mask.reshape(-1), config, segments).view_as(mask)
        future_kl_error = _norm_error(found, tensors["future_kl"])
    if unknown := sorted(expected.keys() - metrics.keys() - {"pg_loss"}):
        raise ValueError(f"expected metrics {', '.join(unknown)} are not known: use names of loss_metrics")
    # A mean over terms of both signs: what rounding does to it has the size of the terms, not of what they leave.
    scales = {"policy_kl": log_ratios[mask].abs().mean().item()}
    return CaseErrors(
        loss=_scalar_error(loss.item(), expected.pop("pg_loss")),
        grad=_norm_error(grad, tensors["grad_log_prob"]),
        future_kl=future_kl_error,
        metrics=max((_scalar_error(metrics[k], v, scales.get(k, 0.0)) for k, v in expected.items()), default=0.0),
    )


def _released_reduction(output: LossOutput, dropped_sequences: float, config: AlgorithmConfig) -> torch.Tensor:
    """The loss from its sum as the released code divides it, which differs from reduction.py in two ways.

    It adds 1e-8 to the count of tokens, and counts dropped sequences (whose sum is 0) as sequences.
    """
    if config.loss_aggregation == "token-mean":
        return output.loss_sum / (output.denominator.double() + COUNT_EPSILON)
    if config.loss_aggregation == "seq-mean-token-sum-norm":
        assert output.denominator == 0
        return output.loss_sum
    return output.loss_sum / (output.denominator + dropped_sequences)


def _scalar_error(found: float, expected: float, scale: float = 0.0) -> float:
    error = abs(found - expected) / (max(abs(expected), scale) or 1.0)
    return error if math.isfinite(error) else UNDEFINED_ERROR


def _norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    error = difference / norm if norm > 0 else difference
    return error if math.isfinite(error) else UNDEFINED_ERROR
