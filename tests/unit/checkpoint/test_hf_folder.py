from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fipo_megatron.checkpoint import hf_folder
from fipo_megatron.checkpoint.hf_folder import write_hf_folder
from fipo_megatron.model.weights import open_safetensors

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
