"""A weight sync between real processes, beside the bare transport and beside the way of gathering and broadcasting.

Two trainer ranks with tensor parallelism 2, and engines of one worker or of two. Random weights, of which every process
holds only its own part. A sync is timed from when the last process is asked to begin to when the last one is done.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fipo_megatron.benchmarks.operation import Workload
from fipo_megatron.benchmarks.report import Row, Rows, Target, time_ratio
from fipo_megatron.benchmarks.sync_ends import End, Ends, World, make_end
from fipo_megatron.benchmarks.timing import summarize
from fipo_megatron.parallel.groups import listening_socket

NAME = "weight_sync"
AXES = ("vocab", "hidden", "layers")
DEFAULT_SHAPE = (151936, 896, 24)  # Qwen2.5-0.5B
ADDRESS = "127.0.0.1"
TRANSPORTS = ("shared_memory", "collective")
ENGINES = (1, 2)  # tensor-parallel sizes
NUM_SOURCES = 2
MEMORY_SYNCS = 100
BUCKET_BYTES = 256 << 20  # of a process: the default of sync.bucket_mib
REPLY_S = 600
GROUP_VARIABLES = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

Note = Callable[[str], None]


def variants() -> list[str]:
    """Names: how the weights travel, and to how many workers."""
    ways = [f"{transport}: {way}" for transport in TRANSPORTS for way in ("bare", "ours", "ours+verify")]
    return [f"{way}, tp2-tp{size}" for size in ENGINES for way in (*ways, "naive: gather, cat, broadcast")]


def targets() -> list[Target]:
    """Of every transport and engine."""
    found = []
    for size in ENGINES:
        naive = f"naive: gather, cat, broadcast, tp2-tp{size}"
        for transport in TRANSPORTS:
            bare, ours, verified = (f"{transport}: {way}, tp2-tp{size}" for way in ("bare", "ours", "ours+verify"))
            place = f"{transport}, tp2-tp{size}"
            found += [
                Target(f"{place}: >= 0.85 of the bare transport's rate", 0.85, time_ratio(bare, ours), at_least=True),
                Target(f"{place}: naive >= 4 x ours", 4, time_ratio(naive, ours), at_least=True),
                Target(f"{place}: verification <= 0.3 of a verified sync", 0.3, _share_beyond(verified, ours)),
            ]
    found.append(Target(f"growth of any process over {MEMORY_SYNCS} syncs, MiB", 1, _growth))
    return found


def run(workload: Workload, num_samples: int, with_memory: bool, note: Note) -> list[Row]:
    """A row a variant. Each is checked first: every worker must hold the trainer's weights.

    Raises:
        RuntimeError: a process failed, or a worker did not get the weights.
    """
    with tempfile.TemporaryDirectory(prefix="fipo-sync-") as folder:
        processes = SyncProcesses(World(workload.shape, workload.dtype, folder, BUCKET_BYTES))
        try:
            times: dict[str, list[float]] = {}
            for name in variants():
                took = processes.sync(name, check=True)
                note(f"{name}: {took:.3g} ms at first")
                times[name] = []
            for number in range(num_samples):
                for name in list(times) if number % 2 == 0 else reversed(list(times)):
                    times[name].append(processes.sync(name))
                note(f"{number + 1} of {num_samples} rounds")
            growth = processes.measure_growth() if with_memory else {}
        finally:
            processes.close()
    rows = []
    for name, found in times.items():
        timing = asdict(summarize(found))
        del timing["num_samples"]
        row = Row(NAME, name, workload.shape, str(workload.dtype).removeprefix("torch."), "cpu", **timing)
        roof = times.get(_roof(name))
        ratio = None if roof is None else timing["median_ms"] / summarize(roof).median_ms
        rows.append(Row(**asdict(row) | {"ratio_to_roof": ratio, "peak_bytes": growth.get(name)}))
    return rows


@dataclass(frozen=True)
class Reply:
    """Of one process: when a sync began and ended on the machine's clock, bytes of memory, or what went wrong."""

    start: float = 0.0
    end: float = 0.0
    resident_bytes: int = 0
    error: str | None = None


