"""Safetensors files read range by range and written front to back, without mapping them into memory.

Pages of a mapped file count as a process's memory for as long as the system likes; what is read here goes into a
buffer of the caller's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.checkpoint.manifest import ContentHash

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20  # as the safetensors library


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of what one index of the first dimension holds."""
        return self.num_bytes // self.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class OpenFiles:
    """Files that are read at any place by several threads, each opened once."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def open(self, path: Path) -> None:
        """Open a file; before threads read from it."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` (bytes) from `offset` on.

        Raises:
            ValueError: the file ends before.
        """
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptors[path], [out[done:]], offset + done)
            if count == 0:
                raise ValueError(f"{path} ends at byte {offset + done}, {len(out) - done} are missing; copy it again")
            done += count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_records(folder: Path) -> dict[str, TensorRecord]:
    """Where every tensor of a Hugging Face folder is; headers alone are read.

    Raises:
        ValueError: no weights, a file of the index is missing, truncated or unreadable, or index and files disagree.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise ValueError(f"{folder} has neither {single.name} nor {index.name}; is the download complete?")
        return _read_header(single)
    try:
        file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} can't be read ({error!r}); copy it again") from error
    records: dict[str, TensorRecord] = {}
    for file in sorted(set(file_of.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, which {index.name} names; is the download complete?")
        for name, record in _read_header(folder / file).items():
            if file_of.get(name) != file:
                raise ValueError(f"{folder / file} holds {name!r}, which {index.name} has not there; copy both again")
            records[name] = record
    missing = sorted(file_of.keys() - records.keys())
    if missing:
        raise ValueError(f"{folder / file_of[missing[0]]} lacks {missing[0]!r}, which {index.name} has there")
    return records


def _read_header(path: Path) -> dict[str, TensorRecord]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header would have {header_bytes} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        records = {}
        end = start
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            if item["dtype"] not in DTYPES:
                raise ValueError(f"{name!r} is of dtype {item['dtype']}, must be one of {', '.join(DTYPES)}")
            record = TensorRecord(path, start + item["data_offsets"][0], DTYPES[item["dtype"]], tuple(item["shape"]))
            if record.offset != end or start + item["data_offsets"][1] != end + record.num_bytes:
                raise ValueError(f"{name!r} is not where its neighbours leave it room")
            end += record.num_bytes
            records[name] = record
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}; copy it again") from error
    if end != size:
        raise ValueError(f"{path} has {size} bytes instead of {end}; copy it again")
    return records


class HashedFile:
    """A new file that is written front to back, with the XXH3-128 of what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.failure: OSError | None = None  # torch.save raises another error in its place
        self._hash = ContentHash()
        self._file = path.open("xb", buffering=0)

    def write(self, piece: Any) -> int:
        """Append anything with a buffer of bytes; a full disk's OSError names the file."""
        view = memoryview(piece).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(self.path))
            raise self.failure from error
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: nothing is held back."""

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        """The hash of what was written."""
        return self._hash.hexdigest()


def write_header(file: HashedFile, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
    """The safetensors header of a file whose tensors' bytes follow in this order."""
    header: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
