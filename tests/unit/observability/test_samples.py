"""The lines that people read, and that a recount starts from."""

import json
from pathlib import Path

import numpy as np

from fipo_megatron.observability.samples import write_samples
from fipo_megatron.types import Prompt, Sample, SampleGroup

LOGPROBS = np.array([-1 / 3, -1e-7], np.float32)


def make_group(uid: str) -> SampleGroup:
    prompt = Prompt(uid, (1, 2), "3", "arithmetic")
    samples = (
        Sample(prompt, np.array([3, 4], np.int32), LOGPROBS, 5, "stop", "34", 1.0, 1.0, "3"),
        Sample(prompt, np.array([5, 6], np.int32), LOGPROBS, 5, "length", "5\n6 µ", -1.0, 0.0, "[INVALID]"),
    )
    return SampleGroup(prompt, samples)


def decode(token_ids: np.ndarray) -> str:
    return "".join(map(str, token_ids))


def test_lines_hold_text_tokens_and_exact_logprobs(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "step_000001.jsonl"
    write_samples(path, [make_group("train/0"), make_group("train/1")], decode)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["uid"] for line in lines] == ["train/0", "train/0", "train/1", "train/1"]
    assert np.array(lines[0].pop("rollout_logprobs"), np.float32).tobytes() == LOGPROBS.tobytes()
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
    }
    assert lines[3]["text"] == "5\n6 µ"


def test_same_samples_same_bytes_and_a_rewrite_replaces(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_samples(first, [make_group("train/0")] * 3, decode)
    write_samples(first, [make_group("train/0")], decode)
    write_samples(second, [make_group("train/0")], decode)
    assert first.read_bytes() == second.read_bytes()
