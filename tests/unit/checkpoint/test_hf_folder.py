from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.checkpoint import hf_folder
from fipo_megatron.checkpoint.hf_folder import write_hf_folder
from fipo_megatron.model.weight_map.entry import open_safetensors

WEIGHTS = {f"layer.{i}.weight": torch.full((64, 4), float(i)) for i in range(5)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("t")
    (folder / "model.safetensors").write_bytes(b"old")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "model.safetensors.index.json").write_text("old")
    return folder


def test_one_file_for_a_small_model(source: Path, tmp_path: Path) -> None:
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_large_model_is_split_and_indexed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "MAX_FILE_BYTES", 2 * 64 * 4 * 4)
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3
    get_slice = open_safetensors(tmp_path / "hf")
    assert all(torch.equal(get_slice(name)[:], WEIGHTS[name]) for name in WEIGHTS)
    with pytest.raises(ValueError, match="has no tensor 'layer.9.weight'"):
        get_slice("layer.9.weight")


def test_a_failure_leaves_the_old_folder_whole(source: Path, tmp_path: Path) -> None:
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "layer.0.weight", torch.zeros(1)
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_folder(broken(), source, tmp_path / "hf")
    assert len(load_file(tmp_path / "hf" / "model.safetensors")) == 5
    assert {p.name for p in tmp_path.iterdir()} == {"source", "hf"}


def test_all_is_on_the_disk_before_it_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def move(old: Path, new: Path) -> None:
        done.append(f"{Path(old).name} -> {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", move)
    (tmp_path / "hf").mkdir()
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    partial, replaced = (f"hf.{kind}-{os.getpid()}" for kind in ("partial", "replaced"))
    assert done[0] == "model-00001.safetensors -> model.safetensors"
    assert sorted(done[1:4]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert done[4:] == [partial, f"hf -> {replaced}", f"{partial} -> hf", tmp_path.name]


def test_what_a_kill_left_of_this_target_is_removed(source: Path, tmp_path: Path) -> None:
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    others = ["hf-2.partial-7", "hf.partial-x", "xhf.partial-7"]
    for name in ["hf.partial-7", "hf.replaced-8", *others]:
        (tmp_path / name).mkdir()
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "hf", *others}


def test_what_is_read_is_no_leftover(source: Path, tmp_path: Path) -> None:
    source = source.rename(tmp_path / "hf.partial-7")
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    assert (source / "tokenizer.json").read_text() == (tmp_path / "hf/tokenizer.json").read_text() == "t"


@pytest.mark.parametrize("ends", ["killed", "failed"])
def test_between_the_two_renames_the_older_folder_is_kept(
    ends: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf_folder(WEIGHTS.items(), source, tmp_path / "hf")
    if ends == "killed":
        os.rename(tmp_path / "hf", tmp_path / "hf.replaced-7")
        hf_folder.remove_leftovers(tmp_path / "hf", source)
    else:
        rename = os.rename

        def fail(old: Path, new: Path) -> None:
            if ".partial-" in Path(old).name:
                raise OSError("the disk fails")
            rename(old, new)

        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="the disk fails"):
            write_hf_folder({"other": torch.zeros(1)}.items(), source, tmp_path / "hf")
    assert len(load_file(tmp_path / "hf" / "model.safetensors")) == 5
    assert {p.name for p in tmp_path.iterdir()} == {"source", "hf"}
