"""A tiny policy's steps, recorded and made again. On whole runs: tests/smoke/test_train.py."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fipo_megatron.checkpoint.manifest import write_manifest
from fipo_megatron.checkpoint.replay_file import (
    ReplayStep,
    StepResults,
    read_replay_step,
    replay_path,
    write_replay_step,
)
from fipo_megatron.config.load import load_config, save_config
from fipo_megatron.trainer.layout_check import make_check_batch, transformers_logprobs
from fipo_megatron.trainer.policy_processes import run_policy
from fipo_megatron.trainer.replay import (
    TOLERANCE,
    ReplayErrors,
    _gather_logprobs,
    compare_metrics,
    compare_replay,
    load_recorded_steps,
    replay,
)
from fipo_megatron.trainer.tiny_models import write_model
from fipo_megatron.types import TrainingBatch
from tests.parity.policy_config import make_config
from tools import replay_step as tool

LOSS = {"train/loss": 0.5, "train/ratio_max": 20.0, "train/clip_frac": 0.25}
RESPONSE_LENS = (1, 30, 11, 5, 22, 9, 13, 28)
MINI_BATCHES = (tuple(range(4)), tuple(range(4, 8)))
LR = 1e-3


@pytest.mark.parametrize(
    ("change", "worst", "difference", "moved_tokens"),
    [
        ({}, None, 0.0, 0.0),
        ({"train/loss": 0.50009}, "train/loss", 9e-5, 0.0),
        ({"train/ratio_max": 20.0022}, "train/ratio_max", 1.1e-4, 0.0),  # relative
        ({"train/clip_frac": 0.2579}, None, 0.0, 7.9),  # in tokens
        ({"train/loss": math.nan}, "train/loss", math.inf, 0.0),
        ({"train/new": 1.0}, "train/new", math.inf, 0.0),
    ],
)
def test_differences(change: dict[str, float], worst: str | None, difference: float, moved_tokens: float) -> None:
    for found, expected in ((LOSS | change, LOSS), (LOSS, LOSS | change)):
        values, moved = compare_metrics(found, expected, 1000)
        assert worst is None or max(values, key=values.__getitem__) == worst
        assert max(values.values()) == pytest.approx(difference, rel=2e-4)
        assert moved == pytest.approx(moved_tokens)


@pytest.mark.parametrize(
    ("difference", "moved_tokens", "first", "exact", "ok"),
    [
        (0.0, 0.0, None, True, True),
        (0.0, 0.0, "old log-probs of step 1", True, False),
        (0.9 * TOLERANCE, 8.0, "old log-probs of step 1", False, True),
        (1.1 * TOLERANCE, 0.0, "old log-probs of step 1", False, False),
        (0.0, 8.1, "old log-probs of step 1", False, False),
    ],
)
def test_what_is_equal(difference: float, moved_tokens: float, first: str | None, exact: bool, ok: bool) -> None:
    assert ReplayErrors({"train/loss": difference}, moved_tokens, first, exact).ok == ok


# ---------------------------------------------------------------- a policy's steps


def record_step(policy: Any, batch: TrainingBatch) -> tuple[dict[str, np.ndarray], TrainingBatch, StepResults]:
    """A step as a run makes it: old log-probs, random generators, updates, new log-probs."""
    batch = replace(batch, old_logprobs=_gather_logprobs(policy, batch))
    states = policy.random_states()
    updates = tuple(replace(policy.update(batch, samples, LR), cost=None) for samples in MINI_BATCHES)
    return states, batch, StepResults(updates, _gather_logprobs(policy, batch))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two updates each on two tensor-parallel ranks, with a checkpoint after the first two."""
    folder = tmp_path_factory.mktemp("run")
    base = folder / "base"
    base.mkdir()
    write_model("qwen2_tied", base)
    (base / "tokenizer.json").touch()  # a run's policy has one; nothing here reads it
    optimizer = {"lr": LR, "adam_eps": 1e-3}
    config = make_config(base, parallel={"tensor": 2}, optimizer=optimizer, timeouts={"collective_s": 59})
    save_config(config, folder / "config.yaml")
    made = make_check_batch(transformers_logprobs(base), RESPONSE_LENS, config.algorithm)
    batches = [replace(made, advantages=made.advantages * factor) for factor in (1, -1, 0.5)]
    calls: list[Any] = [("load", (base, config.optimizer))]
    for step, batch in enumerate(batches, start=1):
        calls.append((record_step, (batch,)))
        if step < 3:
            state = folder / "checkpoints" / f"step-{step:08d}" / "policy"
            state.mkdir(parents=True)
            calls += [("begin_save", (state,)), ("finish_save", ())]
    replies = [
        reply for (method, _), reply in zip(calls, run_policy(config, calls), strict=True) if method is record_step
    ]
    for step, ranks in enumerate(replies, start=1):
        _, batch, results = ranks[0]
        origins = (("",) * 8, np.zeros(8, np.int64), np.zeros(sum(RESPONSE_LENS), np.int32))
        states = tuple(states for states, *_ in ranks)
        about = (config.model_dump(mode="json"), "cpu", batch, *origins, LR, MINI_BATCHES, states, results)
        write_replay_step(replay_path(folder, step), ReplayStep(step, *about))
    for path in (folder / "checkpoints").iterdir():
        write_manifest(path, "checkpoint", {"step": int(path.name[5:]), "score": None})
    return folder


