"""What the policy wrote and how the updates answered, for people to read and for tools to recount."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.types import Decode, Sample, SampleGroup

SAMPLES_FOLDER = "samples"  # of a run folder


@dataclass(frozen=True)
class TokenRecord:
    """What training knows about recorded samples, in sample order; `[R]` is over their response tokens."""

    advantages: np.ndarray  # float32 [S]
    old_logprobs: np.ndarray  # float32 [R], by the trainer before the first update of the batch
    new_logprobs: np.ndarray  # float32 [R], by the trainer after the last one
    influence_weights: np.ndarray  # float32 [R], of the step from old to new


def samples_path(run_folder: Path, step: int) -> Path:
    """Where a run keeps the samples of a step."""
    return run_folder / SAMPLES_FOLDER / f"step_{step:06d}.jsonl"


def groups_to_record(groups: Sequence[SampleGroup], max_groups: int, max_tokens: int) -> Sequence[SampleGroup]:
    """The first groups within both limits, each whole; the first of all, unless `max_groups` is 0, however long.

    `max_tokens` counts the tokens of responses.
    """
    ends = np.cumsum([sum(len(sample.response_ids) for sample in group.samples) for group in groups])
    num_within = int(np.searchsorted(ends, max_tokens, side="right"))
    return groups[: min(max_groups, max(num_within, 1))]


def write_samples(path: Path, groups: Sequence[SampleGroup], tokens: TokenRecord, decode: Decode) -> None:
    """Writes one line of JSON for every sample, in order. The same samples give the same bytes; log-probs are exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [sample for group in groups for sample in group.samples]
    ends = np.cumsum([len(sample.response_ids) for sample in samples])
    assert ends[-1] == len(tokens.new_logprobs), f"{ends[-1]} response tokens, {len(tokens.new_logprobs)} log-probs"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i, (sample, end) in enumerate(zip(samples, ends, strict=True)):
            span = slice(end - len(sample.response_ids), end)
            line = {
                "prompt": decode(np.array(sample.prompt.token_ids)),
                **_record(sample),
                "advantage": float(tokens.advantages[i]),
                "old_logprobs": tokens.old_logprobs[span].tolist(),
                "new_logprobs": tokens.new_logprobs[span].tolist(),
                "influence_weights": tokens.influence_weights[span].tolist(),
            }
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples file, in order; one that is not whole is a ValueError that names it."""
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); remove the line") from error
        if "influence_weights" not in sample:
            raise ValueError(f"{path}:{number}: no influence_weights; the run is of an older version, train it again")
        samples.append(sample)
    return samples


def _record(sample: Sample) -> dict[str, object]:
    spans = {} if sample.token_versions is None else {"token_versions": sample.token_versions.tolist()}
    return spans | {
        "text": sample.text,
        "prediction": sample.prediction,
        "ground_truth": sample.prompt.ground_truth,
        "reward": sample.reward,
        "accuracy": sample.accuracy,
        "uid": sample.prompt.uid,
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
        "prompt_ids": list(sample.prompt.token_ids),
        "response_ids": sample.response_ids.tolist(),
        "rollout_logprobs": sample.rollout_logprobs.tolist(),
    }
