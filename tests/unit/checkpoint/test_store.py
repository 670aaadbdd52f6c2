"""Whatever happens while a checkpoint is written, the one before it is still found; damaged ones are passed over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fipo_megatron.checkpoint import store as store_module
from fipo_megatron.checkpoint.manifest import MANIFEST, DamagedError, write_manifest
from fipo_megatron.checkpoint.store import CheckpointStore, FoundCheckpoint, read_checkpoint


def make_store(folder: Path, keep_last: int = 10, keep_best: int = 0) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep_last, keep_best)


def write(store: CheckpointStore, step: int, score: float | None = None) -> Path:
    partial = store.partial(step)
    (partial / "policy").mkdir()
    (partial / "policy" / "__0_0.distcp").write_bytes(bytes([step % 256]) * 1000)
    (partial / "run.json").write_text(json.dumps({"step": step}))
    return store.complete(step, {"num_updates": 2 * step}, score)


def found(store: CheckpointStore, max_step: int | None = None) -> FoundCheckpoint:
    checkpoint = store.newest(max_step)
    assert checkpoint is not None
    return checkpoint


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_nothing_yet(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert (store.steps(), store.newest()) == ([], None)
    store.remove_partials()
    store.prune()
    assert store.set_aside_after(0) == []
    assert not store.folder.exists()


def test_what_was_written_is_found_by_step(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    folders = [write(store, step, score=0.5) for step in (2, 9, 10)]
    assert store.steps() == [2, 9, 10]
    assert (store.folder / "latest").read_text() == "step-00000010\n"
    newest = found(store)
    assert (newest.folder, newest.step, newest.refused) == (folders[2], 10, ())
    assert (newest.manifest["num_updates"], newest.manifest["score"], newest.manifest["kind"]) == (
        20,
        0.5,
        "checkpoint",
    )
    assert found(store, max_step=9).step == 9
    assert found(store, max_step=8).step == 2
    assert store.newest(max_step=1) is None
    assert json.loads((folders[1] / "run.json").read_text()) == {"step": 9}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (lambda folder: flip(folder / "policy/__0_0.distcp"), "policy/__0_0.distcp has hash"),
    "truncated": (lambda folder: os.truncate(folder / "run.json", 3), "run.json has 3 bytes instead of"),
    "emptied": (lambda folder: os.truncate(folder / "policy/__0_0.distcp", 0), "has 0 bytes instead of 1000"),
    "missing": (lambda folder: (folder / "run.json").unlink(), "run.json is missing"),
    "extra": (lambda folder: (folder / "more").touch(), "more is not in its manifest"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json"),
    "no files": (lambda folder: (shutil.rmtree(folder), folder.mkdir())[0], "has no manifest.json"),
    "weights": (lambda folder: write_manifest(folder, "weights", {}), "is of kind 'weights', not 'checkpoint'"),
    "no step": (lambda folder: write_manifest(folder, "checkpoint", {"score": None}), "is of step None"),
    "step": (lambda folder: write_manifest(folder, "checkpoint", {"step": 3, "score": None}), "is of step 3"),
    "bool": (lambda folder: write_manifest(folder, "checkpoint", {"step": True, "score": None}), "is of step True"),
    "score": (lambda folder: write_manifest(folder, "checkpoint", {"step": 4, "score": "9"}), "has score '9'"),
    "removed": (shutil.rmtree, "step-00000004 is missing, which latest names"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (1, 2, 4):
        write(store, step)
    change, message = DAMAGES[damage]
    change(store.folder / "step-00000004")
    newest = found(store)
    assert newest.step == 2
    assert len(newest.refused) == 1
    assert message in newest.refused[0]
    assert found(store, max_step=3).refused == ()


def test_every_damaged_one_is_named_where_none_is_whole(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (1, 2):
        flip(write(store, step) / "run.json")
    with pytest.raises(
        DamagedError, match=r"no checkpoint is whole\n.*step-00000002: run.json.*\n.*step-00000001: run"
    ):
        store.newest()


@pytest.mark.parametrize("text", [b"", b"step-1\n", b"\x80\x04\x95", b"../step-00000009"])
def test_a_damaged_tracker_is_told_and_misleads_nobody(text: bytes, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1)
    (store.folder / "latest").write_bytes(text)
    newest = found(store)
    assert newest.step == 1
    assert "which names no checkpoint" in newest.refused[0]


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    manifest = write(store, 1, score=0.25) / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(DamagedError, match="step-00000001"):
            read_checkpoint(manifest.parent, contents=False)
    manifest.write_bytes(content)
    read_checkpoint(manifest.parent)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation on the disk, one after the other, is the last one that is made."""
    operations: list[str] = []
    limit = 0

    def stop_at_limit(name: str, module: object) -> None:
        run = getattr(module, name)

        def counted(*arguments: object, **settings: object) -> object:
            if len(operations) == limit:
                raise Killed
            operations.append(name)
            return run(*arguments, **settings)

        monkeypatch.setattr(module, name, counted)

    for name, module in (
        ("rename", os),
        ("fsync", os),
        ("rmtree", store_module.shutil),
        ("write_manifest", store_module),
    ):
        stop_at_limit(name, module)
    outcomes = []
    while True:
        limit, store = 10**9, make_store(tmp_path / f"{len(outcomes)}", keep_last=2)
        for step in (1, 2, 3):
            write(store, step)
        operations.clear()
        limit = len(outcomes)
        try:
            write(store, 3 if again else 4)
        except Killed:
            limit = 10**9
            newest = found(store)
            outcomes.append(newest.step)
            assert not any("step-00000004" in line for line in newest.refused)
            # The run goes on: what is left over disappears, and the step is written again.
            store.remove_partials()
            assert not [name for name in names(store) if "partial" in name]
            write(store, 4)
            assert (found(store).step, found(store).refused, store.steps()[-1]) == (4, (), 4)
            assert (store.folder / "latest").read_text() == "step-00000004\n"
            assert len(store.steps()) == 2
        else:
            break
    assert operations.count("fsync") == 8
    # Before the rename that makes the checkpoint: the manifest, and fsync of 3 files and 2 folders. Where the step had
    # one, only between two renames there is none of it.
    expected = [3] * 7 + ([2] + [3] * 4 if again else [4] * 6)
    assert outcomes == expected


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "scores", "kept"),
    [
        (1, 0, [None] * 5, [5]),
        (2, 0, [0.9, 0.1, 0.1, 0.1, 0.1], [4, 5]),
        (1, 1, [0.1, 0.9, 0.2, 0.3, 0.1], [2, 5]),
        (1, 1, [None, 0.2, 0.9, None, None], [3, 5]),
        (1, 1, [None] * 5, [5]),
        (2, 2, [0.5, 0.9, 0.1, 0.8, 0.2], [2, 4, 5]),
        (1, 2, [0.5, 0.5, 0.5, 0.1, None], [2, 3, 5]),
        (1, 1, [0.1, 0.2, 0.3, 0.4, 0.5], [5]),
        (1, 3, [-1.0, 0, 3, None, -2.0], [1, 2, 3, 5]),
        (9, 9, [None] * 5, [1, 2, 3, 4, 5]),
    ],
)
def test_the_last_and_the_best_are_kept(
    keep_last: int, keep_best: int, scores: list[float | None], kept: list[int], tmp_path: Path
) -> None:
    store = make_store(tmp_path, keep_last, keep_best)
    for step, score in enumerate(scores, 1):
        write(store, step, score)
        assert found(store).step == step
    assert store.steps() == kept
    assert names(store) == ["latest", *(f"step-{step:08d}" for step in kept)]


