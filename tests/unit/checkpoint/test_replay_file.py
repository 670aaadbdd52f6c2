from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.checkpoint.replay_file import (
    ReplayStep,
    StepResults,
    read_replay_step,
    replay_path,
    replay_steps,
    sample_origins,
    write_replay_step,
)
from fipo_megatron.types import PolicyUpdate, Prompt, Sample, SampleGroup, TrainingBatch

STEP = ReplayStep(
    step=12,
    config={"seed": 3, "optimizer": {"lr": 1e-4}},
    platform="cpu",
    batch=TrainingBatch(
        token_ids=np.arange(9),
        cu_seqlens=np.array([0, 4, 9]),
        prompt_lens=np.array([2, 1]),
        advantages=np.array([-0.0, np.nan], np.float32),
        old_logprobs=np.linspace(-3, -0.1, 6, dtype=np.float32),
        loss_mask=np.array([True, False, True, True, True, False]),
    ),
    uids=("train/ä", ""),
    weight_versions=np.array([11, 10]),
    token_versions=np.array([11, 11, 10, 10, 11, 11], np.int32),
    lr=0.1 + 0.2,
    mini_batches=((1,), (), (0,)),
    random_states=tuple(
        {"cpu": np.full(5, rank, np.uint8), "tracker.a.b": np.arange(3, dtype=np.uint8)} for rank in (0, 1)
    ),
    results=StepResults(
        (
            PolicyUpdate(np.array([0.1, np.inf]), 0.1 + 0.7),
            PolicyUpdate(np.array([0.0, -np.inf]), None, "empty"),
            PolicyUpdate(np.array([np.nan, 2.0]), None, "not_finite"),
        ),
        np.linspace(-2, -1, 6, dtype=np.float32),
    ),
)


def written(folder: Path, step: ReplayStep = STEP) -> Path:
    path = replay_path(folder, step.step)
    write_replay_step(path, step)
    return path


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_step_returns_bit_for_bit(tmp_path: Path, with_reference: bool) -> None:
    reference = np.full(6, -1.5, np.float32) if with_reference else None
    step = replace(STEP, batch=replace(STEP.batch, ref_logprobs=reference))
    path = written(tmp_path, step)
    assert path == tmp_path / "replay" / "step-00000012.safetensors"
    assert list(path.parent.iterdir()) == [path]
    found = read_replay_step(path)
    for name, expected in vars(step.batch).items():
        array = getattr(found.batch, name)
        assert (array is None) == (expected is None)
        assert expected is None or (array.dtype, array.tobytes()) == (expected.dtype, expected.tobytes())
    for name in ("step", "config", "platform", "uids", "lr", "mini_batches"):
        assert getattr(found, name) == getattr(step, name)
    for name in ("weight_versions", "token_versions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(step, name))
    assert [sorted(states) for states in found.random_states] == [["cpu", "tracker.a.b"]] * 2
    assert found.random_states[1]["cpu"].tolist() == [1] * 5
    for update, recorded in zip(found.results.updates, step.results.updates, strict=True):
        assert update.statistics.tobytes() == recorded.statistics.tobytes()
        assert (update.grad_norm, update.skipped) == (recorded.grad_norm, recorded.skipped)
    np.testing.assert_array_equal(found.results.new_logprobs, step.results.new_logprobs)


def test_every_flipped_byte_and_every_truncation_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"step-00000012.safetensors.*(can't be read|damaged|no file|no whole)"):
            read_replay_step(path)
        path.write_bytes(content[:place])
        with pytest.raises(ValueError, match=r"step-00000012.safetensors"):
            read_replay_step(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "bomb").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="can't be read"):
        read_replay_step(path)
    assert not (tmp_path / "bomb").exists()


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    content = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, replace(STEP, lr=1.0))
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == content


def test_steps_are_those_with_a_whole_file(tmp_path: Path) -> None:
    assert replay_steps(tmp_path) == []
    for step in (12, 3):
        written(tmp_path, replace(STEP, step=step))
    (tmp_path / "replay" / "step-00000004.safetensors.partial").touch()
    assert replay_steps(tmp_path) == [3, 12]


def test_origins_of_samples_that_span_versions() -> None:
    prompt = Prompt("train/7", (1, 2), "3", "sums")
    ids, logprobs = np.array([4, 5], np.int32), np.zeros(2, np.float32)
    plain = Sample(prompt, ids, logprobs, 6, "stop", "", 1.0, 1.0, "")
    spanning = replace(plain, weight_version=5, token_versions=np.array([5, 6], np.int32))
    uids, versions, of_tokens = sample_origins([SampleGroup(prompt, (plain, spanning))])
    assert uids == ("train/7", "train/7")
    assert versions.tolist() == [6, 5]
    assert (of_tokens.tolist(), of_tokens.dtype) == ([6, 6, 5, 6], np.int32)
