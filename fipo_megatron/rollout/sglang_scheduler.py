"""SGLang's scheduler as the launcher runs it: on a CPU, too, it heeds a request's seed."""

from __future__ import annotations

from typing import Any

import torch

_MASK = 0xFFFFFFFF


def run_scheduler(*arguments: Any, **options: Any) -> Any:
    """What SGLang's own entry returns, in the process that it starts for it.

    The changes for CPUs can go when a package has the kernels that SGLang 0.5.23 has for them.
    """
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.model_executor.model_runner import ModelRunner

    if not torch.cuda.is_available():
        # The Triton kernels by which a batch has no influence; torch's own on a CPU take each row by itself.
        ModelRunner.maybe_enable_batch_invariant_mode = lambda runner: None
        library = torch.library.Library("sgl_kernel", "FRAGMENT")
        library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
        library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    return run_scheduler_process(*arguments, **options)


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (Appleby; x86, 32 bits) of `(seed, position, column)` as 8 + 4 + 4 bytes: int64 [N, V].

    `seed` and `positions` [N], `columns` [V]. What SGLang draws a row's random numbers from, as it does on a GPU.
    """
    seed, positions, columns = (values.to(torch.int64) for values in (seed, positions, columns))
    hashed = torch.zeros_like(seed)
    for block in (seed & _MASK, (seed >> 32) & _MASK, positions & _MASK):
        hashed = _mix(hashed, block)
    hashed = _mix(hashed[:, None], columns[None] & _MASK) ^ 16  # bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & _MASK
    return hashed


def _mix(hashed: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (_rotate(block * 0xCC9E2D51 & _MASK, 15) * 0x1B873593) & _MASK
    return (_rotate(hashed ^ block, 13) * 5 + 0xE6546B64) & _MASK


def _rotate(values: torch.Tensor, bits: int) -> torch.Tensor:
    return ((values << bits) | (values >> (32 - bits))) & _MASK
