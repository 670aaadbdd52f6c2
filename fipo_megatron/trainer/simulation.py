"""Steps of a run without its model: the run's own code shares out, filters, cuts and packs samples of drawn lengths,
and models of engines and ranks say how long each of them works and waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from fipo_megatron.config.schema import Config
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.planner.efficiency import Efficiencies
from fipo_megatron.planner.engine_model import EngineTrace
from fipo_megatron.planner.gpu import Gpu
from fipo_megatron.planner.lengths import GROUP_CORRELATION, MEAN_PROMPT_TOKENS, SIGMA, Lengths
from fipo_megatron.planner.pass_time import PassModel
from fipo_megatron.planner.rollout_time import kv_capacity, make_engine
from fipo_megatron.planner.simulation import PassTrace, simulate_pass
from fipo_megatron.planner.step_time import ACCEPTANCE_RATE, offloaded_s
from fipo_megatron.planner.sync_time import sync_s
from fipo_megatron.rollout.collect import GroupBuffer, batch_metrics, generation_metrics, make_requests
from fipo_megatron.rollout.replicas import share_out
from fipo_megatron.trainer.updates import cost_metrics, mini_batches
from fipo_megatron.types import PolicyUpdate, Prompt, Sample, SampleGroup, UpdateCost

NO_STATISTICS = np.zeros(0)
GROUPS_STREAM, ANSWERS_STREAM = 1, 2  # keep the random numbers of two purposes apart


@dataclass(frozen=True)
class SimulationInputs:
    """What a configuration does not say about a run. The first three have no effect on lengths of a file."""

    mean_response: float | None = None  # tokens; None: half of rollout.max_response_tokens
    sigma: float = SIGMA  # of the logarithm of a response's length
    mean_prompt: float = MEAN_PROMPT_TOKENS
    group_correlation: float = GROUP_CORRELATION
    acceptance_rate: float = ACCEPTANCE_RATE  # share of generated groups that are neither all right nor all wrong
    reward_s: float = 0.0  # that judging adds to a rollout after the last response

    def __post_init__(self) -> None:
        if not 0 < self.acceptance_rate <= 1:
            raise ValueError(f"acceptance_rate = {self.acceptance_rate:g}: must be above 0, at most 1")
        if not 0 <= self.group_correlation <= 1:
            raise ValueError(f"group_correlation = {self.group_correlation:g}: must be between 0 and 1")
        if not 0 <= self.reward_s < math.inf:
            raise ValueError(f"reward_s = {self.reward_s:g}: must be 0 or more")

    def lengths(self, config: Config) -> Lengths:
        """The stated distribution."""
        return Lengths.of_config(
            config, mean_response=self.mean_response, sigma=self.sigma, mean_prompt=self.mean_prompt
        )


def parse_inputs(settings: list[str]) -> SimulationInputs:
    """The defaults with `NAME=VALUE` settings in their place.

    Raises:
        ValueError: a setting that is none, a name that is not known, or a value that can't be.
    """
    names = [field.name for field in fields(SimulationInputs)]
    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in names:
            raise ValueError(f"--input {setting}: not known; choose one of {', '.join(names)}")
        try:
            values[name] = float(text)
        except ValueError:
            raise ValueError(f"--input {setting}: must be NAME=VALUE, such as {name}=0.5") from None
    return SimulationInputs(**values)


@dataclass(frozen=True)
class RolloutTrace:
    """How a step came by its groups."""

    groups: list[SampleGroup]  # that are trained on
    batches: list[list[EngineTrace]]  # [generation batch][engine]: one batch begins when the one before has ended
    metrics: dict[str, float]

    @property
    def seconds(self) -> float:
        """Until the last response, all generation batches one after the other."""
        return sum(max(trace.seconds for trace in batch) for batch in self.batches)

    @property
    def busy_s(self) -> np.ndarray:
        """Of each engine, float64 [engines]; empty if nothing was generated."""
        return np.sum([[trace.seconds for trace in batch] for batch in self.batches], axis=0)


class SimulatedRollout:
    """Collects groups as trainer/run.py does, from engines that are models."""

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        gpu: Gpu,
        efficiencies: Efficiencies,
        lengths: Lengths,
        inputs: SimulationInputs,
    ) -> None:
        self.config, self.lengths, self.inputs = config, lengths, inputs
        self.engine = make_engine(config, shape, gpu, efficiencies)
        self.kv_capacity = kv_capacity(config, self.engine)
        self.buffer = GroupBuffer(config.dynamic_sampling)
        longest = int(lengths.response.max())
        self._tokens, self._logprobs = np.zeros(longest, np.int32), np.zeros(longest, np.float32)
        self.num_batches = 0  # over the whole run
        self.num_prompts = 0

    def collect(self, version: int) -> RolloutTrace:
        """The groups of a step that the weights `version` sample.

        Raises:
            RuntimeError: too few groups pass the filter, as in a run.
        """
        config = self.config
        needed, batches, generated = config.rollout.prompts_per_step, list[list[EngineTrace]](), list[SampleGroup]()
        while len(self.buffer) < needed:
            self.buffer.check_generation_batches(len(batches), needed, num_unjudged=0)
            groups, traces = self._generate(version, num_missing=needed - len(self.buffer))
            self.buffer.add(groups)
            generated += groups
            batches.append(traces)
        trained = self.buffer.take(needed)
        ages = [version - sample.weight_version for group in trained for sample in group.samples]
        metrics = {
            **generation_metrics(generated),
            **batch_metrics(trained, version),
            "generation_batches": len(batches),
            "surplus_kept": len(self.buffer),
            "surplus_dropped": self.buffer.num_surplus_dropped,
            "age_mean": float(np.mean(ages)),
            "age_max": max(ages),
        }
        return RolloutTrace(trained, batches, metrics)

    def _generate(self, version: int, num_missing: int) -> tuple[list[SampleGroup], list[EngineTrace]]:
        """A generation batch: its groups, and what each engine did."""
        config, rollout = self.config, self.config.rollout
        dynamic = config.dynamic_sampling
        num_prompts = dynamic.generation_prompts if dynamic.enabled else num_missing
        seed = [GROUPS_STREAM, config.seed, self.num_batches]
        drawn = self.lengths.draw_groups(num_prompts, rollout.samples_per_prompt, seed, self.inputs.group_correlation)
        prompts = [self._next_prompt(int(n)) for n in drawn.prompt[:: rollout.samples_per_prompt]]
        requests = make_requests(prompts, rollout.samples_per_prompt, config.seed, self.num_batches)
        traces = [
            self.engine.generate(
                drawn.prompt[share],
                drawn.response[share],
                max_concurrent=rollout.max_concurrent_sequences,
                kv_capacity=self.kv_capacity,
                samples_per_prompt=rollout.samples_per_prompt,
            )
            for share in share_out(requests, rollout.replicas)
        ]
        rng = np.random.default_rng([ANSWERS_STREAM, config.seed, self.num_batches])
        accepted = rng.random(num_prompts) < self.inputs.acceptance_rate
        responses = drawn.response.reshape(num_prompts, -1).tolist()
        groups = [
            SampleGroup(prompt, tuple(self._sample(prompt, n, version, is_right) for n, is_right in answers))
            for prompt, answers in zip(prompts, map(_answers, responses, accepted.tolist()), strict=True)
        ]
        self.num_batches += 1
        return groups, traces

    def _next_prompt(self, num_tokens: int) -> Prompt:
        self.num_prompts += 1
        return Prompt(f"simulated/{self.num_prompts}", (self.num_prompts,) * num_tokens, "", "simulated")

    def _sample(self, prompt: Prompt, num_tokens: int, version: int, is_right: bool) -> Sample:
        """Of so many tokens, whose memory all samples share."""
        return Sample(
            prompt=prompt,
            response_ids=self._tokens[:num_tokens],
            rollout_logprobs=self._logprobs[:num_tokens],
            weight_version=version,
            finish_reason="length" if num_tokens == self.config.rollout.max_response_tokens else "stop",
            text="",
            reward=1.0 if is_right else -1.0,
            accuracy=float(is_right),
            prediction="",
        )


def _answers(responses: list[int], accepted: bool) -> list[tuple[int, bool]]:
    """Lengths, and which answers are right: every other one of a group with spread, else none."""
    return [(length, accepted and i % 2 == 0) for i, length in enumerate(responses)]


@dataclass(frozen=True)
class SimulatedStep:
    """A step, phase after phase as the loop times them (trainer/loop.py); evaluation and files are not in it."""

    step: int
    rollout: RolloutTrace
    logprobs: PassTrace  # of the whole batch, without gradients
    updates: list[PassTrace]
    phases: dict[str, float]  # seconds: rollout, old_logprobs, train, sync
    update_end_s: float  # of each update after its passes: gradients and weights exchanged, optimizer
    num_logprob_passes: int

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def metrics(self, config: Config) -> dict[str, float]:
        """What a run's metrics.jsonl has under the same names, and where time is lost."""
        passes = sum(update.seconds for update in self.updates)
        bubble = 1 - sum(update.busy_s for update in self.updates) / sum(u.rank_s.mean() for u in self.updates)
        plans = [self.logprobs, *self.updates]
        num_planned = sum(len(items) for trace in plans for rank in trace.plan.microbatches for items in rank)
        planning_s = sum(trace.planning_s for trace in plans)
        return (
            {f"time/{phase}_s": seconds for phase, seconds in self.phases.items()}
            | {"time/step_s": self.seconds}
            | {f"rollout/{name}": value for name, value in self.rollout.metrics.items()}
            | cost_metrics([_policy_update(update, config) for update in self.updates])
            | {f"bubble/stage_{stage}": float(share) for stage, share in enumerate(bubble)}
            | {
                "idle/data_ranks": 1 - sum(float(update.rank_s.mean()) for update in self.updates) / passes,
                "planning/step_ms": 1e3 * planning_s,
                "planning/ms_per_4096_samples": 1e3 * planning_s * 4096 / num_planned,
            }
            | self._engine_metrics()
            | self._idle_metrics(config)
        )

    def _engine_metrics(self) -> dict[str, float]:
        """Of all generation batches; none if the step was served from surplus alone."""
        traces = [trace for batch in self.rollout.batches for trace in batch]
        if not traces:
            return {}
        return {
            "engines/tail": 1 - float(self.rollout.busy_s.mean()) / self.rollout.seconds,
            "engines/mean_running": float(
                np.average([t.mean_running for t in traces], weights=[t.seconds for t in traces])
            ),
            "engines/preemptions": sum(trace.num_preemptions for trace in traces),
            "engines/recomputed_tokens": sum(trace.recomputed_tokens for trace in traces),
            "engines/tokens_per_s": self.rollout.metrics["generated_tokens"] / self.rollout.seconds,
        }

    def _idle_metrics(self, config: Config) -> dict[str, float]:
        """Shares of the step in which ranks of the trainer, engines, and all devices do nothing, on average."""
        rollout, num_ranks = config.rollout, config.parallel.world_size
        trainer_s = self.num_logprob_passes * float(self.logprobs.busy_s.mean()) + self.phases["sync"]
        trainer_s += sum(float(update.busy_s.mean()) + self.update_end_s for update in self.updates)
        busy = self.rollout.busy_s
        engines_s = (float(busy.mean()) if busy.size else 0.0) + self.phases["sync"]
        num_workers = rollout.replicas * rollout.tensor * rollout.pipeline
        both_s = trainer_s * num_ranks + engines_s * num_workers
        num_devices = num_ranks + num_workers
        if config.placement.mode == "colocated":  # one sync for both
            both_s, num_devices = both_s - self.phases["sync"] * num_workers, num_ranks
        return {
            "idle/trainer": 1 - trainer_s / self.seconds,
            "idle/engines": 1 - engines_s / self.seconds,
            "idle/devices": 1 - both_s / num_devices / self.seconds,
        }


def _policy_update(update: PassTrace, config: Config) -> PolicyUpdate:
    """What the policy would report of an update, for the run's own metrics."""
    plan = update.plan
    cost = UpdateCost(
        num_microbatches=plan.num_microbatches,
        packing_waste_frac=plan.waste,
        unused_frac=plan.unused,
        imbalance_frac=plan.imbalance if config.parallel.expert == 1 else plan.synchronous_imbalance,
        peak_memory_bytes=0,
    )
    return PolicyUpdate(NO_STATISTICS, None, cost=cost)


def check_models(config: Config, gpu: Gpu) -> None:
    """Raises ValueError for an engine and devices of which there is no model."""
    if gpu.num_shared is not None:
        raise ValueError(f"--gpu {gpu.name}: ranks that take turns on shared devices are not simulated; choose another")
    if config.rollout.engine == "hf":
        raise ValueError(
            "rollout.engine = 'hf': samples a few responses after another, of which there is no model here; set "
            "rollout.engine=vllm"
        )


def simulate_steps(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    gpu: Gpu,
    efficiencies: Efficiencies,
    inputs: SimulationInputs,
    num_steps: int,
) -> Iterator[SimulatedStep]:
    """The first steps of a run; the same seed gives the same steps, but for the time that planning takes.

    Raises:
        ValueError: an engine or device of which there is no model, an engine without room, or a sample beyond the
            run's limits or its microbatches.
        RuntimeError: too few groups pass the filter, as in a run.
    """
    check_models(config, gpu)
    lengths.check_limits(config)
    rollout = SimulatedRollout(config, shape, gpu, efficiencies, lengths, inputs)
    model = PassModel(config, shape, gpu, efficiencies)
    update_end_s = sum(model.update_s())
    weights_s, state_s = offloaded_s(config, shape, gpu, efficiencies)
    num_logprob_passes = 2 + (config.algorithm.reference_kl_coef > 0)
    call_s = efficiencies.call_s
    for step in range(1, num_steps + 1):
        collected = rollout.collect(version=step - 1)
        trained = [sample for group in collected.groups for sample in group.samples]
        batch = Lengths(
            np.array([len(sample.prompt.token_ids) for sample in trained]),
            np.array([len(sample.response_ids) for sample in trained]),
        )
        logprobs = simulate_pass(model, batch, range(len(batch)), trains=False)
        updates = [simulate_pass(model, batch, samples, trains=True) for samples in mini_batches(config, step)]
        update_s = sum(update.seconds + update_end_s + call_s for update in updates)
        phases = {
            "rollout": collected.seconds + inputs.reward_s + weights_s,
            "old_logprobs": (num_logprob_passes - 1) * (logprobs.seconds + call_s) + weights_s,
            "train": update_s + logprobs.seconds + call_s + state_s,
            "sync": sync_s(config, shape, gpu, efficiencies) + 2 * weights_s + state_s,
        }
        yield SimulatedStep(step, collected, logprobs, updates, phases, update_end_s, num_logprob_passes)
