"""Row kernels on a GPU: one read of the logits forward, one read and one write backward.

A tile is [VECTORS, LANES, WIDTH]: each lane, a thread of the program, holds VECTORS pieces of 16 bytes. Maximum and
sums stay with the lane while a program walks along its row, so that nothing is exchanged between lanes before the end.
Sizes depend on shapes, strides and types alone: the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fipo_megatron.ops.token_logprob.row_kernels import RowStatistics

LANE_COLUMNS = 16  # columns of a tile that one lane holds
PROGRAMS = 4096  # enough to fill a GPU several times over: rows are split between programs until there are so many
MERGED_ROWS = 128
LOWEST = tl.constexpr(-3.4028234663852886e38)  # for -inf, whose difference from itself would be NaN
MAX_COLUMNS = 2**31 - 2**16  # column numbers are int32, also in the tile that reaches beyond the last one
SCALARS = ["row_stride", "out_stride", "first_column", "num_columns", "num_all_columns"]
COUNTS = ["num_rows", "num_splits", "num_tiles", "tiles_per_split"]


@triton.jit
def add_tile(
    logits: tl.tensor,
    peak: tl.tensor,
    sum_exp: tl.tensor,
    sum_shifted: tl.tensor,
    scale: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds a tile of logits to each lane's peak and sums, [LANES].

    Differences are taken before they are scaled: exactly 0 at the peak, so its term is exactly 1 and no log-prob > 0.
    """
    new_peak = tl.maximum(peak, tl.max(tl.max(logits, 2), 0))
    difference = logits - new_peak[None, :, None]
    exponentials = tl.exp2(difference * scale)
    peak_change = tl.maximum(peak - new_peak, LOWEST)
    decay = tl.exp2(peak_change * scale)
    if WITH_ENTROPY:
        # exp(-inf) * -inf would be NaN; a NaN logit still shows, in the exponentials
        terms = exponentials * tl.maximum(difference, LOWEST)
        sum_shifted = (sum_shifted + peak_change * sum_exp) * decay + tl.sum(tl.sum(terms, 2), 0)
    sum_exp = sum_exp * decay + tl.sum(tl.sum(exponentials, 2), 0)
    return new_peak, sum_exp, sum_shifted


