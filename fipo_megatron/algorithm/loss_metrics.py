"""Metrics of the loss, from statistics that add up over microbatches and ranks.

A statistics vector has three parts: sums (the counts of two histograms among them), minima and maxima. No metric is a
mean of means, and none needs gathered tokens: quantiles are read from the histograms. Everything is over response
tokens, those of dropped sequences included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fipo_megatron.algorithm.future_kl import LOG_RATIO_LIMIT, influence_bounds
from fipo_megatron.config.schema import AlgorithmConfig

# Histogram bins of the log-ratio d are equal steps of asinh(d / BIN_UNIT) up to |d| = 20: 2e-5 wide near ratio 1, 2% of
# d further out. The log of a quantile is off by at most half of that.
BIN_UNIT = 1e-3
BINS_A_SIDE = 512
NUM_BINS = 2 * BINS_A_SIDE + 1
BINS_PER_ASINH = BINS_A_SIDE / math.asinh(LOG_RATIO_LIMIT / BIN_UNIT)

QUANTILES = {"p25": 0.25, "p50": 0.5, "p75": 0.75, "p99_5": 0.995, "p99_9": 0.999}
BOUND_TOLERANCE = 1e-7  # distance at which a weight counts as being at its bound
LOG_RAW_LIMIT = 600.0  # exp of more leaves float64

SUMS = (
    "loss_sum",
    "denominator",
    "kept_tokens",
    "dropped_sequences",
    "tokens",
    "policy_kl",
    "clipped",
    "dual_clipped",
    "advantages",
    "influence",
    "influence_at_upper",
    "influence_at_lower",
    "influence_active",
    "influence_raw",
    "negative_tokens",
    "negative_ratio_2_3",
    "negative_ratio_3_4",
    "negative_ratio_4_c",
    "entropy",
    "entropy_tokens",
    "reference_kl",
    "reference_kl_tokens",
)
MINIMA = ("influence", "influence_raw")
MAXIMA = ("influence", "influence_raw", "ratio_pos", "ratio_neg")
SIGNS = ("pos", "neg")  # of the advantage: a histogram each
NUM_SUMS = len(SUMS) + len(SIGNS) * NUM_BINS
NUM_STATISTICS = NUM_SUMS + len(MINIMA) + len(MAXIMA)


@dataclass(frozen=True)
class TokenTerms:
    """What the loss knows about each token of a microbatch, [N]; only response tokens are read."""

    response_mask: torch.Tensor
    log_ratios: torch.Tensor
    advantages: torch.Tensor
    clipped: torch.Tensor
    dual_clipped: torch.Tensor
    future_kls: torch.Tensor | None  # None: the objective has no influence weights
    influence_weights: torch.Tensor | None
    entropy: torch.Tensor | None
    reference_kl: torch.Tensor | None

    def at(self, tokens: torch.Tensor) -> TokenTerms:
        """The terms at token indices `tokens`."""
        terms = {name: value.index_select(0, tokens) for name, value in vars(self).items() if value is not None}
        return replace(self, **terms)


class LossStatistics:
    """Named access to a statistics vector, float64 [NUM_STATISTICS]."""

    def __init__(self, vector: torch.Tensor) -> None:
        sums, histograms, minima, maxima = (
            vector.detach().cpu().split([len(SUMS), len(SIGNS) * NUM_BINS, len(MINIMA), len(MAXIMA)])
        )
        self.sums: dict[str, float] = dict(zip(SUMS, sums.tolist(), strict=True))
        self.histograms = dict(zip(SIGNS, histograms.view(len(SIGNS), NUM_BINS), strict=True))
        self.minima: dict[str, float] = dict(zip(MINIMA, minima.tolist(), strict=True))
        self.maxima: dict[str, float] = dict(zip(MAXIMA, maxima.tolist(), strict=True))

    def mean(self, name: str, count: str) -> float:
        """Sum `name` over sum `count`; 0 where nothing was counted."""
        return self.sums[name] / max(self.sums[count], 1.0)

    def ratio_quantile(self, sign: str, fraction: float) -> float:
        """The ratio below which `fraction` of the tokens with this sign of advantage lie; up to the bins' width."""
        cumulative = self.histograms[sign].cumsum(0)
        position = int((cumulative < fraction * cumulative[-1]).sum()) - BINS_A_SIDE
        return math.exp(BIN_UNIT * math.sinh(position / BINS_PER_ASINH))


