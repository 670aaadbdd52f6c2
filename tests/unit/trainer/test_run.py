from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fipo_megatron.algorithm.advantage import group_relative_advantages
from fipo_megatron.algorithm.loss_metrics import SUMS, reduce_statistics
from fipo_megatron.config.schema import Config
from fipo_megatron.data.encoding import load_prompt_encoder
from fipo_megatron.data.load import load_files
from fipo_megatron.data.run_prompts import make_run_prompts
from fipo_megatron.data.tasks import make_task
from fipo_megatron.observability.metrics import MetricsWriter, read_metrics
from fipo_megatron.observability.progress import Progress
from fipo_megatron.observability.samples import read_samples, samples_path
from fipo_megatron.observability.trackers import Trackers
from fipo_megatron.rollout.collect import make_training_batch
from fipo_megatron.trainer.run import Run
from fipo_megatron.trainer.warm_start import write_skeleton
from fipo_megatron.types import FinishedResponse, Generation, GenerationRequest, PolicyUpdate, SamplingSettings

# Fails on a response by its length alone, so that the test can say which; scores the others by it, too.
REWARD = """
def reward(response, ground_truth):
    number = len(response)
    if FAILING and number % FAILING == 0:
        kind = number // FAILING % 6
        if kind == 0:
            raise KeyError("no such unit")
        return (float("nan"), float("inf"), None, "right", {"accuracy": 1.0})[kind - 1]
    return {"score": float(number), "accuracy": float(number % 2), "prediction": ""}
"""
PROMPTS, GROUP = 6, 4


class LengthEngine:
    """Responses of 1 to 60 tokens, the length made of the seed alone; finished in an order of its own."""

    def __init__(self, order: int) -> None:
        self._rng = random.Random(order)
        self.requests: list[Sequence[GenerationRequest]] = []  # of every call

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> AsyncIterator[FinishedResponse]:
        self.requests.append(requests)
        for index in self._rng.sample(range(len(requests)), len(requests)):
            await asyncio.sleep(0)
            length = response_tokens(requests[index])
            yield index, Generation(np.full(length, 5, np.int32), np.full(length, -0.5, np.float32), "stop", 0)


def response_tokens(request: GenerationRequest) -> int:
    return 1 + request.seed % 60


@contextmanager
def make_run(folder: Path, order: int, failing: int, **sections: dict[str, Any]) -> Iterator[tuple[Run, LengthEngine]]:
    """A run with a LengthEngine, and a reward that fails on every response whose length `failing` divides; 0: none."""
    folder.mkdir()
    (folder / "reward.py").write_text(f"FAILING = {failing}\n{REWARD}")
    config = Config.model_validate(
        {
            "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": GROUP, "max_response_tokens": 64},
            "dynamic_sampling": {"generation_prompts": 10},
            "evaluation": {"num_problems": 24},
            "warm_start": {},
            **sections,
            "reward": {"rule": "custom", "function": f"{folder / 'reward.py'}:reward", **sections.get("reward", {})},
        }
    )
    write_skeleton(config, make_task(config.task), folder)
    prompts = make_run_prompts(config, load_files(config.data), load_prompt_encoder(folder, config.data))
    engine = LengthEngine(order)
    workers: Any = SimpleNamespace(engine=engine, policy=None, sampling=nullcontext)
    with (
        (folder / "notes.txt").open("w") as notes,
        closing(Run(config, folder, workers, folder, prompts, Progress(notes), Trackers(config, folder))) as run,
    ):
        run.decode = lambda token_ids: "x" * len(token_ids)
        yield run, engine


