"""A folder is taken only if it holds, file by file and byte by byte, what its manifest says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import xxhash

from fipo_megatron.checkpoint.manifest import MANIFEST, DamagedError, check_folder, read_manifest, write_manifest

CONTENTS = {
    "a.bin": b"abc" * 1000,
    "empty": b"",
    "policy/.metadata": b"\x80\x04",
    "policy/__0_0.distcp": bytes(5_000_000),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        path = tmp_path / "step" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_manifest(tmp_path / "step", "checkpoint", {"step": 12})
    return tmp_path / "step"


def test_a_whole_folder_gives_its_manifest(folder: Path) -> None:
    manifest = check_folder(folder)
    assert manifest == json.loads((folder / MANIFEST).read_text()) == read_manifest(folder)
    assert (manifest["format"], manifest["kind"], manifest["step"]) == (1, "checkpoint", 12)
    expected = [(name, len(content), xxhash.xxh3_128_hexdigest(content)) for name, content in sorted(CONTENTS.items())]
    assert [(file["name"], file["size"], file["xxh3"]) for file in manifest["files"]] == expected


def test_known_hashes_are_taken_and_files_with_one_not_read(folder: Path) -> None:
    write_manifest(folder, "weights", {}, {"a.bin": "0" * 32})
    with pytest.raises(DamagedError, match=r"a\.bin has hash [0-9a-f]{32} instead of 0{32}"):
        check_folder(folder)
    check_folder(folder, contents=False)


@pytest.mark.parametrize("name", CONTENTS)
def test_any_file_that_is_missing_longer_or_shorter_is_named(folder: Path, name: str) -> None:
    path, content = folder / name, CONTENTS[name]
    path.write_bytes(content + b"x")
    with pytest.raises(DamagedError, match=f"{name} has {len(content) + 1} bytes instead of {len(content)}"):
        check_folder(folder, contents=False)
    if content:
        path.write_bytes(content[:-1])
        with pytest.raises(DamagedError, match=f"{name} has {len(content) - 1} bytes"):
            check_folder(folder, contents=False)
    path.unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        check_folder(folder, contents=False)


@pytest.mark.parametrize("name", [name for name, content in CONTENTS.items() if content])
def test_one_flipped_bit_anywhere_is_found(folder: Path, name: str) -> None:
    changed = bytearray(CONTENTS[name])
    changed[random.Random(name).randrange(len(changed))] ^= 1 << 3
    (folder / name).write_bytes(changed)
    check_folder(folder, contents=False)
    with pytest.raises(DamagedError, match=f"{name} has hash"):
        check_folder(folder)


def test_a_file_too_many_is_named(folder: Path) -> None:
    (folder / "policy/__1_0.distcp").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"policy/__1_0\.distcp is not in its manifest"):
        check_folder(folder, contents=False)


def test_a_link_is_refused_even_to_the_right_content(folder: Path) -> None:
    (folder / "a.bin").rename(folder.parent / "elsewhere")
    (folder / "a.bin").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(DamagedError, match=r"a\.bin is not a plain file"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no manifest.json"),
        ('{"format": 1', "can't be read"),
        ("[]", "format = 'list', must be 1"),
        ('{"format": 2, "kind": "checkpoint", "files": []}', "format = 2, must be 1"),
        ('{"format": 1, "kind": "checkpoint"}', "list of files can't be read"),
        ('{"format": 1, "kind": "checkpoint", "files": [{"name": "a"}]}', "list of files can't be read"),
        ('{"format": 1, "kind": "checkpoint", "files": [{"name": 1, "size": 1, "xxh3": ""}]}', "can't be read"),
        ('{"format": 1, "files": []}', "kind or its list of files"),
    ],
)
def test_an_unreadable_manifest_is_refused(folder: Path, text: str | None, message: str) -> None:
    (folder / MANIFEST).unlink()
    if text is not None:
        (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=message):
        check_folder(folder)


def test_details_cannot_overwrite_the_manifests_own_keys(folder: Path) -> None:
    with pytest.raises(ValueError, match="'files'"):
        write_manifest(folder, "weights", {"files": []})
