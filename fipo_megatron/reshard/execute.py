"""Both ends of a sync: live parameters into buckets, buckets into live parameters, and proof that they are the same.

Everything that depends on the plan is made once: views of the pieces, their places in the buckets, the lists of a
round. A sync makes no tensor. After its data each stream from source to destination has a trailer of int64: version,
number of the source's updates, a code of the dtype, and a checksum of each transfer, taken of the live parameters.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from fipo_megatron.reshard.boxes import Box
from fipo_megatron.reshard.checksum import BoxChecksum, make_checksums
from fipo_megatron.reshard.plan import ReshardPlan, Transfer
from fipo_megatron.reshard.rounds import TRAILER, Round, RoundPiece, cut_rounds
from fipo_megatron.reshard.transport.base import NUM_SLOTS, Transport

HEADER = 3  # numbers of a trailer before its checksums
NAMED_MISMATCHES = 5
MAX_THREADS = 4  # of a worker's checksums: memory gives no more


class StaleWeightsError(RuntimeError):
    """Weights of another version than the one that was asked for, or of a rank that missed an update."""


class WeightMismatchError(ValueError):
    """What an engine worker stores is not what the trainer's ranks hold."""


Check = tuple[BoxChecksum, int]  # a checksum, and the row before which it can read now


@dataclass
class _Step:
    """One round of all peers, as one end carries it out."""

    sizes: dict[int, int] = field(default_factory=dict)  # packed bytes, by peer
    direct: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    targets: list[torch.Tensor] = field(default_factory=list)  # of copies, from origins of the same number
    origins: list[torch.Tensor] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    trailers: list[int] = field(default_factory=list)  # peers whose trailer begins here


class _End:
    """What both ends have in common. `views[i]` of a stream is the view of its transfer i."""

    def __init__(self, streams: Mapping[int, Sequence[Transfer]], transport: Transport, verify: bool) -> None:
        self.transport, self.with_checksums = transport, verify
        self.streams = {peer: list(transfers) for peer, transfers in sorted(streams.items())}
        self.steps: list[_Step] = []
        self.trailers: dict[int, torch.Tensor] = {}
        self.trailer_bytes = 0  # of one sync

    def close(self) -> None:
        """Give the transport up; more than once does no harm."""
        self.transport.close()

    def _prepare(self, views: Mapping[int, Sequence[torch.Tensor]], sends: bool) -> None:
        """Make the trailers and the steps."""
        transport, rounds = self.transport, {}
        for peer, transfers in self.streams.items():
            first = views[peer][0]
            length = HEADER + (len(transfers) if self.with_checksums else 0)
            self.trailers[peer] = torch.zeros(length, dtype=torch.int64, device=first.device)
            self.trailer_bytes += 8 * length
            rounds[peer] = cut_rounds(
                transfers, first.element_size(), 8 * length, transport.bucket_bytes, transport.min_direct_bytes
            )
        for number in range(max(map(len, rounds.values()), default=0)):
            step = _Step()
            for peer, of_peer in rounds.items():
                if number < len(of_peer):
                    bucket = transport.buffers(peer)[number % NUM_SLOTS]
                    self._add(step, peer, of_peer[number], views[peer], bucket, sends)
            self.steps.append(step)

    def _add(
        self,
        step: _Step,
        peer: int,
        pieces: Round,
        views: Sequence[torch.Tensor],
        bucket: torch.Tensor,
        sends: bool,
    ) -> None:
        step.sizes[peer] = sum(piece.num_bytes for piece in pieces if not piece.is_direct)
        for piece in pieces:
            packed = bucket[piece.offset : piece.offset + piece.num_bytes]
            if piece.transfer == TRAILER:
                if piece.row == 0:
                    step.trailers.append(peer)
                live = self.trailers[peer].view(torch.uint8)[piece.row : piece.row + piece.rows]
                self._add_copy(step, live[:, None], packed[:, None], sends)
                continue
            live = views[piece.transfer][piece.row : piece.row + piece.rows]
            step.checks += self._checks(peer, piece)
            if piece.is_direct:
                stays = live.is_contiguous()
                message = live.reshape(-1).view(torch.uint8) if stays else packed
                step.direct.setdefault(peer, []).append(message)
                if stays:
                    continue
            self._add_copy(step, live, packed.view(live.dtype).view(live.shape), sends)

    def _add_copy(self, step: _Step, live: torch.Tensor, packed: torch.Tensor, sends: bool) -> None:
        step.targets.append(packed if sends else live)
        step.origins.append(live if sends else packed)

    def _checks(self, peer: int, piece: RoundPiece) -> list[Check]:
        """The check of a piece on its way; a receiver has none, it checks at the end."""
        return []


