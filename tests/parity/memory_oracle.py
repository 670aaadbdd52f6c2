"""What real ranks of a policy take: bytes of tensors by the allocator's own record, and memory by the kernel's.

Neither knows anything of planner/memory.py. Tensors: every block that torch's CPU allocator gives and takes back, as
its profiler records them, temporaries inside an operation included. Resident: anonymous memory of the process (from
/proc, every few milliseconds) beyond what it had after its imports; blocks are mapped and unmapped one by one
(MALLOC_MMAP_THRESHOLD_), so that what is freed is gone. The record itself takes some megabytes of it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fipo_megatron.config.schema import Config, OptimizerConfig
from fipo_megatron.types import PolicyUpdate, TrainingBatch

PHASES = ("load", "first update", "old_logprobs", "train")
LARGE_BYTES = 1 << 16  # of a block that is named in what stands at the peak


@dataclass(frozen=True)
class PhaseMemory:
    """The most that a rank has had in a phase."""

    tensor_bytes: int
    resident_bytes: int  # beyond what it had after its imports
    blocks: tuple[tuple[int, int], ...]  # (bytes, how many) of the large blocks at the tensors' peak, largest sum first
    operations: tuple[str, ...]  # that were at work then, outermost first


def measure(policy: Any, folder: Path, first: TrainingBatch, batch: TrainingBatch) -> dict[str, PhaseMemory]:
    """The phases of a policy's second step, of a model of random weights: the first, on a small batch, leaves moments
    as all later ones find them. A call for `run_policy`."""
    from torch.autograd.profiler import profile

    _import_all()
    marks, resident = [time.time_ns()], _Resident()
    with profile(profile_memory=True, use_kineto=True) as record, resident:
        for call in (
            lambda: policy.load(folder, OptimizerConfig(), random_seed=0),
            lambda: policy.update(first, range(first.num_samples), 1e-5),
            lambda: policy.logprobs(batch),
            lambda: policy.update(batch, range(batch.num_samples), 1e-5),
        ):
            call()
            marks.append(time.time_ns())
    blocks, operations = _read_record(record.kineto_results)
    phases = {}
    for phase, start, end in zip(PHASES, marks, marks[1:], strict=False):
        at, tensor_bytes, large = _peak_between(blocks, start, end)
        names = tuple(name for begun, ended, name in operations if begun <= at < ended)
        phases[phase] = PhaseMemory(tensor_bytes, resident.most_between(start, end), large, names)
    return phases


def measure_on_cuda(policy: Any, folder: Path, first: TrainingBatch, batch: TrainingBatch) -> dict[str, int]:
    """Bytes of tensors at the peak of the last two phases of `measure`, by the allocator of the device. Between phases
    what rests in host memory goes there, as in a run."""
    import torch

    policy.load(folder, OptimizerConfig(), random_seed=0)
    policy.update(first, range(first.num_samples), 1e-5)
    peaks = {}
    for phase, call in (
        ("old_logprobs", lambda: policy.logprobs(batch)),
        ("train", lambda: policy.update(batch, range(batch.num_samples), 1e-5)),
    ):
        if policy.config.trainer.offload:
            policy.offload()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        peaks[phase] = torch.cuda.max_memory_allocated()
        if isinstance(result, PolicyUpdate) and result.cost is not None:  # it measures its own, and begins anew
            peaks[phase] = max(peaks[phase], result.cost.peak_memory_bytes)
    return peaks


def _import_all() -> None:
    """What would else be imported or compiled within what is measured."""
    import torch

    import fipo_megatron.model.build
    import fipo_megatron.model.host_offload
    import fipo_megatron.trainer.step  # noqa: F401
    from fipo_megatron.ops.future_kl_scan import future_kl_scan
    from fipo_megatron.types import SegmentTable

    future_kl_scan(torch.zeros(4), 0.5, SegmentTable(torch.tensor([0, 4])))


class _Resident:
    """Samples the anonymous memory of this process while it is entered."""

    def __init__(self) -> None:
        self._samples: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._baseline = self._read()

    def most_between(self, start: int, end: int) -> int:
        """Bytes above those at the beginning."""
        return max(size for at, size in self._samples if start <= at < end) - self._baseline

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.003):
            self._samples.append((time.time_ns(), self._read()))

    def _read(self) -> int:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
        return (int(resident) - int(shared)) * self._page_bytes


def _read_record(results: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int, str]]]:
    """The times and bytes of blocks taken and given back (negative), and the times and names of operations.

    What gloo's own threads give back is not recorded: such a block is known to be gone when its address is taken again.
    """
    from torch._C._profiler import _EventType

    allocations, operations, left = [], [], list(results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
        elif event.tag == _EventType.TorchOp:
            operations.append((event.start_time_ns, event.end_time_ns, event.name))
    held: dict[int, int] = {}
    blocks = []
    for at, address, size in sorted(allocations):
        if size < 0:
            size = -held.pop(address, 0)
        else:
            size, held[address] = size - held.get(address, 0), size
        blocks.append((at, size))
    return blocks, sorted(operations)


def _peak_between(
    events: Sequence[tuple[int, int]], start: int, end: int
) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """When most bytes live in a span of time, how many, and the large blocks that do then."""
    times, sizes = (np.array(values) for values in zip(*events, strict=True))
    live = np.cumsum(sizes)
    inside = np.flatnonzero((times >= start) & (times < end))
    peak = int(inside[live[inside].argmax()])
    blocks: Counter[int] = Counter()
    for size in sizes[: peak + 1].tolist():
        blocks[abs(size)] += 1 if size > 0 else -1
    large = sorted(((size, n) for size, n in blocks.items() if n and size >= LARGE_BYTES), key=lambda b: -b[0] * b[1])
    return int(times[peak]), int(live[peak]), tuple(large)


def write_shape(folder: Path, architecture: str, **sizes: Any) -> Path:
    """A folder whose config.json alone describes a model."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": [architecture],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1 << 16,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def make_batch(prompt_lens: Sequence[int], response_lens: Sequence[int], vocab_size: int) -> TrainingBatch:
    """Random samples of these lengths, with old log-probs of a policy that knows nothing."""
    rng = np.random.default_rng(0)
    prompts, responses = np.array(prompt_lens), np.array(response_lens)
    lens = prompts + responses
    return TrainingBatch(
        token_ids=rng.integers(0, vocab_size, lens.sum()),
        cu_seqlens=np.concatenate([[0], np.cumsum(lens)]),
        prompt_lens=prompts,
        advantages=rng.normal(size=len(lens)).astype(np.float32),
        old_logprobs=np.full(responses.sum(), -np.log(vocab_size), np.float32),
        loss_mask=np.ones(responses.sum(), bool),
    )


def make_config(
    folder: Path,
    dtype: str,
    microbatch_tokens: int,
    parallel: dict[str, Any],
    platform: str = "cpu",
    **sections: dict[str, Any],
) -> Config:
    """A run of the model in `folder`."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    values: dict[str, Any] = {
        "platform": platform,
        "model": {"path": str(folder), "dtype": dtype},
        "rollout": {"max_prompt_tokens": 256, "max_response_tokens": microbatch_tokens - 256},
        "trainer": {"microbatch_tokens": microbatch_tokens, "max_policy_kl": 1e9},
        "parallel": parallel,
        "timeouts": {"startup_s": 100, "call_s": 290, "collective_s": 280},
    }
    for name, settings in sections.items():
        values[name] = {**values.get(name, {}), **settings}
    return Config.model_validate(values)