@torch.no_grad()
def loss_statistics(
    terms: TokenTerms,
    config: AlgorithmConfig,
    loss_sum: torch.Tensor,
    denominator: torch.Tensor,
    kept_tokens: torch.Tensor,
    dropped_sequences: torch.Tensor,
) -> torch.Tensor:
    """The statistics vector of one microbatch on one rank, float64 [NUM_STATISTICS]."""
    terms = terms.at(terms.response_mask.nonzero().squeeze(1))
    positive, negative = terms.advantages > 0, terms.advantages < 0
    ratios = terms.log_ratios.exp()
    c = config.dual_clip_ratio if config.dual_clip_ratio is not None else torch.inf
    sums = {
        "loss_sum": loss_sum,
        "denominator": denominator,
        "kept_tokens": kept_tokens,
        "dropped_sequences": dropped_sequences,
        "tokens": terms.response_mask.sum(),
        "policy_kl": (-terms.log_ratios).sum(dtype=torch.float64),
        "clipped": terms.clipped.sum(),
        "dual_clipped": terms.dual_clipped.sum(),
        "advantages": terms.advantages.sum(dtype=torch.float64),
        "negative_tokens": negative.sum(),
        "negative_ratio_2_3": (negative & (ratios >= 2) & (ratios < 3)).sum(),
        "negative_ratio_3_4": (negative & (ratios >= 3) & (ratios < 4)).sum(),
        "negative_ratio_4_c": (negative & (ratios >= 4) & (ratios < c)).sum(),
    }
    maxima = {"ratio_pos": ratios[positive], "ratio_neg": ratios[negative]}
    minima: dict[str, torch.Tensor] = {}
    for name, values in {"entropy": terms.entropy, "reference_kl": terms.reference_kl}.items():
        if values is not None:
            sums |= {name: values.sum(dtype=torch.float64), f"{name}_tokens": sums["tokens"]}
    if terms.influence_weights is not None and terms.future_kls is not None:
        weights = terms.influence_weights.double()
        raw = terms.future_kls.double().clamp(max=LOG_RAW_LIMIT).exp()
        lower, upper = influence_bounds(config)
        sums |= {
            "influence": weights.sum(),
            "influence_at_upper": (weights >= upper - BOUND_TOLERANCE).sum(),
            "influence_at_lower": (weights <= lower + BOUND_TOLERANCE).sum(),
            "influence_active": ((weights - 1).abs() > BOUND_TOLERANCE).sum(),
            "influence_raw": raw.sum(),
        }
        minima = {"influence": weights, "influence_raw": raw}
        maxima |= minima
    # Where a policy is lost to NaN the loss says so; counting must not fail before.
    bins = (torch.asinh(terms.log_ratios / BIN_UNIT) * BINS_PER_ASINH).nan_to_num().round().long() + BINS_A_SIDE
    histograms = torch.bincount(
        (bins + NUM_BINS * negative)[positive | negative], minlength=len(SIGNS) * NUM_BINS
    ).double()
    zero, nothing = loss_sum.new_zeros((), dtype=torch.float64), loss_sum.new_zeros(0)
    return torch.cat([
        torch.stack([sums.get(name, zero) for name in SUMS]),
        histograms,
        torch.stack([-_largest(-minima.get(name, nothing)) for name in MINIMA]),
        torch.stack([_largest(maxima.get(name, nothing)) for name in MAXIMA]),
    ])  # fmt: skip


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.double().amax() if values.numel() else values.new_full((), -torch.inf, dtype=torch.float64)


def reduce_statistics(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One vector for the microbatches of a rank; without any, the vector that changes nothing."""
    rows = torch.stack([*vectors, _neutral_statistics(vectors[0].device if vectors else None)])
    sums, minima, maxima = rows.split([NUM_SUMS, len(MINIMA), len(MAXIMA)], dim=1)
    return torch.cat([sums.sum(0), minima.amin(0), maxima.amax(0)])


def all_reduce_statistics(vector: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """One vector for the ranks of `group`, the same on all of them. Collective: a sum and a maximum."""
    sums, extrema = vector[:NUM_SUMS].clone(), vector[NUM_SUMS:].clone()
    extrema[: len(MINIMA)].neg_()
    dist.all_reduce(sums, group=group)
    dist.all_reduce(extrema, dist.ReduceOp.MAX, group=group)
    extrema[: len(MINIMA)].neg_()
    return torch.cat([sums, extrema])


def loss_metrics(vector: torch.Tensor, config: AlgorithmConfig) -> dict[str, float]:
    """Metrics of a mini-batch by name, from its reduced statistics. One that nothing was counted for is left out, but
    for the means over response tokens, which are then 0."""
    statistics = LossStatistics(vector)
    sums = statistics.sums
    metrics = {
        "loss": statistics.mean("loss_sum", "denominator"),
        "dropped_sequences": sums["dropped_sequences"],
        "policy_kl": statistics.mean("policy_kl", "tokens"),
        "clip_frac": statistics.mean("clipped", "tokens"),
        "dual_clip_frac": statistics.mean("dual_clipped", "tokens"),
        "advantage_token_mean": statistics.mean("advantages", "tokens"),
    }
    for name in ("entropy", "reference_kl"):
        if sums[f"{name}_tokens"] > 0:
            metrics[name] = statistics.mean(name, f"{name}_tokens")
    if config.objective == "fipo" and sums["tokens"] > 0:
        metrics |= _influence_metrics(statistics)
    for sign in SIGNS:
        if statistics.histograms[sign].sum() > 0:
            metrics |= {f"ratio_{sign}_{n}": statistics.ratio_quantile(sign, q) for n, q in QUANTILES.items()}
            metrics[f"ratio_{sign}_max"] = statistics.maxima[f"ratio_{sign}"]
    if sums["negative_tokens"] > 0:
        for band in ("2_3", "3_4", "4_c"):
            metrics[f"neg_ratio_frac_{band}"] = statistics.mean(f"negative_ratio_{band}", "negative_tokens")
    return metrics


def _influence_metrics(statistics: LossStatistics) -> dict[str, float]:
    upper = statistics.mean("influence_at_upper", "tokens")
    lower = statistics.mean("influence_at_lower", "tokens")
    metrics = {
        "influence_clip_frac": upper + lower,
        "influence_clip_frac_upper": upper,
        "influence_clip_frac_lower": lower,
        "influence_active_frac": statistics.mean("influence_active", "tokens"),  # weights other than 1
    }
    for name in ("influence", "influence_raw"):
        metrics[f"{name}_mean"] = statistics.mean(name, "tokens")
        metrics[f"{name}_min"] = statistics.minima[name]
        metrics[f"{name}_max"] = statistics.maxima[name]
    return metrics


def _neutral_statistics(device: torch.device | None) -> torch.Tensor:
    vector = torch.zeros(NUM_STATISTICS, dtype=torch.float64, device=device)
    vector[NUM_SUMS:] = -torch.inf
    vector[NUM_SUMS : NUM_SUMS + len(MINIMA)] = torch.inf
    return vector
