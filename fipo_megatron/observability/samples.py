"""What the policy wrote, for people to read and for tools to recount."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fipo_megatron.types import Decode, Sample, SampleGroup


def write_samples(path: Path, groups: Iterable[SampleGroup], decode: Decode) -> None:
    """Writes one line of JSON for every sample, in order. The same samples give the same bytes; log-probs are exact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for group in groups:
            prompt_text = decode(np.array(group.prompt.token_ids))
            for sample in group.samples:
                file.write(json.dumps({"prompt": prompt_text, **_record(sample)}, allow_nan=False) + "\n")


def _record(sample: Sample) -> dict[str, object]:
    return {
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
