"""A model is told from another by what its folder holds beside the weights' numbers."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from fipo_megatron.checkpoint.contents import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    check_same_model,
    describe_model,
    find_difference,
    hash_blocks,
)
from fipo_megatron.checkpoint.manifest import hash_file


def write_model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    (folder / "README.md").write_text("of no weight")
    return folder


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", '{"hidden_size": 16}', "config"),
        ("tokenizer.json", "{ }", "tokenizer"),
        ("tokenizer_config.json", "{}", "tokenizer"),
        ("model.safetensors", "123456789", "weights"),
        ("model-00002-of-00002.safetensors", "", "weights"),
        ("model.safetensors", "12345679", "weight contents"),
    ],
)
def test_another_model_is_refused_by_what_differs(name: str, content: str, part: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    saved = json.loads(json.dumps(describe_model(folder)))  # as a manifest holds it
    (folder / "README.md").write_text("changed")
    check_same_model(saved, Path(shutil.move(folder, tmp_path / "moved")), with_contents=True)
    (tmp_path / "moved" / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"model.path: .*moved is not the model .*\(.*model\): {part} differ; give that"
    ):
        check_same_model(saved, tmp_path / "moved", with_contents=True)
    assert find_difference(saved, tmp_path / "moved", with_contents=True) == part


def test_contents_are_compared_where_that_is_asked_for_and_they_were_described(tmp_path: Path) -> None:
    """A warm start's model may be made anew; a checkpoint may be older than the comparison."""
    folder = write_model_folder(tmp_path / "model")
    saved = describe_model(folder)
    (folder / "model.safetensors").write_bytes(b"12345679")
    check_same_model(saved, folder, with_contents=False)
    del saved["weight_contents"]
    check_same_model(saved, folder, with_contents=True)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES + 1, NUM_BLOCKS * BLOCK_BYTES])
def test_a_small_file_is_hashed_as_a_whole(size: int, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    path.write_bytes(content)
    assert hash_blocks(path) == hash_file(path)


def test_blocks_of_a_large_file_lie_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    path, size = tmp_path / "weights", 10 * NUM_BLOCKS * BLOCK_BYTES + 77
    path.touch()
    os.truncate(path, size)
    before, seen = hash_blocks(path), []
    for place in range(0, size, BLOCK_BYTES // 2):
        write_byte(path, place, b"1")
        seen.append(hash_blocks(path) != before)
        write_byte(path, place, b"\0")
    write_byte(path, size - 1, b"1")
    assert hash_blocks(path) != before
    assert seen[0]
    assert NUM_BLOCKS <= sum(seen) <= 3 * NUM_BLOCKS
    found = [i for i, value in enumerate(seen) if value]
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert max(gaps) < 2 * 10 + 2  # in half blocks


def write_byte(path: Path, place: int, byte: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(byte)
