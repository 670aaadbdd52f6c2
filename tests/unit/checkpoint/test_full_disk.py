"""On a full disk nothing is left half-written, what it was made of is as it was, and the file is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fipo_megatron.checkpoint.hf_to_megatron import hf_to_megatron
from fipo_megatron.checkpoint.megatron_format import CheckpointLayout
from fipo_megatron.checkpoint.store import CheckpointStore
from fipo_megatron.trainer.checkpoints import RunState, write_run_state
from tests.unit.checkpoint.small_disk import content, small_disk
from tests.unit.checkpoint.test_conversion import write_folder
from tests.unit.checkpoint.test_sample_groups import GROUPS
from tools import convert

LAYOUT = CheckpointLayout(2, 2)
PAGE = 4096
LARGE = 1 << 23


def used(disk: Path) -> int:
    """Bytes taken on a small disk."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_conversion_is_there_as_a_whole_or_not_at_all(
    direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the first file, in the middle, and at the manifest, which comes last."""
    source = write_folder("qwen2", tmp_path / "model")
    if direction == "megatron-to-hf":
        hf_to_megatron(source, tmp_path / "checkpoint", LAYOUT, jobs=2)
        source = tmp_path / "checkpoint"
    before = content(source)

    def run(out: Path) -> int:
        return convert.main([direction, "--model", str(source), "--out", str(out), "--jobs", "2"])

    with small_disk(tmp_path / "large", LARGE) as disk:
        assert run(disk / "out") == 0
        needed = used(disk)
    capsys.readouterr()
    for i, size in enumerate((PAGE, needed // 2, needed - PAGE)):
        with small_disk(tmp_path / f"disk{i}", size // PAGE * PAGE) as disk:
            assert run(disk / "out") == 1, size
            assert not list(disk.iterdir())
        error = capsys.readouterr().err
        assert f"No space left on device: '{disk / 'out'}.partial-" in error
        assert ("manifest.json" in error) == (i == 2)
        assert content(source) == before


def write_run(folder: Path) -> None:
    write_run_state(RunState(4, {"generation_batches": 4}, tuple(GROUPS * 40)), folder)


def write_much(folder: Path) -> None:
    (folder / "weights").write_bytes(b"\1" * 20 * PAGE)


@pytest.mark.parametrize(
    ("write", "free", "name"),
    [
        (write_run, 1, "run.json"),
        (write_run, 6, "groups.safetensors"),
        (write_much, 20, "manifest.json"),
    ],
)
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(
    write: Callable[[Path], None], free: int, name: str, tmp_path: Path
) -> None:
    """`free` are pages."""
    with small_disk(tmp_path / "disk", 32 * PAGE) as disk:
        store = CheckpointStore(disk, keep_last=1, keep_best=0)
        (store.partial(2) / "weights").write_bytes(b"\1" * PAGE)
        before = content(store.complete(2, {}, None))
        partial = store.partial(4)
        (disk / "filling").write_bytes(b"\1" * (32 * PAGE - used(disk) - free * PAGE))
        with pytest.raises(OSError, match=rf"(?=.*No space left on device).*step-00000004.partial-[0-9a-f]+/{name}"):
            write_and_complete(store, write, partial)
        assert store.steps() == [2]
        store.remove_partials()
        found = store.newest()
        assert found is not None
        assert (found.step, found.refused, content(found.folder)) == (2, (), before)
        (disk / "filling").unlink()
        write_and_complete(store, write, store.partial(4))
        assert store.steps() == [4]


def write_and_complete(store: CheckpointStore, write: Callable[[Path], None], partial: Path) -> None:
    write(partial)
    store.complete(4, {}, None)
