"""Say what a checkpoint holds, whether it is whole, and which layouts can load it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  tools/inspect_checkpoint.py runs/x                                   the newest whole checkpoint of a run
  tools/inspect_checkpoint.py runs/x/checkpoints/step-00000012 --quick names and sizes, hardly any contents
  tools/inspect_checkpoint.py Qwen2.5-32B-megatron --json              converted weights

No file is opened before its hash holds. A run's checkpoints are looked for where its config.yaml says.
exit status: 0 whole, 1 damaged, also where an older one of the run is whole, 2 unusable arguments
"""
SIZES = (1, 2, 4, 8)  # of tensor, pipeline and expert parallelism that are tried
GROUPS = "groups.safetensors"  # of a run's checkpoint
LEFT_OUT = "left out by --quick"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    options = parse(arguments)
    from fipo_megatron.checkpoint.manifest import DamagedError

    try:
        folder, manifest, refused = find(options.path, options.quick)
        found = inspect(folder, manifest, options.quick)
    except DamagedError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in refused:
        print(f"damaged: {line}", file=sys.stderr)
    print(json.dumps(found | {"refused": refused}) if options.json else describe(found))
    return 1 if refused else 0


def find(path: Path, quick: bool) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder that is meant, its manifest, and why newer ones are not: of a run, or of its checkpoints, the newest
    whole one; else the path itself.

    Raises:
        DamagedError: it is not whole.
        ValueError: there is none.
    """
    from fipo_megatron.checkpoint.manifest import MANIFEST, check_folder
    from fipo_megatron.checkpoint.store import STEP_NAME, CheckpointStore, read_checkpoint

    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if STEP_NAME.fullmatch(path.resolve().name):
        return path, read_checkpoint(path.resolve(), not quick), []
    store = CheckpointStore(path, 1, 0)
    if not (path / MANIFEST).is_file() and (path / "config.yaml").is_file():
        from fipo_megatron.config.load import load_config
        from fipo_megatron.trainer.run_folder import checkpoint_store

        store = checkpoint_store(load_config(path / "config.yaml"), path.resolve())
        if not store.steps():
            raise ValueError(f"{path}: the run has no checkpoint in {store.folder}; give another folder")
    found = store.newest(contents=not quick)
    if found is not None:
        return found.folder, found.manifest, list(found.refused)
    return path, check_folder(path, not quick), []


def inspect(folder: Path, manifest: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What is in a folder that is whole.

    Raises:
        DamagedError: what is read is not what the manifest says.
    """
    found = {"folder": str(folder), "whole": "names and sizes" if quick else "every byte", "kind": manifest["kind"]}
    found |= {key: manifest[key] for key in ("step", "score", "num_updates", "layout") if key in manifest}
    found["files"] = {file["name"]: file["size"] for file in manifest["files"]}
    if parts := tensor_bytes(folder, manifest):
        found["tensor bytes"] = parts
    if GROUPS in found["files"]:
        found["groups in the buffer"] = LEFT_OUT if quick else count_groups(folder / GROUPS)
    if config := model_config(folder, manifest):
        found["layouts"] = layouts(config, str(folder))
    return found


def count_groups(path: Path) -> int:
    """Groups of samples that wait for a step; a file that can't be read is a DamagedError."""
    from fipo_megatron.checkpoint.manifest import DamagedError
    from fipo_megatron.checkpoint.sample_groups import read_groups

    try:
        return len(read_groups(path))
    except (ValueError, OSError) as error:
        raise DamagedError(str(error)) from error


def check_file(folder: Path, manifest: dict[str, Any], name: str) -> bool:
    """Whether a file is there that may be opened; one that is not what the manifest says is a DamagedError."""
    from fipo_megatron.checkpoint.manifest import DamagedError, hash_file

    known = {file["name"]: file["xxh3"] for file in manifest["files"]}
    if name in known and hash_file(folder / name) != known[name]:
        raise DamagedError(f"{folder}: {name} is not what its manifest says; use another checkpoint, or copy it again")
    return name in known


