"""Hugging Face weights out of a Megatron-Core distributed checkpoint, streamed: never a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from fipo_megatron.checkpoint.contents import POLICY, find_difference
from fipo_megatron.checkpoint.conversion import (
    CARRIED,
    Progress,
    TensorHash,
    check_records,
    copy_carried,
    ignore_progress,
    run_tasks,
    written_whole,
)
from fipo_megatron.checkpoint.distcp import METADATA, CheckpointFiles
from fipo_megatron.checkpoint.hf_folder import write_index
from fipo_megatron.checkpoint.manifest import (
    MANIFEST,
    ContentHash,
    DamagedError,
    check_folder,
    hash_file,
    read_manifest,
    sync_to_disk,
    write_manifest,
)
from fipo_megatron.checkpoint.megatron_format import GlobalTensor, find_global_tensors, rows_of_tensor
from fipo_megatron.checkpoint.store import PARTIAL, SET_ASIDE, STEP_NAME, CheckpointStore, read_checkpoint
from fipo_megatron.checkpoint.tensor_files import (
    DTYPE_NAMES,
    HashedFile,
    OpenFiles,
    bytes_of,
    read_records,
    write_header,
)
from fipo_megatron.model.hf_config import ModelShape, read_model_shape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, hf_tensor_shape
from fipo_megatron.model.weight_map.families import make_entries

HF_FILE_BYTES = 1 << 30
PIECE_BYTES = 4 << 20  # of a tensor, that are read, hashed and written at a time


@dataclass(frozen=True)
class MegatronSource:
    """A checkpoint that may be opened, and what is known of it."""

    folder: Path  # of Megatron's files
    whole: Path  # that its manifest covers: this folder, or the one above it
    hf_folder: Path  # config and tokenizer
    hashes: dict[str, str]  # of the tensors, by Hugging Face name; empty where no manifest has them
    notes: tuple[str, ...] = ()  # for people: which checkpoint of several it is, and why no newer one


def find_megatron_source(model: Path, hf_folder: Path | None, allow_foreign: bool) -> MegatronSource:
    """The checkpoint in a folder: converted weights, a run's checkpoint or its `policy`, the newest whole one of a
    folder of a run's checkpoints, or with `allow_foreign` one of another program. `hf_folder` has its config.json and
    tokenizer; None: what was carried along, or the folder that the run took its model from, if that still holds it.

    Raises:
        ValueError: no manifest covers it, it is damaged, unfinished or of another kind, or the model's folder is
            missing or another one's.
    """
    checkpoint = _find_checkpoint(model)
    if checkpoint is not None:
        return _read_trained(checkpoint, model, hf_folder)
    if (model / MANIFEST).exists():
        return _read_weights(model, hf_folder)
    if CheckpointStore(model, 1, 0).steps():
        found = CheckpointStore(model, 1, 0).newest()
        assert found is not None
        notes = (*found.refused, f"{found.folder}: the newest whole checkpoint")
        return _trained(found.folder, POLICY, found.manifest, hf_folder, notes)
    if not (model / METADATA).is_file():
        raise ValueError(
            f"{model} has neither {MANIFEST} nor {METADATA}: it holds no Megatron checkpoint of type torch_dist; name "
            "the folder of one"
        )
    if not allow_foreign:
        raise ValueError(
            f"{model} has no {MANIFEST}, so another program wrote it, and its files are pickles; if you trust them, "
            "add --allow-foreign"
        )
    return MegatronSource(model, model, _carried(model, hf_folder), {})


def _find_checkpoint(model: Path) -> Path | None:
    """The folder of a run's checkpoint which `model` is, or lies in; None if it is none.

    Raises:
        ValueError: one that is not finished.
    """
    for folder in (model, model.parent if model.name else model.resolve().parent):
        name = folder.resolve().name
        step = STEP_NAME.match(name)
        if step is not None and name.startswith(PARTIAL, step.end()):
            raise ValueError(
                f"{folder}: this checkpoint was not written to its end, or is being removed; name one without {PARTIAL}"
            )
        is_put_aside = step is not None and name.startswith(SET_ASIDE, step.end())
        if is_put_aside or (step is not None and step.end() == len(name) and (folder / POLICY).is_dir()):
            return folder
        if (folder / MANIFEST).exists():
            return None if folder == model and read_manifest(folder)["kind"] == "weights" else folder
    return None


def _read_trained(checkpoint: Path, model: Path, hf_folder: Path | None) -> MegatronSource:
    kind = read_manifest(checkpoint)["kind"]
    if kind != "checkpoint":
        hint = "it is a Hugging Face folder already" if kind == "huggingface" else "is it of a newer version?"
        raise ValueError(f"{checkpoint}: its manifest is of kind {kind!r}, which holds no Megatron checkpoint; {hint}")
    part = POLICY if checkpoint == model else model.resolve().name
    return _trained(checkpoint, part, read_checkpoint(checkpoint), hf_folder, ())


def _trained(
    checkpoint: Path, part: str, manifest: dict[str, Any], hf_folder: Path | None, notes: tuple[str, ...]
) -> MegatronSource:
    """The policy of a run's checkpoint, every byte of which was compared with its manifest."""
    if f"{part}/{METADATA}" not in {file["name"] for file in manifest["files"]}:
        raise DamagedError(f"{checkpoint / part} has no checkpoint in the manifest; name {checkpoint}")
    found = _check_model(checkpoint, manifest.get("model", {}), hf_folder)
    return MegatronSource(checkpoint / part, checkpoint, found, {}, notes)


