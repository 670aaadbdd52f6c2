"""Conversion between a Hugging Face folder and Megatron's format, beside bare loops over the same bytes.

Random weights on a disk, cut for two tensor-parallel ranks and two pipeline stages. A loop is one thread, which reads,
hashes, writes into the same format, and brings to the disk; ours is what tools/convert.py does, with all cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fipo_megatron.benchmarks.memory import peak_of_process
from fipo_megatron.benchmarks.operation import Workload
from fipo_megatron.benchmarks.report import Row, Rows, Target, time_ratio
from fipo_megatron.benchmarks.timing import Call, measure, summarize, time_on_host
from fipo_megatron.checkpoint.hf_to_megatron import hf_to_megatron
from fipo_megatron.checkpoint.manifest import READ_BYTES, ContentHash, sync_to_disk
from fipo_megatron.checkpoint.megatron_format import CheckpointLayout
from fipo_megatron.checkpoint.megatron_to_hf import compare, find_megatron_source, megatron_to_hf
from fipo_megatron.checkpoint.tensor_files import HashedFile, OpenFiles, bytes_of, read_records, write_header
from fipo_megatron.model.hf_config import read_model_shape
from fipo_megatron.model.weight_map.entry import hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries

NAME = "conversion"
AXES = ("vocab", "hidden", "layers")
DEFAULT_SHAPE = (64000, 2048, 18)  # 2.1 GB in bfloat16, the largest tensor 250 MiB
LAYOUT = CheckpointLayout(tensor=2, pipeline=2)
HEAD_DIM = 128
MAX_TIME_RATIO = 1.25
MAX_BESIDE_BYTES = 64 << 20  # beside twice the largest tensor

Note = Callable[[str], None]


@dataclass(frozen=True)
class Folders:
    """Where a benchmark reads, and what it writes again and again."""

    model: Path
    checkpoint: Path
    out: Path


def to_megatron(folders: Folders) -> None:
    """Ours, one way."""
    hf_to_megatron(folders.model, folders.out, LAYOUT, os.cpu_count() or 1)


def to_hf(folders: Folders) -> None:
    """Ours, back."""
    megatron_to_hf(find_megatron_source(folders.checkpoint, None, False), folders.out, os.cpu_count() or 1)


def bare_to_megatron(folders: Folders) -> None:
    """Each tensor is read, hashed, and written by torch.save: a `.distcp` file holds such archives."""
    folders.out.mkdir()
    with OpenFiles() as files, HashedFile(folders.out / "__0_0.distcp") as file:
        for record in read_records(folders.model).values():
            files.open(record.file)
            tensor = torch.empty(record.shape, dtype=record.dtype)
            files.read(record.file, record.offset, bytes_of(tensor))
            ContentHash().update(bytes_of(tensor))
            torch.save(tensor, file)  # type: ignore[arg-type]
    sync_to_disk(file.path)


def bare_to_hf(folders: Folders) -> None:
    """All bytes are read, hashed and written: a safetensors file holds them as they are."""
    folders.out.mkdir()
    view = memoryview(bytearray(READ_BYTES))
    with HashedFile(folders.out / "model.safetensors") as file:
        for path in sorted(folders.checkpoint.glob("*.distcp")):
            content = ContentHash()
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(view):
                    content.update(view[:count])
                    file.write(view[:count])
    sync_to_disk(file.path)


# Variant, and the loop that it is compared with; None for a loop.
VARIANTS: dict[str, tuple[Callable[[Folders], None], str | None]] = {
    "to Megatron: bare loop": (bare_to_megatron, None),
    "to Megatron: ours": (to_megatron, "to Megatron: bare loop"),
    "to Hugging Face: bare loop": (bare_to_hf, None),
    "to Hugging Face: ours": (to_hf, "to Hugging Face: bare loop"),
}


def targets(workload: Workload) -> list[Target]:
    """Of both directions; memory in MiB."""
    limit = (2 * largest_tensor_bytes(workload) + MAX_BESIDE_BYTES) / 2**20
    found = []
    for ours, (_, loop) in VARIANTS.items():
        if loop is not None:
            direction = ours.partition(":")[0]
            found += [
                Target(f"{direction}: <= {MAX_TIME_RATIO} x the bare loop", MAX_TIME_RATIO, time_ratio(ours, loop)),
                Target(
                    f"{direction}: peak MiB <= {limit:.0f}, twice the largest tensor + 64", limit, _peak_figure(ours)
                ),
            ]
    return found


def largest_tensor_bytes(workload: Workload) -> int:
    """Of the embedding, or of an MLP's matrix."""
    vocab, hidden, _ = workload.shape
    return max(vocab, _intermediate_size(hidden)) * hidden * workload.dtype.itemsize


