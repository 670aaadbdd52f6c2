"""THE loss. FIPO, and DAPO and GRPO as what is left when parts of it are switched off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fipo_megatron.algorithm.future_kl import LOG_RATIO_LIMIT, future_kl, influence_weights, log_ratio
from fipo_megatron.algorithm.loss_metrics import TokenTerms, loss_statistics
from fipo_megatron.algorithm.reduction import count_per_segment, counts_sequences, expand_to_tokens, reduce_loss
from fipo_megatron.config.schema import AlgorithmConfig
from fipo_megatron.types import LossOutput, SegmentTable

MAX_DUAL_CLIPPED_TOKENS = 1  # a sequence with more is dropped whole


def fipo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig,
    *,
    segments: SegmentTable | None = None,
    entropy: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    context_group: ProcessGroup | None = None,
    sequence_norm: int | None = None,
    scan_impl: str = "auto",
) -> LossOutput:
    """Loss sum, denominator and statistics of one microbatch on this rank; gradient to `logprobs`, and where
    entropy_coef > 0 to `entropy`.

    All tensors are rows [B, L], each row a sequence, or flat [N] with the sequences in `segments`; float32 or float64,
    the mask of any type. `response_mask` marks the response tokens; what stands outside it may be anything. All
    log-probs are the trainer's, at the sampling temperature: `old_logprobs` from before the rollout batch's first
    update, `ref_logprobs` from the frozen reference (needed where reference_kl_coef > 0). `sequence_norm`: see
    reduction.py; `scan_impl`: see future_kl_scan. Collectives over `context_group` (every rank must call): one
    all-gather for F, one all-reduce of counts a sequence. Source: equations 3 to 8 of the paper in the form of the
    released code.
    """
    _check_inputs(
        logprobs, segments, config, ref_logprobs,
        old_logprobs=old_logprobs, advantages=advantages, response_mask=response_mask, entropy=entropy,
    )  # fmt: skip
    if segments is None:
        segments = _rows_as_segments(logprobs)
    logprobs, mask = logprobs.flatten(), response_mask.flatten().bool()
    advantages = torch.where(mask, advantages.detach().flatten().to(logprobs), 0)
    log_ratios = log_ratio(logprobs, old_logprobs.detach().flatten().to(logprobs), mask)
    ratios = log_ratios.exp()

    future_kls = weights = None
    if config.objective == "fipo":
        future_kls = future_kl(log_ratios, mask, config, segments, context_group, scan_impl)
        weights = influence_weights(future_kls, ratios, advantages, config)
    surrogate = _clipped_surrogate(ratios, advantages, weights, config)
    kept = _find_kept(mask, surrogate.dual_clipped, segments, config, context_group)
    losses, reference_kl = surrogate.losses, None
    if ref_logprobs is not None:
        reference_kl = _reference_kl(logprobs, ref_logprobs.detach().flatten().to(logprobs), mask)
        losses = losses + config.reference_kl_coef * reference_kl
    if config.entropy_coef > 0:
        assert entropy is not None
        losses = losses - config.entropy_coef * torch.where(mask, entropy.flatten(), 0)
    loss_sum, denominator = reduce_loss(
        losses, kept.tokens, kept.per_segment, segments, config.loss_aggregation, sequence_norm, context_group
    )
    terms = TokenTerms(
        mask, log_ratios, advantages, surrogate.clipped, surrogate.dual_clipped,
        future_kls, weights, None if entropy is None else entropy.detach().flatten(), reference_kl,
    )  # fmt: skip
    dropped_sequences = kept.dropped.sum() * counts_sequences(context_group)
    statistics = loss_statistics(terms, config, loss_sum, denominator, kept.tokens.sum(), dropped_sequences)
    return LossOutput(loss_sum, denominator, statistics)


@dataclass(frozen=True)
class _Surrogate:
    losses: torch.Tensor  # [N], with gradient
    clipped: torch.Tensor  # bool [N], the ratio's clip decided
    dual_clipped: torch.Tensor  # bool [N], A < 0 and the loss beyond its bound


def _clipped_surrogate(
    ratios: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor | None, config: AlgorithmConfig
) -> _Surrogate:
    """PPO's surrogate with an asymmetric clip, bounded above for A < 0; zero where the advantage is."""
    weighted = advantages if weights is None else advantages * weights
    unclipped = -weighted * ratios
    at_bound = -weighted * ratios.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    losses = torch.maximum(unclipped, at_bound)
    clipped = at_bound > unclipped
    if config.dual_clip_ratio is None:
        return _Surrogate(losses, clipped, torch.zeros_like(clipped))
    limit = -weighted * config.dual_clip_ratio
    dual_clipped = (advantages < 0) & (losses > limit)
    return _Surrogate(torch.where(weighted < 0, torch.minimum(losses, limit), losses), clipped, dual_clipped)


