"""The files of torch's distributed checkpoints, as Megatron-Core writes them: `.metadata` and `*.distcp`.

They are pickles. Nothing here calls what a pickle names: the classes of the metadata are listed, and of a tensor's
pickle sizes and dtype are taken, the bytes are read from where they are.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fipo_megatron.checkpoint.manifest import DamagedError
from fipo_megatron.checkpoint.megatron_format import GlobalTensor
from fipo_megatron.checkpoint.tensor_files import DTYPES, HashedFile, OpenFiles, TensorRecord, bytes_of

METADATA, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
FORMAT["common_backend_version"] = 1
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch.load, over what it is called with
COPY_BYTES = 1 << 20  # of a chunk's rows, read at a time where only some of their columns are wanted

_ChunksByPrefix = dict[tuple[int, ...], list[tuple[ChunkStorageMetadata, _StorageInfo]]]
_CHECKPOINT = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
# By these names alone: what else the module holds, it imports, and a dotted name would reach that.
_MEGATRON_NAMES = ("MCoreMetadata", "MCoreSavePlan")
ALLOWED = {
    *((f"{_CHECKPOINT}.metadata", kind.__name__) for kind in (BytesStorageMetadata, ChunkStorageMetadata, Metadata)),
    *((f"{_CHECKPOINT}.metadata", kind.__name__) for kind in (MetadataIndex, StorageMeta, TensorProperties)),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (f"{_CHECKPOINT}.planner", "BytesIOWriteData"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in (*DTYPES.values(), torch.uint8, torch.int64)),
    *(("torch", name) for name in ("int32", "int16", "int8", "bool", "float8_e4m3fn", "float8_e5m2")),
}


class _Placeholder:
    """Stands for Megatron's additions to the metadata, which nothing here reads."""

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == _MEGATRON and name in _MEGATRON_NAMES:
            return _Placeholder
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's metadata has")
        return super().find_class(module, name)


