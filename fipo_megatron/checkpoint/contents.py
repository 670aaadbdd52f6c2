"""What a run's checkpoint holds by name, and which model it is of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POLICY, RUN, GROUPS = "policy", "run.json", "groups.safetensors"


def describe_model(folder: Path) -> dict[str, Any]:
    """What tells a model's Hugging Face folder from another's, without reading the weights; of JSON's types."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("tokenizer*")):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "path": str(folder),
        "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "weights": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
        "tokenizer_sha256": digest.hexdigest(),
    }


def find_difference(saved: Mapping[str, Any], folder: Path) -> str | None:
    """Which of config, weights (names and sizes of files) and tokenizer of a model's folder are not those that
    `describe_model` gave; the first, None if all are. The folder may be another one."""
    found = describe_model(folder)
    for part in ("config", "weights", "tokenizer_sha256"):
        if saved.get(part) != found[part]:
            return part.removesuffix("_sha256")
    return None


def check_same_model(saved: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError unless the folder is of the model that a checkpoint's run began with; it may have moved."""
    part = find_difference(saved, folder)
    if part is not None:
        raise ValueError(
            f"model.path: {folder} is not the model that the run began with ({saved.get('path')}): {part} differ; give "
            "that one, or start a new run"
        )
