"""The updates of a recorded run, made again in any layout from the samples that it wrote; no engine takes part.

Two layouts compute the same update, but for the order of sums: what their metrics differ by is what that order does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from fipo_megatron.config.checks import check_config, check_model_folder
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.data.load import load_files
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.observability.metrics import read_metrics
from fipo_megatron.observability.samples import read_samples, samples_path
from fipo_megatron.parallel.packed import merge_response_rows
from fipo_megatron.rollout.collect import make_training_batch
from fipo_megatron.trainer.launch import initial_policy
from fipo_megatron.trainer.layouts import parallel_settings
from fipo_megatron.trainer.updates import learning_rate, mini_batches, update_metrics
from fipo_megatron.types import PolicyUpdate, Prompt, Sample, SampleGroup, TrainingBatch

if TYPE_CHECKING:
    from fipo_megatron.trainer.policy import MegatronPolicy

TOLERANCE = 1e-4  # of a metric, relative to the recorded one where that is above 1
# Of a share of tokens, those on one side of a threshold: a token that lies on it but for rounding falls on either side.
MAX_MOVED_TOKENS = 8
NOT_REPLAYED = {"train/batch_kl"}  # of the policy after the updates
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class RecordedRun:
    """The first steps of a run, as it wrote them."""

    name: str
    config: Config
    base: Path  # folder of the policy that it began with
    batches: list[TrainingBatch]  # without log-probs
    metrics: list[dict[str, Any]]  # of the same steps

    def in_layout(self, layout: str) -> Config:
        """The run's configuration in another layout, on the CPU; a ValueError if its model can't be laid out so."""
        parallel = parallel_settings(layout, with_experts=read_model_shape(self.base).num_experts > 0)
        config = Config.model_validate({**self.config.model_dump(), "parallel": parallel, "platform": "cpu"})
        check_config(config)
        check_model_folder(self.base, config.parallel)
        return config


def load_recorded_run(run_folder: Path, num_steps: int) -> RecordedRun:
    """The first steps of a run.

    Raises:
        ValueError: the folder is not a run's, the run has fewer steps, did not write all of their samples, or its base
            policy is gone.
    """
    if not (run_folder / "config.yaml").is_file():
        raise ValueError(f"{run_folder} is no run folder (config.yaml); give one, e.g. runs/quickstart_cpu-seed0")
    config = load_config(run_folder / "config.yaml")
    metrics = read_metrics(run_folder / "metrics.jsonl")[1 : num_steps + 1]
    if not 1 <= num_steps <= len(metrics):
        raise ValueError(f"--steps {num_steps}: {run_folder} has {len(metrics)} steps; give 1 to that many")
    base, _ = initial_policy(config, load_files(config.data))
    if not (base / "config.json").is_file():
        raise ValueError(f"{base}, the policy that {run_folder} began with, is gone; train the run again")
    batches = [_read_batch(samples_path(run_folder, step), config) for step in range(1, num_steps + 1)]
    return RecordedRun(run_folder.resolve().name, config, base, batches, metrics)


def _read_batch(path: Path, config: Config) -> TrainingBatch:
    lines = read_samples(path) if path.is_file() else []
    groups = [_read_group(list(of_group)) for _, of_group in groupby(lines, key=lambda line: line["uid"])]
    if len(groups) != config.rollout.prompts_per_step:
        raise ValueError(
            f"{path} holds {len(groups)} of the {config.rollout.prompts_per_step} groups of its step; record a run "
            f"with run.sample_groups={config.rollout.prompts_per_step} and run.sample_tokens above all their tokens"
        )
    advantages = np.array([line["advantage"] for line in lines], np.float32)
    return make_training_batch(groups, advantages, mask_truncated=config.reward.mask_truncated)


COPIED_KEYS = ("weight_version", "finish_reason", "text", "reward", "accuracy", "prediction")


def _read_group(lines: Sequence[dict[str, Any]]) -> SampleGroup:
    prompt = Prompt(lines[0]["uid"], tuple(lines[0]["prompt_ids"]), lines[0]["ground_truth"], "")
    samples = [
        Sample(
            prompt,
            response_ids=np.array(line["response_ids"], np.int32),
            rollout_logprobs=np.array(line["rollout_logprobs"], np.float32),
            token_versions=np.array(line["token_versions"], np.int32) if "token_versions" in line else None,
            **{
                key: line[key]
                for key in ("weight_version", "finish_reason", "text", "reward", "accuracy", "prediction")
            },
        )
        for line in lines
    ]
    return SampleGroup(prompt, tuple(samples))


def replay(config: Config, batches: Sequence[TrainingBatch], base: Path) -> list[dict[str, float]]:
    """Metrics of the updates that the layout of `config` makes of recorded batches, a dictionary each step.

    Raises:
        RuntimeError: a rank failed.
    """
    from fipo_megatron.trainer.policy_processes import run_policy

    steps = [
        (replay_step, (batch, mini_batches(config, step), learning_rate(config, step)))
        for step, batch in enumerate(batches, start=1)
    ]
    _, *replies = run_policy(config, [("load", (base, config.optimizer)), *steps], timeout_s=TIMEOUT_S)
    return [
        update_metrics(updates[0], learning_rate(config, step), config.algorithm)
        for step, updates in enumerate(replies, start=1)
    ]


def replay_step(
    policy: MegatronPolicy, batch: TrainingBatch, samples: Sequence[Sequence[int]], lr: float
) -> list[PolicyUpdate]:
    """The updates of one step, with this policy's own log-probs as the old ones. Collective."""
    batch = replace(batch, old_logprobs=_gather_logprobs(policy, policy.logprobs(batch)))
    if policy.config.algorithm.reference_kl_coef > 0:
        batch = replace(batch, ref_logprobs=_gather_logprobs(policy, policy.ref_logprobs(batch)))
    return [policy.update(batch, of_update, lr) for of_update in samples]


def _gather_logprobs(policy: MegatronPolicy, rows: Any) -> np.ndarray:
    replies: list[Any] = [None] * policy.groups.world.size()
    dist.all_gather_object(replies, rows, group=policy.groups.world)
    return merge_response_rows(part for reply in replies if reply is not None for part in reply)


@dataclass(frozen=True)
class ReplayErrors:
    """How far replayed metrics are from the recorded ones: the worst of all steps."""

    values: dict[str, float]  # of each metric but shares, relative where the recorded one is above 1
    moved_tokens: float  # of the share that differs most, in tokens of its step

    @property
    def worst(self) -> str:
        return max(self.values, key=self.values.__getitem__)

    @property
    def ok(self) -> bool:
        return self.values[self.worst] <= TOLERANCE and self.moved_tokens <= MAX_MOVED_TOKENS


def compare_metrics(replayed: Sequence[dict[str, float]], recorded: Sequence[dict[str, float]]) -> ReplayErrors:
    """The differences between metrics of the same steps; one that only one side has differs by infinity."""
    values: dict[str, float] = {}
    moved_tokens = 0.0
    for found, expected in zip(replayed, recorded, strict=True):
        for name in found.keys() | {key for key in expected if key.startswith("train/")} - NOT_REPLAYED:
            difference = abs(found.get(name, np.inf) - expected.get(name, np.inf))
            if math.isnan(difference):
                difference = np.inf
            if "_frac" in name:
                moved_tokens = max(moved_tokens, difference * expected["rollout/trained_tokens"])
            else:
                values[name] = max(values.get(name, 0.0), difference / max(1.0, abs(expected.get(name, 0.0))))
    return ReplayErrors(values, moved_tokens)
