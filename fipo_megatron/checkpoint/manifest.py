"""What a checkpoint's folder holds: every file with its size and hash, so that damage is found before anything is read.

Files of a checkpoint may be pickles. None is opened that a manifest does not cover.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

MANIFEST = "manifest.json"
FORMAT = 1
READ_BYTES = 4 << 20
OWN_HASH = "manifest_xxh3"  # of the manifest's text, with NO_HASH in the hash's place
NO_HASH = "0" * 32
NO_HASHES: Mapping[str, str] = MappingProxyType({})


class DamagedError(ValueError):
    """A folder that does not hold what its manifest says."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a folder."""

    name: str  # POSIX path relative to the folder
    size: int  # bytes
    xxh3: str  # XXH3-128 of the content, 32 hexadecimal digits


class ContentHash:
    """XXH3-128 of what is passed to `update`, piece by piece."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, piece: Any) -> None:
        """Go on with `piece`, anything with a buffer of bytes."""
        self._state.update(piece)

    def hexdigest(self) -> str:
        """The hash so far, 32 hexadecimal digits."""
        return self._state.hexdigest()


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's content, read piece by piece."""
    content, buffer = ContentHash(), bytearray(READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            content.update(view[:count])
    return content.hexdigest()


def write_manifest(folder: Path, kind: str, details: Mapping[str, Any], hashes: Mapping[str, str] = NO_HASHES) -> None:
    """Describe every file below `folder` in its manifest, and bring files, manifest and folders to the disk.

    `details` are further keys of the manifest. Files of which `hashes` (by name) has the XXH3-128 are not read again.

    Raises:
        ValueError: `details` has a key of the manifest's own, or something below the folder is not a plain file.
    """
    taken = {OWN_HASH, "format", "kind", "files"} & details.keys()
    if taken:
        raise ValueError(f"manifest: details hold {min(taken)!r}, which is a key of the manifest itself")
    names = sorted(name for name in _names(folder) if name != MANIFEST)
    for name in names:
        sync_to_disk(folder / name)
    files = [
        FileRecord(name, (folder / name).stat().st_size, hashes.get(name) or hash_file(folder / name)) for name in names
    ]
    manifest = {OWN_HASH: NO_HASH, "format": FORMAT, "kind": kind, "files": [asdict(file) for file in files], **details}
    text = json.dumps(manifest, indent=1)
    with naming(folder / MANIFEST):
        (folder / MANIFEST).write_text(text.replace(NO_HASH, _hash_text(text), 1))
    sync_to_disk(folder / MANIFEST)
    for parent in sorted({(folder / name).parent for name in names} | {folder}):
        sync_to_disk(parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; whether the folder holds what it says is for `check_folder`.

    Raises:
        DamagedError: there is none, or it can't be read, was changed, or is of another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError:
        raise DamagedError(f"{folder} has no {MANIFEST}: it is no checkpoint of this project, or not whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} can't be read ({error}); use another checkpoint") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DamagedError(f"{path}: format = {found!r}, must be {FORMAT}; it is of another version of this project")
    try:
        files = [FileRecord(**file) for file in manifest["files"]]
        ok = all(isinstance(f.name, str) and isinstance(f.size, int) and isinstance(f.xxh3, str) for f in files)
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path}: its list of files can't be read ({error!r}); use another checkpoint") from error
    if not ok or not isinstance(manifest.get("kind"), str):
        raise DamagedError(f"{path}: its kind or its list of files can't be read; use another checkpoint")
    own = manifest.get(OWN_HASH)
    if not isinstance(own, str) or len(own) != len(NO_HASH) or _hash_text(text.replace(own, NO_HASH, 1)) != own:
        raise DamagedError(
            f"{path}: its own hash is not {own!r}; it was changed, use another checkpoint or copy it again"
        )
    return manifest


def check_folder(folder: Path, contents: bool = True, jobs: int = 2) -> dict[str, Any]:
    """The manifest of a folder that holds exactly what it says: names and sizes, and with `contents` every byte.

    `jobs` files are read at a time.

    Raises:
        DamagedError: names the first file that is missing, extra, no plain file, of another size or of other content.
    """
    manifest = read_manifest(folder)
    files = {file["name"]: FileRecord(**file) for file in manifest["files"]}
    present = set(_names(folder)) - {MANIFEST}
    for name in sorted(files.keys() | present):
        if name not in present:
            raise DamagedError(f"{folder}: {name} is missing; use another checkpoint, or copy it again")
        if name not in files:
            raise DamagedError(f"{folder}: {name} is not in its manifest; remove it, or use another checkpoint")
        size = (folder / name).stat().st_size
        if size != files[name].size:
            raise DamagedError(
                f"{folder}: {name} has {size} bytes instead of {files[name].size}; use another checkpoint, or copy it "
                "again"
            )
    if contents:
        with ThreadPoolExecutor(jobs) as pool:  # hashing and reading leave Python's lock alone
            for name, found in zip(files, pool.map(lambda name: hash_file(folder / name), files), strict=True):
                if found != files[name].xxh3:
                    raise DamagedError(
                        f"{folder}: {name} has hash {found} instead of {files[name].xxh3}; use another checkpoint, or "
                        "copy it again"
                    )
    return manifest


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file that is written, as that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_to_disk(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_text(text: str) -> str:
    content = ContentHash()
    content.update(text.encode())
    return content.hexdigest()


def _names(folder: Path) -> Iterator[str]:
    """Every file below the folder. A link is refused: what it leads to is not the checkpoint's, and may change."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DamagedError(f"{folder}: {name} is not a plain file; remove it, or use another checkpoint")
        if path.is_file():
            yield name