class SyncProcesses:
    """Trainer ranks and engine workers, each with its ends of every variant."""

    def __init__(self, world: World) -> None:
        context = mp.get_context("spawn")
        num_processes = NUM_SOURCES + max(ENGINES)
        listeners = [listening_socket(ADDRESS) for _ in variants()]
        ports = [listener.getsockname()[1] for listener in listeners]
        self._barrier = context.Barrier(num_processes)  # held: the processes open it by its name
        before = {name: os.environ.get(name) for name in GROUP_VARIABLES}
        os.environ.update(GROUP_VARIABLES)
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        try:
            for number in range(num_processes):
                ours, theirs = context.Pipe()
                held = listeners if number == 0 else []
                process = context.Process(
                    target=_serve, args=(world, number, ports, held, self._barrier, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            for listener in listeners:
                listener.close()

    def sync(self, variant: str, check: bool = False) -> float:
        """Milliseconds of a sync."""
        replies = self._ask(variant, check)
        return 1e3 * (max(reply.end for reply in replies) - min(reply.start for reply in replies))

    def measure_growth(self) -> dict[str, int]:
        """By how much the resident memory of any process grew over MEMORY_SYNCS verified syncs."""
        growth = {}
        for name in variants():
            if "verify" in name and name.endswith(f"tp{ENGINES[0]}"):
                before = self._ask(name, False)
                for _ in range(MEMORY_SYNCS):
                    after = self._ask(name, False)
                pairs = zip(before, after, strict=True)
                growth[name] = max(0, *(b.resident_bytes - a.resident_bytes for a, b in pairs))
        return growth

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, variant: str, check: bool) -> list[Reply]:
        for pipe in self._pipes:
            pipe.send((variant, check))
        replies: dict[int, Reply] = {}
        deadline = time.monotonic() + REPLY_S
        while waiting := [pipe for number, pipe in enumerate(self._pipes) if number not in replies]:
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{variant}: {len(waiting)} processes did not answer within {REPLY_S} s")
            for number, pipe in enumerate(self._pipes):
                if pipe not in ready:
                    continue
                try:
                    replies[number] = pipe.recv()
                except (EOFError, ConnectionError):
                    raise RuntimeError(f"{variant}: process {number} died; is there enough memory?") from None
                if (error := replies[number].error) is not None:
                    raise RuntimeError(f"{variant}: process {number}: {error}")
        return [replies[number] for number in range(len(self._pipes))]


def _serve(world: World, number: int, ports: list[int], listeners: list[Any], barrier: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    ends = Ends(world, number, ADDRESS, ports, listeners)
    made: dict[str, End] = {}
    try:
        while True:
            variant, check = pipe.recv()
            try:
                if variant not in made:
                    made[variant] = make_end(ends, variant, variants().index(variant))
                if check:
                    made[variant].clear()
                barrier.wait(REPLY_S)
                start = time.perf_counter()
                made[variant].sync()
                end = time.perf_counter()
                if check:
                    made[variant].check()
                pipe.send(Reply(start, end, _resident_bytes()))
            except Exception:
                pipe.send(Reply(error=traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _roof(variant: str) -> str:
    """The bare transport of the same kind."""
    way, _, layout = variant.rpartition(", ")
    return f"{way.split(':')[0]}: bare, {layout}"


def _share_beyond(over: str, under: str) -> Callable[[Rows], tuple[float, float] | None]:
    """What `over` takes more than `under`, of what it takes."""

    def figures(rows: Rows) -> tuple[float, float] | None:
        ratio = time_ratio(under, over)(rows)
        return None if ratio is None else (1 - ratio[0], 1 - ratio[1])

    return figures


def _growth(rows: Mapping[str, Row]) -> tuple[float, float] | None:
    grown = [row.peak_bytes / 2**20 for row in rows.values() if row.peak_bytes is not None]
    return (max(grown), max(grown)) if grown else None