def test_groups_with_failed_responses_are_dropped_replaced_and_counted(tmp_path: Path) -> None:
    """Without dynamic sampling; one length in twelve fails, in each of six ways; two finishing orders, one result."""
    batches = []
    for order in (0, 1):
        with make_run(
            tmp_path / str(order), order, 12, dynamic_sampling={"enabled": False}, reward={"max_unjudged_frac": 0.5}
        ) as (run, engine):
            groups, metrics = asyncio.run(run.collect_groups(version=0))
            requested = [len(requests) for requests in engine.requests]
        batches.append([[sample.text for sample in group.samples] for group in groups])
        assert metrics["rollout/generated_groups"] == sum(requested) // GROUP
        assert metrics["rollout/unjudged_groups"] == sum(requested) // GROUP - PROMPTS
    assert batches[0] == batches[1]
    assert requested[0] == PROMPTS * GROUP
    assert requested[1:] == [n for n in requested[1:] if n % GROUP == 0]
    assert len(requested) == metrics["rollout/generation_batches"] > 1
    assert metrics["rollout/unjudged_samples"] >= metrics["rollout/unjudged_groups"] > 0

    rewards = [sample.reward for group in groups for sample in group.samples]
    assert rewards == [len(text) for texts in batches[0] for text in texts]
    assert not any(reward % 12 == 0 for reward in rewards)
    advantages = group_relative_advantages(rewards, [GROUP] * PROMPTS, normalize_by_std=True)
    assert np.isfinite(make_training_batch(groups, advantages).advantages).all()
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, metrics)  # refuses numbers that are not finite


def test_counts_are_those_of_every_response(tmp_path: Path) -> None:
    """One generation batch of ten prompts, recounted from the seeds of its requests."""
    with make_run(tmp_path / "run", 0, 20, reward={"max_unjudged_frac": 0.5}) as (run, engine):
        groups, metrics = asyncio.run(run.collect_groups(version=0))
    lengths = np.array([response_tokens(request) for request in engine.requests[0]]).reshape(-1, GROUP)
    failed = lengths % 20 == 0
    judged = lengths[~failed.any(axis=1)]
    assert metrics["rollout/unjudged_samples"] == failed.sum() > 0
    assert metrics["rollout/unjudged_groups"] == failed.any(axis=1).sum()
    assert metrics["rollout/reward_mean"] == pytest.approx(judged.mean())
    assert metrics["rollout/accuracy"] == pytest.approx((judged % 2).mean())
    with_spread = judged[(judged % 2).min(axis=1) != (judged % 2).max(axis=1)]
    assert [[len(sample.text) for sample in group.samples] for group in groups] == with_spread[:PROMPTS].tolist()
    notes = (tmp_path / "run" / "notes.txt").read_text()
    assert f"the reward failed on {failed.sum()} responses" in notes
    assert "The first: reward.function: " in notes


@pytest.mark.parametrize(("failing", "limit"), [(1, 0.99), (3, 0.1)])
def test_a_reward_that_fails_too_often_ends_the_run_with_its_cause(failing: int, limit: float, tmp_path: Path) -> None:
    with (
        make_run(tmp_path / "run", 0, failing, reward={"max_unjudged_frac": limit}) as (run, _),
        pytest.raises(RuntimeError, match=rf"max_unjudged_frac = {limit}: \d+ or more of 40 .*failed on sample train/"),
    ):
        asyncio.run(run.collect_groups(version=0))


