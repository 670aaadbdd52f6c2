"""A Hugging Face folder as the policy leaves it: weights, config and tokenizer, whole or not there at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fipo_megatron.checkpoint.manifest import sync_to_disk

PARTIAL, REPLACED = ".partial-", ".replaced-"  # and the process that writes
MAX_FILE_BYTES = 4 << 30
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")  # of the policy before training


def write_hf_folder(weights: Iterable[tuple[str, torch.Tensor]], source: Path, target: Path) -> None:
    """Write `weights` (Hugging Face names) to `target`, with everything but weights copied from `source`.

    Written beside `target`, brought to the disk and renamed: a reader never sees half a folder, also after a crash.
    What a kill left of an earlier write of this target is removed first. One process writes a target at a time. At most
    one file of `MAX_FILE_BYTES` and the tensor at hand are in memory.
    """
    remove_leftovers(target, source)
    partial = target.with_name(f"{target.name}{PARTIAL}{os.getpid()}")
    replaced = target.with_name(f"{target.name}{REPLACED}{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for path in source.iterdir():
            if path.is_file() and ".safetensors" not in path.name and path.suffix not in OTHER_WEIGHTS:
                shutil.copy(path, partial / path.name)
        file_of, total_size = _write_files(weights, partial)
        if len(set(file_of.values())) == 1:
            os.rename(partial / next(iter(file_of.values())), partial / "model.safetensors")
        else:
            write_index(partial, file_of, total_size)
        for path in (*partial.iterdir(), partial):
            sync_to_disk(path)
        if target.exists():
            os.rename(target, replaced)
        os.rename(partial, target)
        sync_to_disk(target.parent)
    finally:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(target: Path, source: Path) -> None:
    """Remove what a kill left beside `target`, unless it is what is read; of a write that was killed between its two
    renames the older folder comes back."""
    name = re.compile(rf"{re.escape(target.name)}({re.escape(PARTIAL)}|{re.escape(REPLACED)})\d+")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match is None or path.resolve() in (source.resolve(), *source.resolve().parents):
            continue
        if match[1] == REPLACED and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path)


def write_index(folder: Path, file_of: dict[str, str], total_size: int) -> None:
    """The index of a Hugging Face folder of several weight files."""
    index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_files(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> tuple[dict[str, str], int]:
    """The file that holds each tensor, and the bytes of all tensors."""
    file_of: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = num_files = total_size = 0

    def flush() -> None:
        nonlocal pending, pending_bytes, num_files
        num_files += 1
        file = f"model-{num_files:05d}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(pending, file))
        pending, pending_bytes = {}, 0

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > MAX_FILE_BYTES:
            flush()
        pending[name] = tensor.cpu().contiguous()
        pending_bytes += tensor.nbytes
        total_size += tensor.nbytes
    flush()
    return file_of, total_size
