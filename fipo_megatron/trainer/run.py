"""A run's parts around the algorithm: data, reward, run folder, records. loop.py puts them in order."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import numpy as np

from fipo_megatron.algorithm.future_kl import response_influence_weights
from fipo_megatron.checkpoint.replay_file import (
    RandomStates,
    ReplayStep,
    StepResults,
    replay_path,
    sample_origins,
    write_replay_step,
)
from fipo_megatron.config.schema import Config
from fipo_megatron.data.run_prompts import RunPrompts
from fipo_megatron.evaluation.protocol import write_sets
from fipo_megatron.observability.metrics import MetricsWriter, throughput
from fipo_megatron.observability.plots import plot_curves
from fipo_megatron.observability.progress import Progress
from fipo_megatron.observability.samples import TokenRecord, groups_to_record, samples_path, write_samples
from fipo_megatron.observability.timers import PhaseTimers
from fipo_megatron.observability.trackers import Trackers
from fipo_megatron.reward.judge import JudgeWithLimit, make_rewards
from fipo_megatron.rollout.collect import (
    GroupBuffer,
    SpreadGuard,
    batch_metrics,
    check_prompt_lengths,
    flat_rollout_logprobs,
    generation_metrics,
    is_fresh_token,
    make_requests,
    mismatch_metrics,
)
from fipo_megatron.rollout.stream import judge_while_sampling
from fipo_megatron.trainer.checkpoints import Checkpoints, RunState
from fipo_megatron.trainer.held_out import HeldOutEvaluation
from fipo_megatron.trainer.placement import Workers
from fipo_megatron.trainer.updates import SkipGuard, cost_metrics, mini_batches, update_metrics
from fipo_megatron.types import Decode, PolicyUpdate, SampleGroup, SamplingSettings, TrainingBatch

CURVES_EVERY_S = 60.0  # between evaluations: to draw them takes a second or so


class Run:
    """Everything that the loop needs, for one run folder."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        workers: Workers,
        model_folder: Path,
        prompts: RunPrompts,
        progress: Progress,
        trackers: Trackers,
        resumed: RunState | None = None,
        stop: Event | None = None,
    ) -> None:
        """`prompts` stand where the resumed run's did. `stop` is set when the run is to end after the step under way,
        with a checkpoint: its time is over, it goes on later."""
        self.config = config
        self.folder = folder
        self.workers = workers
        self.model_folder = model_folder
        self.progress = progress
        self.trackers = trackers
        self.decode = load_decode(model_folder)
        self._rewards = make_rewards(config.reward, prompts.rules.values(), config.rollout.max_response_tokens)
        self._reward = self._rewards[config.reward.rule]
        self._prompts = prompts
        rewards = {name: self._rewards[rule] for name, rule in prompts.rules.items()}
        self._evaluation = HeldOutEvaluation(config, prompts.evaluation, rewards, self.decode, folder / "evaluation")
        num_problems = {name: len(of_set) for name, of_set in prompts.evaluation.items()}
        write_sets(folder / "evaluation_sets.json", num_problems, prompts.rules)
        self._buffer = GroupBuffer(config.dynamic_sampling)
        self._spread = SpreadGuard(config.dynamic_sampling.max_steps_without_spread)
        self._skips = SkipGuard(config.trainer.max_skipped_updates)
        self._num_generation_batches = 0
        self.first_step = 1
        self.stop = stop or Event()
        self.checkpoints = Checkpoints(config, folder, workers.policy, model_folder)
        if resumed is not None:
            self._restore(resumed)
        self._metrics = MetricsWriter(folder / "metrics.jsonl")
        self._drawn_s = -math.inf  # when the curves were
        self.timers = PhaseTimers(progress.phase)  # last: the first step begins here

    async def collect_groups(self, version: int) -> tuple[list[SampleGroup], dict[str, float]]:
        """The groups that a step trains on, sampled by weights `version` or left over, and their metrics."""
        config = self.config
        needed, generated, num_batches = config.rollout.prompts_per_step, list[SampleGroup | None](), 0
        judge = self._reward.with_limit()
        async with self.workers.sampling():
            while len(self._buffer) < needed:
                self._buffer.check_generation_batches(num_batches, needed, generated.count(None))
                batch = await self._generate_groups(judge, num_missing=needed - len(self._buffer))
                generated += batch
                self._buffer.add(batch)
                num_batches += 1
        groups = self._buffer.take(needed)
        if judge.failures:
            self.progress.note(
                f"the reward failed on {len(judge.failures)} responses; their {generated.count(None)} groups are "
                f"dropped and replaced. The first: {judge.failures[0]}"
            )
        surplus = {"surplus_kept": len(self._buffer), "surplus_dropped": self._buffer.num_surplus_dropped}
        if not config.dynamic_sampling.enabled:
            self._spread.observe(groups)
        metrics = (
            generation_metrics(generated)
            | batch_metrics(groups, version)
            | {"generation_batches": num_batches, "unjudged_samples": len(judge.failures)}
            | {"judge_timeouts": judge.num_timeouts, "judge_crashes": judge.num_crashes}
            | {"prompts_over_limit": self._prompts.num_over_limit}
            | surplus
        )
        return groups, {f"rollout/{name}": value for name, value in metrics.items()}

    async def _generate_groups(self, judge: JudgeWithLimit, num_missing: int) -> list[SampleGroup | None]:
        """A generation batch of prompts; without dynamic sampling only the `num_missing`, since all can be used."""
        rollout, dynamic = self.config.rollout, self.config.dynamic_sampling
        prompts = self._prompts.train.next_prompts(dynamic.generation_prompts if dynamic.enabled else num_missing)
        check_prompt_lengths(prompts, rollout.max_prompt_tokens)
        requests = make_requests(prompts, rollout.samples_per_prompt, self.config.seed, self._num_generation_batches)
        self._num_generation_batches += 1
        sampling = SamplingSettings(rollout.temperature, rollout.top_p, rollout.max_response_tokens)
        judge.num_responses += len(requests)
        responses = self.workers.engine.generate(requests, sampling)
        return await judge_while_sampling(prompts, responses, rollout.samples_per_prompt, judge, self.decode)

    def check_mismatch(self, groups: Sequence[SampleGroup], batch: TrainingBatch, version: int) -> dict[str, float]:
        """How far engine and trainer log-probs of the fresh samples differ.

        Raises:
            RuntimeError: beyond `rollout.max_logprob_mismatch`: the engine does not hold the policy's weights.
        """
        assert batch.old_logprobs is not None
        mismatch = mismatch_metrics(flat_rollout_logprobs(groups), batch.old_logprobs, is_fresh_token(groups, version))
        limit = self.config.rollout.max_logprob_mismatch
        if limit is not None and mismatch.get("mismatch_max", 0.0) > limit:
            raise RuntimeError(
                f"engine and trainer log-probs differ by {mismatch['mismatch_max']:.3g}, beyond "
                f"rollout.max_logprob_mismatch = {limit:g}: the engine does not sample from the policy that is trained"
            )
        return {f"rollout/{name}": value for name, value in mismatch.items()}

    def check_kl(self, batch: TrainingBatch, logprobs: np.ndarray) -> dict[str, float]:
        """KL of the policy before to the policy after all updates of a batch: mean(old - new) over what counts.

        Each update has checked the policy that it began with; this checks what the last one made, before it is pushed.

        Raises:
            RuntimeError: beyond `trainer.max_policy_kl`, or a log-prob is not finite.
        """
        assert batch.old_logprobs is not None
        changes = batch.old_logprobs.astype(np.float64) - logprobs
        if not np.isfinite(changes).all():
            raise RuntimeError(
                f"{np.count_nonzero(~np.isfinite(changes))} of {changes.size} log-probs are not finite before or after "
                "the updates of a rollout batch; lower optimizer.lr, raise optimizer.warmup_steps, or set "
                "model.dtype=float32"
            )
        if batch.loss_mask is not None:
            changes = changes[batch.loss_mask]
        kl = float(np.mean(changes)) if changes.size else 0.0
        limit = self.config.trainer.max_policy_kl
        if not abs(kl) <= limit:
            raise RuntimeError(
                f"the updates of a rollout batch moved the policy by a KL of {kl:.4g}, beyond trainer.max_policy_kl = "
                f"{limit:g}; lower optimizer.lr, raise optimizer.warmup_steps, or use larger mini-batches"
            )
        return {"train/batch_kl": kl}

    def update_metrics(self, updates: Sequence[PolicyUpdate], lr: float) -> dict[str, float]:
        """Metrics over all updates of a step.

        Raises:
            RuntimeError: `trainer.max_skipped_updates` mini-batches in a row made none.
        """
        for update in updates:
            self._skips.observe(update)
        skipped = Counter(update.skipped for update in updates if update.skipped is not None)
        if skipped:
            counts = ", ".join(f"{number} {why.replace('_', ' ')}" for why, number in sorted(skipped.items()))
            self.progress.note(f"{skipped.total()} of {len(updates)} mini-batches made no update: {counts}")
        return update_metrics(updates, lr, self.config.algorithm) | cost_metrics(updates)

    async def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy of the engine's policy, after step `step`."""
        with self.timers.phase("eval"):
            async with self.workers.sampling():
                return await self._evaluation.measure(self.workers.engine, step)

    def record_samples(
        self, step: int, groups: Sequence[SampleGroup], batch: TrainingBatch, logprobs: np.ndarray
    ) -> dict[str, float]:
        """Write samples of the step, with what the updates did to their tokens; how many of its groups were written.

        These are the first within `run.sample_groups` and `run.sample_tokens`. `logprobs` is float32 [R], by the policy
        after the updates.
        """
        settings = self.config.run
        recorded = groups_to_record(groups, settings.sample_groups, settings.sample_tokens)
        if recorded:
            with self.timers.phase("samples"):
                self._write_samples(step, recorded, batch, logprobs)
        return {"rollout/recorded_groups": len(recorded)}

    def _write_samples(
        self, step: int, recorded: Sequence[SampleGroup], batch: TrainingBatch, logprobs: np.ndarray
    ) -> None:
        assert batch.old_logprobs is not None
        lengths = np.array([len(sample.response_ids) for group in recorded for sample in group.samples])
        num_samples, num_tokens = len(lengths), lengths.sum()
        tokens = TokenRecord(
            advantages=batch.advantages[:num_samples],
            old_logprobs=batch.old_logprobs[:num_tokens],
            new_logprobs=logprobs[:num_tokens],
            influence_weights=response_influence_weights(
                logprobs[:num_tokens],
                batch.old_logprobs[:num_tokens],
                batch.advantages[:num_samples],
                lengths,
                self.config.algorithm,
                batch.loss_mask[:num_tokens] if batch.loss_mask is not None else None,
            ),
        )
        write_samples(samples_path(self.folder, step), recorded, tokens, self.decode)

    async def random_states(self, step: int) -> list[dict[str, np.ndarray]]:
        """The random generators of the policy's ranks; none in a step of which no replay file is written."""
        if not self._is_recorded(step):
            return []
        with self.timers.phase("replay"):
            return await self.workers.policy.random_states()

    def record_replay(
        self,
        step: int,
        groups: Sequence[SampleGroup],
        batch: TrainingBatch,
        lr: float,
        random_states: Sequence[RandomStates],
        updates: Sequence[PolicyUpdate],
        logprobs: np.ndarray,
    ) -> None:
        """Write what the updates of a step were made of and what they gave, every `checkpoint.replay_every_steps`.

        `random_states` are those before the first update; `logprobs` is float32 [R], by the policy after the last.
        """
        if not self._is_recorded(step):
            return
        with self.timers.phase("replay"):
            uids, weight_versions, token_versions = sample_origins(groups)
            record = ReplayStep(
                step,
                self.config.model_dump(mode="json"),
                self.workers.platform.name,
                batch,
                uids,
                weight_versions,
                token_versions,
                lr,
                tuple(tuple(samples) for samples in mini_batches(self.config, step)),
                tuple(random_states),
                StepResults(tuple(updates), logprobs),
            )
            write_replay_step(replay_path(self.folder, step), record)

    def _is_recorded(self, step: int) -> bool:
        every = self.config.checkpoint.replay_every_steps
        return every > 0 and step % every == 0

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics and curves, and show the step. What this takes is the next step's time."""
        metrics = metrics | self.timers.collect()
        metrics |= throughput(metrics)
        with self.timers.phase("record"):
            self._metrics.write(step, metrics)
            self.trackers.log(step, metrics)
            self.progress.step(step, self.config.trainer.steps, metrics)
        if any(name.startswith("eval/") for name in metrics) or time.perf_counter() - self._drawn_s > CURVES_EVERY_S:
            with self.timers.phase("curves"):
                plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
            self._drawn_s = time.perf_counter()

    async def save(self, step: int, metrics: dict[str, float], stops: bool) -> None:
        """What is due after a recorded step: an export, and a checkpoint, also where the run stops.

        Raises:
            RuntimeError: a checkpoint could not be written, this one or the one before.
        """
        self.checkpoints.check()
        every = self.config.checkpoint.export_hf_every_steps
        if every > 0 and step % every == 0:  # first: a run goes on after a checkpoint, and would leave it out
            with self.timers.phase("export"):
                await self.workers.policy.export(self.model_folder, self.folder / f"hf-step-{step:08d}")
        if self.checkpoints.is_due(step) or stops:
            with self.timers.phase("save"):
                self._metrics.sync()
                await self.checkpoints.save(self._state(step), metrics.get("eval/sampled_accuracy"))

    def _state(self, step: int) -> RunState:
        values = {
            "generation_batches": self._num_generation_batches,
            "prompts": self._prompts.train.state_dict(),
            "buffer": self._buffer.counters(),
            "steps_without_spread": self._spread.num_steps,
            "skipped_updates": self._skips.num_skipped,
        }
        return RunState(step, values, self._buffer.groups)

    def _restore(self, state: RunState) -> None:
        self.first_step = state.step + 1
        self._num_generation_batches = state.values["generation_batches"]
        self._buffer.restore(state.groups, state.values["buffer"])
        self._spread.num_steps = state.values["steps_without_spread"]
        self._skips.num_skipped = state.values["skipped_updates"]

    def close(self) -> None:
        """End the rewards' processes, also in the middle of judging, and close the metrics' file."""
        for reward in self._rewards.values():
            reward.close()
        self._metrics.close()


def load_decode(model_folder: Path) -> Decode:
    """Text of token ids by the folder's tokenizer, special tokens left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)
