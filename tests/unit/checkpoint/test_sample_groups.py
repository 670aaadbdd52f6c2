"""Groups come back with every bit, and a file that is not theirs is refused by name."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fipo_megatron.checkpoint.sample_groups import read_groups, write_groups
from fipo_megatron.types import Prompt, Sample, SampleGroup

PROMPTS = [
    Prompt("train/000001", (3, 1 << 40, 5), "½", "arithmetic"),
    Prompt("", (9,), "", "gsm8k"),
    Prompt("empty group", (1, 2), "7", "x"),
]


def make_sample(prompt: Prompt, length: int, text: str, versions: bool, reward: float) -> Sample:
    rng = np.random.default_rng(length)
    return Sample(
        prompt=prompt,
        response_ids=rng.integers(0, 2**31, length).astype(np.int32),
        rollout_logprobs=(-rng.random(length)).astype(np.float32),
        weight_version=length + 3,
        finish_reason="length" if versions else "stop",
        text=text,
        reward=reward,
        accuracy=float(length % 2),
        prediction=text[:2],
        token_versions=np.arange(length, dtype=np.int32) if versions else None,
    )


GROUPS = [
    SampleGroup(
        PROMPTS[0],
        (
            make_sample(PROMPTS[0], 4, "drei \N{SNOWMAN}\0\n", False, 0.1 + 0.2),
            make_sample(PROMPTS[0], 1, "half \udc80", True, float("nan")),
        ),
    ),
    SampleGroup(
        PROMPTS[1],
        (make_sample(PROMPTS[1], 7, "", True, -1e-310), make_sample(PROMPTS[1], 5, "𝄞", False, 5e300)),
    ),
    SampleGroup(PROMPTS[2], ()),
]


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert np.float64(found).tobytes() == np.float64(expected).tobytes()
    else:
        assert found == expected


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[1:2], GROUPS[2:], [], GROUPS[::-1]])
def test_every_bit_comes_back(groups: list[SampleGroup], tmp_path: Path) -> None:
    write_groups(tmp_path / "groups.safetensors", groups)
    assert_same(read_groups(tmp_path / "groups.safetensors"), groups)


def test_many_long_strings_leave_the_header_small(tmp_path: Path) -> None:
    sample = make_sample(PROMPTS[0], 2, "x" * 3000, False, 1.0)
    write_groups(tmp_path / "groups.safetensors", [SampleGroup(PROMPTS[0], (sample,) * 1000)])
    content = (tmp_path / "groups.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") < 4096
    assert [s.text for s in read_groups(tmp_path / "groups.safetensors")[0].samples] == ["x" * 3000] * 1000


def set_array(name: str, values: Any) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: arrays.update({name: np.array(values).astype(arrays[name].dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("reward"), "lacks 'reward'"),
        (lambda arrays: arrays.pop("text.ends"), "lacks 'text.ends'"),
        (lambda arrays: arrays.update(more=np.zeros(1)), "has 'more'"),
        (lambda arrays: arrays.update(reward=np.zeros(4, np.float32)), "'reward' is float32"),
        (lambda arrays: arrays.update(reward=np.zeros((4, 1))), r"'reward' is float64 \[4, 1\]"),
        (set_array("reward", [1, 2, 3]), "'reward' has 3 entries instead of 4"),
        (set_array("has_token_versions", [1, 0, 1]), "'has_token_versions' has 3 entries instead of 4"),
        (set_array("has_token_versions", [1, 1, 1, 0]), "'token_versions' has 8 entries instead of 12"),
        (set_array("samples.ends", [2, 5, 5]), "'samples.ends' does not cut the 4 entries"),
        (set_array("samples.ends", [5, 4, 4]), "'samples.ends' does not cut"),
        (set_array("samples.ends", [2, 4]), "'prompt_ids.ends' has 3 entries instead of 2"),
        (set_array("response_ids.ends", [4, 5, 12, 18]), "'response_ids.ends' does not cut the 17 entries"),
        (set_array("response_ids.ends", [-1, 5, 12, 17]), "'response_ids.ends' does not cut"),
        (set_array("rollout_logprobs", [0.0] * 16), "'rollout_logprobs' has 16 entries instead of 17"),
        (set_array("uid", [255] * 23), "a string is no UTF-8"),
        (set_array("finish_reason", list(b"stopLengthlengthstop")), "'finish_reason' holds 'Length'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.safetensors"
    write_groups(path, GROUPS)
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    with pytest.raises(ValueError, match=f"groups.safetensors.*{message}"):
        read_groups(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "groups.safetensors"
    with pytest.raises(ValueError, match="groups.safetensors can't be read"):
        read_groups(path)
    write_groups(path, GROUPS)
    content = path.read_bytes()
    for other in (b"", content[:5], content[:-1], content[:200], pickle.dumps({"reward": 1.0})):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="groups.safetensors can't be read"):
            read_groups(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": np.zeros(4, np.int64)}, r"response_ids is int64 \[4\], must be int32 \[4\]"),
        ({"rollout_logprobs": np.zeros(3, np.float32)}, r"rollout_logprobs is float32 \[3\], must be float32 \[4\]"),
        ({"token_versions": np.zeros(5, np.int32)}, r"token_versions is int32 \[5\]"),
        ({"prompt": PROMPTS[1]}, "another than its group"),
    ],
)
def test_samples_that_would_come_back_changed_are_not_written(changes: Any, message: str, tmp_path: Path) -> None:
    sample = dataclasses.replace(GROUPS[0].samples[0], **changes)
    with pytest.raises(ValueError, match=message):
        write_groups(tmp_path / "groups.safetensors", [SampleGroup(PROMPTS[0], (sample,))])
    assert not list(tmp_path.iterdir())