def _read_weights(model: Path, hf_folder: Path | None) -> MegatronSource:
    """Converted weights. Each tensor is compared with its hash when it is read."""
    manifest = check_folder(model, contents=False)
    known = {file["name"]: file["xxh3"] for file in manifest["files"]}
    for name in (METADATA, *(name for name in known if name.startswith(f"{CARRIED}/"))):
        if hash_file(model / name) != known.get(name):
            raise DamagedError(f"{model}: {name} is not what its manifest says; copy the checkpoint again")
    hashes = {tensor["name"]: tensor["xxh3"] for tensor in manifest["tensors"]}
    return MegatronSource(model, model, _carried(model, hf_folder), hashes)


def _carried(model: Path, hf_folder: Path | None) -> Path:
    carried = hf_folder or model / CARRIED
    if not (carried / "config.json").is_file():
        raise ValueError(f"{carried} has no config.json; name the model's Hugging Face folder with --hf-folder")
    return carried


def _check_model(checkpoint: Path, trained: dict[str, Any], hf_folder: Path | None) -> Path:
    """The folder with config and tokenizer of the model that a run has trained; refused if it is another one's. One
    without weights will do: they are not read."""
    found = hf_folder or Path(trained.get("path", CARRIED))
    remedy = "name the model's folder with --hf-folder" if hf_folder is None else "give --hf-folder the model's own"
    if not (found / "config.json").is_file():
        raise ValueError(f"{checkpoint}: its run took its model from {found}, which has no config.json; {remedy}")
    if not trained:
        return found
    if not any(found.glob("*.safetensors")):
        trained = {**trained, "weights": {}}
    part = find_difference(trained, found)
    if part is not None:
        raise ValueError(f"{checkpoint}: {part} of {found} is not that of the model that was trained; {remedy}")
    return found