def test_an_evaluation_counts_what_cannot_be_judged_as_wrong(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", 0, 5, reward={"max_unjudged_frac": 0.9}) as (run, engine):
        metrics = asyncio.run(run.evaluate(step=0))
    lengths = np.array([[response_tokens(request) for request in requests] for requests in engine.requests])
    failed = lengths % 5 == 0
    assert [metrics["eval/sampled_unjudged"], metrics["eval/greedy_unjudged"]] == failed.sum(axis=1).tolist()
    assert failed.any()
    assert metrics["eval/sampled_accuracy"] == np.mean(~failed[0] & (lengths[0] % 2 == 1))
    with (
        make_run(tmp_path / "failing", 0, 1, reward={"max_unjudged_frac": 0.5}) as (run, _),
        pytest.raises(RuntimeError, match="max_unjudged_frac = 0.5: 24 or more of 24 responses"),
    ):
        asyncio.run(run.evaluate(step=0))


def test_a_step_served_from_surplus_samples_nothing_and_says_so(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", 0, 0, dynamic_sampling={"generation_prompts": 40}) as (run, _):
        asyncio.run(run.collect_groups(version=0))
        groups, metrics = asyncio.run(run.collect_groups(version=1))
    assert len(groups) == PROMPTS
    assert metrics["rollout/generated_groups"] == metrics["rollout/generation_batches"] == 0
    assert metrics["rollout/stale_samples"] == PROMPTS * GROUP
    assert "rollout/accuracy" not in metrics
    assert "rollout/reward_mean" not in metrics


def test_a_policy_that_the_engine_does_not_hold_or_that_ran_away_is_refused(tmp_path: Path) -> None:
    """The engine's log-probs are -0.5; one of the trainer's is 2e-3 off; the updates move them by 0.5 a token."""
    with make_run(
        tmp_path / "run",
        0,
        0,
        dynamic_sampling={"enabled": False},
        rollout={"max_logprob_mismatch": 1e-3, "prompts_per_step": PROMPTS, "samples_per_prompt": GROUP},
        trainer={"max_policy_kl": 0.4},
    ) as (run, _):
        groups, _ = asyncio.run(run.collect_groups(version=0))
        batch = make_training_batch(groups, np.zeros(PROMPTS * GROUP, np.float32))
        num_tokens = sum(len(sample.response_ids) for group in groups for sample in group.samples)
        old_logprobs = np.full(num_tokens, -0.5, np.float32)
        batch = replace(batch, old_logprobs=old_logprobs)
        assert run.check_mismatch(groups, batch, 0)["rollout/mismatch_max"] == 0
        old_logprobs[7] -= 2e-3
        with pytest.raises(RuntimeError, match=r"differ by 0\.002, beyond rollout\.max_logprob_mismatch = 0\.001"):
            run.check_mismatch(groups, batch, 0)
        assert "rollout/mismatch_max" not in run.check_mismatch(groups, batch, 1)  # no sample is fresh
        assert run.check_kl(batch, old_logprobs - 0.25)["train/batch_kl"] == pytest.approx(0.25, abs=1e-6)
        with pytest.raises(RuntimeError, match=r"log-probs are not finite before or after the updates .* lower optim"):
            run.check_kl(batch, old_logprobs * np.nan)
        masked = replace(batch, loss_mask=np.arange(num_tokens) % 2 == 0)
        changed = np.where(masked.loss_mask, old_logprobs - 0.25, old_logprobs - 9).astype(np.float32)
        assert run.check_kl(masked, changed)["train/batch_kl"] == pytest.approx(0.25, abs=1e-6)
        for logprobs in (old_logprobs - 0.5, old_logprobs + 0.5):
            with pytest.raises(RuntimeError, match=r"trainer\.max_policy_kl = 0\.4; lower optimizer\.lr"):
                run.check_kl(batch, logprobs)


def statistics(**sums: float) -> np.ndarray:
    vector = reduce_statistics([]).numpy()
    for name, value in sums.items():
        vector[SUMS.index(name)] = value
    return vector


EMPTY = PolicyUpdate(statistics(), grad_norm=None, skipped="empty")
LOST = PolicyUpdate(statistics(loss_sum=np.nan, denominator=3), grad_norm=None, skipped="not_finite")


def test_mini_batches_without_an_update_are_counted_and_left_out(tmp_path: Path) -> None:
    made = PolicyUpdate(statistics(loss_sum=3.0, denominator=6, tokens=6), grad_norm=0.25)
    with make_run(tmp_path / "run", 0, 0) as (run, _):
        metrics = run.update_metrics([EMPTY, made, LOST, made, EMPTY], lr=0.1)
        assert "3 of 5 mini-batches made no update: 2 empty, 1 not finite" in (tmp_path / "run/notes.txt").read_text()
        assert (metrics["train/loss"], metrics["train/grad_norm"]) == (0.5, 0.25)
        counts = [metrics[f"train/{name}"] for name in ("updates", "skipped_empty", "skipped_not_finite")]
        assert counts == [2, 2, 1]
        metrics = run.update_metrics([LOST], lr=0.1)
        assert metrics.keys() == {"train/" + name for name in ("lr", "updates", "skipped_empty", "skipped_not_finite")}


@pytest.mark.parametrize(
    ("last", "remedy"), [(EMPTY, "raise rollout.max_response_tokens"), (LOST, "lower optimizer.lr, raise")]
)
def test_mini_batches_in_a_row_without_an_update_end_the_run(tmp_path: Path, last: PolicyUpdate, remedy: str) -> None:
    made = PolicyUpdate(statistics(denominator=1, tokens=1), grad_norm=1.0)
    with make_run(tmp_path / "run", 0, 0, trainer={"max_skipped_updates": 3}) as (run, _):
        run.update_metrics([LOST, LOST, made, EMPTY, LOST], lr=0.1)
        message = rf"trainer\.max_skipped_updates: 3 mini-batches in a row made no update; .* {remedy}"
        with pytest.raises(RuntimeError, match=message):
            run.update_metrics([last, made], lr=0.1)


def test_samples_are_written_within_the_tokens_counted_and_timed(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", 0, 0, run={"sample_tokens": 300}) as (run, _):
        groups, _ = asyncio.run(run.collect_groups(version=0))
        batch = make_training_batch(groups, np.ones(PROMPTS * GROUP, np.float32))
        logprobs = np.full(batch.token_ids.size - batch.prompt_lens.sum(), -0.5, np.float32)
        metrics = run.record_samples(1, groups, replace(batch, old_logprobs=logprobs), logprobs)
        times = run.timers.collect()
    lengths = [sum(len(sample.response_ids) for sample in group.samples) for group in groups]
    expected = next(i for i in range(1, PROMPTS + 1) if sum(lengths[: i + 1]) > 300)
    assert 1 < expected < PROMPTS
    assert metrics == {"rollout/recorded_groups": expected}
    lines = read_samples(samples_path(tmp_path / "run", 1))
    assert [line["uid"] for line in lines] == [group.prompt.uid for group in groups[:expected] for _ in range(GROUP)]
    assert 0 < times["time/samples_s"] <= times["time/step_s"]


def test_curves_are_drawn_with_evaluations_and_once_a_minute_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    now = 1000.0
    monkeypatch.setattr("fipo_megatron.trainer.run.plot_curves", lambda lines, png: drawn.append(step))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with make_run(tmp_path / "run", 0, 0) as (run, _):
        for step in range(10):
            run.record(step, {"eval/sampled_accuracy": 0.5} if step in (0, 5) else {"train/loss": 0.5})
            now += 25.0
    assert drawn == [0, 3, 5, 8]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "time/curves_s" in line] == [1, 4, 6, 9]  # after the step that shows it


class ExportedPolicy:
    """Keeps what it is asked to export; its checkpoints are the store's, and not looked at here."""

    def __init__(self) -> None:
        self.exported: list[tuple[Path, str]] = []

    async def export(self, source: Path, target: Path) -> None:
        self.exported.append((source, target.name))


def test_exports_and_checkpoints_have_schedules_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 3rd and 4th step, and a checkpoint at the end and where the run is stopped."""
    policy, saved = ExportedPolicy(), list[tuple[int, float | None]]()
    settings = {"checkpoint": {"export_hf_every_steps": 3, "every_steps": 4}, "trainer": {"steps": 10}}

    async def save(state: Any, score: float | None) -> None:
        saved.append((state.step, score))

    with make_run(tmp_path / "run", 0, 0, **settings) as (run, _):
        run.workers.policy = policy  # type: ignore[assignment]
        monkeypatch.setattr(run.checkpoints, "save", save)
        for step in range(1, 11):
            asyncio.run(run.save(step, {"eval/sampled_accuracy": 0.5} if step == 8 else {}, stops=step == 7))
    names = [f"hf-step-0000000{step}" for step in (3, 6, 9)]
    assert policy.exported == [(tmp_path / "run", name) for name in names]
    assert saved == [(4, None), (7, None), (8, 0.5), (10, None)]
