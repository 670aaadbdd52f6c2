"""The few records that cross a boundary between packages. All are frozen; arrays are never written after creation.

Names: `S` samples (one response each), `T` tokens of one response, `N` tokens of a batch, `B` rows, `L` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sent to an engine."""

    uid: str  # unique within a run, e.g. "train/000123"; part of every sampling seed
    token_ids: tuple[int, ...]
    ground_truth: str
    data_source: str  # names the reward rule and the evaluation set, e.g. "arithmetic"


@dataclass(frozen=True)
class SamplingSettings:
    """How an engine samples; the log-probs it returns are those of the distribution it sampled from (after temperature
    and top-p)."""

    temperature: float  # 0 is greedy
    top_p: float
    max_response_tokens: int


@dataclass(frozen=True)
class GenerationRequest:
    """One response to sample."""

    prompt_ids: tuple[int, ...]
    seed: int  # the engine's random generator for this response: same seed and weights, same tokens


@dataclass(frozen=True)
class Generation:
    """One sampled response as an engine returns it."""

    token_ids: np.ndarray  # int32 [T], with the end-of-sequence token where one was sampled
    logprobs: np.ndarray  # float32 [T], the engine's log-prob of each sampled token
    finish_reason: FinishReason
    weight_version: int  # version of the policy that sampled the tokens; the oldest where they have several
    token_versions: np.ndarray | None = None  # int32 [T], where a response spans versions; None: all by weight_version


# A response as an engine hands it out when it is finished: its request's index, and what was sampled.
FinishedResponse = tuple[int, Generation]


@dataclass(frozen=True)
class Judgement:
    """What the reward says about one response."""

    reward: float  # the rule's score plus penalties; NaN where the rule failed
    accuracy: float  # 1.0 if the answer is right, else 0.0
    prediction: str  # the answer the rule extracted
    failure: str | None = None  # why the rule could not judge it, on one line; such a response is not trained on


# How rollout and evaluation reach reward and tokenizer without importing them; the trainer hands them over.
# Of prompts, responses' texts and their numbers of tokens: one entry a response, all judged together.
Judge = Callable[[Sequence[Prompt], Sequence[str], Sequence[int]], list[Judgement]]
Encode = Callable[[str], tuple[int, ...]]  # token ids of a prompt's text
Decode = Callable[[np.ndarray], str]  # text of token ids, special tokens left out


@dataclass(frozen=True)
class Sample:
    """One judged response."""

    prompt: Prompt
    response_ids: np.ndarray  # int32 [T]
    rollout_logprobs: np.ndarray  # float32 [T]
    weight_version: int
    finish_reason: FinishReason
    text: str  # decoded response, for people and for the reward; never tokenised again
    reward: float  # the rule's score plus penalties
    accuracy: float  # 1.0 if the answer is right, else 0.0
    prediction: str  # the answer the rule extracted
    token_versions: np.ndarray | None = None  # int32 [T], where a response spans versions; None: all by weight_version


@dataclass(frozen=True)
class SampleGroup:
    """The samples of one prompt: what a group-relative advantage is computed over."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class TrainingBatch:
    """The samples of one rollout batch as flat arrays, prompt and response joined, in sample order."""

    token_ids: np.ndarray  # int64 [N]
    cu_seqlens: np.ndarray  # int64 [S + 1], sample i is token_ids[cu_seqlens[i]:cu_seqlens[i + 1]]
    prompt_lens: np.ndarray  # int64 [S], >= 1
    advantages: np.ndarray  # float32 [S], one value a sample, broadcast over its response tokens
    # float32 [R], responses only, in sample order; R = N - sum(prompt_lens)
    old_logprobs: np.ndarray | None = None  # by the trainer, before the first update of the batch
    ref_logprobs: np.ndarray | None = None  # by the frozen reference policy
    loss_mask: np.ndarray | None = None  # bool [R], tokens that count in the loss; None: all

    @property
    def num_samples(self) -> int:
        return len(self.prompt_lens)


@dataclass(frozen=True)
class UpdateCost:
    """What a mini-batch took. Of its packing plan, over all ranks, and of the rank that took most memory."""

    num_microbatches: int  # a data-parallel rank
    packing_waste_frac: float  # of the microbatches' capacity: padding, and microbatches beyond the fewest possible
    unused_frac: float  # of the microbatches' capacity: all that holds no token
    # By which the slowest data-parallel rank computes longer than the mean; with expert parallelism added up over
    # microbatches, as ranks then meet in each
    imbalance_frac: float
    # Since the update before, so that of log-probs counts: of tensors on a device, of the whole process on a CPU
    peak_memory_bytes: int


@dataclass(frozen=True)
class PolicyUpdate:
    """What a mini-batch did to the policy."""

    statistics: np.ndarray  # of the loss, see algorithm/loss_metrics.py
    grad_norm: float | None  # before clipping; None: no optimizer step was made
    skipped: Literal["empty", "not_finite"] | None = (
        None  # why: no token counts in its loss, or loss or gradient is NaN
    )
    cost: UpdateCost | None = None  # None: not measured


@dataclass(frozen=True)
class TransferCost:
    """What one rank's part of a sync of weights took."""

    sent_bytes: int  # counted where they are handed to the transport
    seconds: float


@dataclass(frozen=True)
class SegmentTable:
    """Where sequences begin and end in the flattened tokens of one rank.

    Padded rows `[B, L]` are B segments of L tokens. Under context parallelism of size cp every sequence is padded to a
    multiple of 2 * cp, cut into 2 * cp equal chunks, and rank r holds chunks r and 2 * cp - 1 - r one after the other
    (zig-zag, Transformer Engine's order): its local segment is those two halves. Where it keeps the response rows
    alone, they are what the two chunks have of them, of any lengths that may differ between ranks.
    """

    cu_seqlens: torch.Tensor  # int64 [num_segments + 1], local boundaries, first 0, last the number of local tokens
    # int64 [2 * num_segments + 1], the boundaries between the zig-zag chunks; None: in the middle of each segment
    cu_chunks: torch.Tensor | None = None

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.numel() - 1


@dataclass(frozen=True)
class LossOutput:
    """What one microbatch adds to the loss of a mini-batch, on this rank. See algorithm/reduction.py for the contract:
    the loss is (sum of loss_sum) / max(1, sum of denominator) over microbatches, data- and context-parallel ranks."""

    loss_sum: torch.Tensor  # scalar with gradient
    denominator: torch.Tensor  # scalar int64: kept tokens or sequences, by aggregation
    statistics: torch.Tensor  # float64 [K] without gradient, see algorithm/loss_metrics.py