class WeightSender(_End):
    """What trainer rank `source` sends, of its live `parameters` (Megatron's names, all of one dtype)."""

    def __init__(
        self,
        plan: ReshardPlan,
        source: int,
        parameters: Mapping[str, torch.Tensor],
        transport: Transport,
        verify: bool,
    ) -> None:
        super().__init__(plan.sends(source), transport, verify)
        self.source = source
        live = {name: tensor.detach() for name, tensor in parameters.items()}
        views = {
            peer: [t.source_box.of(live[t.parameter]) for t in transfers] for peer, transfers in self.streams.items()
        }
        # The same box may go to several destinations: it is read once.
        boxes = {
            (t.parameter, t.source_box): view
            for peer, transfers in self.streams.items()
            for t, view in zip(transfers, views[peer], strict=True)
        }
        self._checksums = dict(zip(boxes, make_checksums(list(boxes.values())), strict=True)) if verify else {}
        self._dtype_code = _dtype_code(boxes.values())
        self._prepare(views, sends=True)

    @torch.no_grad()
    def send(self, version: int, num_updates: int) -> None:
        """Send the parameters as `version`, the weights after this rank's `num_updates` updates.

        Returns when they may change again. Every trainer rank and every engine worker takes part at the same time.

        Raises:
            ConnectionError: an engine worker died or stalled; the transport is closed.
        """
        try:
            for box in self._checksums.values():
                box.restart()
            for number, step in enumerate(self.steps):
                slot = number % NUM_SLOTS
                self.transport.wait(slot)
                for peer in step.trailers:
                    self._write_trailer(peer, version, num_updates)
                if step.targets:
                    torch._foreach_copy_(step.targets, step.origins)
                self.transport.start(slot, step.sizes, step.direct)
                for box, end in step.checks:  # while the round is on its way, and the caches have it
                    box.advance(end)
            for number in range(len(self.steps), len(self.steps) + NUM_SLOTS):
                self.transport.wait(number % NUM_SLOTS)
        except BaseException:
            self.transport.close()
            raise

    def _write_trailer(self, peer: int, version: int, num_updates: int) -> None:
        trailer = self.trailers[peer]
        for place, value in enumerate((version, num_updates, self._dtype_code)):
            trailer[place].fill_(value)
        if self.with_checksums:
            for place, transfer in enumerate(self.streams[peer], HEADER):
                box = self._checksums[transfer.parameter, transfer.source_box]
                box.write_to(trailer[place : place + 1])

    def _checks(self, peer: int, piece: RoundPiece) -> list[Check]:
        if not self.with_checksums:
            return []
        transfer = self.streams[peer][piece.transfer]
        return [(self._checksums[transfer.parameter, transfer.source_box], piece.row + piece.rows)]


