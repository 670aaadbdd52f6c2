"""The loss in plain Python floats, one token at a time, as the specification words it: the oracle of the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fipo_megatron.config.schema import AlgorithmConfig


@dataclass
class Sequence:
    """One response: values a token, and a mask."""

    logprobs: list[float]
    old_logprobs: list[float]
    advantages: list[float]
    mask: list[bool]
    ref_logprobs: list[float]


@dataclass
class Totals:
    """Sums over sequences that a test compares."""

    loss_sum: float = 0.0
    denominator: int = 0
    grads: list[list[float]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of the response tokens
    raw_weights: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    dropped: int = 0
    dual_clipped: int = 0
    clipped: int = 0


def weight_of(future: float, ratio: float, advantage: float, config: AlgorithmConfig) -> float:
    raw, eps = math.exp(future), config.influence_clip
    if eps == 0:
        weight = min(raw, 10.0)
    elif config.influence_clip_high_only:
        weight = min(max(raw, 1.0), 1 + eps)
    else:
        weight = min(max(raw, 1 - eps), 1 + eps)
    if advantage < 0 and ratio > config.safety_threshold:
        weight = min(max(weight, 0.8), 1.0) if config.safety_rule == "clamp" else 1.0
    return weight


def loss_by_hand(sequences: list[Sequence], config: AlgorithmConfig, sequence_norm: int) -> Totals:
    """Sums, denominator and the gradient of `loss_sum` by hand."""
    totals = Totals()
    for sequence in sequences:
        _add_sequence(totals, sequence, config, sequence_norm)
    return totals


def _add_sequence(totals: Totals, s: Sequence, config: AlgorithmConfig, sequence_norm: int) -> None:
    c = config.dual_clip_ratio if config.dual_clip_ratio is not None else math.inf
    gamma = 2 ** (-1 / config.half_life_tokens)
    length = len(s.mask)
    d = [min(max(a - b, -20.0), 20.0) if m else 0.0 for a, b, m in zip(s.logprobs, s.old_logprobs, s.mask, strict=True)]
    losses, grads, dual_clipped = [0.0] * length, [0.0] * length, 0
    for t in range(length):
        if not s.mask[t]:
            continue
        ratio, advantage, weight = math.exp(d[t]), s.advantages[t], 1.0
        if config.objective == "fipo":
            future = sum(gamma ** (k - t) * d[k] for k in range(t, length) if s.mask[k] and d[k] <= math.log(c))
            weight = weight_of(future, ratio, advantage, config)
            totals.raw_weights.append(math.exp(future))
        totals.weights.append(weight)
        totals.log_ratios.append(d[t])
        a = advantage * weight
        clipped_ratio = min(max(ratio, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
        loss, grad = -a * ratio, -a * ratio
        if -a * clipped_ratio > loss:
            loss, grad = -a * clipped_ratio, 0.0
            totals.clipped += 1
        if advantage < 0 and loss > -a * c:
            dual_clipped += 1
            loss, grad = -a * c, 0.0
        if abs(s.logprobs[t] - s.old_logprobs[t]) > 20:
            grad = 0.0
        if config.reference_kl_coef > 0:
            q = min(max(s.ref_logprobs[t] - s.logprobs[t], -20.0), 20.0)
            loss += config.reference_kl_coef * (math.exp(q) - q - 1)
            grad += config.reference_kl_coef * (1 - math.exp(q)) if abs(q) < 20 else 0.0
        losses[t], grads[t] = loss, grad
    totals.dual_clipped += dual_clipped
    count = sum(s.mask)
    if config.objective == "fipo" and dual_clipped > 1:
        totals.dropped += 1
        losses, grads, count = [0.0] * length, [0.0] * length, 0
    divisor = {"seq-mean-token-mean": max(count, 1), "seq-mean-token-sum-norm": sequence_norm}
    scale = 1 / divisor.get(config.loss_aggregation, 1)
    totals.loss_sum += scale * sum(losses)
    totals.grads.append([scale * g for g in grads])
    is_final = config.loss_aggregation == "seq-mean-token-sum-norm"
    totals.denominator += count if config.loss_aggregation == "token-mean" else int(count > 0 and not is_final)
