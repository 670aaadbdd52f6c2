"""Hugging Face weights into a Megatron-Core distributed checkpoint, streamed: never a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fipo_megatron.checkpoint.conversion import (
    CARRIED,
    MemoryBudget,
    Progress,
    TensorHash,
    check_records,
    copy_carried,
    ignore_progress,
    run_tasks,
    written_whole,
)
from fipo_megatron.checkpoint.distcp import MetadataWriter
from fipo_megatron.checkpoint.manifest import ContentHash, write_manifest
from fipo_megatron.checkpoint.megatron_format import (
    CheckpointLayout,
    Chunk,
    cut_chunks,
    extra_states,
    owner_rank,
    owner_stage,
    written_tensors,
)
from fipo_megatron.checkpoint.tensor_files import (
    DTYPE_NAMES,
    HashedFile,
    OpenFiles,
    TensorRecord,
    bytes_of,
    read_records,
)
from fipo_megatron.model.hf_config import ModelShape, read_model_shape
from fipo_megatron.model.weight_map.entry import WeightMapEntry, padded_vocab_size
from fipo_megatron.model.weight_map.families import make_entries

FILES_PER_RANK = 2  # as Megatron's writer; each is written by one thread


def hf_to_megatron(
    model: Path, out: Path, layout: CheckpointLayout, jobs: int, progress: Progress = ignore_progress
) -> None:
    """Write the weights of a Hugging Face folder as the checkpoint that the ranks of `layout` would save.

    `jobs` files are written at a time; they are the same for any number. Memory: twice the largest tensor.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape; a file is damaged; the layout does not fit;
            `out` exists. There is no `out` then.
    """
    shape = read_model_shape(model)
    layout.check(shape)
    records = read_records(model)
    check_records(model, shape, records)
    tasks = _file_tasks(shape, layout, records)
    memory = MemoryBudget(2 * max(record.num_bytes for record in records.values()))
    with written_whole(out, model) as partial, OpenFiles() as files:
        for record in records.values():
            files.open(record.file)
        write = _CheckpointTask(partial, shape, layout, records, files, memory, progress)
        with ThreadPoolExecutor(jobs) as pool:
            results = run_tasks(pool, write.run, tasks)
        collected, tensors, hashes = MetadataWriter(), [], {}
        for metadata, task_tensors, task_hashes in results:
            collected.merge(metadata)
            tensors += task_tensors
            hashes.update(task_hashes)
        collected.finish(partial)
        copy_carried(model, partial / CARRIED)
        details = {"source": model.name, "layout": asdict(layout), "tensors": [asdict(t) for t in tensors]}
        write_manifest(partial, "weights", details, hashes)


@dataclass(frozen=True)
class _Task:
    """Files `__RANK_NUMBER.distcp` of a stage's ranks, and what is in them."""

    stage: int
    number: int
    entries: tuple[WeightMapEntry, ...]


def _file_tasks(shape: ModelShape, layout: CheckpointLayout, records: dict[str, TensorRecord]) -> list[_Task]:
    """The entries of each stage, shared out to equal bytes."""
    shares: list[list[list[WeightMapEntry]]] = [[[] for _ in range(FILES_PER_RANK)] for _ in range(layout.pipeline)]
    loads = [[0] * FILES_PER_RANK for _ in range(layout.pipeline)]
    for entry in make_entries(shape):
        stage = owner_stage(entry, shape, layout)
        number = loads[stage].index(min(loads[stage]))
        loads[stage][number] += sum(records[name].num_bytes for name in entry.hf_names)
        shares[stage][number].append(entry)
    return [
        _Task(stage, number, tuple(share))
        for stage, of_stage in enumerate(shares)
        for number, share in enumerate(of_stage)
    ]


@dataclass
class _CheckpointTask:
    folder: Path
    shape: ModelShape
    layout: CheckpointLayout
    records: dict[str, TensorRecord]
    files: OpenFiles
    memory: MemoryBudget
    progress: Progress

    def run(self, task: _Task) -> tuple[MetadataWriter, list[TensorHash], dict[str, str]]:
        """What was written, the tensors that were read, and the hashes of the files."""
        with ExitStack() as stack:
            return self._write_files(task, stack)

    def _write_files(self, task: _Task, stack: ExitStack) -> tuple[MetadataWriter, list[TensorHash], dict[str, str]]:
        metadata, tensors, outputs = MetadataWriter(), [], {}

        def output(shard: int, entry: WeightMapEntry) -> HashedFile:
            rank = owner_rank(entry, shard, task.stage, self.shape, self.layout)
            if rank not in outputs:
                outputs[rank] = stack.enter_context(HashedFile(self.folder / f"__{rank}_{task.number}.distcp"))
            return outputs[rank]

        for entry in task.entries:
            tensors += self._write_entry(entry, output, metadata)
        if task.number == 0 and outputs:
            file = outputs[min(outputs)]
            for key, layer in extra_states(self.shape):
                if self.layout.stage_of(layer, self.shape.num_layers) == task.stage:
                    metadata.add_empty_object(key, file)
        return metadata, tensors, {file.path.name: file.hexdigest() for file in outputs.values()}

    def _write_entry(
        self, entry: WeightMapEntry, output: Callable[[int, WeightMapEntry], HashedFile], metadata: MetadataWriter
    ) -> list[TensorHash]:
        records = [self.records[name] for name in entry.hf_names]
        size = self.layout.tensor if entry.expert is None else self.layout.expert_tensor
        targets = written_tensors(entry, self.shape, padded_vocab_size(self.shape.vocab_size, size))
        hashes = [ContentHash() for _ in records]
        whole = None
        for chunk in cut_chunks(entry, self.shape, size):
            needed = torch.Size(chunk.sizes).numel() * records[0].dtype.itemsize
            with self.memory.held(needed + (records[0].num_bytes if entry.rule == "row" else 0)):
                if entry.rule == "row":
                    whole = self._read_chunk(records, chunk, hashes) if whole is None else whole
                    first = chunk.offsets[1]
                    part = (
                        whole
                        if size == 1
                        else whole[:, first : first + chunk.sizes[1]].clone(memory_format=torch.contiguous_format)
                    )
                else:
                    part = self._read_chunk(records, chunk, hashes)
                for target in targets:
                    metadata.add_tensor(target, chunk.offsets, part, output(chunk.shard, entry))
                self.progress(needed)
        return [
            TensorHash(name, record.shape, DTYPE_NAMES[record.dtype], content.hexdigest())
            for name, record, content in zip(entry.hf_names, records, hashes, strict=True)
        ]

    def _read_chunk(self, records: list[TensorRecord], chunk: Chunk, hashes: list[ContentHash]) -> torch.Tensor:
        """A chunk's rows, of all columns."""
        out = torch.empty((chunk.sizes[0], *records[0].shape[1:]), dtype=records[0].dtype)
        filled = sum(rows.count for rows in chunk.rows)
        out[filled:] = 0  # padding of the vocabulary, which comes last
        for rows in chunk.rows:
            record = records[rows.tensor]
            view = bytes_of(out[rows.offset : rows.offset + rows.count])
            self.files.read(record.file, record.offset + rows.start * record.row_bytes, view)
            hashes[rows.tensor].update(view)
        return out
