"""The scan on a GPU in two kernels, both over equal tiles of the flat tokens whatever the segments are.

The first scans each tile by itself, up to the segment ends in it, and keeps the F of its first token, the head. The
second adds to the tokens of each tile's last segment what lies right of the tile: the sum over the following tiles of
gamma^distance * head, up to the one in which the segment ends. The segment of a token is found by search in the table,
on the GPU: no plan is made on the host, nothing is waited for. Sums are float64, as is gamma: rounded to float32, the
decay of a long segment would be off by the rounding times its length.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fipo_megatron.types import SegmentTable

TILE = 1024
NUM_WARPS = 4
PROBES = tl.constexpr(128)  # entries of the table that are looked at together
HEAD_BITS = 7  # 2^7 heads of tiles are added together
SCALARS = ["num_tokens", "num_segments"]


@triton.jit
def find_segment(cu_seqlens_ptr: tl.tensor, num_segments: tl.tensor, token: tl.tensor) -> tl.tensor:
    """The one segment that holds `token`: the last entry of the table that is not beyond it."""
    first = token * 0
    count = num_segments.to(tl.int64) + 1  # entries among which it is: first, first + 1, ...
    while count > 1:
        step = (count + PROBES - 1) // PROBES
        probes = (tl.arange(0, PROBES) + 1).to(tl.int64) * step
        inside = probes < count
        reached = inside & (tl.load(cu_seqlens_ptr + first + probes, mask=inside, other=0) <= token)
        passed = tl.sum(reached.to(tl.int64), 0) * step
        first += passed
        count = tl.minimum(step, count - passed)
    return first


@triton.jit
def add_behind(
    value: tl.tensor, decay: tl.tensor, left_value: tl.tensor, left_decay: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """F over a run of tokens (value, decay over it) and the run left of it; the scan goes from right to left."""
    return left_value + left_decay * value, left_decay * decay


@triton.jit
def integer_powers(base: tl.tensor, exponents: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """base**exponents for exponents below 2**BITS: 0**0 = 1, and no logarithm of 0."""
    result = tl.full(exponents.shape, 1.0, tl.float64)
    for bit in tl.static_range(BITS):
        result = tl.where((exponents >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit(do_not_specialize=SCALARS)
def scan_tiles_kernel(
    values_ptr: tl.tensor,
    result_ptr: tl.tensor,
    heads_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor,
    gamma_high: tl.tensor,
    gamma_low: tl.tensor,
    num_tokens: tl.tensor,
    num_segments: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """F within each tile, into `result`, and that of the tile's first token into `heads`."""
    gamma = tl.full([], gamma_high, tl.float64) + tl.full([], gamma_low, tl.float64)
    start = tl.program_id(0).to(tl.int64) * TILE
    tokens = start + tl.arange(0, TILE)
    inside = tokens < num_tokens
    values = tl.load(values_ptr + tokens, mask=inside, other=0.0).to(tl.float64)

    # binary search of every token's segment, between those of the tile's ends: no step where they are the same
    first = find_segment(cu_seqlens_ptr, num_segments, start)
    last = find_segment(cu_seqlens_ptr, num_segments, tl.minimum(start + TILE, num_tokens) - 1)
    segments = tl.zeros([TILE], tl.int64) + first
    count = last - first + 1
    while count > 1:
        half = count // 2
        reached = tl.load(cu_seqlens_ptr + segments + half) <= tl.where(inside, tokens, start)
        segments += tl.where(reached, half, 0)
        count -= half
    ends = tl.load(cu_seqlens_ptr + segments + 1)
    decays = tl.where(tokens + 1 == ends, 0.0, gamma)
    result, _ = tl.associative_scan((values, decays), 0, add_behind, reverse=True)
    tl.store(result_ptr + tokens, result.to(result_ptr.dtype.element_ty), mask=inside)
    head = tl.sum(tl.where(tokens == start, result, 0.0), 0)
    tl.store(heads_ptr + tl.program_id(0), head)


