"""The file of one step's updates: all that went into them, and what came out, so that they can be made again.

A safetensors file, so nothing in it is code. Its header has a hash over all arrays, which is compared when it is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fipo_megatron.checkpoint.manifest import ContentHash
from fipo_megatron.types import PolicyUpdate, SampleGroup, TrainingBatch

FORMAT = "1"
SKIPS = (None, "empty", "not_finite")  # a number on disk
FILE_NAME = re.compile(r"step-(\d{8})\.safetensors")
PARTIAL = ".partial"  # behind the name of a file that is being written
BATCH_ARRAYS: dict[str, np.dtype[Any]] = {
    "token_ids": np.dtype(np.int64),
    "cu_seqlens": np.dtype(np.int64),
    "prompt_lens": np.dtype(np.int64),
    "advantages": np.dtype(np.float32),
    "old_logprobs": np.dtype(np.float32),
    "ref_logprobs": np.dtype(np.float32),
    "loss_mask": np.dtype(np.bool_),
}
OPTIONAL = ("ref_logprobs", "loss_mask")

RandomStates = Mapping[str, np.ndarray]  # of a rank: uint8 arrays by the name of the generator


@dataclass(frozen=True)
class StepResults:
    """What the updates of a step gave. Two are equal if every bit of them is."""

    updates: tuple[PolicyUpdate, ...]  # without their cost
    new_logprobs: np.ndarray  # float32 [R], by the policy after the last update


@dataclass(frozen=True)
class ReplayStep:
    """The updates of a step."""

    step: int
    config: Mapping[str, Any]  # the run's resolved configuration, of JSON's types
    platform: str  # that computed it: "cpu" or "cuda"
    batch: TrainingBatch  # with the old log-probs, and those of the reference policy where there is one
    uids: tuple[str, ...]  # [S], of each sample's prompt
    weight_versions: np.ndarray  # int64 [S], that sampled the response; the oldest where it spans several
    token_versions: np.ndarray  # int32 [R]
    lr: float
    mini_batches: tuple[tuple[int, ...], ...]  # indices of samples, an update each
    random_states: tuple[RandomStates, ...]  # of every rank, before the first update
    results: StepResults


def sample_origins(groups: Sequence[SampleGroup]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Of the samples of `groups` in order: prompts' uids, weight versions (int64 [S]), token versions (int32 [R])."""
    samples = [sample for group in groups for sample in group.samples]
    of_tokens = [
        np.full(len(sample.response_ids), sample.weight_version) if sample.token_versions is None
        else sample.token_versions
        for sample in samples
    ]  # fmt: skip
    versions = np.array([sample.weight_version for sample in samples], np.int64)
    return tuple(sample.prompt.uid for sample in samples), versions, np.concatenate(of_tokens).astype(np.int32)


def replay_path(run_folder: Path, step: int) -> Path:
    """Where a run keeps the file of a step."""
    return run_folder / "replay" / f"step-{step:08d}.safetensors"


def replay_steps(run_folder: Path) -> list[int]:
    """The steps of which a run has a file, in order."""
    paths = (run_folder / "replay").glob("step-*.safetensors")
    return sorted(int(match[1]) for path in paths if (match := FILE_NAME.fullmatch(path.name)))


# ---------------------------------------------------------------- writing