def replayed(run: Path, step: int | None, layout: str = "same") -> tuple[int, ReplayErrors]:
    """The step that the replay began after, and how far it is from what was recorded."""
    recorded = load_recorded_steps(run, step)
    config = recorded.in_layout(layout)
    return recorded.start.step, compare_replay(config, replay(config, recorded), recorded)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    for name in ("config.yaml", "replay", "checkpoints"):
        source = run / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def test_checkpoints_are_looked_for_where_the_runs_present_settings_say(copied: Path) -> None:
    """Not where those of the recorded step did: they may have moved since."""
    config = load_config(copied / "config.yaml")
    (copied / "elsewhere").mkdir()
    (copied / "checkpoints").rename(copied / "elsewhere" / copied.name)
    assert load_recorded_steps(copied, 3).start.step == 0
    settings = config.checkpoint.model_copy(update={"folder": str(copied / "elsewhere")})
    save_config(config.model_copy(update={"checkpoint": settings}), copied / "config.yaml")
    assert load_recorded_steps(copied, 3).start.step == 2


@pytest.mark.multiproc
@pytest.mark.parametrize(("step", "start"), [(1, 0), (3, 2)])
def test_own_layout_gives_the_recorded_bits(run: Path, step: int, start: int) -> None:
    began, errors = replayed(run, step)
    assert began == start
    assert (errors.first_difference, errors.ok, set(errors.values.values())) == (None, True, {0.0})


@pytest.mark.multiproc
def test_without_checkpoints_all_steps_are_made_again(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    began, errors = replayed(copied, None)
    assert (began, errors.first_difference) == (0, None)


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_another_layout_is_within_rounding(run: Path, layout: str) -> None:
    began, errors = replayed(run, 3, layout)
    assert began == 2
    assert errors.ok
    assert errors.first_difference is not None
    assert 0 < errors.values["new log-probs"] < 1e-5


@pytest.mark.multiproc
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copied / "checkpoints" / "step-00000002" / "policy" / "rng-rank00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert tool.main([str(copied), "--step", "3"]) == 0
    output = capsys.readouterr()
    assert "not used: " in output.err
    assert "policy/rng-rank00000.safetensors has " in output.err
    assert "steps 2 to 3 made again from the checkpoint of step 1" in " ".join(output.out.split())
    assert "bit for bit" in output.out


@pytest.mark.multiproc
@pytest.mark.parametrize("array", ["old_logprobs", "advantages"])
def test_one_other_bit_of_an_input_is_noticed(copied: Path, array: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = replay_path(copied, 3)
    step = read_replay_step(path)
    changed = getattr(step.batch, array).copy()
    changed.view(np.uint8)[1] ^= 1
    write_replay_step(path, replace(step, batch=replace(step.batch, **{array: changed})))
    assert tool.main([str(copied)]) == 1
    where = "old log-probs" if array == "old_logprobs" else "statistics of update 1"
    assert f"the first difference is in the {where} of step 3" in capsys.readouterr().err


@pytest.mark.multiproc
def test_another_optimizer_state_is_noticed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the step before, under the weights' own place: the first update's loss is still the recorded one."""
    config = load_recorded_steps(copied, 3).in_layout("same")
    base = load_recorded_steps(copied, 3).start.base
    state = copied / "checkpoints" / "step-00000002"
    shutil.rmtree(state)
    (state / "policy").mkdir(parents=True)
    before = copied / "checkpoints" / "step-00000001" / "policy"
    calls: list[Any] = [("load", (base, config.optimizer)), ("load_state", (before,)), (keep_moments, ())]
    step = read_replay_step(replay_path(copied, 2))
    calls += [("update", (step.batch, samples, step.lr)) for samples in step.mini_batches]
    calls += [(put_moments_back, ()), ("begin_save", (state / "policy",)), ("finish_save", ())]
    run_policy(config, calls)
    write_manifest(state, "checkpoint", {"step": 2, "score": None})
    assert tool.main([str(copied), "--step", "3"]) == 1
    assert "the first difference is in the statistics of update 2 of step 3" in capsys.readouterr().err


def _moments(policy: Any) -> list[Any]:
    inner = policy.optimizer.chained_optimizers[0].optimizer
    return [state["exp_avg"] for state in inner.state.values()]


def keep_moments(policy: Any) -> None:
    policy.kept = [moment.clone() for moment in _moments(policy)]


def put_moments_back(policy: Any) -> None:
    for moment, kept in zip(_moments(policy), policy.kept, strict=True):
        moment.copy_(kept)


# ---------------------------------------------------------------- what can't be made again


def test_refusals(copied: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(folder: Path, *arguments: str) -> str:
        assert tool.main([str(folder), *arguments]) == 2
        return capsys.readouterr().err

    empty = tmp_path_factory.mktemp("empty")
    assert "is no run folder (config.yaml)" in refusal(empty)
    shutil.copy(copied / "config.yaml", empty)
    assert "record a run with checkpoint.replay_every_steps=1" in refusal(empty)
    assert "--step 7: " in (message := refusal(copied, "--step", "7"))
    assert "there are 1-3" in message
    path = replay_path(copied, 2)
    step = read_replay_step(path)
    shutil.rmtree(copied / "checkpoints" / "step-00000002")
    other = {**step.config, "algorithm": {**step.config["algorithm"], "half_life_tokens": 8.0}}
    write_replay_step(path, replace(step, config=other))
    assert "step 2 was made with algorithm.half_life_tokens = 8.0, step 3 with " in refusal(copied)
    path.unlink()
    message = refusal(copied)
    assert "from the checkpoint of step 1, the newest to start from" in message
    assert "without the replay files of steps 2; give" in message
    last = read_replay_step(replay_path(copied, 3))
    gone = {**last.config, "model": {**last.config["model"], "path": str(empty / "gone")}}
    write_replay_step(replay_path(copied, 3), replace(last, config=gone))
    assert "gone, the policy that" in refusal(copied)