class WeightReceiver(_End):
    """What engine worker `destination` receives, into its live `views` (Hugging Face names, shapes of `plan.stored`).

    Raises:
        ValueError: the views are not what the plan fills, to the last element.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        destination: int,
        views: Mapping[str, torch.Tensor],
        transport: Transport,
        verify: bool,
    ) -> None:
        super().__init__(plan.receives(destination), transport, verify)
        self.destination = destination
        check_views(plan, destination, views)
        live = {name: tensor.detach() for name, tensor in views.items()}
        self._views = {
            peer: [t.destination_box.of(live[t.hf_name]) for t in transfers] for peer, transfers in self.streams.items()
        }
        everything = [view for of_peer in self._views.values() for view in of_peer]
        self._checks_of_threads = share_out(everything) if verify else []
        self._threads = ThreadPoolExecutor(max(1, len(self._checks_of_threads)), "weight-checksums")
        self._found = torch.zeros(len(everything) if verify else 0, dtype=torch.int64, device=everything[0].device)
        self._dtype_code = _dtype_code(everything)
        self._is_complete = False
        self._prepare(self._views, sends=False)

    def close(self) -> None:
        super().close()
        self._threads.shutdown(wait=False)

    @torch.no_grad()
    def receive(self, version: int) -> None:
        """Fill the views with the weights of `version`.

        Raises:
            ConnectionError: a trainer rank died or stalled; the transport is closed and the views are torn.
            StaleWeightsError: a rank sent another version, or made fewer updates than the others.
        """
        self._is_complete = False
        try:
            for number, step in enumerate(self.steps[:NUM_SLOTS]):
                self.transport.start(number, step.sizes, step.direct)
            for number, step in enumerate(self.steps):
                slot = number % NUM_SLOTS
                self.transport.wait(slot)
                if step.targets:
                    torch._foreach_copy_(step.targets, step.origins)
                self.transport.release(slot)
                if number + NUM_SLOTS < len(self.steps):
                    coming = self.steps[number + NUM_SLOTS]
                    self.transport.start(slot, coming.sizes, coming.direct)
        except BaseException:
            self.transport.close()
            raise
        self._check_headers(version)
        self._is_complete = True

    @torch.no_grad()
    def verify_checksums(self) -> list[tuple[int, Transfer]]:
        """The transfers, each with its source, whose place in the views does not hold what the source holds."""
        assert self._is_complete, "receive comes first"
        list(self._threads.map(self._compute, self._checks_of_threads))
        wanted = torch.cat([trailer[HEADER:] for trailer in self.trailers.values()])
        wrong = (self._found != wanted).cpu()
        transfers = [(peer, transfer) for peer, of_peer in self.streams.items() for transfer in of_peer]
        return [transfers[place] for place in wrong.nonzero().flatten().tolist()]

    def verify(self) -> None:
        """Compare what the views hold now with what the sources held when they sent.

        Raises:
            WeightMismatchError: naming tensors, boxes, source ranks and this destination.
        """
        if not self.with_checksums:
            return
        wrong = self.verify_checksums()
        if wrong:
            raise WeightMismatchError(describe_mismatches(wrong, self.destination))

    def _compute(self, checks: Sequence[tuple[int, BoxChecksum]]) -> None:
        for place, box in checks:
            box.restart()
            box.write_to(self._found[place : place + 1])

    def _check_headers(self, version: int) -> None:
        headers = {peer: trailer[:HEADER].tolist() for peer, trailer in self.trailers.items()}
        for peer, (found, _, dtype_code) in headers.items():
            if found != version:
                raise StaleWeightsError(
                    f"engine worker {self.destination} was to receive version {version}, "
                    f"trainer rank {peer} sent {found}"
                )
            if dtype_code != self._dtype_code:
                raise WeightMismatchError(
                    f"trainer rank {peer} has another dtype than engine worker {self.destination}"
                )
        check_updates({peer: header[1] for peer, header in headers.items()}, version)


def share_out(views: Sequence[torch.Tensor]) -> list[list[tuple[int, BoxChecksum]]]:
    """Checksums of all views with their places among them, in parts of about as many bytes for one thread each.

    While weights are checked the engine waits, and so do its threads; a GPU has its own.
    """
    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if views[0].device.type == "cpu" else 1
    parts: list[list[int]] = [[] for _ in range(num_threads)]
    num_bytes = [0] * num_threads
    for place, view in sorted(enumerate(views), key=lambda item: -item[1].numel()):
        least = num_bytes.index(min(num_bytes))
        parts[least].append(place)
        num_bytes[least] += view.numel()
    return [list(zip(part, make_checksums([views[place] for place in part]), strict=True)) for part in parts if part]


def check_updates(num_updates: Mapping[int, int], version: int) -> None:
    """StaleWeightsError, which names the ranks, where some ranks made fewer updates than others."""
    newest = max(num_updates.values())
    stale = {rank: count for rank, count in num_updates.items() if count < newest}
    if stale:
        ranks = ", ".join(f"trainer rank {rank} made {count}" for rank, count in sorted(stale.items()))
        raise StaleWeightsError(f"version {version} is the weights after {newest} updates, but {ranks}")


def check_views(plan: ReshardPlan, destination: int, views: Mapping[str, torch.Tensor]) -> None:
    """ValueError unless the views are those that the plan fills: names, shapes, one dtype, every element once."""
    stored = plan.stored(destination)
    if different := stored.keys() ^ views.keys():
        raise ValueError(f"engine worker {destination}: {min(different)} is stored or planned, but not both")
    boxes: dict[str, list[Box]] = defaultdict(list)
    for transfers in plan.receives(destination).values():
        for transfer in transfers:
            boxes[transfer.hf_name].append(transfer.destination_box)
    dtypes = {tensor.dtype for tensor in views.values()}
    if len(dtypes) > 1:
        raise ValueError(f"engine worker {destination} stores several dtypes: {sorted(map(str, dtypes))}")
    for name, box in stored.items():
        rows, *columns = views[name].shape
        if (rows, *columns) != (box.rows, box.columns)[: 1 + len(columns)] or (not columns and box.columns != 1):
            raise ValueError(f"engine worker {destination}: {name} is {list(views[name].shape)}, planned is {box}")
        # As many elements as there are, and none twice: so every one.
        filled = boxes[name]
        is_full = sum(part.num_elements for part in filled) == box.num_elements
        if not is_full or any(a.intersect(b).num_elements for i, a in enumerate(filled) for b in filled[:i]):
            raise ValueError(f"engine worker {destination}: the plan does not fill {name} once and wholly")


def describe_mismatches(wrong: Sequence[tuple[int, Transfer]], destination: int) -> str:
    """The first few, and how many there are."""
    named = [
        f"{t.hf_name} rows {t.hf_box.row}:{t.hf_box.row + t.hf_box.rows} "
        f"columns {t.hf_box.column}:{t.hf_box.column + t.hf_box.columns} from trainer rank {source}"
        for source, t in wrong[:NAMED_MISMATCHES]
    ]
    more = f" and {len(wrong) - len(named)} more" if len(wrong) > len(named) else ""
    return f"engine worker {destination} does not store what was sent: {'; '.join(named)}{more}"


def _dtype_code(tensors: Iterable[torch.Tensor]) -> int:
    """Of the one dtype of all; 0 for none."""
    dtypes = {tensor.dtype for tensor in tensors}
    assert len(dtypes) <= 1, f"weights of several dtypes: {dtypes}"
    return zlib.crc32(str(next(iter(dtypes))).encode()) if dtypes else 0
