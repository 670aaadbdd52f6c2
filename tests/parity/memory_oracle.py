"""What real ranks of a policy take: bytes of tensors by the allocator's own record, and resident memory by the kernel's.

Neither knows anything of planner/memory.py. Tensors: every block that torch's CPU allocator gives and takes back, as its
profiler records them, temporaries inside an operation included. Resident memory: what the process has beyond what it had
after its imports; small blocks are mapped and unmapped one by one (MALLOC_MMAP_THRESHOLD_), so that what is freed is gone.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fipo_megatron.config.schema import Config, OptimizerConfig
from fipo_megatron.types import TrainingBatch

PHASES = ("load", "first update", "old_logprobs", "train")
LARGE_BYTES = 1 << 16  # of a block that is named in what stands at the peak


@dataclass(frozen=True)
class PhaseMemory:
    """The most that a rank has had in a phase."""

    tensor_bytes: int
    resident_bytes: int  # beyond what it had after its imports
    blocks: tuple[tuple[int, int], ...]  # (bytes, how many) of the large blocks at the tensors' peak, largest sum first
    operations: tuple[str, ...]  # that were at work then, outermost first


def measure(policy: Any, folder: Path, batch: TrainingBatch) -> dict[str, PhaseMemory]:
    """The phases of a policy's second step, of a model of random weights. A call for `run_policy`."""
    from torch.autograd.profiler import profile

    import fipo_megatron.model.build
    import fipo_megatron.model.host_offload
    import fipo_megatron.trainer.step  # noqa: F401  the imports that are no part of what is measured

    samples = range(batch.num_samples)
    baseline = _status_bytes("VmRSS")
    marks, resident = [time.time_ns()], []
    with profile(profile_memory=True, use_kineto=True) as record:
        for call in (
            lambda: policy.load(folder, OptimizerConfig(), random_seed=0),
            lambda: policy.update(batch, samples, 1e-5),
            lambda: policy.logprobs(batch),
            lambda: policy.update(batch, samples, 1e-5),
        ):
            policy.platform.reset_peak_memory()
            call()
            resident.append(_status_bytes("VmHWM") - baseline)
            marks.append(time.time_ns())
    blocks, operations = _read_record(record.kineto_results)
    phases = {}
    for i, phase in enumerate(PHASES):
        at, tensor_bytes, large = _peak_between(blocks, marks[i], marks[i + 1])
        names = tuple(name for start, end, name in operations if start <= at < end)
        phases[phase] = PhaseMemory(tensor_bytes, resident[i], large, names)
    return phases


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


def _status_bytes(name: str) -> int:
    (kib,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) << 10


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
    folder: Path, dtype: str, microbatch_tokens: int, parallel: dict[str, Any], **sections: dict[str, Any]
) -> Config:
    """A run of the model in `folder` on CPU."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    values: dict[str, Any] = {
        "platform": "cpu",
        "model": {"path": str(folder), "dtype": dtype},
        "rollout": {"max_prompt_tokens": 512, "max_response_tokens": microbatch_tokens - 512},
        "trainer": {"microbatch_tokens": microbatch_tokens, "max_policy_kl": 1e9},
        "parallel": parallel,
        "timeouts": {"startup_s": 100, "call_s": 290, "collective_s": 280},
    }
    for name, settings in sections.items():
        values[name] = {**values.get(name, {}), **settings}
    return Config.model_validate(values)