def write_replay_step(path: Path, step: ReplayStep) -> None:
    """Write the file of a step; under a temporary name first, so that it is whole or not there."""
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(step).items()}
    about = {"step": step.step, "platform": step.platform, "lr": step.lr.hex(), "config": step.config}
    text = json.dumps(about, sort_keys=True)
    metadata = {"format": FORMAT, "about": text, "xxh3": _hash(arrays, text)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(save(arrays, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _arrays(step: ReplayStep) -> dict[str, np.ndarray]:
    batch, updates = step.batch, step.results.updates
    arrays = {f"batch.{name}": getattr(batch, name) for name in BATCH_ARRAYS if getattr(batch, name) is not None}
    uids, arrays["uids.ends"] = _join([np.frombuffer(uid.encode(), np.uint8) for uid in step.uids], np.uint8)
    samples, arrays["mini_batches.ends"] = _join(step.mini_batches, np.int64)
    norms = [np.nan if update.grad_norm is None else update.grad_norm for update in updates]
    arrays |= {
        "uids": uids,
        "mini_batches": samples,
        "weight_versions": step.weight_versions,
        "token_versions": step.token_versions,
        "results.statistics": np.stack([update.statistics for update in updates]).astype(np.float64),
        "results.grad_norms": np.array(norms, np.float64),
        "results.skipped": np.array([SKIPS.index(update.skipped) for update in updates], np.int64),
        "results.new_logprobs": step.results.new_logprobs,
    }
    for rank, states in enumerate(step.random_states):
        arrays |= {f"random.{rank:05d}.{name}": state for name, state in states.items()}
    return arrays


def _join(parts: Sequence[Any], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Parts one behind the other, and where each ends, int64."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)]), ends


def _split(joined: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return np.split(joined, ends)[:-1]


def _hash(arrays: Mapping[str, np.ndarray], about: str) -> str:
    content = ContentHash()
    content.update(about.encode())
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
    return content.hexdigest()


# ---------------------------------------------------------------- reading


def read_replay_step(path: Path) -> ReplayStep:
    """The step that `write_replay_step` wrote.

    Raises:
        ValueError: there is no such file, or its content is not what was written.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}); replay another step") from error
    if metadata.get("format") != FORMAT or "about" not in metadata:
        raise ValueError(f"{path}: format = {metadata.get('format')!r}, must be {FORMAT!r}; it is no file of a replay")
    if metadata.get("xxh3") != (found := _hash(arrays, metadata["about"])):
        raise ValueError(
            f"{path} is damaged: its content has hash {found} instead of {metadata.get('xxh3')}; replay another step"
        )
    try:
        return _step(arrays, json.loads(metadata["about"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is no whole file of a replay ({error!r}); replay another step") from error


def _step(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> ReplayStep:
    batch = TrainingBatch(**{
        name: _typed(arrays, f"batch.{name}", dtype)
        for name, dtype in BATCH_ARRAYS.items()
        if name not in OPTIONAL or f"batch.{name}" in arrays
    })  # fmt: skip
    updates = zip(arrays["results.statistics"], arrays["results.grad_norms"], arrays["results.skipped"], strict=True)
    return ReplayStep(
        step=int(about["step"]),
        config=about["config"],
        platform=about["platform"],
        batch=batch,
        uids=tuple(part.tobytes().decode() for part in _split(arrays["uids"], arrays["uids.ends"])),
        weight_versions=_typed(arrays, "weight_versions", np.dtype(np.int64)),
        token_versions=_typed(arrays, "token_versions", np.dtype(np.int32)),
        lr=float.fromhex(about["lr"]),
        mini_batches=tuple(
            tuple(part.tolist()) for part in _split(arrays["mini_batches"], arrays["mini_batches.ends"])
        ),
        random_states=_random_states(arrays),
        results=StepResults(
            tuple(
                PolicyUpdate(statistics, None if np.isnan(norm) else float(norm), SKIPS[skip])  # type: ignore[arg-type]
                for statistics, norm, skip in updates
            ),
            _typed(arrays, "results.new_logprobs", np.dtype(np.float32)),
        ),
    )


def _typed(arrays: Mapping[str, np.ndarray], name: str, dtype: np.dtype[Any]) -> np.ndarray:
    if arrays[name].dtype != dtype:
        raise ValueError(f"{name} is {arrays[name].dtype}, must be {dtype}")
    return arrays[name]


def _random_states(arrays: Mapping[str, np.ndarray]) -> tuple[RandomStates, ...]:
    ranks: dict[int, dict[str, np.ndarray]] = {}
    for key, state in arrays.items():
        if key.startswith("random."):
            _, rank, name = key.split(".", 2)
            ranks.setdefault(int(rank), {})[name] = state
    return tuple(ranks[rank] for rank in range(len(ranks)))