@dataclass(frozen=True)
class _Kept:
    tokens: torch.Tensor  # bool [N], tokens that count
    per_segment: torch.Tensor  # int64 [num_segments], their number in each whole sequence, over context-parallel ranks
    dropped: torch.Tensor  # bool [num_segments], sequences with too many dual-clipped tokens


def _find_kept(
    mask: torch.Tensor,
    dual_clipped: torch.Tensor,
    segments: SegmentTable,
    config: AlgorithmConfig,
    context_group: ProcessGroup | None,
) -> _Kept:
    """Response tokens but for those of dropped sequences. Collective over `context_group`: one all-reduce."""
    counts = torch.stack([count_per_segment(mask, segments), count_per_segment(dual_clipped, segments)])
    if context_group is not None:
        dist.all_reduce(counts, group=context_group)
    tokens_per_segment, dual_clipped_per_segment = counts
    limit = MAX_DUAL_CLIPPED_TOKENS if config.objective == "fipo" else torch.inf
    dropped = dual_clipped_per_segment > limit
    return _Kept(mask & ~expand_to_tokens(dropped, segments, len(mask)), tokens_per_segment * ~dropped, dropped)


def _reference_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """exp(q) - q - 1 with q = reference - policy log-prob: an estimate of the KL that is never negative."""
    q = torch.where(mask, ref_logprobs - logprobs, 0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return q.exp() - q - 1


def _rows_as_segments(rows: torch.Tensor) -> SegmentTable:
    num_rows, num_columns = rows.shape
    return SegmentTable(torch.arange(num_rows + 1) * num_columns)


def _check_inputs(
    logprobs: torch.Tensor,
    segments: SegmentTable | None,
    config: AlgorithmConfig,
    ref_logprobs: torch.Tensor | None,
    **others: torch.Tensor | None,
) -> None:
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logprobs is {logprobs.dtype}, too coarse for ratios: pass float32 or float64")
    if logprobs.dim() != (2 if segments is None else 1):
        raise ValueError(
            f"logprobs is {list(logprobs.shape)}: pass rows [B, L] without segments, or flat [N] with segments"
        )
    if segments is not None and int(segments.cu_seqlens[-1]) != len(logprobs):
        raise ValueError(
            f"segments end at token {int(segments.cu_seqlens[-1])}, logprobs has {len(logprobs)}: pass this rank's"
        )
    for name, value in {"ref_logprobs": ref_logprobs, **others}.items():
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(f"{name} is {list(value.shape)}, logprobs {list(logprobs.shape)}: pass one value a token")
    if config.entropy_coef > 0 and others["entropy"] is None:
        raise ValueError(
            f"entropy_coef={config.entropy_coef} needs entropy: pass it, with gradient, or set the coefficient to 0"
        )
    if config.reference_kl_coef > 0 and ref_logprobs is None:
        raise ValueError(
            f"reference_kl_coef={config.reference_kl_coef} needs ref_logprobs: pass them, or set the coefficient to 0"
        )