@triton.jit(do_not_specialize=SCALARS)
def add_carries_kernel(
    result_ptr: tl.tensor,
    heads_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor,
    gamma_high: tl.tensor,
    gamma_low: tl.tensor,
    num_segments: tl.tensor,
    TILE_BITS: tl.constexpr,
    HEAD_BITS: tl.constexpr,
) -> None:
    """Adds gamma^distance * (F of the next tile's first token) where a segment goes on in the next tile."""
    TILE: tl.constexpr = 1 << TILE_BITS
    HEADS: tl.constexpr = 1 << HEAD_BITS
    gamma = tl.full([], gamma_high, tl.float64) + tl.full([], gamma_low, tl.float64)
    tile = tl.program_id(0).to(tl.int64)
    tile_end = (tile + 1) * TILE
    segment = find_segment(cu_seqlens_ptr, num_segments, tile_end - 1)
    segment_start = tl.load(cu_seqlens_ptr + segment)
    segment_end = tl.load(cu_seqlens_ptr + segment + 1)
    if segment_end > tile_end:
        tile_decay = gamma
        for _ in tl.static_range(TILE_BITS):
            tile_decay = tile_decay * tile_decay
        ahead = tl.arange(0, HEADS)
        weights = integer_powers(tile_decay, ahead, HEAD_BITS)
        heads_decay = tile_decay
        for _ in tl.static_range(HEAD_BITS):
            heads_decay = heads_decay * heads_decay
        carry = tl.zeros([1], tl.float64)
        scale = tl.full([], 1.0, tl.float64)
        next_tile = tile + 1
        # gamma^distance is 0 in the end, unless gamma is 1
        while (next_tile * TILE < segment_end) & (scale > 0.0):
            mask = (next_tile + ahead) * TILE < segment_end
            heads = tl.load(heads_ptr + next_tile + ahead, mask=mask, other=0.0)
            carry += scale * tl.sum(heads * weights, 0)
            scale = scale * heads_decay
            next_tile += HEADS

        offsets = tl.arange(0, TILE)
        tokens = tile * TILE + offsets
        continued = tokens >= segment_start
        result = tl.load(result_ptr + tokens, mask=continued, other=0.0).to(tl.float64)
        # a tile may be cut in the middle: distances are 1 at the last token
        result += carry * integer_powers(gamma, TILE - offsets, TILE_BITS + 1)
        tl.store(result_ptr + tokens, result.to(result_ptr.dtype.element_ty), mask=continued)


def scan_triton(
    values: torch.Tensor, gamma: float, segments: SegmentTable, *, tile: int = TILE, head_bits: int = HEAD_BITS
) -> torch.Tensor:
    """F of every token of `values` [N], float32 or float64, on a GPU, or on the CPU in Triton's interpreter.

    Equal to `scan_reference` up to the rounding of the result. A table on the CPU is copied from pinned memory, one on
    the GPU is read there: the device is not waited for. Takes 8 bytes a tile. `tile`, a power of 2, and `head_bits` are
    for tests. Raises ValueError for values on another device.
    """
    if not (values.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"values are on {values.device}: impl='triton' is for CUDA, pass impl='auto'")
    num_tokens = values.numel()
    values = values.contiguous()
    result = torch.empty_like(values)
    if num_tokens == 0:
        return result
    cu_seqlens = segments.cu_seqlens.to(torch.int64).contiguous()
    if values.is_cuda and not cu_seqlens.is_cuda:
        cu_seqlens = cu_seqlens.pin_memory().to(values.device, non_blocking=True)
    num_tiles = triton.cdiv(num_tokens, tile)
    heads = values.new_empty(num_tiles, dtype=torch.float64)
    gamma_high = float(np.float32(gamma))  # a kernel's float argument is float32
    gamma_low = float(np.float32(gamma - gamma_high))
    num_segments = cu_seqlens.numel() - 1
    with torch.cuda.device_of(values):
        scan_tiles_kernel[(num_tiles,)](
            values,
            result,
            heads,
            cu_seqlens,
            gamma_high,
            gamma_low,
            num_tokens,
            num_segments,
            TILE=tile,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        if num_tiles > 1:
            add_carries_kernel[(num_tiles - 1,)](  # nothing lies right of the last tile
                result,
                heads,
                cu_seqlens,
                gamma_high,
                gamma_low,
                num_segments,
                TILE_BITS=tile.bit_length() - 1,
                HEAD_BITS=head_bits,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return result