def test_damaged_ones_take_no_place_among_the_last(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=2, keep_best=1)
    for step, score in ((1, 0.9), (2, None), (3, None)):
        write(store, step, score)
    for step in (1, 3):
        (store.folder / f"step-{step:08d}" / "run.json").unlink()
    write(store, 4)
    assert store.steps() == [2, 3, 4]
    write(store, 5)
    assert store.steps() == [4, 5]


def test_later_ones_are_set_aside_and_never_removed(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=2)
    for _ in range(2):
        for step in (1, 2, 3):
            write(store, step)
        aside = store.set_aside_after(2)
        assert (store.folder / "latest").read_text() == "step-00000002\n"
        assert (found(store).step, found(store).refused) == (2, ())
        store.set_aside_after(0)
        assert store.newest() is None
    assert aside == ["step-00000003.set-aside-2"]
    store.remove_partials()
    assert names(store) == [f"step-0000000{step}.set-aside{suffix}" for step in (2, 3) for suffix in ("", "-2")]
    for name in names(store):
        assert read_checkpoint(store.folder / name)["step"] == int(name[5:13])


def test_a_step_that_is_written_again_sets_the_older_aside(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 1)
    flip(write(store, 2) / "run.json")
    assert found(store).step == 1
    write(store, 2)
    assert (found(store).step, found(store).refused) == (2, ())
    assert names(store) == ["latest", "step-00000001", "step-00000002", "step-00000002.set-aside"]


def test_what_is_not_the_stores_is_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=1)
    write(store, 1)
    (store.partial(3) / "half").touch()
    for name in ("notes.partial", "step-00000009x", "step-7", "best"):
        (store.folder / name).mkdir()
    (store.folder / "step-00000008").touch()  # a file
    (store.folder / "latest.partial").touch()
    assert (store.steps(), found(store).step) == ([1], 1)
    store.remove_partials()
    assert names(store) == [
        "best",
        "latest",
        "notes.partial",
        "step-00000001",
        "step-00000008",
        "step-00000009x",
        "step-7",
    ]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda store: store.complete(7, {}, None), r"step = 7: has no folder; write .* where partial\(7\) says"),
        (lambda store: (store.partial(7), store.complete(7, {}, float("nan"))), "score = nan: must be finite"),
        (lambda store: (store.partial(7), store.complete(7, {"step": 1}, None)), "details hold 'step'"),
        (lambda store: (store.partial(7), store.complete(7, {"files": []}, None)), "details hold 'files'"),
        (lambda store: store.partial(-1), "step = -1: must be at least 0"),
        (lambda store: CheckpointStore(store.folder, 0, 1), "checkpoint.keep_last = 0: must be at least 1"),
        (lambda store: CheckpointStore(store.folder, 1, -1), "checkpoint.keep_best = -1: must be at least 0"),
    ],
)
def test_refusals(run: Callable[[CheckpointStore], object], message: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write(store, 6)
    with pytest.raises(ValueError, match=message):
        run(store)
    assert found(store).step == 6
