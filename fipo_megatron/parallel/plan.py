"""The packing plan: from the lengths of a mini-batch's samples to the microbatches of every data-parallel rank.

Pure and deterministic: every rank computes the whole plan and finds its own part in it.

Fewest microbatches first, then equal work. Best-fit decreasing says how many microbatches the budget takes. Samples are
then dealt to ranks, and those of a rank to its microbatches, longest first and each to the bin with the least work so
far. Where so even a distribution leaves no room for the last samples, the best-fit bins themselves are dealt to ranks.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fipo_megatron.config.schema import Config

# Bins looked at per sample, on average, before an even distribution is given up. Keeps the plan linear in the samples.
MAX_PROBES_PER_SAMPLE = 4


@dataclass(frozen=True)
class PackingUnits:
    """What the lengths of packed sequences and of a whole microbatch must be multiples of."""

    context_size: int = 1
    sequence_parallel_size: int = 1  # tensor-parallel ranks that share the tokens under sequence parallelism

    @property
    def sequence_multiple(self) -> int:
        """Of each sequence: two zig-zag chunks a context-parallel rank."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def total_multiple(self) -> int:
        """Of a microbatch: every context-parallel rank's part is cut among the sequence-parallel ranks."""
        return math.lcm(self.sequence_multiple, self.context_size * self.sequence_parallel_size)

    def sequence_lens(self, sample_lens: np.ndarray) -> np.ndarray:
        """Positions that samples take, padding included. The last token of a sample is a target only."""
        return -(-(sample_lens - 1) // self.sequence_multiple) * self.sequence_multiple

    def total_len(self, num_positions: int) -> int:
        """Positions of a microbatch whose sequences take so many; without any it has some, to join collectives."""
        return max(1, -(-num_positions // self.total_multiple)) * self.total_multiple

    def capacity(self, microbatch_tokens: int) -> int:
        """Positions of a microbatch over all context-parallel ranks, of which one has `microbatch_tokens` at most."""
        return microbatch_tokens * self.context_size // self.total_multiple * self.total_multiple


@dataclass(frozen=True)
class ForwardCost:
    """Work of a sample's forward pass, in floating-point operations; the backward pass is in proportion."""

    per_token: float
    per_response_token: float  # of the head, which only response rows reach
    per_pair: float  # of a token and one that it attends to

    def of(self, sample_lens: np.ndarray, response_lens: np.ndarray) -> np.ndarray:
        """Cost of each sample, float64 [S]."""
        n = sample_lens - 1.0
        return self.per_token * n + self.per_pair * n * (n + 1) / 2 + self.per_response_token * response_lens


def forward_cost(
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    vocab_size: int,
) -> ForwardCost:
    """The cost of a decoder-only transformer's samples: two operations for each weight that a token meets, and for
    causal attention 2 * heads * head_dim * L^2 a layer.

    `intermediate_size`: of experts, that of all that one token is sent to.
    """
    query, key_value = num_attention_heads * head_dim, num_key_value_heads * head_dim
    weights = hidden_size * (2 * query + 2 * key_value + 3 * intermediate_size)
    return ForwardCost(
        per_token=2.0 * num_layers * weights,
        per_response_token=2.0 * hidden_size * vocab_size,
        per_pair=4.0 * num_layers * query,
    )


@dataclass(frozen=True)
class PackingPlan:
    """The microbatches of all data-parallel ranks: the same number on each, every sample in one of them."""

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]  # [data rank][microbatch] -> samples; () is an empty one
    costs: np.ndarray  # float64 [data ranks, microbatches]
    num_tokens: int  # positions that samples take without padding
    num_positions: int  # positions that are computed, over all ranks
    capacity: int  # positions that a microbatch may have
    fewest_microbatches: int  # per rank: no plan within the budget has less

    @property
    def num_microbatches(self) -> int:
        """Per rank."""
        return len(self.microbatches[0])

    @property
    def waste(self) -> float:
        """Share of the microbatches' capacity that is padding, or belongs to microbatches beyond the fewest possible.

        What the fewest possible leave unused is forced by their whole, equal numbers, and is in `unused` alone.
        """
        total = self.costs.size * self.capacity
        beyond = (self.num_microbatches - self.fewest_microbatches) * len(self.costs) * self.capacity
        return (self.num_positions - self.num_tokens + beyond) / total

    @property
    def unused(self) -> float:
        """Share of the microbatches' capacity that holds no token of a sample, forced or not."""
        return 1 - self.num_tokens / (self.costs.size * self.capacity)

    @property
    def imbalance(self) -> float:
        """How much longer than the mean the slowest rank computes, as a share; ranks meet once, after the last one."""
        per_rank = self.costs.sum(1)
        return float(per_rank.max() / per_rank.mean()) - 1

    @property
    def synchronous_imbalance(self) -> float:
        """The same where ranks meet after every microbatch, as expert-parallel ranks do."""
        return float(self.costs.max(0).sum() / self.costs.mean(0).sum()) - 1


def plan_packing(
    samples: Sequence[int],
    sample_lens: np.ndarray,
    sample_costs: np.ndarray,
    units: PackingUnits,
    *,
    data_size: int,
    microbatch_tokens: int,
    microbatch_multiple: int = 1,
) -> PackingPlan:
    """The plan of a mini-batch: `samples` are indices into `sample_lens` and `sample_costs` [S].

    `microbatch_tokens` is the budget: positions that ONE context-parallel rank computes in a microbatch, padding
    included; a sequence spreads over all of them, so that one of `context_size * microbatch_tokens` positions fits.
    The number of microbatches is a multiple of `microbatch_multiple`, as the interleaved pipeline schedule needs.

    Raises:
        ValueError: a sample is longer than the budget.
    """
    capacity = units.capacity(microbatch_tokens)
    chosen = list(samples)
    lens = units.sequence_lens(sample_lens[chosen])
    check_budget(int(lens.max(initial=0)), units, microbatch_tokens)
    packer = _Packer(lens.tolist(), sample_costs[chosen].tolist(), capacity)
    longest_first = sorted(range(len(lens)), key=lambda k: -packer.lens[k])

    step = data_size * microbatch_multiple
    bins = packer.fill(longest_first)
    num_microbatches = max(1, -(-len(bins) // step)) * microbatch_multiple
    ranks = packer.spread_over_ranks(longest_first, data_size, num_microbatches) or packer.deal_bins(
        bins, data_size, num_microbatches
    )

    ordered = [_small_ones_outside(sorted(rank, key=lambda items: (packer.cost(items), items))) for rank in ranks]
    fewest_bins = max(-(-int(lens.sum()) // capacity), int((2 * lens > capacity).sum()), 1)
    return PackingPlan(
        microbatches=tuple(tuple(tuple(chosen[k] for k in items) for items in rank) for rank in ordered),
        costs=np.array([[packer.cost(items) for items in rank] for rank in ordered]),
        num_tokens=int(sample_lens[chosen].sum()) - len(chosen),
        num_positions=sum(units.total_len(sum(packer.lens[k] for k in items)) for rank in ordered for items in rank),
        capacity=capacity,
        fewest_microbatches=-(-fewest_bins // step) * microbatch_multiple,
    )


def microbatch_tokens(config: Config) -> int:
    """The budget of a run: what is set, or what the longest sample takes on each context-parallel rank."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    parallel = config.parallel
    units = PackingUnits(parallel.context, parallel.tensor if parallel.sequence_parallel else 1)
    sequence_len = int(units.sequence_lens(np.array([longest]))[0])
    return config.trainer.microbatch_tokens or units.total_len(sequence_len) // parallel.context


Items = list[int]  # positions in the mini-batch


@dataclass(frozen=True)
class _Packer:
    """Puts items, the samples of a mini-batch, into bins, the microbatches, of `capacity` positions."""

    lens: list[int]  # positions of each item
    costs: list[float]
    capacity: int

    def cost(self, items: Items) -> float:
        return sum(self.costs[k] for k in items)

    def fill(self, longest_first: Items) -> list[Items]:
        """As few bins as best-fit decreasing needs: each item goes where it leaves the least room."""
        bins: list[Items] = []
        rooms: list[tuple[int, int]] = []  # (room, bin), sorted
        for k in longest_first:
            at = bisect_left(rooms, (self.lens[k], -1))
            if at == len(rooms):
                room, target = self.capacity, len(bins)
                bins.append([])
            else:
                room, target = rooms.pop(at)
            bins[target].append(k)
            insort(rooms, (room - self.lens[k], target))
        return bins

    def spread(self, longest_first: Items, num_bins: int, capacity: int) -> list[Items] | None:
        """Bins of about equal cost: each item goes to the cheapest that has room; None where that leads nowhere."""
        bins: list[Items] = [[] for _ in range(num_bins)]
        cheapest = [(0.0, b, capacity) for b in range(num_bins)]  # (cost, bin, room), a heap
        probes = MAX_PROBES_PER_SAMPLE * len(longest_first) + num_bins
        for k in longest_first:
            full = []
            while cheapest and cheapest[0][2] < self.lens[k]:
                full.append(heapq.heappop(cheapest))
            probes -= len(full)
            if not cheapest or probes < 0:
                return None
            cost, target, room = cheapest[0]
            bins[target].append(k)
            heapq.heapreplace(cheapest, (cost + self.costs[k], target, room - self.lens[k]))
            for entry in full:
                heapq.heappush(cheapest, entry)
        return bins

    def spread_over_ranks(
        self, longest_first: Items, num_ranks: int, num_microbatches: int
    ) -> list[list[Items]] | None:
        """Ranks of about equal cost, in each microbatches of about equal cost; None where the room is too narrow."""
        ranks = []
        for items in self.spread(longest_first, num_ranks, num_microbatches * self.capacity) or []:
            bins = self.spread(items, num_microbatches, self.capacity) or self.fill(items)
            if len(bins) > num_microbatches:
                return None
            ranks.append(bins + [[] for _ in range(num_microbatches - len(bins))])
        return ranks or None

    def deal_bins(self, bins: list[Items], num_ranks: int, num_microbatches: int) -> list[list[Items]]:
        """Filled bins dealt to ranks in rounds of one each, the dearest to the rank with the least cost so far."""
        bins = bins + [[] for _ in range(num_ranks * num_microbatches - len(bins))]
        dearest_first = sorted(bins, key=lambda items: -self.cost(items))
        ranks: list[list[Items]] = [[] for _ in range(num_ranks)]
        costs = [0.0] * num_ranks
        for start in range(0, len(bins), num_ranks):
            cheapest_first = sorted(range(num_ranks), key=lambda r: costs[r])
            for r, items in zip(cheapest_first, dearest_first[start : start + num_ranks], strict=True):
                ranks[r].append(items)
                costs[r] += self.cost(items)
        return ranks


def _small_ones_outside(cheapest_first: list[Items]) -> list[Items]:
    """First and last the cheapest: while a pipeline fills and drains its stages wait for one microbatch.

    The k-th cheapest has the same place on all ranks, so that ranks that meet there have about the same work.
    """
    return [sorted(items) for items in cheapest_first[::2] + cheapest_first[1::2][::-1]]


def check_budget(longest: int, units: PackingUnits, microbatch_tokens: int) -> None:
    """Raises ValueError if a microbatch of `microbatch_tokens` can't hold a sequence of `longest` positions."""
    needed = units.total_len(longest)
    if needed > units.capacity(microbatch_tokens):
        raise ValueError(
            f"trainer.microbatch_tokens = {microbatch_tokens}: the longest sample takes {needed} positions, padding "
            f"included, which is {needed // units.context_size} on each of parallel.context = {units.context_size} "
            "ranks; set it to that or more, raise parallel.context, or lower rollout.max_response_tokens"
        )
