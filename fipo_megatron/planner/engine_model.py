"""How long an engine takes: a step of decoding from bytes and operations, a batch of requests by continuous batching.

A step of decoding reads the weights and the keys and values of all sequences once, so it is bound by memory until many
sequences share the weights (Pope et al. 2022, "Efficiently scaling transformer inference", section 2). Requests are
scheduled as vLLM does: first come, first served; a new one starts when a place and room for its tokens are free, and
when the cache is full, the one that started last gives its room back and is computed again later.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.parallel.plan import ForwardCost
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.flops import model_cost, num_pairs
from fipo_megatron.planner.gpu import Gpu


class _StepParts(NamedTuple):
    """Seconds of a decoding step over all stages of an engine."""

    weights: float  # to read those that every token meets
    expert: float  # to read one expert of each layer
    read_token: float  # to read keys and values of one token
    sequence: float  # to compute one sequence's token
    attend_token: float  # to attend to one token
    all_reduce: float  # of one sequence's token
    fixed: float  # whatever the batch: of each stage, and of each all-reduce


def kv_bytes_per_token(shape: ModelShape, tensor: int, pipeline: int, bytes_per_number: int) -> float:
    """Keys and values of one token on one worker of an engine; a head that tensor-parallel workers can't share is on
    each."""
    heads = -(-shape.num_key_value_heads // tensor)
    return 2 * shape.num_layers / pipeline * heads * shape.head_dim * bytes_per_number


@dataclass(frozen=True)
class EngineModel:
    """One engine of `tensor` * `pipeline` workers, a GPU each.

    Routing of experts is taken to be even. A pipeline of p stages works on p parts of the batch in turn: in the time of
    a step each stage reads its weights p times.
    """

    shape: ModelShape
    gpu: Gpu
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    tensor: int = 1
    pipeline: int = 1
    expert_parallel: bool = False  # a worker holds whole experts, else a slice of each
    bytes_per_weight: int = 2  # of weights, activations, keys and values

    @cached_property
    def _cost(self) -> ForwardCost:
        return model_cost(self.shape)

    @cached_property
    def _expert_weights(self) -> int:
        """Of one expert of one layer."""
        return 3 * self.shape.hidden_size * self.shape.moe_intermediate_size

    @cached_property
    def _dense_weights(self) -> float:
        """That every token meets: of all layers without their experts, and the head."""
        shape, cost = self.shape, self._cost
        active = shape.num_layers * shape.experts_per_token * self._expert_weights
        return cost.per_token / 2 - active + shape.vocab_size * shape.hidden_size

    @cached_property
    def _expert_share(self) -> float:
        """Of a layer's experts, the part of the worker that holds most."""
        if not self.expert_parallel or not self.shape.num_experts:
            return 1 / self.tensor
        return -(-self.shape.num_experts // self.tensor) / self.shape.num_experts

    @cached_property
    def weight_bytes(self) -> float:
        """Of a worker, on average over stages."""
        shape = self.shape
        dense = self._dense_weights
        if not shape.tie_word_embeddings:
            dense += shape.vocab_size * shape.hidden_size
        experts = shape.num_layers * shape.num_experts * self._expert_weights
        held = dense / self.tensor + experts * self._expert_share
        return held * self.bytes_per_weight / self.pipeline

    @cached_property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token on one worker."""
        return kv_bytes_per_token(self.shape, self.tensor, self.pipeline, self.bytes_per_weight)

    def kv_capacity_tokens(self, memory_share: float) -> int:
        """Tokens whose keys and values fit beside the weights in `memory_share` of a GPU; the workspace of the
        engine's own computations is not taken off.

        Raises:
            ValueError: not even the weights fit.
        """
        room = memory_share * self.gpu.memory_bytes - self.weight_bytes
        if room < self.kv_bytes_per_token:
            raise ValueError(
                f"rollout.gpu_memory_utilization = {memory_share:g}: an engine's worker has "
                f"{self.weight_bytes / 2**30:.1f} GiB of weights, which leaves no room for keys and values in that "
                f"share of {self.gpu.name}; raise rollout.tensor or rollout.pipeline"
            )
        return int(room / self.kv_bytes_per_token)

    def experts_hit(self, num_tokens: float) -> float:
        """Experts of a layer that any of `num_tokens` is sent to, expected: E (1 - (1 - k / E)^n)."""
        num_experts = self.shape.num_experts
        if not num_experts:
            return 0.0
        return num_experts * (1 - (1 - self.shape.experts_per_token / num_experts) ** num_tokens)

    def decode_step_s(self, num_sequences: float, num_context_tokens: float) -> float:
        """Seconds in which each of `num_sequences` gets a token; they hold `num_context_tokens` together.

        The longer of reading (weights, keys, values) and computing, the all-reduces, and fixed times.
        """
        own = self._step_s
        experts = self.experts_hit(num_sequences / self.pipeline)  # by the sequences that a stage works on at once
        read_s = own.weights + experts * own.expert + num_context_tokens * own.read_token
        compute_s = num_sequences * own.sequence + num_context_tokens * own.attend_token
        return max(read_s, compute_s) + num_sequences * own.all_reduce + own.fixed

    @cached_property
    def _step_s(self) -> _StepParts:
        shape, cost = self.shape, self._cost
        read = self.gpu.memory_bandwidth * self.efficiencies.decode
        compute = self.gpu.flops(self.bytes_per_weight) * self.efficiencies.decode_matmul * self.tensor
        return _StepParts(
            weights=self._dense_weights / self.tensor * self.bytes_per_weight / read,
            expert=shape.num_layers * self._expert_weights * self._expert_share * self.bytes_per_weight / read,
            read_token=self.kv_bytes_per_token * self.pipeline / read,
            sequence=(cost.per_token + cost.per_response_token) / compute,
            attend_token=cost.per_pair / compute,
            all_reduce=self._all_reduce_s(1),
            fixed=self.pipeline * self.efficiencies.decode_step_s
            + (2 * shape.num_layers * self.efficiencies.collective_s if self.tensor > 1 else 0.0),
        )

    def _all_reduce_s(self, num_tokens: float) -> float:
        """Two all-reduces a layer of the tokens' hidden states, in a ring: 2 (t - 1) / t of their bytes each."""
        if self.tensor == 1:
            return 0.0
        eff, gpu, tensor = self.efficiencies, self.gpu, self.tensor
        link = gpu.nvlink_bandwidth * eff.nvlink
        if tensor > gpu.gpus_per_node:
            link = gpu.network_bandwidth * eff.network
        hidden = num_tokens * self.shape.hidden_size * self.bytes_per_weight
        return 2 * self.shape.num_layers * hidden * 2 * (tensor - 1) / tensor / link

    def prefill_s(self, lengths: np.ndarray) -> float:
        """Seconds to compute sequences of `lengths` tokens `[N]` whole, which gives each its next token."""
        return self.prefill_of_sums_s(float(np.sum(lengths)), num_pairs(lengths), np.size(lengths))

    def prefill_of_sums_s(self, num_tokens: float, pairs: float, num_sequences: int) -> float:
        """The same of sums over sequences: tokens, pairs of a token and one that it attends to, and their number."""
        cost = self._cost
        flops = cost.per_token * num_tokens + cost.per_pair * pairs + cost.per_response_token * num_sequences
        peak = self.gpu.flops(self.bytes_per_weight) * self.tensor * self.pipeline
        compute_s = flops / (peak * self.efficiencies.prefill)
        return compute_s + self._all_reduce_s(num_tokens) / self.pipeline

    def generate(
        self,
        prompt_lens: np.ndarray,
        response_lens: np.ndarray,
        *,
        max_concurrent: int,
        kv_capacity: int,
        samples_per_prompt: int = 1,
    ) -> EngineTrace:
        """What one engine does with N requests that come at once, in order; int arrays `[N]`.

        The requests of a prompt are `samples_per_prompt` neighbours, and the first computes the prompt for all (the
        engine's prefix cache); each still holds its keys and values.

        Raises:
            ValueError: a sequence that the cache can't hold.
        """
        longest = int((prompt_lens + response_lens).max(initial=0))
        if longest > kv_capacity:
            raise ValueError(
                f"an engine holds keys and values of {kv_capacity} tokens, the longest sequence has {longest}; raise "
                "rollout.tensor, rollout.gpu_memory_utilization or rollout.kv_cache_gib, or lower "
                "rollout.max_response_tokens"
            )
        batching = _Batching(self, prompt_lens.tolist(), response_lens.tolist(), max_concurrent, kv_capacity)
        return batching.run(samples_per_prompt)


@dataclass(frozen=True)
class EngineTrace:
    """What an engine did with N requests."""

    finish_s: np.ndarray  # float64 [N], since they came
    event_s: np.ndarray  # float64 [E], when the number of sequences in the batch changed
    running: np.ndarray  # int64 [E], that number from then on
    num_steps: int  # of decoding
    num_preemptions: int
    recomputed_tokens: int  # because of them

    @property
    def seconds(self) -> float:
        """Until the last response."""
        return float(self.finish_s.max(initial=0.0))

    @property
    def mean_running(self) -> float:
        """Sequences in the batch, on average over time."""
        durations = np.diff(self.event_s)
        return float((durations * self.running[:-1]).sum() / self.seconds) if self.seconds else 0.0


@dataclass
class _Batching:
    """The scheduler's state. Time jumps from one change of the batch to the next: between two, each step adds a token
    to each sequence, and the steps' mean time is that at the mean number of tokens."""

    model: EngineModel
    prompts: list[int]
    responses: list[int]
    max_concurrent: int
    kv_capacity: int

    now_s: float = 0.0
    step: int = 0  # of decoding, so far
    num_running: int = 0
    context: int = 0  # tokens of all running sequences
    has_left: bool = False  # whether one was taken out since requests were last admitted
    num_preemptions: int = 0
    recomputed: int = 0
    started: list[tuple[int, int]] = field(default_factory=list)  # (request, its last step), the latest last
    ends: list[tuple[int, int]] = field(default_factory=list)  # (last step, request), a heap
    events: list[tuple[float, int]] = field(default_factory=list)

    def run(self, samples_per_prompt: int) -> EngineTrace:
        num_requests = len(self.prompts)
        self.waiting = deque(range(num_requests))
        self.num_left = list(self.responses)  # tokens to come, of those that don't run
        self.last_step = [-1] * num_requests  # of those that run
        self.finish_s = np.zeros(num_requests)
        self.cached = [request % samples_per_prompt != 0 for request in range(num_requests)]
        while self.waiting or self.num_running:
            self._admit()
            if self.num_running:
                self._make_room()
                self._decode()
        self._note()
        times, running = zip(*self.events, strict=True)
        return EngineTrace(
            self.finish_s, np.array(times), np.array(running), self.step, self.num_preemptions, self.recomputed
        )

    def _admit(self) -> None:
        """Starts requests, in order, while there are places and room; each computes its tokens so far and gets one."""
        self.has_left = False
        admitted: list[tuple[int, int]] = []
        num_tokens, pairs, num_computed = 0, 0, 0
        while self.waiting and self.num_running < self.max_concurrent:
            request = self.waiting[0]
            length = self.prompts[request] + self.responses[request] - self.num_left[request]
            if self.context + length + 1 > self.kv_capacity:
                break
            self.waiting.popleft()
            if not self.cached[request]:
                num_tokens += length
                pairs += length * (length + 1) // 2
                num_computed += 1
            self.num_running += 1
            self.context += length + 1
            self.num_left[request] -= 1
            self.last_step[request] = self.step + self.num_left[request]
            admitted.append((self.last_step[request], request))
        if not admitted:
            return
        if num_computed:
            self.now_s += self.model.prefill_of_sums_s(num_tokens, pairs, num_computed)
        for end, request in admitted:
            self.cached[request] = False  # if it has to start again
            heapq.heappush(self.ends, (end, request))
            self.started.append((request, end))
        self._note()
        self._finish()

    def _decode(self) -> None:
        """Steps until a sequence ends, the cache has no room for one more, or another may be admitted."""
        while self.last_step[self.ends[0][1]] != self.ends[0][0]:
            heapq.heappop(self.ends)  # was stopped since
        room = (self.kv_capacity - self.context) // self.num_running
        num_steps = 1 if self.has_left else min(self.ends[0][0] - self.step, room)
        mean_context = self.context + self.num_running * (num_steps - 1) / 2
        self.now_s += num_steps * self.model.decode_step_s(self.num_running, mean_context)
        self.step += num_steps
        self.context += num_steps * self.num_running
        self._finish()

    def _finish(self) -> None:
        """Takes out what has all its tokens."""
        finished = False
        while self.ends and self.ends[0][0] <= self.step:
            end, request = heapq.heappop(self.ends)
            if self.last_step[request] == end:
                self._take_out(request, self.responses[request])
                self.finish_s[request] = self.now_s
                finished = True
        if finished:
            self._note()

    def _make_room(self) -> None:
        """Stops the latest sequences until the others have room for a step."""
        while self.kv_capacity - self.context < self.num_running:
            self._stop_latest()

    def _stop_latest(self) -> None:
        while self.last_step[self.started[-1][0]] != self.started[-1][1]:
            self.started.pop()  # has finished, or was stopped and has started again
        request, end = self.started.pop()
        self.num_left[request] = end - self.step
        num_done = self.responses[request] - self.num_left[request]
        self._take_out(request, num_done)
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        self.recomputed += self.prompts[request] + num_done
        self._note()

    def _take_out(self, request: int, num_done: int) -> None:
        self.has_left = True
        self.num_running -= 1
        self.context -= self.prompts[request] + num_done
        self.last_step[request] = -1

    def _note(self) -> None:
        self.events.append((self.now_s, self.num_running))