@triton.jit(do_not_specialize=SCALARS + COUNTS)
def sum_columns_kernel(
    logits_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    scale: tl.tensor,
    row_stride: tl.tensor,
    num_columns: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    tiles_per_split: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Peak and sums of one split of one row, in units of logits: partial[:, row, split]."""
    TILE: tl.constexpr = VECTORS * LANES * WIDTH
    program = tl.program_id(0)
    row = (program // num_splits).to(tl.int64)
    first_tile = (program % num_splits) * tiles_per_split
    end_tile = first_tile + tiles_per_split
    row_ptr = logits_ptr + tl.multiple_of(row * row_stride, WIDTH)

    vectors = tl.arange(0, VECTORS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    vectors = vectors * WIDTH
    columns = vectors + tl.arange(0, WIDTH)[None, None, :]

    peak = tl.full([LANES], LOWEST, tl.float32)
    sum_exp = tl.zeros([LANES], tl.float32)
    sum_shifted = tl.zeros([LANES], tl.float32)
    num_full_tiles = num_columns // TILE
    for tile in range(first_tile, tl.minimum(end_tile, num_full_tiles)):
        logits = tl.load(row_ptr + (tile * TILE + columns)).to(tl.float32)
        peak, sum_exp, sum_shifted = add_tile(logits, peak, sum_exp, sum_shifted, scale, WITH_ENTROPY)
    if (first_tile <= num_full_tiles) & (num_full_tiles < end_tile) & (num_columns % TILE > 0):
        start = num_full_tiles * TILE
        # whole vectors are read: columns that do not count may stand between the last that do and the row's end
        logits = tl.load(row_ptr + (start + columns), mask=start + vectors < num_columns).to(tl.float32)
        logits = tl.where(start + columns < num_columns, logits, -float("inf"))
        peak, sum_exp, sum_shifted = add_tile(logits, peak, sum_exp, sum_shifted, scale, WITH_ENTROPY)

    row_peak = tl.max(peak, 0)
    peak_change = tl.maximum(peak - row_peak, LOWEST)
    decay = tl.exp2(peak_change * scale)
    part_stride = num_rows.to(tl.int64) * num_splits
    tl.store(partial_ptr + program, row_peak)
    tl.store(partial_ptr + part_stride + program, tl.sum(sum_exp * decay, 0))
    if WITH_ENTROPY:
        row_shifted = tl.sum((sum_shifted + peak_change * sum_exp) * decay, 0)
        tl.store(partial_ptr + 2 * part_stride + program, row_shifted)


@triton.jit(do_not_specialize=SCALARS + COUNTS)
def merge_splits_kernel(
    partial_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    target_ptr: tl.tensor,
    result_ptr: tl.tensor,
    scale: tl.tensor,
    inverse_temperature: tl.tensor,
    row_stride: tl.tensor,
    first_column: tl.tensor,
    num_columns: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """RowStatistics of ROWS rows from the partial results of their splits: result[:, row]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < num_rows
    part_stride = num_rows.to(tl.int64) * num_splits
    peak = tl.full([ROWS], LOWEST, tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    sum_shifted = tl.zeros([ROWS], tl.float32)
    for split in range(num_splits):
        ptr = partial_ptr + rows * num_splits + split
        split_peak = tl.load(ptr, mask=valid, other=LOWEST)
        split_sum = tl.load(ptr + part_stride, mask=valid, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        change = tl.maximum(peak - new_peak, LOWEST)
        split_change = tl.maximum(split_peak - new_peak, LOWEST)
        decay, split_decay = tl.exp2(change * scale), tl.exp2(split_change * scale)
        if WITH_ENTROPY:
            split_shifted = tl.load(ptr + 2 * part_stride, mask=valid, other=0.0)
            sum_shifted = (sum_shifted + change * sum_exp) * decay
            sum_shifted += (split_shifted + split_change * split_sum) * split_decay
        sum_exp = sum_exp * decay + split_sum * split_decay
        peak = new_peak

    target = tl.load(target_ptr + rows, mask=valid, other=-1) - first_column
    is_local = (target >= 0) & (target < num_columns)
    logit = tl.load(logits_ptr + rows * row_stride + target, mask=valid & is_local, other=0.0).to(tl.float32)
    shifted_target = tl.where(is_local, (logit - peak) * inverse_temperature, 0.0)
    # all that counts is -inf: a row that this block adds nothing to
    scaled_peak = tl.where(sum_exp == 0, -float("inf"), peak * inverse_temperature)
    tl.store(result_ptr + rows, scaled_peak, mask=valid)
    tl.store(result_ptr + num_rows + rows, sum_exp, mask=valid)
    tl.store(result_ptr + 2 * num_rows.to(tl.int64) + rows, shifted_target, mask=valid)
    if WITH_ENTROPY:
        scaled_shifted = sum_shifted * inverse_temperature
        tl.store(result_ptr + 3 * num_rows.to(tl.int64) + rows, scaled_shifted, mask=valid)


@triton.jit(do_not_specialize=SCALARS + COUNTS)
def write_gradient_kernel(
    logits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    target_ptr: tl.tensor,
    log_normalizer_ptr: tl.tensor,
    grad_logprob_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    grad_entropy_ptr: tl.tensor,
    inverse_temperature: tl.tensor,
    row_stride: tl.tensor,
    out_stride: tl.tensor,
    first_column: tl.tensor,
    num_columns: tl.tensor,
    num_all_columns: tl.tensor,
    num_tiles: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The gradient of one tile of one row. Each element is read and written by the same thread, so in place is safe."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    start = (program % num_tiles) * (VECTORS * LANES * WIDTH)
    vectors = tl.arange(0, VECTORS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    vectors = start + vectors * WIDTH
    columns = vectors + tl.arange(0, WIDTH)[None, None, :]
    inside = vectors < num_all_columns

    logits_row = logits_ptr + tl.multiple_of(row * row_stride, WIDTH)
    logits = tl.load(logits_row + columns, mask=inside).to(tl.float32)
    target = (tl.load(target_ptr + row) - first_column).to(tl.int32)
    log_normalizer = tl.load(log_normalizer_ptr + row)
    grad_logprob = tl.load(grad_logprob_ptr + row) * inverse_temperature

    log_probs = logits * inverse_temperature - log_normalizer
    probs = tl.exp2(log_probs * LOG2_E)
    grad = tl.where(columns == target, grad_logprob, 0.0) - probs * grad_logprob
    if WITH_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        grad_entropy = tl.load(grad_entropy_ptr + row) * inverse_temperature
        grad -= probs * (tl.maximum(log_probs, LOWEST) + entropy) * grad_entropy
    grad = tl.where(columns < num_columns, grad, 0.0)
    out_row = out_ptr + tl.multiple_of(row * out_stride, WIDTH)
    tl.store(out_row + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)


def vector_width(*blocks: torch.Tensor) -> int:
    """Columns in 16 bytes of the wider type, if every row of all blocks begins and ends with a whole vector; else 1."""
    width = 16 // max(block.element_size() for block in blocks)
    whole = all(
        block.data_ptr() % 16 == 0 and block.stride(0) % width == 0 and block.size(1) % width == 0 for block in blocks
    )
    return width if whole else 1


def tile_shape(num_columns: int, width: int) -> dict[str, int]:
    """VECTORS, LANES, WIDTH and num_warps of a kernel over rows of `num_columns` columns."""
    num_warps = 8 if num_columns > 4096 else 4
    return {"VECTORS": LANE_COLUMNS // width, "LANES": 32 * num_warps, "WIDTH": width, "num_warps": num_warps}


class TritonRowKernels:
    """RowKernels (see there) for float16, bfloat16 and float32 logits on a GPU, or on the CPU in Triton's interpreter.

    Beside the results it takes 12 bytes a row and split; rows are split where there are fewer than 4096. Raises
    ValueError for float64 logits and for rows that are not contiguous. Source of the sums: the online softmax of
    Milakov and Gimelshein (2018), with a shifted sum for the entropy.
    """

    def row_statistics(
        self,
        logits: torch.Tensor,
        target_ids: torch.Tensor,
        *,
        temperature: float,
        first_column: int,
        num_columns: int,
        with_entropy: bool,
    ) -> RowStatistics:
        """The sums of each row of `logits` [N, C], float32 [N] each."""
        _check(logits)
        num_rows = len(logits)
        results = logits.new_empty(4 if with_entropy else 3, num_rows, dtype=torch.float32)
        if num_columns == 0:
            results.zero_()[0] = -math.inf
        elif num_rows > 0:
            tile = tile_shape(num_columns, vector_width(logits))
            num_tiles = triton.cdiv(num_columns, LANE_COLUMNS * tile["LANES"])
            tiles_per_split = triton.cdiv(num_tiles, triton.cdiv(PROGRAMS, num_rows))
            num_splits = triton.cdiv(num_tiles, tiles_per_split)
            partials = logits.new_empty(3 if with_entropy else 2, num_rows, num_splits, dtype=torch.float32)
            scale = math.log2(math.e) / temperature
            with torch.cuda.device_of(logits):
                sum_columns_kernel[(num_rows * num_splits,)](
                    logits,
                    partials,
                    scale,
                    logits.stride(0),
                    num_columns,
                    num_rows,
                    num_splits,
                    tiles_per_split,
                    WITH_ENTROPY=with_entropy,
                    enable_fp_fusion=True,
                    **tile,
                )
                merge_splits_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
                    partials,
                    logits,
                    target_ids.contiguous(),
                    results,
                    scale,
                    1 / temperature,
                    logits.stride(0),
                    first_column,
                    num_columns,
                    num_rows,
                    num_splits,
                    WITH_ENTROPY=with_entropy,
                    ROWS=MERGED_ROWS,
                    num_warps=4,
                    enable_fp_fusion=True,
                )
        return RowStatistics(results[0], results[1], results[3] if with_entropy else None, results[2])

    def write_logit_gradient(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        target_ids: torch.Tensor,
        log_normalizer: torch.Tensor,
        grad_logprobs: torch.Tensor,
        *,
        entropy: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        temperature: float,
        first_column: int,
        num_columns: int,
    ) -> None:
        """Writes the gradient of the logits into `out` [N, C]; `out` may be `logits`."""
        _check(logits)
        _check(out)
        num_rows, num_all_columns = logits.shape
        if logits.numel() == 0:
            return
        tile = tile_shape(num_all_columns, vector_width(logits, out))
        num_tiles = triton.cdiv(num_all_columns, LANE_COLUMNS * tile["LANES"])
        rows = [
            x if x is None else x.float().contiguous() for x in (log_normalizer, grad_logprobs, entropy, grad_entropy)
        ]
        with torch.cuda.device_of(logits):
            write_gradient_kernel[(num_rows * num_tiles,)](
                logits,
                out,
                target_ids.contiguous(),
                *rows,
                1 / temperature,
                logits.stride(0),
                out.stride(0),
                first_column,
                num_columns,
                num_all_columns,
                num_tiles,
                WITH_ENTROPY=grad_entropy is not None,
                enable_fp_fusion=True,
                **tile,
            )


def _check(block: torch.Tensor) -> None:
    if not (block.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"logits are on {block.device}: impl='triton' is for CUDA, pass impl='auto'")
    if block.dtype == torch.float64:
        raise ValueError("float64 has no Triton kernel: pass impl='torch'")
    if block.size(1) > MAX_COLUMNS:
        raise ValueError(f"{block.size(1)} columns: the kernels count up to {MAX_COLUMNS}")
    if block.size(1) > 1 and block.stride(1) != 1:
        raise ValueError(f"strides {block.stride()}: the columns of a row must be contiguous")
