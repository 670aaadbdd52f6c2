"""Convert weights between a Hugging Face folder and a Megatron-Core distributed checkpoint, byte for byte."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipo_megatron.checkpoint.conversion import Progress

EXAMPLES = """\
examples:
  tools/convert.py hf-to-megatron --model Qwen2.5-32B --out Qwen2.5-32B-megatron --tp 4 --pp 4 --check
  tools/convert.py megatron-to-hf --model Qwen2.5-32B-megatron --out Qwen2.5-32B-again
  tools/convert.py megatron-to-hf --model runs/x/checkpoints/step-00000012 --out trained
  tools/convert.py megatron-to-hf --model runs/x --out trained          its newest whole checkpoint
  tools/convert.py megatron-to-hf --model other/iter_0000100 --hf-folder Qwen2.5-32B --out trained --allow-foreign

A checkpoint can be loaded by any layout, whatever --tp, --pp and --ep cut it into. Nothing is left at --out unless all
of it was written. More is in docs/conversion.md.
exit status: 0 converted, 1 refused or failed, 2 unusable arguments
"""
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    options = parse(arguments)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs = {options.jobs}: must be at least 1")
        if not options.model.is_dir():
            raise ValueError(f"--model {options.model}: no such folder")
        (hf_to_megatron if options.direction == "hf-to-megatron" else megatron_to_hf)(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def hf_to_megatron(options: argparse.Namespace) -> None:
    """Convert one way, and check by reading both anew."""
    from fipo_megatron.checkpoint import hf_to_megatron as conversion
    from fipo_megatron.checkpoint.megatron_format import CheckpointLayout
    from fipo_megatron.checkpoint.megatron_to_hf import compare, find_megatron_source

    layout = CheckpointLayout(options.tp, options.pp, options.vpp, options.ep, options.etp)
    with progress_bar("convert", total_bytes(options.model)) as progress:
        conversion.hf_to_megatron(options.model, options.out, layout, options.jobs, progress)
    if options.check:
        source = find_megatron_source(options.out, None, False)
        with progress_bar("check", total_bytes(options.model)) as progress:
            print(f"equal: {compare(source, options.model, options.jobs, progress)} tensors")
    print(f"written: {options.out}")


def megatron_to_hf(options: argparse.Namespace) -> None:
    """Convert the other way, and check by reading both anew."""
    from fipo_megatron.checkpoint.megatron_to_hf import compare, count_weight_bytes, find_megatron_source
    from fipo_megatron.checkpoint.megatron_to_hf import megatron_to_hf as convert

    source = find_megatron_source(checkpoints_of(options.model), options.hf_folder, options.allow_foreign)
    for note in source.notes:
        print(note, file=sys.stderr)
    with progress_bar("convert", count_weight_bytes(source)) as progress:
        convert(source, options.out, options.jobs, progress)
    if options.check:
        with progress_bar("check", total_bytes(options.out)) as progress:
            print(f"equal: {compare(source, options.out, options.jobs, progress)} tensors")
    print(f"written: {options.out}")


def checkpoints_of(model: Path) -> Path:
    """Of a run's folder that of its checkpoints; else the folder itself."""
    from fipo_megatron.checkpoint.manifest import MANIFEST

    if (model / MANIFEST).exists() or not (model / "config.yaml").is_file():
        return model
    from fipo_megatron.config.load import load_config
    from fipo_megatron.trainer.run_folder import checkpoint_store

    store = checkpoint_store(load_config(model / "config.yaml"), model.resolve())
    if not store.steps():
        raise ValueError(f"--model {model}: the run has no checkpoint in {store.folder}; give another folder")
    return store.folder


def total_bytes(folder: Path) -> int:
    """About the bytes of a Hugging Face folder's weights: those of the files that hold them."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Progress]:
    """A bar in MiB that several threads may move, and that is full at the end."""
    from fipo_megatron.observability import progress

    lock, size, done, shown, start = threading.Lock(), -(-total // MIB), 0, 0, time.perf_counter()
    with progress.Progress(sys.stderr) as display, display.task(f"{name}, MiB", size) as advance:

        def add(count: int, whole: bool = False) -> None:
            nonlocal done, shown
            with lock:
                done += count
                while shown < (size if whole else min(size, done // MIB)):
                    shown += 1
                    advance(f"{done / MIB / (time.perf_counter() - start):.0f} MiB/s")

        yield add
        add(0, whole=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    there = directions.add_parser("hf-to-megatron", help="a Hugging Face folder into a distributed checkpoint")
    back = directions.add_parser("megatron-to-hf", help="a distributed checkpoint into a Hugging Face folder")
    for direction in (there, back):
        direction.add_argument("--model", type=Path, required=True, metavar="DIR", help="what is converted")
        direction.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist")
        direction.add_argument("--check", action="store_true", help="read both anew and compare every byte")
        direction.add_argument(
            "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="files at a time (default: all cores)"
        )
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"), ("etp", "expert tensor")):
        there.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{meaning} parallelism (default: 1)")
    there.add_argument("--vpp", type=int, metavar="N", help="model chunks of a pipeline rank")
    back.add_argument(
        "--hf-folder",
        type=Path,
        metavar="DIR",
        help="config and tokenizer, where they are not with the checkpoint nor where its run took its model from",
    )
    back.add_argument(
        "--allow-foreign", action="store_true", help="read one without a manifest: its files are pickles, trust them"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
