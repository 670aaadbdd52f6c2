"""What both directions of a conversion share: whole output or none, a bound on memory, threads, and refusals."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.checkpoint.hf_folder import OTHER_WEIGHTS, PARTIAL, remove_leftovers
from fipo_megatron.checkpoint.manifest import MANIFEST, sync_to_disk
from fipo_megatron.checkpoint.megatron_format import written_tensors
from fipo_megatron.checkpoint.tensor_files import DTYPE_NAMES, TensorRecord
from fipo_megatron.model.hf_config import ModelShape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries

CARRIED = "huggingface"  # config and tokenizer, in a folder of the checkpoint

Progress = Callable[[int], None]  # is told the bytes that were converted; by several threads


@dataclass(frozen=True)
class TensorHash:
    """One tensor as the manifest lists it."""

    name: str  # Hugging Face's
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, e.g. "BF16"
    xxh3: str


class MemoryBudget:
    """Bytes that threads may hold at the same time."""

    def __init__(self, limit: int) -> None:
        self._free, self._limit, self._changed = limit, limit, threading.Condition()

    @contextmanager
    def held(self, count: int) -> Iterator[None]:
        count = min(count, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


def ignore_progress(_: int) -> None:
    """Tells nobody."""


@contextmanager
def written_whole(out: Path, source: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end, or vanishes. Its files are for the caller to bring to the disk,
    as `write_manifest` does. What a kill left of an earlier one is removed; one process writes `out` at a time."""
    remove_leftovers(out, source)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it, or name another folder")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"--out {out} lies in the model's folder {source}, which is left as it is; name another folder"
        )
    partial = out.with_name(f"{out.name}{PARTIAL}{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, out)
        sync_to_disk(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_carried(source: Path, target: Path) -> None:
    """Everything of a Hugging Face folder but weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        is_weight = ".safetensors" in path.name or path.suffix in OTHER_WEIGHTS
        if path.is_file() and not is_weight and path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)


def check_records(folder: Path, shape: ModelShape, records: dict[str, TensorRecord]) -> None:
    """Raises ValueError unless a Hugging Face folder has the tensors of its config.json and no other."""
    expected = {name: hf_tensor_shape(name, shape) for entry in make_entries(shape) for name in entry.hf_names}
    for name in [*expected, *records]:
        if name not in records:
            raise ValueError(f"{folder} lacks tensor {name!r}; is the download complete?")
        if name not in expected:
            raise ValueError(
                f"{folder} has tensor {name!r}, which a {shape.architecture} of its config.json does not have and "
                "which would be lost; remove it from the weights, or correct config.json"
            )
        if records[name].shape != expected[name]:
            raise ValueError(
                f"{folder}: tensor {name!r} has shape {list(records[name].shape)}, its config.json makes it "
                f"{list(expected[name])}; correct config.json, or copy the weights again"
            )
    dtypes: dict[str, tuple[torch.dtype, str]] = {}
    for entry in make_entries(shape):
        key = written_tensors(entry, shape, shape.vocab_size)[0].key
        for name in entry.hf_names:
            dtype, other = dtypes.setdefault(key, (records[name].dtype, name))
            if dtype != records[name].dtype:
                raise ValueError(
                    f"{folder}: {name!r} is {DTYPE_NAMES[records[name].dtype]}, {other!r} {DTYPE_NAMES[dtype]}, and "
                    f"Megatron keeps both in one tensor, {key}; save the model in one dtype"
                )


def run_tasks(pool: ThreadPoolExecutor, run: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """The results in order; the first failure drops the tasks that have not begun."""
    futures = [pool.submit(run, task) for task in tasks]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise
