"""Word sums of a view on a GPU in one read of it; checksum.py defines them, and its torch form is the slow twin."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # words of a program
NUM_WARPS = 8


@triton.jit
def mix(values: tl.tensor) -> tl.tensor:
    """splitmix64's finaliser; shifts are those of unsigned numbers."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["row_words", "row_stride", "part_words", "num_words"])
def sum_words_kernel(
    words_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    part_words: tl.tensor,
    num_words: tl.tensor,
    num_blocks: tl.tensor,
    CHUNK_WORDS: tl.constexpr,
    IS_CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """sums[0 or 1, part, block]: those of one block of one part of the words."""
    FACTOR: tl.constexpr = -7046029254386353131
    program = tl.program_id(0)
    part = program // num_blocks
    positions = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)  # within the part
    places = part.to(tl.int64) * part_words + positions
    inside = (positions < part_words) & (places < num_words)
    if IS_CONTIGUOUS:
        offsets = places
    else:
        offsets = places // row_words * row_stride + places % row_words
    words = tl.load(words_ptr + offsets, mask=inside, other=0)
    numbers = positions.to(tl.int64) + 1
    odd = mix(numbers * FACTOR) | 1
    other = mix((numbers + CHUNK_WORDS) * FACTOR)
    tl.store(sums_ptr + program, tl.sum(words * odd, 0))
    tl.store(sums_ptr + tl.num_programs(0) + program, tl.sum((words >> 32) * other, 0))


class WordSumKernel:
    """The kernel for one view of int64 words [rows, row_words], whose rows may lie apart, in parts of `part_rows`."""

    def __init__(self, words: torch.Tensor, part_rows: int, chunk_words: int) -> None:
        self._words, self._chunk_words, self.address = words, chunk_words, words.data_ptr()
        rows, self._row_words = words.shape
        self._part_words = part_rows * self._row_words
        self.num_parts = triton.cdiv(rows, part_rows)
        self._num_blocks = triton.cdiv(min(self._part_words, words.numel()), BLOCK)
        self._sums = words.new_empty(2, self.num_parts, self._num_blocks)

    def run(self, out: torch.Tensor) -> None:
        """Puts both sums of every part into `out`, int64 [2, parts]."""
        words = self._words
        with torch.cuda.device_of(words):
            sum_words_kernel[(self.num_parts * self._num_blocks,)](
                words,
                self._sums,
                self._row_words,
                words.stride(0),
                self._part_words,
                words.numel(),
                self._num_blocks,
                CHUNK_WORDS=self._chunk_words,
                IS_CONTIGUOUS=words.is_contiguous(),
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
        torch.sum(self._sums, 2, out=out)
