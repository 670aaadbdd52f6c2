"""Judged groups on disk, bit for bit: those that a run has sampled and not yet trained on.

One safetensors file of flat arrays. Strings are UTF-8 bytes one after the other, so neither a header grows with them
nor is there anything in the file that could run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fipo_megatron.checkpoint.manifest import naming
from fipo_megatron.types import FinishReason, Prompt, Sample, SampleGroup

Arrays = dict[str, np.ndarray]
# G groups, S samples. `.ends` [n] are where each of n entries ends in the flat array of the same name.
DTYPES: dict[str, Any] = {
    "samples.ends": np.int64,  # [G]
    "prompt_ids": np.int64,
    "response_ids": np.int32,
    "rollout_logprobs": np.float32,  # as many as response_ids
    "token_versions": np.int32,  # of the samples that have them
    "has_token_versions": np.bool_,  # [S]
    "weight_version": np.int64,  # [S]
    "reward": np.float64,  # [S]
    "accuracy": np.float64,  # [S]
}
GROUP_STRINGS = ("uid", "ground_truth", "data_source")
SAMPLE_STRINGS = ("finish_reason", "text", "prediction")
PIECES = ("prompt_ids", "response_ids", *GROUP_STRINGS, *SAMPLE_STRINGS)  # that have ends of their own
for _name in (*GROUP_STRINGS, *SAMPLE_STRINGS):
    DTYPES[_name] = np.uint8
for _name in PIECES:
    DTYPES[f"{_name}.ends"] = np.int64


def write_groups(path: Path, groups: Sequence[SampleGroup]) -> None:
    """Write groups to a new file. It is not brought to the disk: a manifest does that.

    Raises:
        ValueError: an array of a sample has another dtype or length than `Sample` says, or a sample another prompt
            than its group.
        OSError: the disk is full or fails; names the file.
    """
    samples = [sample for group in groups for sample in group.samples]
    for group in groups:
        for sample in group.samples:
            _check_sample(group, sample)
    arrays: Arrays = {
        "samples.ends": _ends([len(group.samples) for group in groups]),
        "prompt_ids": _flat([np.array(group.prompt.token_ids, np.int64) for group in groups], np.int64),
        "prompt_ids.ends": _ends([len(group.prompt.token_ids) for group in groups]),
        "response_ids": _flat([sample.response_ids for sample in samples], np.int32),
        "response_ids.ends": _ends([len(sample.response_ids) for sample in samples]),
        "rollout_logprobs": _flat([sample.rollout_logprobs for sample in samples], np.float32),
        "token_versions": _flat([s.token_versions for s in samples if s.token_versions is not None], np.int32),
        "has_token_versions": np.array([sample.token_versions is not None for sample in samples], np.bool_),
        "weight_version": np.array([sample.weight_version for sample in samples], np.int64),
        "reward": np.array([sample.reward for sample in samples], np.float64),
        "accuracy": np.array([sample.accuracy for sample in samples], np.float64),
    }
    for names, records in ((GROUP_STRINGS, [group.prompt for group in groups]), (SAMPLE_STRINGS, samples)):
        for name in names:
            # An engine may sample half of a character: what can't be decoded has to survive, too.
            texts = [getattr(record, name).encode("utf-8", "surrogatepass") for record in records]
            arrays[name] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[f"{name}.ends"] = _ends([len(text) for text in texts])
    try:
        with naming(path):
            save_file(arrays, path)
    except SafetensorError as error:  # also for a full disk
        raise OSError(f"{path} can't be written: {error}") from error


def read_groups(path: Path) -> list[SampleGroup]:
    """The groups that `write_groups` wrote, in order, every bit the same.

    Raises:
        ValueError: names the file, and the array that is missing, unknown, of another dtype, or does not fit the rest.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as sample groups ({error}); use another checkpoint") from error
    _check_arrays(path, arrays)
    try:
        strings = {name: _strings(arrays, name) for name in (*GROUP_STRINGS, *SAMPLE_STRINGS)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a string is no UTF-8 ({error}); use another checkpoint") from error
    if unknown := set(strings["finish_reason"]) - set(get_args(FinishReason)):
        raise ValueError(f"{path}: 'finish_reason' holds {min(unknown)!r}; must be one of {get_args(FinishReason)}")
    prompt_ids, sample_ranges = _ranges(arrays["prompt_ids.ends"]), _ranges(arrays["samples.ends"])
    response_ranges, ends = _ranges(arrays["response_ids.ends"]), iter(_ranges(_version_ends(arrays)))
    groups = []
    for i, rows in enumerate(sample_ranges):
        token_ids = tuple(arrays["prompt_ids"][prompt_ids[i]].tolist())
        prompt = Prompt(token_ids=token_ids, **{name: strings[name][i] for name in GROUP_STRINGS})
        samples = []
        for j in range(rows.start, rows.stop):
            has_versions = arrays["has_token_versions"][j]
            values: dict[str, Any] = {name: strings[name][j] for name in SAMPLE_STRINGS}
            values |= {name: arrays[name][j].item() for name in ("weight_version", "reward", "accuracy")}
            values |= {name: arrays[name][response_ranges[j]].copy() for name in ("response_ids", "rollout_logprobs")}
            values["token_versions"] = arrays["token_versions"][next(ends)].copy() if has_versions else None
            samples.append(Sample(prompt=prompt, **values))
        groups.append(SampleGroup(prompt, tuple(samples)))
    return groups


def _check_sample(group: SampleGroup, sample: Sample) -> None:
    where = f"sample of prompt {group.prompt.uid!r}"
    if sample.prompt != group.prompt:
        raise ValueError(f"{where}: it has prompt {sample.prompt.uid!r}, another than its group")
    for name, dtype in (("response_ids", np.int32), ("rollout_logprobs", np.float32), ("token_versions", np.int32)):
        array = getattr(sample, name)
        if array is None and name == "token_versions":
            continue
        if array.dtype != dtype or array.shape != sample.response_ids.shape:
            raise ValueError(
                f"{where}: {name} is {array.dtype} {list(array.shape)}, must be {np.dtype(dtype)} "
                f"{list(sample.response_ids.shape)}"
            )


def _check_arrays(path: Path, arrays: Arrays) -> None:
    """Raises ValueError for the first array that a file of groups can't have."""
    for name in sorted(DTYPES.keys() | arrays.keys()):
        if name not in arrays:
            raise ValueError(f"{path} lacks {name!r}: it holds no sample groups, or not all of them")
        if name not in DTYPES:
            raise ValueError(f"{path} has {name!r}, which no file of sample groups has; use another")
        if arrays[name].dtype != DTYPES[name] or arrays[name].ndim != 1:
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise ValueError(f"{path}: {name!r} is {found}, must be {np.dtype(DTYPES[name])} with one dimension")
    num_groups, num_samples = len(arrays["samples.ends"]), len(arrays["weight_version"])
    totals = {name: len(arrays[name]) for name in PIECES} | {"samples": num_samples}
    for name, total in totals.items():
        ends = arrays[f"{name}.ends"]
        if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != total:
            raise ValueError(f"{path}: '{name}.ends' does not cut the {total} entries of {name!r}; use another")
    lengths = {f"{name}.ends": num_groups for name in ("prompt_ids", *GROUP_STRINGS)}
    lengths |= {f"{name}.ends": num_samples for name in ("response_ids", *SAMPLE_STRINGS)}
    lengths |= dict.fromkeys(("has_token_versions", "reward", "accuracy"), num_samples)
    lengths |= {
        "rollout_logprobs": len(arrays["response_ids"]),
        "token_versions": int(_version_ends(arrays)[-1:].sum()),
    }
    for name, length in lengths.items():
        if len(arrays[name]) != length:
            raise ValueError(f"{path}: {name!r} has {len(arrays[name])} entries instead of {length}; use another")


def _version_ends(arrays: Arrays) -> np.ndarray:
    """int64, where the samples with token versions end in them; empty where lengths don't fit."""
    lengths, has_versions = np.diff(arrays["response_ids.ends"], prepend=0), arrays["has_token_versions"]
    return _ends(lengths[has_versions].tolist() if len(lengths) == len(has_versions) else [])


def _ends(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum(lengths, dtype=np.int64)


def _ranges(ends: np.ndarray) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)]


def _flat(pieces: Sequence[np.ndarray | None], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(piece for piece in pieces if piece is not None)])


def _strings(arrays: Arrays, name: str) -> list[str]:
    return [arrays[name][each].tobytes().decode("utf-8", "surrogatepass") for each in _ranges(arrays[f"{name}.ends"])]
