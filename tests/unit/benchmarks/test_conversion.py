"""The benchmark of conversions: its rows and targets; memory stays bounded, whatever the model's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fipo_megatron.benchmarks import conversion
from fipo_megatron.benchmarks.conversion import (
    DEFAULT_SHAPE,
    VARIANTS,
    Folders,
    check,
    largest_tensor_bytes,
    peak_of,
    targets,
    write_random_model,
)
from fipo_megatron.benchmarks.operation import Workload
from fipo_megatron.benchmarks.report import Row, judge_targets
from fipo_megatron.checkpoint.tensor_files import read_records

MIB = 1 << 20


def workload(*shape: int) -> Workload:
    return Workload(conversion.NAME, shape, torch.bfloat16, torch.device("cpu"))


def test_every_variant_is_timed_and_checked_first() -> None:
    notes: list[str] = []
    rows = conversion.run(workload(300, 256, 2), 3, 60, with_memory=False, note=notes.append)
    assert [row.variant for row in rows] == list(VARIANTS)
    assert all(row.median_ms is not None and row.median_ms > 0 for row in rows)
    assert [row.ratio_to_roof is not None for row in rows] == [False, True] * 2
    assert notes[:2] == ["equal: 27 tensors"] * 2  # embedding, head, norm, and 12 of each of 2 layers
    assert [verdict for *_, verdict in judge_targets(targets(workload(300, 256, 2)), rows)][1::2] == [
        "not measured"
    ] * 2


def test_a_conversion_that_is_wrong_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(tmp_path / "model", tmp_path / "checkpoint", tmp_path / "out")
    write_random_model(folders.model, workload(300, 256, 2))
    write = conversion.megatron_to_hf

    def write_wrongly(source: object, out: Path, jobs: int) -> None:
        write(source, out, jobs)  # type: ignore[arg-type]
        path = out / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(conversion, "megatron_to_hf", write_wrongly)
    with pytest.raises(RuntimeError, match="the conversion is wrong: 'lm_head.weight' differs"):
        check(folders, lambda text: None)


def row(variant: str, milliseconds: float, peak: int | None = None) -> Row:
    times = dict.fromkeys(("median_ms", "min_ms", "p20_ms", "p80_ms"), milliseconds)
    return Row(conversion.NAME, variant, DEFAULT_SHAPE, "bfloat16", "cpu", peak_bytes=peak, **times)


def test_targets() -> None:
    times = zip(VARIANTS, (100, 125, 200, 260), (None, 564 * MIB, None, 565 * MIB), strict=True)
    verdicts = judge_targets(targets(workload(*DEFAULT_SHAPE)), [row(*each) for each in times])
    assert [each[1:] for each in verdicts] == [("1.25", "met"), ("564", "met"), ("1.3", "not met"), ("565", "not met")]


def test_the_largest_tensor_of_the_default_is_250_mib() -> None:
    assert largest_tensor_bytes(workload(*DEFAULT_SHAPE)) == 250 * MIB


@pytest.mark.multiproc
@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Beside what the imports take: 300 MiB of weights take at most 75, both ways."""
    folders = Folders(tmp_path / "model", tmp_path / "checkpoint", tmp_path / "out")
    of = workload(2048, 1024, 14)
    write_random_model(folders.model, of)
    sizes = [record.num_bytes for record in read_records(folders.model).values()]
    assert max(sizes) == largest_tensor_bytes(of)
    limit = 2 * max(sizes) + conversion.MAX_BESIDE_BYTES
    assert sum(sizes) > 3 * limit
    conversion.hf_to_megatron(folders.model, folders.checkpoint, conversion.LAYOUT, 1)
    for number, variant in enumerate(name for name, (_, loop) in VARIANTS.items() if loop is not None):
        peak = peak_of(variant, Folders(folders.model, folders.checkpoint, tmp_path / f"out{number}"))
        assert peak is None or peak <= limit, variant