class _TensorUnpickler(pickle.Unpickler):
    """Of a pickled tensor its storage's dtype and record, offset, sizes and strides."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no plain tensor has")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class CheckpointFiles:
    """The tensors of a distributed checkpoint, read box by box. Threads may read at the same time."""

    def __init__(self, folder: Path, files: OpenFiles) -> None:
        """Reads the metadata of `folder`.

        Raises:
            ValueError: it can't be read or names something that is no part of one, or a file is missing.
        """
        self.folder, self._files = folder, files
        self._metadata = _read_metadata(folder)
        self._chunks: dict[str, list[tuple[ChunkStorageMetadata, _StorageInfo]]] = {}
        self._by_prefix: dict[tuple[str, int], _ChunksByPrefix] = {}
        self._located: dict[tuple[str, int], TensorRecord] = {}  # by file and place in it
        for index, info in self._metadata.storage_data.items():
            if isinstance(self._metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
                path = folder / info.relative_path
                if Path(info.relative_path).name != info.relative_path or not path.is_file():
                    raise DamagedError(f"{path} is missing, which {METADATA} names; copy the checkpoint again")
                files.open(path)
                sizes = {chunk.offsets: chunk for chunk in self._metadata.state_dict_metadata[index.fqn].chunks}
                self._chunks.setdefault(index.fqn, []).append((sizes[index.offset], info))

    def keys(self) -> set[str]:
        """Of all tensors; those of an optimizer included."""
        return set(self._chunks)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and global shape of a tensor."""
        found = self._metadata.state_dict_metadata[key]
        return found.properties.dtype, tuple(found.size)

    def read_rows(self, tensor: GlobalTensor, start: int, out: torch.Tensor) -> None:
        """Fill `out` `[n, ...]`, contiguous, with rows `start` to `start + n` of a parameter.

        Raises:
            ValueError: the chunks don't cover them, or one can't be read.
        """
        lead, missing = len(tensor.prefix), out.numel()
        columns = out.shape[1] if out.dim() > 1 else 1
        for chunk, info in self._chunks_of(tensor):
            place = tuple(chunk.offsets[:lead])
            (first, *left), (count, *wide) = chunk.offsets[lead:], chunk.sizes[lead:]
            begin, end = max(start, first), min(start + len(out), first + count)
            if begin >= end:
                continue
            record = self._locate(tensor.key, chunk, info)
            skipped = 0  # parameters before this one in a chunk of several
            for p, o, s in zip(tensor.prefix, place, chunk.sizes[:lead], strict=True):
                skipped = skipped * s + p - o
            width = wide[0] if wide else 1
            row = record.dtype.itemsize * width
            offset = record.offset + (skipped * count + begin - first) * row
            part = out[begin - start : end - start]
            missing -= (end - begin) * width
            if width == columns:
                self._files.read(record.file, offset, bytes_of(part))
                continue
            step = max(1, COPY_BYTES // row)
            # By numpy: a copy of this size by torch's threads takes several times as long on busy cores.
            whole, column = part.view(torch.uint8).numpy(), left[0] * record.dtype.itemsize
            for i in range(0, end - begin, step):
                block = np.empty((min(step, end - begin - i), row), np.uint8)
                self._files.read(record.file, offset + i * row, memoryview(block).cast("B"))  # type: ignore[arg-type]
                whole[i : i + step, column : column + row] = block
        if missing:
            raise DamagedError(
                f"{self.folder}: {tensor.key} lacks {missing} elements of {tensor.prefix}; save the checkpoint again"
            )

    def _chunks_of(self, tensor: GlobalTensor) -> list[tuple[ChunkStorageMetadata, _StorageInfo]]:
        """Those that hold a part of a parameter; found once of all parameters under a key, which may be many."""
        lead = len(tensor.prefix)
        if (tensor.key, lead) not in self._by_prefix:
            found: _ChunksByPrefix = defaultdict(list)
            for chunk, info in self._chunks[tensor.key]:
                leading = zip(chunk.offsets[:lead], chunk.sizes[:lead], strict=True)
                for prefix in itertools.product(*(range(o, o + s) for o, s in leading)):
                    found[prefix].append((chunk, info))
            self._by_prefix[tensor.key, lead] = found
        return self._by_prefix[tensor.key, lead].get(tuple(tensor.prefix), [])

    def _locate(self, key: str, chunk: ChunkStorageMetadata, info: _StorageInfo) -> TensorRecord:
        """Where a chunk's elements are in its file: a torch.save archive, whose records are stored as they are."""
        place = (info.relative_path, info.offset)
        if place not in self._located:
            self._located[place] = self._read_place(key, chunk, info)
        return self._located[place]

    def _read_place(self, key: str, chunk: ChunkStorageMetadata, info: _StorageInfo) -> TensorRecord:
        path = self.folder / info.relative_path
        try:
            with _FileSlice(path, info.offset, info.length) as view, zipfile.ZipFile(view) as archive:
                by_name = {item.filename.split("/", 1)[1]: item for item in archive.infolist()}
                pickled = archive.read(by_name["data.pkl"])
                (_, kind, name, *_), start, sizes, strides, *_ = _TensorUnpickler(io.BytesIO(pickled)).load()
                data = by_name[f"data/{name}"]
                header = view.read_at(data.header_offset, 30)
            offset = data.header_offset + 30 + int.from_bytes(header[26:28], "little")
            offset += int.from_bytes(header[28:30], "little")
            dtype, size = self.describe(key)[0], torch.Size(chunk.sizes)
            plain = torch.empty(size, dtype=dtype, device="meta")
            expected = (torch.storage._dtype_to_storage_type_map()[dtype], 0, tuple(size), plain.stride(), plain.nbytes)
            found = (kind, start, tuple(sizes), tuple(strides), data.file_size)
            if expected != found or data.compress_type != zipfile.ZIP_STORED or offset + plain.nbytes > info.length:
                raise ValueError(f"it holds {found} instead of {expected}")
        except Exception as error:  # whatever a damaged archive makes zipfile and pickle raise
            raise DamagedError(f"{path}: {key} at {tuple(chunk.offsets)} can't be read: {error}") from error
        return TensorRecord(path, info.offset + offset, dtype, tuple(size))


class _FileSlice(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = path.open("rb"), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        found = self.read_at(self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(found)
        return found

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of the part on."""
        self._file.seek(self._start + offset)
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()
        super().close()


def check_pickles(folder: Path) -> None:
    """Return if the pickles of a checkpoint that torch would run, `.metadata` and common.pt, name nothing but what such
    files hold. Nothing that they name is called.

    Raises:
        DamagedError: one names something else, or can't be read.
    """
    _read_metadata(folder)
    if (folder / COMMON).exists():
        try:
            torch.load(folder / COMMON, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle makes it raise
            raise DamagedError(
                f"{folder / COMMON} can't be read: {pickle_failure(error)}; use another checkpoint"
            ) from error


@contextmanager
def weights_only() -> Iterator[None]:
    """Let torch load nothing but tensors and plain values meanwhile, also where its callers ask for more: it reads the
    objects among a checkpoint's tensors as any pickle. For one thread of the process."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before


def pickle_failure(error: BaseException) -> str:
    """What torch says of a pickle that it refused, without its advice to read it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])


def _read_metadata(folder: Path) -> Any:
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("it is no metadata of a torch distributed checkpoint")
        return metadata
    except FileNotFoundError:
        raise DamagedError(
            f"{folder} has no {METADATA}: it is no Megatron-Core checkpoint of type torch_dist"
        ) from None
    except Exception as error:  # whatever a damaged pickle makes it raise
        raise DamagedError(f"{path} can't be read: {error}; copy the checkpoint again") from error


class MetadataWriter:
    """Collects what is written into `.distcp` files; for one thread. `merge` joins those of several."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}

    def add_tensor(self, tensor: GlobalTensor, offsets: tuple[int, ...], part: torch.Tensor, file: HashedFile) -> None:
        """Append to `file` the part of a parameter at `offsets`."""
        lead = (1,) * len(tensor.prefix)
        whole = part.reshape(*lead, *part.shape)
        size = torch.Size(tensor.shape)
        entry = self.tensors.setdefault(tensor.key, TensorStorageMetadata(TensorProperties(dtype=part.dtype), size, []))
        assert isinstance(entry, TensorStorageMetadata)
        place = torch.Size((*tensor.prefix, *offsets))
        entry.chunks.append(ChunkStorageMetadata(place, torch.Size(whole.shape)))
        self._append(MetadataIndex(tensor.key, place), whole, file)

    def add_empty_object(self, key: str, file: HashedFile) -> None:
        """Append to `file` an extra state without content."""
        self.tensors[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [None], file)

    def _append(self, index: MetadataIndex, value: Any, file: HashedFile) -> None:
        start = file.size
        try:
            torch.save(value, file)  # type: ignore[arg-type]  # it wants no more than write and flush
        except RuntimeError as error:
            raise file.failure or error from error
        self.places[index] = _StorageInfo(file.path.name, start, file.size - start)

    def merge(self, other: MetadataWriter) -> None:
        """Add what another one has collected, of tensors of the same dtypes."""
        for key, entry in other.tensors.items():
            own = self.tensors.setdefault(key, entry)
            if isinstance(own, TensorStorageMetadata) and isinstance(entry, TensorStorageMetadata) and own is not entry:
                own.chunks.extend(entry.chunks)
        self.places.update(other.places)

    def finish(self, folder: Path) -> None:
        """Write the metadata beside the `.distcp` files, and Megatron's own two files."""
        metadata = Metadata(self.tensors, None, self.places, StorageMeta(), "1.0.0")
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
        (folder / CONFIG).write_text(json.dumps(FORMAT))
        torch.save({}, folder / COMMON)
