"""What a run's checkpoint holds by name, and which model it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fipo_megatron.checkpoint.manifest import ContentHash

POLICY, RUN, GROUPS = "policy", "run.json", "groups.safetensors"
NUM_BLOCKS, BLOCK_BYTES = 64, 16 << 10  # of a weight file, that tell it from one of another training


def describe_model(folder: Path) -> dict[str, Any]:
    """What tells a model's Hugging Face folder from another's, without reading all of the weights; of JSON's types."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("tokenizer*")):
        digest.update(path.name.encode() + path.read_bytes())
    files = sorted(folder.glob("*.safetensors"))
    return {
        "path": str(folder),
        "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "weights": {path.name: path.stat().st_size for path in files},
        "weight_contents": {path.name: hash_blocks(path) for path in files},
        "tokenizer_sha256": digest.hexdigest(),
    }


def hash_blocks(path: Path) -> str:
    """XXH3-128 of `NUM_BLOCKS` blocks of a file, spread evenly from its first byte to its last; of a file no larger
    than these, of all of it."""
    content, size = ContentHash(), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for i in range(NUM_BLOCKS):
            start = (
                i * BLOCK_BYTES if size <= NUM_BLOCKS * BLOCK_BYTES else i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1)
            )
            file.seek(start)
            content.update(file.read(BLOCK_BYTES))
    return content.hexdigest()


def find_difference(saved: Mapping[str, Any], folder: Path, with_contents: bool = False) -> str | None:
    """Which of config, weights (names and sizes of files) and tokenizer of a model's folder are not those that
    `describe_model` gave; the first, None if all are. The folder may be another one. `with_contents`: samples of the
    weight files are compared, too, where they were described."""
    found = describe_model(folder)
    parts = ["config", "weights", "tokenizer_sha256"]
    if with_contents and "weight_contents" in saved:
        parts.append("weight_contents")
    for part in parts:
        if saved.get(part) != found[part]:
            return part.removesuffix("_sha256").replace("_", " ")
    return None


def check_same_model(saved: Mapping[str, Any], folder: Path, with_contents: bool) -> None:
    """Raises ValueError unless the folder is of the model that a checkpoint's run began with; it may have moved.

    `with_contents` for weights that are given, not for those of a warm start: another layout or machine makes the same
    with other rounding.
    """
    part = find_difference(saved, folder, with_contents)
    if part is not None:
        raise ValueError(
            f"model.path: {folder} is not the model that the run began with ({saved.get('path')}): {part} differ; give "
            "that one, or start a new run"
        )
