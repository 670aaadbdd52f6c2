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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fipo_megatron.checkpoint.store import CheckpointStore

EXAMPLES = """\
examples:
  tools/inspect_checkpoint.py runs/x                                   all of a run, in detail the newest whole one
  tools/inspect_checkpoint.py runs/x/checkpoints/step-00000012 --quick names and sizes, hardly any contents
  tools/inspect_checkpoint.py Qwen2.5-32B-megatron --json              converted weights

No file is opened before its hash holds. A run's checkpoints are looked for where its config.yaml says.
exit status: 0 whole, 1 one is damaged, also where another one of the run is whole, 2 unusable arguments
"""
SIZES = (1, 2, 4, 8)  # of tensor, pipeline and expert parallelism that are tried
WHOLE, DAMAGED = "whole", "damaged"
LEFT_OUT = "left out by --quick"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    options = parse(arguments)
    from fipo_megatron.checkpoint.manifest import DamagedError

    table: list[dict[str, Any]] = []
    try:
        store = find_store(options.path)
        if store is not None:
            table = list_checkpoints(store, options.quick)
        folder, manifest, refused = find(options.path, store, options.quick)
        found = inspect(folder, manifest, options.quick)
    except DamagedError as error:
        print(describe_table(table), end="")
        print(f"damaged: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in refused:
        print(f"damaged: {line}", file=sys.stderr)
    if options.json:
        print(json.dumps(found | {"refused": refused} | ({} if store is None else {"checkpoints": table})))
    else:
        print(describe_table(table) + describe(found))
    return 1 if refused or any(row["state"] == DAMAGED for row in table) else 0


def find_store(path: Path) -> CheckpointStore | None:
    """The checkpoints of a run's folder, or of a folder of checkpoints; None where the path is neither.

    Raises:
        ValueError: there is no such folder, or the run has no checkpoint.
    """
    from fipo_megatron.checkpoint.manifest import MANIFEST
    from fipo_megatron.checkpoint.store import STEP_NAME, CheckpointStore

    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    if (path / MANIFEST).is_file() or STEP_NAME.match(path.resolve().name):
        return None
    if (path / "config.yaml").is_file():
        from fipo_megatron.config.load import load_config
        from fipo_megatron.trainer.run_folder import checkpoint_store

        store = checkpoint_store(load_config(path / "config.yaml"), path.resolve())
        if not store.steps():
            raise ValueError(f"{path}: the run has no checkpoint in {store.folder}; give another folder")
        return store
    store = CheckpointStore(path, 1, 0)
    return store if store.steps() else None


def list_checkpoints(store: CheckpointStore, quick: bool) -> list[dict[str, Any]]:
    """Of each checkpoint, those that don't count included, by step: `folder`, `step`, `score`, `state`, and `why` where
    it is damaged."""
    from fipo_megatron.checkpoint.manifest import DamagedError
    from fipo_megatron.checkpoint.store import PARTIAL, SET_ASIDE, STEP_NAME, read_checkpoint

    rows = []
    for path in sorted(store.folder.iterdir()):
        match = STEP_NAME.match(path.name)
        if match is None or not path.is_dir():
            continue
        end = path.name[match.end() :]
        row = {"folder": path.name, "step": int(match[1]), "score": None, "state": WHOLE, "why": ""}
        if end.startswith(PARTIAL):
            row["state"] = "partial: being written or removed, or left by a kill"
        else:
            try:
                row["score"] = read_checkpoint(path, not quick)["score"]
                row["state"] = "set aside, whole" if end.startswith(SET_ASIDE) else WHOLE
            except DamagedError as error:
                row |= {"state": DAMAGED, "why": str(error)}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["step"], row["folder"]))


def find(path: Path, store: CheckpointStore | None, quick: bool) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder to describe in detail, its manifest, and why newer ones are not: of a store the newest whole one, else
    the path itself.

    Raises:
        DamagedError: it is not whole.
    """
    from fipo_megatron.checkpoint.manifest import check_folder
    from fipo_megatron.checkpoint.store import STEP_NAME, read_checkpoint

    if store is None:
        whole = path.resolve()
        is_checkpoint = STEP_NAME.match(whole.name)
        return path, read_checkpoint(whole, not quick) if is_checkpoint else check_folder(path, not quick), []
    found = store.newest(contents=not quick)
    assert found is not None
    return found.folder, found.manifest, list(found.refused)


def describe_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a checkpoint, with a head; nothing without checkpoints."""
    if not rows:
        return ""
    width = max(len(row["folder"]) for row in rows)
    lines = [f"{'checkpoint':{width}}  {'step':>6}  {'score':>8}  state"]
    for row in rows:
        score = "-" if row["score"] is None else f"{row['score']:.4f}"
        why = f": {row['why']}" if row["why"] else ""
        lines.append(f"{row['folder']:{width}}  {row['step']:>6}  {score:>8}  {row['state']}{why}")
    return "\n".join(lines) + "\n\n"


def inspect(folder: Path, manifest: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What is in a folder that is whole.

    Raises:
        DamagedError: what is read is not what the manifest says.
    """
    found = {"folder": str(folder), "whole": "names and sizes" if quick else "every byte", "kind": manifest["kind"]}
    found |= {key: manifest[key] for key in ("step", "score", "layout") if key in manifest}
    from fipo_megatron.checkpoint.contents import GROUPS

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
    from fipo_megatron.checkpoint.contents import POLICY
    from fipo_megatron.checkpoint.distcp import METADATA, CheckpointFiles
    from fipo_megatron.checkpoint.tensor_files import OpenFiles

    parts: Counter[str] = Counter()
    for prefix in ("", f"{POLICY}/"):
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