def tensor_bytes(folder: Path, manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of the tensors of each part; empty without Megatron's files. Of these only the metadata is read."""
    from fipo_megatron.checkpoint.distcp import METADATA, CheckpointFiles
    from fipo_megatron.checkpoint.tensor_files import OpenFiles

    parts: Counter[str] = Counter()
    for prefix in ("", "policy/"):
        if not check_file(folder, manifest, f"{prefix}{METADATA}"):
            continue
        with OpenFiles() as files:
            checkpoint = CheckpointFiles(folder / prefix, files)
            for key in sorted(checkpoint.keys()):
                dtype, shape = checkpoint.describe(key)
                is_state = key.startswith("optimizer.state.")
                parts[".".join(key.split(".")[:3]) if is_state else "weights"] += dtype.itemsize * math.prod(shape)
    return dict(sorted(parts.items()))


def model_config(folder: Path, manifest: dict[str, Any]) -> Any:
    """The model's config.json: of the manifest, or carried along."""
    model = manifest.get("model")
    if isinstance(model, dict):
        return model.get("config")
    for name in ("huggingface/config.json", "config.json"):
        if check_file(folder, manifest, name):
            return json.loads((folder / name).read_text(encoding="utf-8"))
    return None


def layouts(config: dict[str, Any], source: str) -> dict[str, str]:
    """Of each layout "yes", or why it can't load the model: of those that are compared, and of `SIZES`."""
    from fipo_megatron.config.checks import find_model_problems
    from fipo_megatron.config.schema import ParallelConfig
    from fipo_megatron.model.hf_config import make_model_shape
    from fipo_megatron.trainer.layouts import LAYOUTS, parallel_settings

    shape = make_model_shape(config, source)
    settings = {name: parallel_settings(name, shape.num_experts > 0) for name in LAYOUTS}
    for tp, pp, ep in product(SIZES, repeat=3):
        settings[size_name(tp, pp, ep)] = {
            **{"tensor": tp, "pipeline": pp, "expert": ep, "data": ep, "sequence_parallel": tp > 1},
            "expert_tensor": tp if shape.num_experts and ep == 1 else 1,
        }
    return {
        name: "; ".join(find_model_problems(shape, ParallelConfig(**parallel))) or "yes"
        for name, parallel in settings.items()
    }


def size_name(tp: int, pp: int, ep: int) -> str:
    """Of a layout that these sizes alone make."""
    return f"tp={tp} pp={pp} ep={ep}"


def describe(found: dict[str, Any]) -> str:
    """Lines for people: layouts by what they have in common."""
    lines = []
    for key, value in found.items():
        shown = describe_layouts(value) if key == "layouts" else value
        lines.append(key if isinstance(shown, dict) else f"{key}: {shown}")
        lines += [f"  {name}: {entry}" for name, entry in shown.items()] if isinstance(shown, dict) else []
    return "\n".join(lines)


def describe_layouts(layouts: dict[str, str]) -> dict[str, str]:
    """Names by verdict; sizes as the values that each may have, where every combination of these will do."""
    combinations = {size_name(*sizes): sizes for sizes in product(SIZES, repeat=3)}
    by_verdict: dict[str, list[str]] = {"yes": []}
    for name, verdict in layouts.items():
        # A size is told with the others at 1: more of them would only repeat their own problems.
        if name not in combinations or (verdict != "yes" and sorted(combinations[name])[1] == 1):
            by_verdict.setdefault(verdict, []).append(name)
    fitting = [sizes for name, sizes in combinations.items() if layouts[name] == "yes"]
    axes = [sorted(set(axis)) for axis in zip(*fitting, strict=True)]
    if len(fitting) == math.prod(map(len, axes)):
        values = (f"{name} {'|'.join(map(str, axis))}" for name, axis in zip(("tp", "pp", "ep"), axes, strict=False))
        by_verdict["yes"].append(" x ".join(values))
    else:
        by_verdict["yes"] += [size_name(*sizes) for sizes in fitting]
    return {verdict: ", ".join(names) for verdict, names in by_verdict.items()}


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
    parser.add_argument("--quick", action="store_true", help="compare names and sizes, not the contents")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
