"""The lines that people read, and that a recount starts from."""

import json
from pathlib import Path

import numpy as np
import pytest

from fipo_megatron.observability.samples import (
    TokenRecord,
    groups_to_record,
    read_samples,
    samples_path,
    write_samples,
)
from fipo_megatron.types import Prompt, Sample, SampleGroup

LOGPROBS = np.array([-1 / 3, -1e-7], np.float32)


def make_group(uid: str) -> SampleGroup:
    prompt = Prompt(uid, (1, 2), "3", "arithmetic")
    samples = (
        Sample(prompt, np.array([3, 4], np.int32), LOGPROBS, 5, "stop", "34", 1.0, 1.0, "3"),
        Sample(prompt, np.array([5], np.int32), LOGPROBS[:1], 5, "length", "5\n\u2028 µ", -1.0, 0.0, "[INVALID]"),
    )
    return SampleGroup(prompt, samples)


def make_tokens(num_groups: int) -> TokenRecord:
    """Every number tells where it belongs: 3 tokens a group."""
    index = np.arange(3 * num_groups, dtype=np.float32)
    return TokenRecord(np.arange(2 * num_groups, dtype=np.float32), -index / 3, -index / 7, 1 + index / 100)


@pytest.mark.parametrize(
    ("max_groups", "max_tokens", "num_recorded"),
    [(0, 100, 0), (2, 100, 2), (9, 100, 4), (9, 12, 4), (9, 11, 3), (9, 6, 2), (9, 5, 1), (9, 1, 1), (0, 1, 0)],
)
def test_whole_groups_are_recorded_within_both_limits(max_groups: int, max_tokens: int, num_recorded: int) -> None:
    groups = [make_group(f"train/{i}") for i in range(4)]  # of 3 tokens
    assert groups_to_record(groups, max_groups, max_tokens) == groups[:num_recorded]


def decode(token_ids: np.ndarray) -> str:
    return "".join(map(str, token_ids))


def test_lines_hold_text_tokens_and_exact_logprobs(tmp_path: Path) -> None:
    path = samples_path(tmp_path, 1)
    assert path == tmp_path / "samples" / "step_000001.jsonl"
    tokens = make_tokens(2)
    write_samples(path, [make_group("train/0"), make_group("train/1")], tokens, decode)
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [line["uid"] for line in lines] == ["train/0", "train/0", "train/1", "train/1"]
    assert np.array(lines[0].pop("rollout_logprobs"), np.float32).tobytes() == LOGPROBS.tobytes()
    for key in ("old_logprobs", "new_logprobs", "influence_weights"):
        assert [len(line[key]) for line in lines] == [2, 1, 2, 1]
        joined = np.concatenate([np.array(line[key], np.float32) for line in lines])
        assert joined.tobytes() == getattr(tokens, key).tobytes()
        del lines[0][key]
    assert [line["advantage"] for line in lines] == [0.0, 1.0, 2.0, 3.0]
    assert lines[0] == {
        "prompt": "12",
        "text": "34",
        "prediction": "3",
        "ground_truth": "3",
        "reward": 1.0,
        "accuracy": 1.0,
        "uid": "train/0",
        "finish_reason": "stop",
        "weight_version": 5,
        "prompt_ids": [1, 2],
        "response_ids": [3, 4],
        "advantage": 0.0,
    }
    assert [line["text"] for line in read_samples(path)] == ["34", "5\n\u2028 µ"] * 2


def test_same_samples_same_bytes_and_a_rewrite_replaces(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_samples(first, [make_group("train/0")] * 3, make_tokens(3), decode)
    write_samples(first, [make_group("train/0")], make_tokens(1), decode)
    write_samples(second, [make_group("train/0")], make_tokens(1), decode)
    assert first.read_bytes() == second.read_bytes()


def test_a_line_that_is_not_whole_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"text": \n')
    with pytest.raises(ValueError, match=r"samples.jsonl:1: not JSON"):
        read_samples(path)
    path.write_text('{"text": "34"}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl:1: no influence_weights; the run is of an older version"):
        read_samples(path)
