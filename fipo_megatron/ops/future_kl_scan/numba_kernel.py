"""The scan as a loop, compiled for the CPU when it is first called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from fipo_megatron.types import SegmentTable


def scan_segments(values: np.ndarray, gamma: float, cu_seqlens: np.ndarray, result: np.ndarray) -> None:
    """Writes F of every token; sums are float64.

    A multiplication and an addition of one token have to wait for those of the token right of it. So that the processor
    has more to do meanwhile, four tokens are summed by themselves, and only gamma^4 * F is waited for.
    """
    gamma_2 = gamma * gamma
    gamma_3 = gamma_2 * gamma
    gamma_4 = gamma_2 * gamma_2
    for segment in range(len(cu_seqlens) - 1):
        start = cu_seqlens[segment]
        t = cu_seqlens[segment + 1] - 1
        future = 0.0
        while t - start >= 3:
            sum_1 = np.float64(values[t])
            sum_2 = values[t - 1] + gamma * sum_1
            sum_3 = values[t - 2] + gamma * sum_2
            sum_4 = values[t - 3] + gamma * sum_3
            result[t] = sum_1 + gamma * future
            result[t - 1] = sum_2 + gamma_2 * future
            result[t - 2] = sum_3 + gamma_3 * future
            future = sum_4 + gamma_4 * future
            result[t - 3] = future
            t -= 4
        while t >= start:
            future = values[t] + gamma * future
            result[t] = future
            t -= 1


@cache
def compile_scan() -> Callable[[np.ndarray, float, np.ndarray, np.ndarray], None]:
    """`scan_segments` as machine code, from numba's cache on disk where this user can write one."""
    from numba import njit

    try:
        return njit(cache=True, nogil=True, fastmath={"contract"})(scan_segments)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return njit(nogil=True, fastmath={"contract"})(scan_segments)


def scan_numba(values: torch.Tensor, gamma: float, segments: SegmentTable) -> torch.Tensor:
    """F of every token of `values` [N], float32 or float64, on the CPU and in one thread.

    Equal to `scan_reference` up to the rounding of the result. The first call of a process loads numba, and the first
    of a machine compiles. Raises ValueError for a tensor that is not on the CPU.
    """
    if values.device.type != "cpu":
        raise ValueError(f"values are on {values.device}: impl='numba' is for the CPU, pass impl='triton'")
    values = values.detach().contiguous()
    result = torch.empty_like(values)
    cu_seqlens = segments.cu_seqlens.cpu().to(torch.int64).contiguous()
    compile_scan()(values.numpy(), gamma, cu_seqlens.numpy(), result.numpy())
    return result
