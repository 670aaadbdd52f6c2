"""The updates of a recorded step, made again from its replay file, in the run's layout or another, without an engine.

In the run's own layout everything that comes out is what was recorded, bit for bit. Two layouts compute the same update
but for the order of sums: what their metrics differ by is what that order does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from fipo_megatron.checkpoint.contents import POLICY
from fipo_megatron.checkpoint.manifest import DamagedError
from fipo_megatron.checkpoint.replay_file import (
    RandomStates,
    ReplayStep,
    StepResults,
    read_replay_step,
    replay_path,
    replay_steps,
)
from fipo_megatron.config.checks import check_config, check_model_folder
from fipo_megatron.config.load import load_config
from fipo_megatron.config.schema import Config
from fipo_megatron.data.load import load_files
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.parallel.packed import merge_response_rows
from fipo_megatron.trainer.launch import initial_policy
from fipo_megatron.trainer.layouts import parallel_settings
from fipo_megatron.trainer.run_folder import checkpoint_store
from fipo_megatron.trainer.updates import update_metrics
from fipo_megatron.types import TrainingBatch

if TYPE_CHECKING:
    from fipo_megatron.trainer.policy import MegatronPolicy

SAME = "same"  # the layout that the run had
TOLERANCE = 1e-4  # of a metric, relative to the recorded one where that is above 1; of the mean change of a log-prob
# Of a share of tokens, those on one side of a threshold: a token that lies on it but for rounding falls on either side.
MAX_MOVED_TOKENS = 8
TIMEOUT_S = 600.0  # of a step
# Settings that an update does not depend on, or of which its file has the value.
FREE_SETTINGS = {"trainer": {"steps", "offload"}, "optimizer": {"lr", "warmup_steps"}}
UPDATE_SECTIONS = ("model", "trainer", "algorithm", "optimizer", "kernels", "parallel")


@dataclass(frozen=True)
class StartingPoint:
    """Where a replay begins: the base policy of a run, or a checkpoint of it."""

    step: int  # 0: the base policy alone
    base: Path  # folder of the policy that the run began with
    state: Path | None  # saved state of the policy after `step`; None at step 0
    notes: tuple[str, ...] = ()  # why a newer checkpoint is not used


@dataclass(frozen=True)
class RecordedSteps:
    """The steps from a starting point to the one that is asked for."""

    name: str  # of the run
    start: StartingPoint
    steps: tuple[ReplayStep, ...]

    @property
    def config(self) -> Config:
        return Config.model_validate(self.steps[-1].config)

    def is_own_layout(self, config: Config) -> bool:
        """Whether `config` has the layout and the platform that the run had."""
        return config.parallel == self.config.parallel and config.platform == self.steps[-1].platform

    def in_layout(self, layout: str) -> Config:
        """The run's configuration in its own layout on its own platform, or in another one on the CPU.

        Raises:
            ValueError: the model can't be laid out so.
        """
        settings = self.config.model_dump()
        if layout == SAME:
            return Config.model_validate({**settings, "platform": self.steps[-1].platform})
        parallel = parallel_settings(layout, with_experts=read_model_shape(self.start.base).num_experts > 0)
        config = Config.model_validate({**settings, "parallel": parallel, "platform": "cpu"})
        check_config(config)
        check_model_folder(self.start.base, config.parallel)
        return config


# ---------------------------------------------------------------- what was recorded


def load_recorded_steps(run_folder: Path, step: int | None) -> RecordedSteps:
    """All that is needed to make `step` again, by default the newest of which the run has a file.

    Raises:
        ValueError: the folder is not a run's, a file is missing or damaged, the steps on the way were made with other
            settings, or the base policy is gone.
    """
    if not (run_folder / "config.yaml").is_file():
        raise ValueError(f"{run_folder} is no run folder (config.yaml); give one, e.g. runs/quickstart_cpu-seed0")
    present = replay_steps(run_folder)
    if not present:
        raise ValueError(
            f"{run_folder} has no replay file (replay/step-00000001.safetensors); record a run with "
            "checkpoint.replay_every_steps=1"
        )
    step = present[-1] if step is None else step
    if step not in present:
        raise ValueError(f"--step {step}: {replay_path(run_folder, step)} is missing; there are {_ranges(present)}")
    last = read_replay_step(replay_path(run_folder, step))
    config = Config.model_validate(last.config)
    start = find_start(run_folder, config, step)
    steps = (*_read_steps(run_folder, start, step, present), last)
    for each in steps:
        _check_step(each, last)
    return RecordedSteps(run_folder.resolve().name, start, steps)


def find_start(run_folder: Path, config: Config, step: int) -> StartingPoint:
    """The newest whole checkpoint before `step`, or the base policy. `config` is the one that the step was made with;
    where the checkpoints are now is for the run folder's present settings to say.

    Raises:
        ValueError: the base policy is gone.
    """
    base, _ = initial_policy(config, load_files(config.data))
    if not (base / "config.json").is_file():
        raise ValueError(f"{base}, the policy that {run_folder} began with, is gone; train the run again")
    store = checkpoint_store(load_config(run_folder / "config.yaml"), run_folder)
    try:
        found = store.newest(max_step=step - 1)
    except DamagedError as error:
        return StartingPoint(0, base, None, (str(error),))
    if found is None:
        return StartingPoint(0, base, None, ())
    return StartingPoint(found.step, base, found.folder / POLICY, found.refused)


def _read_steps(run_folder: Path, start: StartingPoint, step: int, present: Sequence[int]) -> list[ReplayStep]:
    if missing := sorted(set(range(start.step + 1, step)) - set(present)):
        whence = f"the checkpoint of step {start.step}" if start.step else "the base policy"
        raise ValueError(
            f"--step {step}: from {whence}, the newest to start from, its policy can't be made again without the "
            f"replay files of steps {_ranges(missing)}; give a step right after a checkpoint, or record with "
            "checkpoint.replay_every_steps=1"
        )
    return [read_replay_step(replay_path(run_folder, each)) for each in range(start.step + 1, step)]


def _check_step(each: ReplayStep, last: ReplayStep) -> None:
    """Raises ValueError where a step on the way was made with other settings than the last."""
    earlier, later = _update_settings(each), _update_settings(last)
    for key in sorted(earlier.keys() | later.keys()):
        if earlier.get(key) != later.get(key):
            raise ValueError(
                f"step {each.step} was made with {key} = {earlier.get(key)}, step {last.step} with {later.get(key)}: "
                f"one replay can't make both; give --step {each.step}, or a step that has a checkpoint between them"
            )


def _update_settings(step: ReplayStep) -> dict[str, Any]:
    """What an update depends on beside what its file has, by dotted key."""
    config = step.config
    settings = {
        f"{section}.{name}": value
        for section in UPDATE_SECTIONS
        for name, value in config[section].items()
        if name not in FREE_SETTINGS.get(section, ())
    }
    settings |= {f"rollout.{name}": config["rollout"][name] for name in ("temperature", "max_response_tokens")}
    return {**settings, "seed": config["seed"], "platform": step.platform}


def _ranges(steps: Sequence[int]) -> str:
    """Sorted numbers as "1-4, 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][-1] == step - 1:
            runs[-1][-1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# ---------------------------------------------------------------- the updates, again


@dataclass(frozen=True)
class ReplayedStep:
    """What a step gave when it was made again."""

    old_logprobs: np.ndarray  # float32 [R], by the policy that the step began with
    results: StepResults


def replay(config: Config, recorded: RecordedSteps) -> list[ReplayedStep]:
    """What the layout of `config` makes of recorded steps.

    Raises:
        RuntimeError: a rank failed.
    """
    from fipo_megatron.trainer.policy_processes import Call, run_policy

    # In another layout a rank's random numbers are for other parts of the model.
    same = recorded.is_own_layout(config)
    calls: list[Call] = [("load", (recorded.start.base, config.optimizer))]
    if recorded.start.state is not None:
        calls.append(("load_state", (recorded.start.state,)))
    calls += [
        (replay_step, (step.batch, step.mini_batches, step.lr, step.random_states if same else None))
        for step in recorded.steps
    ]
    replies = run_policy(config, calls, timeout_s=TIMEOUT_S * len(recorded.steps))
    return [of_ranks[0] for of_ranks in replies[-len(recorded.steps) :]]


def replay_step(
    policy: MegatronPolicy,
    batch: TrainingBatch,
    mini_batches: Sequence[Sequence[int]],
    lr: float,
    random_states: Sequence[RandomStates] | None,
) -> ReplayedStep:
    """The updates of one step. Collective.

    In the run's own layout `random_states` are those of every rank, and the loss compares with the recorded old
    log-probs. Without them it compares with this layout's own: before the first update a ratio is 1 exactly, which is a
    bound of the influence weights, and another layout's rounding would put half of all tokens beyond it.
    """
    old_logprobs = _gather_logprobs(policy, batch)
    if random_states is None:
        batch = replace(batch, old_logprobs=old_logprobs)
    else:
        policy.set_random_states(random_states)
    updates = tuple(replace(policy.update(batch, samples, lr), cost=None) for samples in mini_batches)
    return ReplayedStep(old_logprobs, StepResults(updates, _gather_logprobs(policy, batch)))


def _gather_logprobs(policy: MegatronPolicy, batch: TrainingBatch) -> np.ndarray:
    replies: list[Any] = [None] * policy.groups.world.size()
    dist.all_gather_object(replies, policy.logprobs(batch), group=policy.groups.world)
    return merge_response_rows(part for reply in replies if reply is not None for part in reply)


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class ReplayErrors:
    """How far what was replayed is from what was recorded: the worst of all steps."""

    values: dict[str, float]  # of each metric but shares, relative where the recorded one is above 1; of log-probs
    moved_tokens: float  # of the share that differs most, in tokens of its step
    first_difference: str | None  # the first that is not equal bit for bit; None: all are
    exact: bool  # whether that must be none

    @property
    def worst(self) -> str:
        return max(self.values, key=self.values.__getitem__)

    @property
    def ok(self) -> bool:
        if self.exact:
            return self.first_difference is None
        return self.values[self.worst] <= TOLERANCE and self.moved_tokens <= MAX_MOVED_TOKENS


def compare_replay(config: Config, replayed: Sequence[ReplayedStep], recorded: RecordedSteps) -> ReplayErrors:
    """Replayed steps beside the recorded ones, bit for bit where `config` has the run's layout."""
    errors = ReplayErrors({}, 0.0, None, exact=recorded.is_own_layout(config))
    for found, step in zip(replayed, recorded.steps, strict=True):
        values, moved_tokens = compare_metrics(
            _metrics(found.results, step.lr, config), _metrics(step.results, step.lr, config), len(found.old_logprobs)
        )
        assert step.batch.old_logprobs is not None
        values["old log-probs"] = _mean_difference(found.old_logprobs, step.batch.old_logprobs)
        values["new log-probs"] = _mean_difference(found.results.new_logprobs, step.results.new_logprobs)
        worst = {name: max(values[name], errors.values.get(name, 0.0)) for name in values}
        errors = replace(
            errors,
            values=errors.values | worst,
            moved_tokens=max(errors.moved_tokens, moved_tokens),
            first_difference=errors.first_difference or _first_difference(found, step),
        )
    return errors


def _metrics(results: StepResults, lr: float, config: Config) -> dict[str, float]:
    return update_metrics(results.updates, lr, config.algorithm)


def compare_metrics(
    found: Mapping[str, float], expected: Mapping[str, float], num_tokens: int
) -> tuple[dict[str, float], float]:
    """Differences of a step's metrics but shares, and that of the worst share in tokens (of `num_tokens`).

    A metric that only one side has differs by infinity, as does one that is NaN.
    """
    values, moved_tokens = dict[str, float](), 0.0
    for name in found.keys() | expected.keys():
        difference = abs(found.get(name, math.inf) - expected.get(name, math.inf))
        if math.isnan(difference):
            difference = math.inf
        if "_frac" in name:
            moved_tokens = max(moved_tokens, difference * num_tokens)
        else:
            values[name] = difference / max(1.0, abs(expected.get(name, 0.0)))
    return values, moved_tokens


def _mean_difference(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return math.inf
    difference = float(np.abs(found.astype(np.float64) - expected).mean())
    return math.inf if math.isnan(difference) else difference


def _first_difference(found: ReplayedStep, step: ReplayStep) -> str | None:
    """What is not equal bit for bit, in the order in which it was computed."""
    assert step.batch.old_logprobs is not None
    if not _equal(found.old_logprobs, step.batch.old_logprobs):
        return f"old log-probs of step {step.step}"
    expected = step.results.updates
    for number, (update, recorded) in enumerate(zip(found.results.updates, expected, strict=True), start=1):
        for name, differs in (
            ("statistics", not _equal(update.statistics, recorded.statistics)),
            ("gradient norm", update.grad_norm != recorded.grad_norm),
            ("reason to skip", update.skipped != recorded.skipped),
        ):
            if differs:
                return f"{name} of update {number} of step {step.step}"
    if not _equal(found.results.new_logprobs, step.results.new_logprobs):
        return f"new log-probs of step {step.step}"
    return None


def _equal(found: np.ndarray, expected: np.ndarray) -> bool:
    """By bytes: -0.0 is not 0.0, and NaN is NaN."""
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
