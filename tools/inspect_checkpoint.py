"""Say what a checkpoint holds, whether it is whole, and which layouts can load it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  tools/inspect_checkpoint.py runs/x                                   the newest checkpoint of a run
  tools/inspect_checkpoint.py runs/x/checkpoints/step-00000012 --quick names and sizes, no contents
  tools/inspect_checkpoint.py Qwen2.5-32B-megatron --json              converted weights

No file but the manifest is opened before all hashes hold.
exit status: 0 whole, 1 damaged, 2 unusable arguments
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    options = parse(arguments)
    from fipo_megatron.checkpoint.manifest import DamagedError

    try:
        found = inspect(find_folder(options.path), options.quick)
    except DamagedError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        if isinstance(value, dict):
            print(key, *(f"  {name}: {entry}" for name, entry in value.items()), sep="\n")
        else:
            print(f"{key}: {value}")
    return 0


def find_folder(path: Path) -> Path:
    """The folder with a manifest that is meant: of a run, or of its checkpoints, the newest step."""
    from fipo_megatron.checkpoint.store import CheckpointStore, step_name

    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    for folder in (path, path / "checkpoints"):
        if steps := CheckpointStore(folder, 1, 0).steps():
            return folder / step_name(steps[-1])
    return path


def inspect(folder: Path, quick: bool) -> dict[str, Any]:
    """What is in a folder that is whole; a DamagedError if it is not."""
    from fipo_megatron.checkpoint.manifest import check_folder
    from fipo_megatron.checkpoint.sample_groups import read_groups
    from fipo_megatron.checkpoint.store import STEP_NAME, read_checkpoint

    is_checkpoint = STEP_NAME.fullmatch(folder.name) is not None
    manifest = read_checkpoint(folder, not quick) if is_checkpoint else check_folder(folder, not quick)
    found = {"folder": str(folder), "whole": "names and sizes" if quick else "every byte", "kind": manifest["kind"]}
    found |= {key: manifest[key] for key in ("step", "score", "num_updates", "layout") if key in manifest}
    found["files"] = {file["name"]: file["size"] for file in manifest["files"]}
    if not quick:
        if parts := tensor_bytes(folder):
            found["tensor bytes"] = parts
        if (folder / "groups.safetensors").is_file():
            found["groups in the buffer"] = len(read_groups(folder / "groups.safetensors"))
        if config := model_config(folder, manifest):
            found["layouts"] = layouts(config, str(folder))
    return found


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the tensors of each part; empty without Megatron's files."""
    from fipo_megatron.checkpoint.distcp import METADATA, CheckpointFiles
    from fipo_megatron.checkpoint.tensor_files import OpenFiles

    parts: Counter[str] = Counter()
    source = folder if (folder / METADATA).is_file() else folder / "policy"
    if (source / METADATA).is_file():
        with OpenFiles() as files:
            checkpoint = CheckpointFiles(source, files)
            for key in sorted(checkpoint.keys()):
                dtype, shape = checkpoint.describe(key)
                size = dtype.itemsize
                for length in shape:
                    size *= length
                is_state = key.startswith("optimizer.state.")
                parts[".".join(key.split(".")[:3]) if is_state else "weights"] += size
    return dict(sorted(parts.items()))


def model_config(folder: Path, manifest: dict[str, Any]) -> Any:
    """The model's config.json: of the manifest, or carried along."""
    model = manifest.get("model")
    if isinstance(model, dict):
        return model.get("config")
    for path in (folder / "huggingface" / "config.json", folder / "config.json"):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def layouts(config: dict[str, Any], source: str) -> dict[str, str]:
    """Of each layout "yes", or why it can't load the model."""
    from fipo_megatron.config.checks import find_model_problems
    from fipo_megatron.config.schema import ParallelConfig
    from fipo_megatron.model.hf_config import make_model_shape
    from fipo_megatron.trainer.layouts import LAYOUTS, parallel_settings

    shape = make_model_shape(config, source)
    found = {}
    for name in LAYOUTS:
        parallel = ParallelConfig(**parallel_settings(name, shape.num_experts > 0))
        found[name] = "; ".join(find_model_problems(shape, parallel)) or "yes"
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoint",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a run, its checkpoints, one of them, or converted weights"
    )
    parser.add_argument("--quick", action="store_true", help="compare names and sizes alone")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
