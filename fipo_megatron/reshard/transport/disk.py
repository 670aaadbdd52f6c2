"""Weights through files: a whole Hugging Face folder, or only what has changed since the last sync.

Whole: trainer rank 0 writes `weights-VERSION/`, which any engine can load, with a manifest of checksums; a worker reads
its boxes alone. Changes: each trainer rank writes `changes-VERSION-RANK.safetensors`. Every file has another name until
it is whole and on the disk, and a version's files go when the next one is written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fipo_megatron.reshard.boxes import Box
from fipo_megatron.reshard.checksum import checksum
from fipo_megatron.reshard.execute import StaleWeightsError, WeightMismatchError, check_updates, check_views
from fipo_megatron.reshard.plan import ReshardPlan, Transfer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NO_BASE = -1  # version on which a file that holds everything builds
_RETRY_S = 0.02

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def folder_of(folder: Path, version: int) -> Path:
    """Of a whole version."""
    return folder / f"weights-{version}"


def changes_of(folder: Path, version: int, source: int) -> Path:
    """The file of a trainer rank."""
    return folder / f"changes-{version}-{source}.safetensors"


class FolderSender:
    """Writes whole versions. `gather` yields whole tensors on rank 0, by a collective; `write` writes a Hugging Face
    folder of them to a path, whole or not at all.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        source: int,
        folder: Path,
        gather: Callable[[], NamedTensors],
        write: Callable[[NamedTensors, Path], None],
        verify: bool,
    ) -> None:
        self._source, self._folder, self._gather, self._write, self._verify = source, folder, gather, write, verify
        self.sent_bytes = 0
        self._last: Path | None = None
        self._boxes: dict[str, set[Box]] = {}
        for destination in range(plan.engine.num_workers if source == 0 else 0):
            for name, box in plan.stored(destination).items():
                self._boxes.setdefault(name, set()).add(box)

    def send(self, version: int, num_updates: int) -> None:
        """Write `version`. Every trainer rank takes part."""
        if self._source > 0:
            for _ in self._gather():
                pass
            return
        checksums: dict[str, list[list[int]]] = {}
        target = folder_of(self._folder, version)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(self._noting(self._gather(), checksums), target)
        manifest = {"version": version, "num_updates": num_updates, "checksums": checksums}
        _write_whole(target / MANIFEST, lambda path: path.write_text(json.dumps(manifest)))
        if self._last not in (None, target):
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = target

    def close(self) -> None:
        """Nothing is held."""

    def _noting(
        self, tensors: NamedTensors, checksums: dict[str, list[list[int]]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if self._verify:
                checksums[name] = [[*box, checksum(box.of(tensor))] for box in sorted(self._boxes.get(name, ()))]
            self.sent_bytes += tensor.nbytes
            yield name, tensor


class FolderReceiver:
    """Reads the boxes of an engine worker out of whole versions, into its live `views`."""

    def __init__(
        self,
        plan: ReshardPlan,
        destination: int,
        views: Mapping[str, torch.Tensor],
        folder: Path,
        open_folder: Callable[[Path], Callable[[str], Any]],
        timeout_s: float,
        verify: bool,
    ) -> None:
        check_views(plan, destination, views)
        self._stored, self._destination, self._folder = plan.stored(destination), destination, folder
        self._views = {name: tensor.detach() for name, tensor in views.items()}
        self._open, self._timeout_s, self._verify = open_folder, timeout_s, verify
        self._wanted: dict[str, int] = {}

    def receive(self, version: int) -> None:
        """Fill the views from `version`.

        Raises:
            ConnectionError: it was not there within `timeout_s`.
            StaleWeightsError: what is there is another version.
        """
        target = folder_of(self._folder, version)
        _await(target / MANIFEST, "trainer rank 0", self._timeout_s)
        manifest = json.loads((target / MANIFEST).read_text())
        if manifest["version"] != version:
            raise StaleWeightsError(f"{target} holds version {manifest['version']}")
        get_slice = self._open(target)
        for name, box in self._stored.items():
            rows = slice(box.row, box.row + box.rows)
            whole = get_slice(name)
            columns = slice(box.column, box.column + box.columns)
            part = whole[rows] if len(whole.get_shape()) == 1 else whole[rows, columns]
            self._views[name].copy_(part.view(self._views[name].shape))
        by_box = {name: {tuple(row[:4]): row[4] for row in rows} for name, rows in manifest["checksums"].items()}
        self._wanted = {name: by_box[name][box] for name, box in self._stored.items()} if self._verify else {}

    def verify(self) -> None:
        """Compare what the views hold now with what the trainer gathered.

        Raises:
            WeightMismatchError: naming the tensors.
        """
        wrong = [name for name, wanted in self._wanted.items() if checksum(self._views[name]) != wanted]
        if wrong:
            raise WeightMismatchError(
                f"engine worker {self._destination} does not store what trainer rank 0 wrote: {', '.join(wrong[:5])}"
            )

    def close(self) -> None:
        """Nothing is held."""


class ChangesSender:
    """Writes what changed in a trainer rank's part of the weights; a box of which too much changed is written whole.

    The copies of what was last sent are on the host: the memory of the part once more.
    """

    def __init__(
        self, plan: ReshardPlan, source: int, parameters: Mapping[str, torch.Tensor], folder: Path, verify: bool
    ) -> None:
        self._source, self._folder, self._verify = source, folder, verify
        self._boxes: dict[str, torch.Tensor] = {}
        for transfers in plan.sends(source).values():
            for t in transfers:
                self._boxes[box_key(t)] = t.source_box.of(parameters[t.parameter].detach())
        self._sent: dict[str, torch.Tensor] = {}
        self._checksums: dict[str, int] = {}  # of what was last sent
        self._base = NO_BASE
        self._was_said = False
        self.sent_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"changes-*-{source}.safetensors*"):  # of a run that was killed
            path.unlink()

    def send(self, version: int, num_updates: int) -> None:
        """Write this rank's file of `version`."""
        tensors: dict[str, torch.Tensor] = {}
        checksums: dict[str, list[int]] = {}
        num_whole = 0
        for key, live in self._boxes.items():
            new = live.cpu().contiguous()
            old = self._sent.get(key)
            changed = None if old is None else (as_bits(new) != as_bits(old)).flatten().nonzero().flatten()
            if self._verify:
                before = self._checksums.get(key, 0)
                self._checksums[key] = checksum(live)  # where the worker's are: not of the copy on the host
                checksums[key] = [before, self._checksums[key]]
            if changed is None or changed.numel() * (4 + new.element_size()) >= new.nbytes:
                tensors[f"{key}/whole"] = new
                num_whole += 1
            elif changed.numel():
                tensors[f"{key}/index"] = smallest_integers(changed)
                tensors[f"{key}/value"] = new.flatten()[changed]
            if old is None:
                self._sent[key] = new.clone()
            else:
                old.copy_(new)
        if num_whole and self._base != NO_BASE and not self._was_said:
            self._was_said = True
            logger.warning(
                "trainer rank %d: %d of %d boxes changed so much that they are written whole: sync.transport=disk may "
                "be the better choice",
                self._source,
                num_whole,
                len(self._boxes),
            )
        header = {
            "version": str(version),
            "base_version": str(self._base),
            "num_updates": str(num_updates),
            "checksums": json.dumps(checksums),
        }
        self.sent_bytes += sum(tensor.nbytes for tensor in tensors.values())
        target = changes_of(self._folder, version, self._source)
        _write_whole(target, lambda path: save_file(tensors, path, metadata=header))
        self._base = version
        for path in self._folder.glob(f"changes-*-{self._source}.safetensors"):
            if path != target:
                path.unlink()

    def close(self) -> None:
        """Nothing is held."""


class ChangesReceiver:
    """Applies the trainer ranks' changes to the live `views` of an engine worker."""

    def __init__(
        self,
        plan: ReshardPlan,
        destination: int,
        views: Mapping[str, torch.Tensor],
        folder: Path,
        timeout_s: float,
        verify: bool,
    ) -> None:
        check_views(plan, destination, views)
        self._folder, self._destination, self._timeout_s, self._verify = folder, destination, timeout_s, verify
        self._streams = plan.receives(destination)
        live = {name: tensor.detach() for name, tensor in views.items()}
        self._views = {
            (source, box_key(t)): t.destination_box.of(live[t.hf_name])
            for source, transfers in self._streams.items()
            for t in transfers
        }
        self._wanted: dict[tuple[int, str], int] = {}
        self.version = NO_BASE

    def receive(self, version: int) -> None:
        """Apply the changes that make `version`; first all files are opened and judged, then the views change.

        Raises:
            ConnectionError: a rank's file was not there within `timeout_s`.
            StaleWeightsError: a file builds on another version than the worker holds, e.g. one that was applied
                already, or a rank made fewer updates than the others. The views are as they were.
            WeightMismatchError: what the worker holds is not what a file builds on.
        """
        files = {source: self._open(source, version) for source in self._streams}
        check_updates({source: int(header["num_updates"]) for source, (_, header) in files.items()}, version)
        self._wanted = {}
        for source, (_, header) in files.items():
            self._judge(source, header, version)
        for source, (file, header) in files.items():
            names = set(file.keys())
            checksums = json.loads(header["checksums"])
            for t in self._streams[source]:
                key = box_key(t)
                self._apply(self._views[source, key], t, file, names)
                if self._verify:
                    self._wanted[source, key] = checksums[key][1]
        self.version = version

    def verify(self) -> None:
        """Compare what the views hold now with what the sources hold.

        Raises:
            WeightMismatchError: naming tensor, box, source rank and destination.
        """
        self._compare(self._wanted)

    def close(self) -> None:
        """Nothing is held."""

    def _open(self, source: int, version: int) -> tuple[Any, dict[str, str]]:
        path = changes_of(self._folder, version, source)
        _await(path, f"trainer rank {source}", self._timeout_s)
        file = safe_open(path, framework="pt")
        return file, file.metadata()

    def _judge(self, source: int, header: dict[str, str], version: int) -> None:
        found, base = int(header["version"]), int(header["base_version"])
        if found != version or base not in (NO_BASE, self.version):
            raise StaleWeightsError(
                f"engine worker {self._destination} holds version {self.version} and was to receive {version}; trainer "
                f"rank {source} wrote version {found} as changes of {base}"
            )
        if self._verify and base != NO_BASE:
            checksums = json.loads(header["checksums"])
            self._compare({(source, box_key(t)): checksums[box_key(t)][0] for t in self._streams[source]})

    def _apply(self, view: torch.Tensor, transfer: Transfer, file: Any, names: set[str]) -> None:
        key = box_key(transfer)
        if f"{key}/whole" in names:
            view.copy_(file.get_tensor(f"{key}/whole"))
        elif f"{key}/index" in names:
            index = file.get_tensor(f"{key}/index").to(torch.int64)
            row, column = index // transfer.hf_box.columns, index % transfer.hf_box.columns
            view[row.to(view.device), column.to(view.device)] = file.get_tensor(f"{key}/value").to(view.device)

    def _compare(self, wanted: Mapping[tuple[int, str], int]) -> None:
        wrong = [place for place, value in wanted.items() if checksum(self._views[place]) != value]
        if wrong:
            named = "; ".join(f"{key} from trainer rank {source}" for source, key in wrong[:5])
            raise WeightMismatchError(f"engine worker {self._destination} does not store what was written: {named}")


def box_key(transfer: Transfer) -> str:
    """A box of a Hugging Face tensor as text: name, first row, rows, first column, columns."""
    return f"{transfer.hf_name}[{','.join(map(str, transfer.hf_box))}]"


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: 0 and -0 are different, NaN is itself."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def smallest_integers(index: torch.Tensor) -> torch.Tensor:
    """Ascending indices as int32 where they fit, else as int64."""
    return index.to(torch.int32 if int(index[-1]) < 1 << 31 else torch.int64)


def _write_whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, bring it to the disk, then rename it."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        write(partial)
        for path, flags in ((partial, os.O_RDONLY), (target.parent, os.O_RDONLY | os.O_DIRECTORY)):
            descriptor = os.open(path, flags)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if path == partial:
                os.rename(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _await(path: Path, writer: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConnectionError(f"{writer} did not write {path.name} within {timeout_s:g} s")
        time.sleep(_RETRY_S)
