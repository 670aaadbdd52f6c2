"""From log-ratio to influence weight: the part of FIPO that the other objectives do not have."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.distributed import ProcessGroup

from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.ops.future_kl_scan import future_kl_scan
from fipo_megatron.types import SegmentTable

LOG_RATIO_LIMIT = 20.0
UNCLIPPED_WEIGHT_LIMIT = 10.0
SAFE_WEIGHTS = (0.8, 1.0)


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """d = log-prob - old log-prob, within +-20; 0 outside the mask, whatever stands there. Gradient to `logprobs`."""
    difference = torch.where(response_mask, logprobs - old_logprobs, 0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def future_kl(
    log_ratios: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    segments: SegmentTable,
    context_group: ProcessGroup | None = None,
    scan_impl: str = "auto",
) -> torch.Tensor:
    """F_t = sum over k >= t of gamma^(k - t) * M_k * d_k, [N], no gradient; gamma = 2^(-1 / half_life_tokens).

    M leaves out tokens beyond the dual-clip ratio; they keep a sum of their own. Distances count positions, so holes in
    the mask still age the signal. Collectives over `context_group`: see `future_kl_scan`. Source: equations 3 and 4.
    """
    participates = response_mask
    if config.dual_clip_ratio is not None:
        participates = participates & (log_ratios <= math.log(config.dual_clip_ratio))
    values = torch.where(participates, log_ratios.detach(), 0)
    gamma = 2 ** (-1 / config.half_life_tokens)
    return future_kl_scan(values, gamma, segments, impl=scan_impl, context_group=context_group)


def influence_bounds(config: AlgorithmConfig) -> tuple[float, float]:
    """Lower and upper bound of an influence weight, before the safety rule."""
    if config.influence_clip == 0:
        return 0.0, UNCLIPPED_WEIGHT_LIMIT
    return 1.0 if config.influence_clip_high_only else 1 - config.influence_clip, 1 + config.influence_clip


def influence_weights(
    future_kls: torch.Tensor, ratios: torch.Tensor, advantages: torch.Tensor, config: AlgorithmConfig
) -> torch.Tensor:
    """The weight of each token's advantage, [N], no gradient: exp(F) within bounds, then the safety rule.

    Where a disliked token (A < 0) has become much likelier, its push back must not grow. Source: equations 5 to 7; the
    paper resets such weights to 1, the released code clamps them to [0.8, 1].
    """
    weights = future_kls.exp().clamp(*influence_bounds(config))
    unsafe = (advantages < 0) & (ratios.detach() > config.safety_threshold)
    safe_weights = weights.clamp(*SAFE_WEIGHTS) if config.safety_rule == "clamp" else torch.ones_like(weights)
    return torch.where(unsafe, safe_weights, weights)


def response_influence_weights(
    logprobs: np.ndarray,
    old_logprobs: np.ndarray,
    advantages: np.ndarray,
    response_lens: np.ndarray,
    config: AlgorithmConfig,
    loss_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The weights that the loss would give a batch's response tokens, float32 [R]; all 1 for dapo and grpo.

    Log-probs are float32 [R], responses one after the other; advantages and lengths [S], one value a response. Tokens
    outside of `loss_mask`, bool [R], have the weight 1 and add to no future-KL.
    """
    if config.objective != "fipo":
        return np.ones(len(logprobs), np.float32)
    segments = SegmentTable(torch.from_numpy(np.cumsum([0, *response_lens], dtype=np.int64)))
    mask = torch.ones(len(logprobs), dtype=torch.bool) if loss_mask is None else torch.from_numpy(loss_mask)
    log_ratios = log_ratio(torch.from_numpy(logprobs), torch.from_numpy(old_logprobs), mask)
    token_advantages = torch.from_numpy(np.repeat(advantages, response_lens))
    future_kls = future_kl(log_ratios, mask, config, segments)
    weights = influence_weights(future_kls, log_ratios.exp(), token_advantages, config)
    return torch.where(mask, weights, 1).numpy()