@dataclass
class _MegatronTensors:
    """The tensors of a checkpoint under their Hugging Face names, in the order of the forward pass."""

    source: MegatronSource
    shape: ModelShape
    files: OpenFiles

    def __post_init__(self) -> None:
        self.checkpoint = CheckpointFiles(self.source.folder, self.files)
        keys = self.checkpoint.keys()
        self.places: dict[str, tuple[WeightMapEntry, int, GlobalTensor]] = {}
        used = set()
        for entry in make_entries(self.shape):
            places = find_global_tensors(entry, self.shape, self.shape.vocab_size)
            present = [place for place in places if place.key in keys]
            if not present:
                raise ValueError(f"{self.source.folder} lacks {places[0].key}, of which {entry.hf_names[0]!r} is made")
            used |= {place.key for place in present}
            self._check_shape(entry, present[0])
            for i, name in enumerate(entry.hf_names):
                self.places[name] = (entry, i, present[0])
        extra = sorted(key for key in keys - used if not key.startswith("optimizer."))
        if extra:
            raise ValueError(
                f"{self.source.folder} has {extra[0]!r}, which no {self.shape.architecture} of config.json has "
                "and which would be lost; is this the config.json of the model?"
            )

    def _check_shape(self, entry: WeightMapEntry, place: GlobalTensor) -> None:
        found = self.checkpoint.describe(place.key)[1]
        rows = len(place.prefix)
        fits = found == place.shape
        if entry.rule == "vocab" and len(found) == len(place.shape):  # may be padded
            fits = found[rows] >= place.shape[rows] and found[rows + 1 :] == place.shape[rows + 1 :]
        if not fits:
            raise ValueError(
                f"{self.source.folder}: {place.key} has shape {list(found)}, config.json makes it {list(place.shape)}; "
                "is this the config.json of the model?"
            )

    def record(self, name: str) -> tuple[str, torch.dtype, tuple[int, ...]]:
        """Name, dtype and shape."""
        dtype = self.checkpoint.describe(self.places[name][2].key)[0]
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{self.source.folder}: {self.places[name][2].key} is of {dtype}; save it in bfloat16")
        return name, dtype, hf_tensor_shape(name, self.shape)

    def num_bytes(self, name: str) -> int:
        """Of one tensor."""
        _, dtype, shape = self.record(name)
        return torch.Size(shape).numel() * dtype.itemsize

    def read(self, name: str, buffer: torch.Tensor, content: ContentHash) -> Iterator[memoryview]:
        """A tensor's bytes in pieces that go through `buffer` (uint8), each gone with the next, and into `content`.

        Raises:
            DamagedError: at the end, where the manifest has another hash.
        """
        entry, i, place = self.places[name]
        _, dtype, shape = self.record(name)
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        most = max(1, len(buffer) // row_bytes)
        for start, count in rows_of_tensor(entry, i, self.shape):
            for first in range(start, start + count, most):
                rows = min(most, start + count - first)
                out = buffer[: rows * row_bytes].view(dtype).view(rows, *shape[1:])
                self.checkpoint.read_rows(place, first, out)
                content.update(bytes_of(out))
                yield bytes_of(out)
        found, expected = content.hexdigest(), self.source.hashes.get(name)
        if self.source.hashes and found != expected:
            raise DamagedError(
                f"{self.source.folder}: {name!r} has hash {found}, its manifest says {expected}; copy the checkpoint "
                "again"
            )

    def piece_bytes(self, share: int) -> int:
        """Of a buffer for `read`: a `share`-th of the largest tensor, up to `PIECE_BYTES`, but every tensor's rows."""
        largest = max(map(self.num_bytes, self.places))
        longest = max(self.num_bytes(name) // hf_tensor_shape(name, self.shape)[0] for name in self.places)
        return max(min(PIECE_BYTES, largest // share), longest)


def count_weight_bytes(source: MegatronSource) -> int:
    """Of the tensors that `megatron_to_hf` writes; those of an optimizer are none of them."""
    with OpenFiles() as files:
        tensors = _MegatronTensors(source, read_model_shape(source.hf_folder), files)
        return sum(tensors.num_bytes(name) for name in tensors.places)


def megatron_to_hf(source: MegatronSource, out: Path, jobs: int, progress: Progress = ignore_progress) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder, with config and tokenizer.

    Files hold up to `HF_FILE_BYTES`; `jobs` are written at a time, each through a buffer of up to `PIECE_BYTES` and
    blocks of `distcp.COPY_BYTES`, together no more than twice the largest tensor.

    Raises:
        ValueError: a tensor is missing, unknown, damaged or of another shape; `out` exists. There is no `out` then.
    """
    shape = read_model_shape(source.hf_folder)
    with written_whole(out, source.whole) as partial, OpenFiles() as files:
        tensors = _MegatronTensors(source, shape, files)
        sizes = {name: tensors.num_bytes(name) for name in tensors.places}
        piece_bytes = tensors.piece_bytes(share=jobs)
        shares = _split_files(sizes)
        names = [f"model-{i + 1:05d}-of-{len(shares):05d}.safetensors" for i in range(len(shares))]
        names = names if len(names) > 1 else ["model.safetensors"]

        def write(share: tuple[str, list[str]]) -> tuple[str, list[TensorHash]]:
            # One for all tensors: new memory would cost more than what is read into it.
            found, buffer = [], torch.empty(piece_bytes, dtype=torch.uint8)
            with HashedFile(partial / share[0]) as file:
                write_header(file, [tensors.record(name) for name in share[1]])
                for name in share[1]:
                    content = ContentHash()
                    for piece in tensors.read(name, buffer, content):
                        file.write(piece)
                        progress(len(piece))
                    _, dtype, of_shape = tensors.record(name)
                    found.append(TensorHash(name, of_shape, DTYPE_NAMES[dtype], content.hexdigest()))
            sync_to_disk(file.path)  # while others are written; the manifest then finds it done
            return file.hexdigest(), found

        with ThreadPoolExecutor(jobs) as pool:
            results = run_tasks(pool, write, list(zip(names, shares, strict=True)))
        if len(names) > 1:
            file_of = {name: file for file, share in zip(names, shares, strict=True) for name in share}
            write_index(partial, file_of, sum(sizes.values()))
        copy_carried(source.hf_folder, partial)
        details = {"source": source.folder.name, "tensors": [asdict(t) for _, found in results for t in found]}
        hashes = {name: content for name, (content, _) in zip(names, results, strict=True)}
        write_manifest(partial, "huggingface", details, hashes)


def _split_files(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, in files of up to `HF_FILE_BYTES` or one tensor."""
    shares: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shares[-1] and filled + size > HF_FILE_BYTES:
            shares.append([])
            filled = 0
        shares[-1].append(name)
        filled += size
    return shares


def compare(source: MegatronSource, hf_folder: Path, jobs: int, progress: Progress = ignore_progress) -> int:
    """Compare every tensor of a checkpoint and of a Hugging Face folder, both read anew; their number.

    Raises:
        ValueError: names the first tensor that differs, is missing or is too many.
    """
    shape = read_model_shape(hf_folder)
    records = read_records(hf_folder)
    check_records(hf_folder, shape, records)
    with OpenFiles() as files:
        tensors = _MegatronTensors(source, shape, files)
        for record in records.values():
            files.open(record.file)

        size, pairs = tensors.piece_bytes(share=2 * jobs), SimpleQueue[torch.Tensor]()
        for _ in range(jobs):
            pairs.put(torch.empty((2, size), dtype=torch.uint8))

        def same(name: str) -> bool:
            pair = pairs.get()
            try:
                return is_same(name, *pair)
            finally:
                pairs.put(pair)

        def is_same(name: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
            record, done = records[name], 0
            equal = tensors.record(name)[1] == record.dtype
            for piece in tensors.read(name, found, ContentHash()):
                if equal:
                    files.read(record.file, record.offset + done, bytes_of(expected[: len(piece)]))
                    equal = torch.equal(found[: len(piece)], expected[: len(piece)])
                done += len(piece)
                progress(len(piece))
            return equal

        with ThreadPoolExecutor(jobs) as pool:
            for name, equal in zip(records, pool.map(same, records), strict=True):
                if not equal:
                    raise ValueError(f"{name!r} differs between {source.folder} and {hf_folder}")
    return len(records)