def run(workload: Workload, num_samples: int, max_seconds: float, with_memory: bool, note: Note) -> list[Row]:
    """A row a variant. Both directions are compared with their sources first.

    Raises:
        RuntimeError: what was converted is not what it was made of, or a process that measures memory died.
    """
    with tempfile.TemporaryDirectory(prefix="fipo-conversion-") as name:
        folders = Folders(Path(name) / "model", Path(name) / "checkpoint", Path(name) / "out")
        write_random_model(folders.model, workload)
        check(folders, note)

        def prepare() -> None:
            shutil.rmtree(folders.out, ignore_errors=True)
            os.sync()  # what others have written is not for the next one to wait for

        calls = {name: Call(lambda call=call: call(folders), prepare) for name, (call, _) in VARIANTS.items()}  # type: ignore[misc]
        times = measure(
            calls,
            time_on_host,
            num_samples=num_samples,
            max_seconds=max_seconds,
            on_round=lambda number: note(f"{number} of {num_samples} rounds"),
        )
        peaks = {}
        for variant, (_, loop) in VARIANTS.items():
            if with_memory and loop is not None:
                note(f"memory, {variant} ...")
                prepare()
                peaks[variant] = peak_of(variant, folders)
    return [_make_row(workload, variant, times, peaks.get(variant)) for variant in VARIANTS]


def check(folders: Folders, note: Note) -> None:
    """Convert there and back, and compare both with their source; RuntimeError where they differ."""
    jobs = os.cpu_count() or 1
    hf_to_megatron(folders.model, folders.checkpoint, LAYOUT, jobs)
    source = find_megatron_source(folders.checkpoint, None, False)
    megatron_to_hf(source, folders.out, jobs)
    try:
        for hf_folder in (folders.model, folders.out):
            note(f"equal: {compare(source, hf_folder, jobs)} tensors")
    except ValueError as error:
        raise RuntimeError(f"the conversion is wrong: {error}") from error


def write_random_model(folder: Path, workload: Workload) -> None:
    """A Hugging Face folder of random bits, a tensor at a time in memory."""
    vocab, hidden, layers = workload.shape
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": _intermediate_size(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape, generator = read_model_shape(folder), torch.Generator().manual_seed(0)
    names = [name for entry in make_entries(shape) for name in entry.hf_names]
    with HashedFile(folder / "model.safetensors") as file:
        write_header(file, [(name, workload.dtype, hf_tensor_shape(name, shape)) for name in names])
        for name in names:
            num_bytes = torch.Size(hf_tensor_shape(name, shape)).numel() * workload.dtype.itemsize
            file.write(bytes_of(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)))
    sync_to_disk(file.path)


def peak_of(variant: str, folders: Folders) -> int | None:
    """Bytes by which a new process grows at most beyond what its imports take; None where Linux doesn't say.

    Raises:
        RuntimeError: the process died, as one that the system stops for its memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_peak, variant, folders).result()


def _measure_peak(variant: str, folders: Folders) -> int | None:
    return peak_of_process(lambda: VARIANTS[variant][0](folders))


def _intermediate_size(hidden: int) -> int:
    return hidden * 11 // 4


def _peak_figure(variant: str) -> Callable[[Rows], tuple[float, float] | None]:
    def figures(rows: Rows) -> tuple[float, float] | None:
        peak = rows[variant].peak_bytes if variant in rows else None
        return None if peak is None else (peak / 2**20, peak / 2**20)

    return figures


def _make_row(workload: Workload, variant: str, times: dict[str, list[float]], peak: int | None) -> Row:
    timing = asdict(summarize(times[variant]))
    del timing["num_samples"]
    loop = VARIANTS[variant][1]
    return Row(
        NAME,
        variant,
        workload.shape,
        str(workload.dtype).removeprefix("torch."),
        "cpu",
        peak_bytes=peak,
        ratio_to_roof=None if loop is None else timing["median_ms"] / summarize(times[loop]).median_ms,
        **timing,
    )
